// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What it means to be a codec: the vocabulary that every other folder speaks.
///
/// A codec is a small value type without state. `compress` rounds to nearest, `compress(values,
/// key)` rounds stochastically and unbiased, `decompress` gives back sizes and dtype as they came.
/// Values are taken in row-major order whatever their strides. A nearest `compress` refuses NaN and
/// Inf by a message naming the first one's index; a stochastic one carries them through (what they
/// share a scale with becomes NaN), so that a loss scaler sees them. Neither ever makes them
/// finite.
#include <ATen/core/Tensor.h>
#include <fourfold/core/random.hpp>  // Key

#include <concepts>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// What a codec made of one tensor. The codec's header says what stands in `buffers`.
template <class C>
struct PackedAs {
  std::vector<at::Tensor> buffers;  ///< codes first, then scales and what else the codec needs
  std::vector<std::int64_t> sizes;  ///< logical sizes
  at::ScalarType dtype = at::kFloat;

  [[nodiscard]] std::int64_t numel() const {
    std::int64_t n = 1;
    for (std::int64_t size : sizes) n *= size;
    return n;
  }
  [[nodiscard]] std::int64_t nbytes() const {
    std::int64_t n = 0;
    for (const at::Tensor& buffer : buffers) n += static_cast<std::int64_t>(buffer.nbytes());
    return n;
  }
};

template <class C>
concept Codec = std::default_initializable<C> &&
    requires(const C& codec, const at::Tensor& values, const typename C::Packed& packed) {
  { codec.compress(values) } -> std::same_as<typename C::Packed>;
  { codec.decompress(packed) } -> std::same_as<at::Tensor>;
  {
    codec.error_bound(values)
    } -> std::same_as<at::Tensor>;  // elementwise, of compress; zeros if lossless
  { packed.nbytes() } -> std::convertible_to<std::int64_t>;
  {
    C::name()
    } -> std::convertible_to<std::string>;  // "Int4": in reports, messages and saved files
};

/// Unbiased: the mean of decompress(compress(values, key)) over keys is `values`. The bound is one
/// step, twice that of nearest rounding.
template <class C>
concept StochasticCodec = Codec<C> && requires(const C& codec, const at::Tensor& values, Key key) {
  { codec.compress(values, key) } -> std::same_as<typename C::Packed>;
};

/// Can be read a piece at a time: values [begin, end) in row-major order, as fp32, on a CPU.
/// Kernels that read codes tile by tile ask for this, so nothing ever holds a dense copy.
template <class C>
concept TileCodec = Codec<C> &&
    requires(const C& codec, const typename C::Packed& packed, std::int64_t index, float* out) {
  codec.decode(packed, /*begin=*/index, /*end=*/index, out);
};

/// Whose codes of values [begin, end), `begin` a multiple of C::kGranule, are codes of a tensor of
/// their own, (end - begin) values in a row. They share memory.
template <class C>
concept SliceCodec = Codec<C> && requires(const typename C::Packed& packed, std::int64_t index) {
  { C::kGranule } -> std::convertible_to<std::int64_t>;
  { C::slice(packed, /*begin=*/index, /*end=*/index) } -> std::same_as<typename C::Packed>;
};

}  // namespace fourfold::inline v0

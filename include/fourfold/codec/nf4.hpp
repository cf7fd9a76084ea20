// SPDX-License-Identifier: Apache-2.0
#pragma once
/// NF4: 4 bits a value on the quantiles of a normal distribution, for weights (QLoRA, arXiv
/// 2305.14314, section 3).
///   auto packed = Nf4{}.compress(weight);             // 4.5 bits a value
///   auto less   = Nf4DoubleQuant{}.compress(weight);  // 4.127 bits: scales in 8 bits, 256 a group
///   auto better = Nf4Search{}.compress(weight);       // least squared error of 12 scales a block
///
/// Buffers: codes (ceil(n / 2), uint8, lower nibble first), scales (ceil(n / block), fp32); under
/// double_quant scale codes (ceil(n / block), uint8) and steps (one for 256 of them, fp32). Values:
/// fp32, bf16, fp16, fp64, taken as fp32. Not finite: a nearest compress throws, a stochastic one
/// makes what shares a scale NaN (under double_quant: 256 blocks). Blocks below 2^-126 are held as
/// zeros.
#include <ATen/core/Tensor.h>
#include <fourfold/codec/detail/nf4_tensors.hpp>
#include <fourfold/core/codec.hpp>

namespace fourfold::inline v0 {

template <Nf4Format F>
class NormalFloat {
  static_assert(
      F.block >= 32 && F.block <= nf4::kLargestBlock && (F.block & (F.block - 1)) == 0,
      "Nf4Format::block is the number of values that share a scale: a power of two from 32 to "
      "4096");

 public:
  using Packed = PackedAs<NormalFloat>;
  static constexpr Nf4Format kFormat = F;

  /// "Nf4", "Nf4DoubleQuant", "Nf4Search", "Nf4/32": the last for another block than 64.
  static std::string name() { return nf4::detail::format_name(F); }

  [[nodiscard]] Packed compress(const at::Tensor& values) const {
    return {nf4::detail::compress(F, values, std::nullopt), values.sizes().vec(),
            values.scalar_type()};
  }
  [[nodiscard]] Packed compress(const at::Tensor& values, Key key) const {
    return {nf4::detail::compress(F, values, key), values.sizes().vec(), values.scalar_type()};
  }
  [[nodiscard]] at::Tensor decompress(const Packed& packed) const {
    return nf4::detail::decompress(F, packed.buffers, packed.sizes, packed.dtype);
  }
  /// fp32, of compress(values): half the distance of the two levels around each value, times its
  /// block's scale; for what lies beyond the scale, the distance to it. Rounding included. Twice it
  /// bounds a stochastic code.
  [[nodiscard]] at::Tensor error_bound(const at::Tensor& values) const {
    return nf4::detail::error_bound(F, values);
  }
  /// Whether values that were not finite made what shares their scale NaN.
  [[nodiscard]] static bool holds_nan(const Packed& packed) {
    return detail::any_nan(packed.buffers.back());
  }
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out) const {
    detail::check_tile(packed.buffers.at(0), begin, end, packed.numel(), name());
    nf4::detail::decode(F, packed.buffers, packed.numel(), begin, end, out);
  }
};

using Nf4 = NormalFloat<Nf4Format{}>;
using Nf4DoubleQuant = NormalFloat<Nf4Format{.double_quant = true}>;
using Nf4Search = NormalFloat<Nf4Format{.search = true}>;

static_assert(StochasticCodec<Nf4> && TileCodec<Nf4>, "NormalFloat must stay a Codec");
static_assert(StochasticCodec<Nf4DoubleQuant> && TileCodec<Nf4DoubleQuant>);

}  // namespace fourfold::inline v0

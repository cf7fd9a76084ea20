// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Companded 8-bit codes: evenly spaced on a curve, so that values far below their group's largest
/// keep a small relative error. Made for optimizer moments: Softsign for the first, Sqrt (of values
/// that are not negative) for the second. FlashOptim, arXiv 2602.23349; ours has groups of 128 with
/// fp32 scales, since fp16 scales lose gradients below 3e-8.
///   auto packed = Companded<8, Sqrt>{}.compress(second_moment);        // 8.25 bits a value
///   auto again  = Companded<8, Sqrt>{}.compress(second_moment, key);   // unbiased
///
/// Buffers: codes (n, int8 or uint8), scales (ceil(n / 128), fp32). Values: fp32, bf16, fp16, fp64,
/// taken as fp32. Not finite: a nearest compress throws, a stochastic one makes the group of 128
/// NaN. Below zero: Sqrt throws. A group whose largest magnitude is below 2^-126 is held as zeros.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fourfold/codec/detail/by_kernel.hpp>
#include <fourfold/codec/detail/companded_loops.hpp>
#include <fourfold/codec/detail/random16.hpp>
#include <fourfold/codec/detail/tile_io.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/visit.hpp>

#include <optional>
#include <utility>

namespace fourfold::inline v0 {

template <int Bits, class Curve>
class Companded {
  static_assert(Bits == 8,
                "Companded stores 8 bits a value: use Companded<8, Softsign> or <8, Sqrt>");
  static_assert(
      std::is_same_v<Curve, Softsign> || std::is_same_v<Curve, Sqrt>,
      "Companded has two curves: Softsign for values of either sign, Sqrt for values >= 0");
  using Code = std::conditional_t<std::is_same_v<Curve, Sqrt>, std::uint8_t, std::int8_t>;
  static constexpr bool kNotNegative = std::is_same_v<Curve, Sqrt>;
  static constexpr FourfoldFormat kKernelFormat{
      .kind = kNotNegative ? 3 : 2, .bits = 8, .group = companded::kGroup, .symmetric = 0};

 public:
  using Packed = PackedAs<Companded>;

  static std::string name() { return kNotNegative ? "Companded8Sqrt" : "Companded8Softsign"; }
  [[nodiscard]] Packed compress(const at::Tensor& values) const { return pack(values, {}); }
  [[nodiscard]] Packed compress(const at::Tensor& values, Key key) const {
    return pack(values, key);
  }
  [[nodiscard]] at::Tensor decompress(const Packed& packed) const;
  /// fp32, of compress(values): half the distance of the two codes around each value, plus
  /// rounding.
  [[nodiscard]] at::Tensor error_bound(const at::Tensor& values) const;
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out) const;
  /// Whether values that were not finite made their groups NaN.
  [[nodiscard]] static bool holds_nan(const Packed& packed) {
    return detail::any_nan(packed.buffers.at(1));
  }

  // What an optimizer needs to hold a state in this code: StateCodec in optim/state_codec.hpp.
  static constexpr std::int64_t kTile = companded::kGroup;
  /// A state of zeros, on a CPU.
  [[nodiscard]] Packed zeros(at::IntArrayRef sizes) const;
  /// Rewrites values [begin, end); both are multiples of kTile, or end is numel. Never throws: what
  /// is not finite becomes a group of NaN. As compress(), but that a second moment above zero gets
  /// code 1 at least: up to one step too large, never a zero to divide by.
  void encode(Packed& packed, std::int64_t begin, std::int64_t end, const float* from,
              const std::optional<Key>& key, Isa isa = fourfold::isa()) const {
    encode_range<true>(packed, begin, end, from, key, isa);
  }
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out,
              Isa isa) const;

 private:
  template <bool State>
  void encode_range(Packed& packed, std::int64_t begin, std::int64_t end, const float* from,
                    const std::optional<Key>& key, Isa isa) const;
  [[nodiscard]] Packed pack(const at::Tensor& values, const std::optional<Key>& key) const;
  static const Code* codes(const Packed& packed) {
    return packed.buffers[0].template const_data_ptr<Code>();
  }
  static const float* scales(const Packed& packed) {
    return packed.buffers[1].template const_data_ptr<float>();
  }
};

template <int Bits, class Curve>
typename Companded<Bits, Curve>::Packed Companded<Bits, Curve>::zeros(at::IntArrayRef sizes) const {
  Packed packed;
  packed.sizes = sizes.vec();
  const std::int64_t n = packed.numel(), groups = (n + kTile - 1) / kTile;
  packed.buffers = {at::zeros({n}, c10::CppTypeToScalarType<Code>::value),
                    at::zeros({groups}, at::kFloat)};
  return packed;
}

template <int Bits, class Curve>
template <bool State>
void Companded<Bits, Curve>::encode_range(Packed& packed, std::int64_t begin, std::int64_t end,
                                          const float* from, const std::optional<Key>& key,
                                          Isa isa) const {
  Code* to = packed.buffers[0].template mutable_data_ptr<Code>();
  float* scale = packed.buffers[1].template mutable_data_ptr<float>();
  const PhiloxStream stream = philox_stream(key.value_or(Key{}));
  std::uint16_t random[kTile];
  float padded[kTile];
  Code tail[kTile];
  for (std::int64_t at = begin; at < end; at += kTile, from += kTile) {
    const std::int64_t n = std::min(kTile, end - at);
    if (key) detail::random16(stream, at / kTile, random, isa);
    const float* group = detail::load_group(from, std::int64_t{0}, n, kTile, padded);
    Code* out = n == kTile ? to + at : tail;
    scale[at / kTile] =
        companded::detail::encode_group<Curve, State>(group, out, key ? random : nullptr, isa);
    if (n < kTile) std::copy_n(tail, n, to + at);
  }
}

template <int Bits, class Curve>
void Companded<Bits, Curve>::decode(const Packed& packed, std::int64_t begin, std::int64_t end,
                                    float* out, Isa isa) const {
  const Code* code = codes(packed);
  const float* scale = scales(packed);
  const std::int64_t n = packed.numel();
  float whole[kTile];
  Code tail[kTile] = {};
  for (std::int64_t group = begin / kTile; group * kTile < end; ++group) {
    const std::int64_t first = group * kTile, from = std::max(begin, first);
    const std::int64_t to = std::min(end, first + kTile);
    const Code* source = code + first;
    if (first + kTile > n) source = (std::copy_n(source, n - first, tail), tail);
    const bool direct = to - from == kTile;
    float* target = direct ? out + (first - begin) : whole;
    companded::detail::decode_group<Curve>(source, scale[group], target, isa);
    if (!direct) std::copy(whole + (from - first), whole + (to - first), out + (from - begin));
  }
}

template <int Bits, class Curve>
void Companded<Bits, Curve>::decode(const Packed& packed, std::int64_t begin, std::int64_t end,
                                    float* out) const {
  detail::check_tile(packed.buffers.at(0), begin, end, packed.numel(), name());
  decode(packed, begin, end, out, fourfold::isa());
}

template <int Bits, class Curve>
typename Companded<Bits, Curve>::Packed Companded<Bits, Curve>::pack(
    const at::Tensor& values, const std::optional<Key>& key) const {
  const std::string codec = name();
  detail::check_dense(values, codec);
  const at::Tensor given = values.detach().resolve_neg().contiguous();
  Packed packed{{}, values.sizes().vec(), values.scalar_type()};
  const std::int64_t n = packed.numel(), groups = (n + kTile - 1) / kTile;
  constexpr at::ScalarType kCode = c10::CppTypeToScalarType<Code>::value;
  if (auto made =
          detail::compress_by_kernel(kKernelFormat, given, {n, kCode}, {groups, at::kFloat}, key)) {
    // A group that is NaN by its scale may hold what is refused, and that is named below.
    if ((key && !kNotNegative) || !detail::any_nan((*made)[1])) {
      packed.buffers = *std::move(made);
      return packed;
    }
  }
  return visit_float(values.scalar_type(), codec, [&]<class T>(std::type_identity<T>) {
    const at::Tensor dense = detail::by_way_of_cpu(given, codec, /*has_kernel=*/true);
    const T* from = dense.const_data_ptr<T>();
    packed.buffers = {at::empty({n}, kCode), at::empty({groups}, at::kFloat)};
    detail::FirstIndex misfit;
    parallel_for(0, groups, detail::groups_per_task(kTile), [&](std::int64_t a, std::int64_t b) {
      float buffer[kTile];
      const float* scale = scales(packed);
      for (std::int64_t group = a; group < b; ++group) {
        const std::int64_t begin = group * kTile, size = std::min(kTile, n - begin);
        const float* tile = detail::load_group(from, begin, size, kTile, buffer);
        encode_range<false>(packed, begin, begin + size, tile, key, fourfold::isa());
        if (!std::isnan(scale[group])) continue;
        // A stochastic code carries NaN and infinities, but no code the root of a negative value.
        const float* bad = std::find_if(tile, tile + size, [&](float value) {
          return std::isfinite(value) ? kNotNegative && value < 0 : !key;
        });
        if (bad != tile + size) misfit.report(begin + (bad - tile));
      }
    });
    if (misfit.found()) {
      const auto value = static_cast<double>(from[misfit.value()]);
      TORCH_CHECK(!kNotNegative || !(value < 0), codec, ": value ", misfit.value(), " of ", n,
                  " is ", value,
                  ", and this code holds second moments, which are not negative; use Companded<8, "
                  "Softsign> for values of either sign");
      detail::refuse_not_finite(dense, misfit.value(), codec);
    }
    for (at::Tensor& buffer : packed.buffers) buffer = buffer.to(values.device());
    return packed;
  });
}

template <int Bits, class Curve>
at::Tensor Companded<Bits, Curve>::decompress(const Packed& packed) const {
  if (auto out = detail::decompress_by_kernel(kKernelFormat, packed.buffers[0], packed.buffers[1],
                                              packed.sizes, packed.dtype))
    return *std::move(out);
  Packed here = packed;
  for (at::Tensor& buffer : here.buffers)
    buffer = detail::by_way_of_cpu(buffer, name(), /*has_kernel=*/true);
  const at::Tensor out = at::empty(packed.sizes, packed.dtype);
  visit_float(packed.dtype, name(), [&]<class T>(std::type_identity<T>) {
    detail::decode_to(
        out.mutable_data_ptr<T>(), out.numel(), kTile,
        [&](std::int64_t begin, std::int64_t end, float* to) { decode(here, begin, end, to); });
  });
  return out.to(packed.buffers[0].device());
}

template <int Bits, class Curve>
at::Tensor Companded<Bits, Curve>::error_bound(const at::Tensor& values) const {
  const Packed packed = compress(values.detach().cpu());
  const at::Tensor exact = values.detach().to(at::kCPU, at::kFloat).contiguous();
  const at::Tensor bound = at::empty(values.sizes(), at::kFloat);
  const float* value = exact.const_data_ptr<float>();
  float* out = bound.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < bound.numel(); ++i) {
    const double half = 0.5 * companded::gap(Curve{}, value[i], scales(packed)[i / kTile]);
    out[i] = detail::with_rounding(half, value[i], packed.dtype);
  }
  return bound.to(values.device());
}

static_assert(StochasticCodec<Companded<8, Softsign>> && TileCodec<Companded<8, Softsign>>);
static_assert(StochasticCodec<Companded<8, Sqrt>> && TileCodec<Companded<8, Sqrt>>);

}  // namespace fourfold::inline v0

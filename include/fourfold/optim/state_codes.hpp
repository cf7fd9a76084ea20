// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Codes for moments in 16 and in 4 bits a value.
///   BFloat16   16 bits: a moment of either kind.
///   Normal4    4 bits and a bf16 scale for 64 values, 4.25 in all: a first moment, on NF4's levels.
///   Log4       as many: a second moment, evenly spaced by the logarithm of its root, without zero,
///              since a step divides by it. The smallest level is 0.05 of the largest root.
/// Both 4-bit codes after Li et al., "Memory efficient optimizers with 4-bit states" (arXiv
/// 2309.01507, sections 3 and 4); blocks of 64 with these levels err a third as much as theirs.
///
/// Stochastic rounding is unbiased: between a value's two neighbours by a uniform number of 16 bits.
/// Values that are not finite make their block of 64 NaN; BFloat16 keeps each as it is.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <fourfold/codec/detail/nf4_loops.hpp>
#include <fourfold/codec/detail/random16.hpp>
#include <fourfold/codec/detail/tile_io.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/optim/detail/log_levels.hpp>
#include <fourfold/optim/detail/master_loops.hpp>

#include <algorithm>
#include <optional>
#include <string>

namespace fourfold::inline v0 {
namespace optim {
struct BFloat16 {
  using Packed = PackedAs<BFloat16>;
  static constexpr std::int64_t kTile = fourfold::detail::kRandomTile;
  static std::string name() { return "BFloat16"; }

  [[nodiscard]] Packed zeros(at::IntArrayRef sizes) const {
    return {{at::zeros(sizes, at::kBFloat16)}, sizes.vec()};
  }
  void encode(Packed& packed, std::int64_t begin, std::int64_t end, const float* from,
              const std::optional<Key>& key, Isa isa = fourfold::isa()) const {
    auto* to = packed.buffers[0].mutable_data_ptr<c10::BFloat16>();
    if (!key) return detail::run_vectorised<detail::Narrow>(isa, to + begin, from, end - begin);
    const PhiloxStream stream = philox_stream(*key);
    std::uint16_t random[kTile];
    for (std::int64_t at = begin; at < end; at += kTile, from += kTile) {
      fourfold::detail::random16(stream, at / kTile, random, isa);
      detail::run_vectorised<detail::RoundByRandom>(
          isa, to + at, from, static_cast<const std::uint16_t*>(random), std::min(kTile, end - at));
    }
  }
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out,
              Isa isa = fourfold::isa()) const {
    detail::run_vectorised<detail::Widen>(
        isa, out, packed.buffers[0].const_data_ptr<c10::BFloat16>() + begin, end - begin);
  }
};

/// Buffers: codes (32 bytes a block of 64, the lower nibble first), scales (bf16, one a block).
template <class Levels>
struct Levels4 {
  using Packed = PackedAs<Levels4>;
  static constexpr std::int64_t kBlock = 64;
  static constexpr std::int64_t kTile = fourfold::detail::kRandomTile;
  static std::string name() {
    return std::is_same_v<Levels, detail::LogLevels> ? "Log4" : "Normal4";
  }

  [[nodiscard]] Packed zeros(at::IntArrayRef sizes) const {
    Packed packed{{}, sizes.vec()};
    const std::int64_t blocks = (packed.numel() + kBlock - 1) / kBlock;
    packed.buffers = {at::zeros({blocks * kBlock / 2}, at::kByte),
                      at::zeros({blocks}, at::kBFloat16)};
    return packed;
  }
  void encode(Packed& packed, std::int64_t begin, std::int64_t end, const float* from,
              const std::optional<Key>& key, Isa isa = fourfold::isa()) const {
    auto* codes = packed.buffers[0].template mutable_data_ptr<std::uint8_t>();
    auto* scales = packed.buffers[1].template mutable_data_ptr<c10::BFloat16>();
    const PhiloxStream stream = philox_stream(key.value_or(Key{}));
    std::uint16_t random[kTile];
    float padded[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock, from += kBlock) {
      if (key && at % kTile == 0) fourfold::detail::random16(stream, at / kTile, random, isa);
      const float* block = fourfold::detail::load_group(from, std::int64_t{0},
                                                        std::min(kBlock, end - at), kBlock, padded);
      scales[at / kBlock].x = detail::scale_up(nf4::detail::largest_magnitude(block, kBlock, isa));
      nf4::detail::encode_block<Levels>(block, kBlock, detail::from_bfloat16(scales[at / kBlock].x),
                                        key ? random + at % kTile : nullptr, codes + at / 2, isa);
    }
  }
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out,
              Isa isa = fourfold::isa()) const {
    const auto* codes = packed.buffers[0].template const_data_ptr<std::uint8_t>();
    const auto* scales = packed.buffers[1].template const_data_ptr<c10::BFloat16>();
    float whole[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock, out += kBlock) {
      const std::int64_t n = std::min(kBlock, end - at);
      nf4::detail::decode_block<Levels>(codes + at / 2, kBlock,
                                        detail::from_bfloat16(scales[at / kBlock].x),
                                        n == kBlock ? out : whole, isa);
      if (n < kBlock) std::copy_n(whole, n, out);
    }
  }
};
using Normal4 = Levels4<nf4::NormalLevels>;
using Log4 = Levels4<detail::LogLevels>;

}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How one 16-bit weight, and what a master codec keeps of it (master_codec.hpp), stands for an fp32
/// value. Shared by the loops and the CUDA kernel; 16-bit floats are their bits.
#include <fourfold/core/host_device.hpp>

#include <bit>
#include <cmath>
#include <cstdint>

namespace fourfold::inline v0 {
namespace optim::detail {

/// NaN's bits have one form, since an error of NaN's lower bits could make it infinity.
FOURFOLD_ONE_VALUE std::uint32_t bits_of(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
}
FOURFOLD_ONE_VALUE float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}
FOURFOLD_ONE_VALUE std::uint16_t to_bfloat16(float x) {  // nearest, ties to even
  const std::uint32_t bits = bits_of(x);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

FOURFOLD_ONE_VALUE float with_error(std::uint16_t weight, std::int16_t error) {
  return std::bit_cast<float>((std::uint32_t{weight} << 16) +
                              static_cast<std::uint32_t>(std::int32_t{error}));
}
FOURFOLD_ONE_VALUE void split(float x, std::uint16_t& weight, std::int16_t& error) {
  const std::uint32_t bits = bits_of(x), upper = (bits + 0x8000u) >> 16;
  weight = static_cast<std::uint16_t>(upper);
  error = static_cast<std::int16_t>(bits - (upper << 16));
}
FOURFOLD_ONE_VALUE float with_error(std::uint16_t weight, std::int8_t error) {
  return std::bit_cast<float>(
      ((std::uint32_t{weight} << 8) + static_cast<std::uint32_t>(std::int32_t{error})) << 8);
}
FOURFOLD_ONE_VALUE void split(float x, std::uint16_t& weight, std::int8_t& error) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7Fu + ((bits >> 8) & 1u)) >> 8;
  const std::uint32_t upper = (rounded + 0x80u) >> 8;
  weight = static_cast<std::uint16_t>(upper);
  error = static_cast<std::int8_t>(rounded - (upper << 8));
}
/// What Kahan keeps of x beside the weight that it was rounded to. Infinities have no error.
FOURFOLD_ONE_VALUE float kahan_error(float x, float weight) {
  const float lost = x - weight;
  return std::fabs(lost) <= 3.0e38F ? lost : 0.0F;
}

/// bf16 by 16 random bits: it drops 16 bits, which is one addition.
FOURFOLD_ONE_VALUE std::uint16_t to_bfloat16(float x, std::uint32_t random) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t added = bits == 0x7FC00000u ? 0u : random;
  return static_cast<std::uint16_t>((bits + added) >> 16);
}
/// fp16 by 16 random bits: to the neighbour on x's side of the nearest with the probability of x's
/// share of the way. `widen` gives fp32 of fp16's bits.
template <class Widen>
FOURFOLD_ONE_VALUE std::uint16_t to_half(float x, std::uint16_t nearest, std::uint32_t random,
                                         const Widen& widen) {
  const float low = widen(nearest), lost = x - low;
  if (!(std::fabs(lost) > 0) || !(std::fabs(lost) <= 3.4028234e38F)) return nearest;
  const bool outwards = (lost > 0) == (low > 0);
  const auto other = static_cast<std::uint16_t>(low == 0   ? (lost > 0 ? 0x0001 : 0x8001)
                                                : outwards ? nearest + 1
                                                           : nearest - 1);
  const float gap = std::fabs(widen(other) - low);
  const float u = (static_cast<float>(random) + 0.5F) * (1.0F / 65536.0F);
  return gap <= 3.4028234e38F && u * gap < std::fabs(lost) ? other : nearest;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

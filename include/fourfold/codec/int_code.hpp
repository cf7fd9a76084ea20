// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The one scalar truth of integer group codes: what the plain loop, the vector loops and the CUDA
/// kernels all compute, bit for bit. Free of Torch.
///
/// A group is up to `group` consecutive values. One 32-bit word describes it:
///   asymmetric  low half: scale as bf16, high half: minimum as bf16   value = minimum + code *
///   scale symmetric   scale as fp32                               value = (code - 2^(bits-1)) *
///   scale
/// Codes are unsigned and packed little-end first: value i of a tensor stands in bits
/// [i * bits % 8, + bits) of byte i * bits / 8 (a group is a multiple of 8 values, so it starts on
/// a whole byte). Symmetric codes leave out 0, so that the range is the same on both sides.
///
/// The word is rounded before it is used, and outward: the minimum down, the scale up to the first
/// with which the largest code reaches the largest value. So every value lies within the codes, and
/// none is clipped, which would be a bias. (Where that scale would make the largest code overflow
/// fp32, within one step of FLT_MAX, it is the first that does not; values beyond saturate.)
///
/// Stochastic rounding is done in fixed point: q = round(65536 * (value - minimum) / scale), then
/// code = (q + r) >> 16 with r of 16 random bits. Of the 65536 values of r exactly q % 65536 carry
/// into the code, hence E[code] = q / 65536 without remainder: unbiased but for the rounding of q
/// (2^-17 of a step) and of the three fp32 operations that lead to it (3 * 2^-24 of value -
/// minimum). A value that is on a code stays there, and no code wraps, since q <= 65536 * largest
/// code.
#include <fourfold/core/host_device.hpp>

#include <bit>
#include <cfloat>
#include <cstdint>

/// Inlined into the vector loops, these are compiled for the loop's instructions.
#define FOURFOLD_INLINE [[gnu::always_inline]] inline

namespace fourfold::inline v0 {

/// `group` consecutive values share a word; `bits` is 8, 4 or 2.
struct IntFormat {
  int bits = 8, group = 128;
  bool symmetric = false;
  friend constexpr bool operator==(const IntFormat&, const IntFormat&) = default;
};

/// Codes from `zero_code - levels` (asymmetric: 0) to `zero_code + levels`.
FOURFOLD_HOST_DEVICE constexpr int levels(IntFormat f) {
  return f.symmetric ? (1 << (f.bits - 1)) - 1 : (1 << f.bits) - 1;
}
FOURFOLD_HOST_DEVICE constexpr int zero_code(IntFormat f) {
  return f.symmetric ? 1 << (f.bits - 1) : 0;
}

/// The word of a group that held a NaN or an infinity: all of it decodes to NaN.
inline constexpr std::uint32_t kNanWord = 0x7FC07FC0u;

FOURFOLD_HOST_DEVICE constexpr float bf16_to_float(std::uint32_t bits) {
  return std::bit_cast<float>(bits << 16);
}
/// The largest bf16 not above x, as its 16 bits; below the lowest finite one it saturates. x
/// finite.
FOURFOLD_HOST_DEVICE constexpr std::uint32_t bf16_down(float x) {
  std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (bits > 0x80000000u) bits += 0xFFFFu;  // negative: down is away from zero
  return bits >= 0xFF800000u ? 0xFF7Fu : bits >> 16;
}
/// The smallest bf16 not below x, as its 16 bits. x finite; above the largest finite bf16 it
/// saturates.
FOURFOLD_HOST_DEVICE constexpr std::uint32_t bf16_up(float x) {
  return x == 0 ? 0u : bf16_down(-x) ^ 0x8000u;
}
/// The nearest bf16, ties to even, as its 16 bits. NaN stays NaN, infinity infinity.
FOURFOLD_HOST_DEVICE constexpr std::uint32_t bf16_nearest(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  return x != x ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

/// x to the nearest integer, ties to even; |x| < 2^31.
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE std::int32_t round_to_int(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return static_cast<std::int32_t>(std::nearbyint(x));
#endif
}

/// The word of a group whose least and largest values are lo and hi (order of equal values and the
/// sign of zero do not matter). Pass a NaN for either if the group holds one.
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE std::uint32_t group_word(IntFormat f, float lo, float hi) {
  if (!(lo >= -FLT_MAX && hi <= FLT_MAX)) return kNanWord;
  const float top = static_cast<float>(levels(f));
  if (f.symmetric) {
    const float largest = -lo > hi ? -lo : hi;
    std::uint32_t scale = std::bit_cast<std::uint32_t>((largest + 0.0F) / top);
    if (top * std::bit_cast<float>(scale) < largest) ++scale;
    if (top * std::bit_cast<float>(scale) > FLT_MAX) --scale;
    return scale;
  }
  const std::uint32_t low = bf16_down(lo + 0.0F);  // + 0: -0 becomes 0
  const float minimum = bf16_to_float(low);
  if (hi < minimum) hi = minimum;  // only if the minimum saturated
  float step = (hi - minimum) / top;
  if (step > FLT_MAX) step = (hi * 0.25F - minimum * 0.25F) / top * 4.0F;
  std::uint32_t scale = bf16_up(step);
  if (fma(top, bf16_to_float(scale), minimum) < hi) ++scale;
  if (fma(top, bf16_to_float(scale), minimum) > FLT_MAX) --scale;
  return low << 16 | scale;
}

/// What decoding needs of a word.
struct GroupDecoder {
  float scale = 0, minimum = 0;
  std::int32_t zero = 0;
};
FOURFOLD_HOST_DEVICE constexpr GroupDecoder group_decoder(IntFormat f, std::uint32_t word) {
  if (f.symmetric) return {std::bit_cast<float>(word), 0.0F, zero_code(f)};
  return {bf16_to_float(word & 0xFFFFu), std::bit_cast<float>(word & 0xFFFF0000u), 0};
}
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE float decode(const GroupDecoder& group, std::uint32_t code) {
  return fma(static_cast<float>(static_cast<std::int32_t>(code) - group.zero), group.scale,
             group.minimum);
}

/// What encoding needs of a word. `spread` is a power of two that keeps value - minimum from
/// overflowing, and 1 / scale too; multiplying by it rounds nothing that matters.
struct GroupEncoder {
  float spread = 1, offset = 0, inverse = 0;  ///< steps = (value * spread + offset) * inverse
  float lowest = 0, highest = 0;              ///< clamp for steps
  std::int32_t zero = 0;                      ///< added to the rounded steps
};
/// With `stochastic`, steps and zero are in units of 2^-16 of a step.
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE constexpr GroupEncoder group_encoder(IntFormat f,
                                                                          std::uint32_t word,
                                                                          bool stochastic) {
  const GroupDecoder group = group_decoder(f, word);
  const float unit = stochastic ? 65536.0F : 1.0F;
  GroupEncoder e;
  if (group.scale > 0x1p100F) e.spread = 0.25F;
  if (group.scale < 0x1p-60F && group.scale > 0) e.spread = 0x1p64F;  // then |value| < 2^-28
  e.offset = -group.minimum * e.spread;
  e.inverse = group.scale > 0 ? 1.0F / (group.scale * e.spread) * unit : 0.0F;
  e.highest = static_cast<float>(levels(f)) * unit;
  e.lowest = f.symmetric ? -e.highest : 0.0F;
  e.zero = group.zero * static_cast<std::int32_t>(unit);
  return e;
}

/// The rounded steps of a finite value: a code, or with a stochastic encoder 65536 times one.
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE std::int32_t encode_steps(const GroupEncoder& e, float value) {
  float steps = fma(value, e.spread, e.offset) * e.inverse;
  steps = steps > e.lowest ? steps : e.lowest;
  steps = steps < e.highest ? steps : e.highest;
  return round_to_int(steps) + e.zero;
}
/// The nearest code (ties to the even number of steps).
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE std::uint32_t encode_nearest(const GroupEncoder& e,
                                                                  float value) {
  return static_cast<std::uint32_t>(encode_steps(e, value));
}
/// One of the two codes around value; `bits` are 16 random ones. The encoder must be a stochastic
/// one.
FOURFOLD_HOST_DEVICE FOURFOLD_INLINE std::uint32_t encode_stochastic(const GroupEncoder& e,
                                                                     float value,
                                                                     std::uint32_t bits) {
  return (static_cast<std::uint32_t>(encode_steps(e, value)) + bits) >> 16;
}

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The arithmetic of one companded value: 8 bits, spaced evenly on a curve, so that small values
/// keep small errors. Shared by the plain loop, the vector loops and the CUDA kernels.
///
/// Softsign: code k in -127..127 stands for s * k / (254 - |k|), which is y / (2 - |y|) at y = k /
/// 127 (FlashOptim, arXiv 2602.23349, "companding"). Sqrt: code k in 0..255 stands for (k * s)^2.
///
/// Rounding is decided between the two neighbouring decoded VALUES a and b: a value takes b when it
/// lies more than u of the way from a to b. u = 1/2 gives the nearest code (a tie goes towards
/// zero), a uniform u gives a mean that is the value. How far along a value lies is written in
/// companded coordinates, which needs no second division; each formula's derivation stands beside
/// it.
#include <fourfold/core/host_device.hpp>

#include <cmath>
#include <cstdint>

namespace fourfold::inline v0 {

struct Softsign {};  ///< of either sign: first moments
struct Sqrt {};      ///< not negative: second moments

namespace companded {

inline constexpr int kGroup = 128;  ///< values that share a scale

/// Groups whose largest magnitude lies below the smallest normal number are held as zeros.
inline constexpr float kSmallest = 1.17549435e-38F;

/// Softsign divides by scale + |value|; where that sum could overflow, both are halved first.
FOURFOLD_HOST_DEVICE inline float softsign_half(float scale) {
  return scale > 1.0e38F ? 0.5F : 1.0F;
}

/// With q = a / (s + a), y = 254 q is the companded value, k its floor. Decoded, y is y / (254 -
/// y): the way from k to k + 1 already gone is (y - k) (253 - k) / (254 - y).
FOURFOLD_HOST_DEVICE inline std::int8_t encode(Softsign, float value, float scale, float u) {
  const float half = softsign_half(scale), a = std::fabs(value);
  const float q = (a * half) / fma(a, half, scale * half);
  const float k = std::floor(254.0F * q);
  const float gone = fma(254.0F, q, -k), left = fma(-254.0F, q, 254.0F);
  const int code = static_cast<int>(k) + (gone * (253.0F - k) > u * left ? 1 : 0);
  return static_cast<std::int8_t>(value < 0 ? -code : code);
}

FOURFOLD_HOST_DEVICE inline float decode(Softsign, std::int8_t code, float scale) {
  const float k = static_cast<float>(code);
  return scale * (k / (254.0F - std::fabs(k)));
}

/// x = sqrt(v) / s is the companded value, k its floor. The way gone from k^2 to (k + 1)^2 is
/// (x^2 - k^2) / (2 k + 1), and x^2 - k^2 = (x - k) (x + k) without cancellation.
FOURFOLD_HOST_DEVICE inline std::uint8_t encode(Sqrt, float value, float inverse_scale, float u) {
  const float x = std::fmin(std::sqrt(value) * inverse_scale, 255.0F);
  const float k = std::floor(x);
  const int up = (x - k) * (x + k) > u * fma(2.0F, k, 1.0F) ? 1 : 0;
  return static_cast<std::uint8_t>(static_cast<int>(k) + up);
}

/// As an optimizer's state: what is above zero does not become zero. A step divides by the root, and
/// a first moment that is not zero where the second has become so would be divided by eps alone.
FOURFOLD_HOST_DEVICE inline std::uint8_t encode_state(Sqrt, float value, float inverse_scale,
                                                      float u) {
  const std::uint8_t code = encode(Sqrt{}, value, inverse_scale, u);
  return code == 0 && value > 0 ? std::uint8_t{1} : code;
}
FOURFOLD_HOST_DEVICE inline std::int8_t encode_state(Softsign, float value, float scale, float u) {
  return encode(Softsign{}, value, scale, u);
}

FOURFOLD_HOST_DEVICE inline float decode(Sqrt, std::uint8_t code, float scale) {
  const float root = static_cast<float>(code) * scale;
  return root * root;
}

/// A group's stored scale from its largest magnitude: s itself, or the root that one code stands
/// for.
FOURFOLD_HOST_DEVICE inline float scale_of(Softsign, float largest) {
  return largest < kSmallest ? 0.0F : largest;
}
FOURFOLD_HOST_DEVICE inline float scale_of(Sqrt, float largest) {
  return largest < kSmallest ? 0.0F : std::sqrt(largest) * (1.0F / 255.0F);
}

/// Distance of the two codes that enclose `value`: what a stochastic code may err; the nearest errs
/// by half of it.
FOURFOLD_HOST_DEVICE inline float gap(Softsign, float value, float scale) {
  if (scale == 0) return kSmallest;
  const float a = std::fabs(value) / scale;
  const float k = std::fmin(std::floor(254.0F * (a / (1 + a))), 126.0F);
  return scale * (254.0F / ((254.0F - k) * (253.0F - k)));
}
FOURFOLD_HOST_DEVICE inline float gap(Sqrt, float value, float scale) {
  if (scale == 0) return kSmallest;
  const float k = std::fmin(std::floor(std::sqrt(value) / scale), 254.0F);
  return (2 * k + 1) * scale * scale;
}

}  // namespace companded
}  // namespace fourfold::inline v0

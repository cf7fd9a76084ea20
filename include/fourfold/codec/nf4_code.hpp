// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The arithmetic of one NF4 value: 4 bits that name one of 16 quantiles of a normal distribution,
/// relative to the scale of its block (QLoRA, arXiv 2305.14314, section 3 and appendix E). Shared
/// by the plain loop, the vector loops and the CUDA kernels.
///
/// Codes are packed two a byte, the lower nibble first. Nearest: how many midpoints lie below
/// value / scale. Stochastic: of the two levels around it, the upper if the value lies more than a
/// uniform u of the way, so that the mean is the value; it needs |value| <= scale.
#include <fourfold/core/host_device.hpp>

#include <array>
#include <cmath>
#include <cstdint>

namespace fourfold::inline v0 {

/// Compile-time shape of a NormalFloat.
struct Nf4Format {
  int block = 64;             ///< consecutive values that share a scale; a power of two from 32 on
  bool double_quant = false;  ///< scales in 8 bits, one fp32 for 256 of them
  bool search = false;  ///< nearest rounding tries 12 scales a block, keeps the least squared error
  friend constexpr bool operator==(const Nf4Format&, const Nf4Format&) = default;
};

namespace nf4 {

inline constexpr std::array<float, 16> kLevels{-1.0F,
                                               -0.6961928009986877F,
                                               -0.5250730514526367F,
                                               -0.39491748809814453F,
                                               -0.28444138169288635F,
                                               -0.18477343022823334F,
                                               -0.09105003625154495F,
                                               0.0F,
                                               0.07958029955625534F,
                                               0.16093020141124725F,
                                               0.24611230194568634F,
                                               0.33791524171829224F,
                                               0.44070982933044434F,
                                               0.5626170039176941F,
                                               0.7229568362236023F,
                                               1.0F};

/// Thresholds of the nearest code; the 16th is never read by the search.
inline constexpr std::array<float, 16> kMidpoints = [] {
  std::array<float, 16> mid{};
  for (std::size_t i = 0; i < 15; ++i)
    mid[i] = static_cast<float>((double{kLevels[i]} + double{kLevels[i + 1]}) / 2);
  return mid;
}();

/// Thresholds of the lower neighbour, which is at most level 14.
inline constexpr std::array<float, 16> kInner = [] {
  std::array<float, 16> inner{};
  for (std::size_t i = 0; i < 14; ++i) inner[i] = kLevels[i + 1];
  inner[14] = 2.0F;  // above every value: |value| <= scale
  return inner;
}();

/// kGaps[i] = kLevels[i + 1] - kLevels[i].
inline constexpr std::array<float, 16> kGaps = [] {
  std::array<float, 16> gaps{};
  for (std::size_t i = 0; i < 15; ++i) gaps[i] = kLevels[i + 1] - kLevels[i];
  return gaps;
}();

/// The levels of a code of 4 bits as the loops of codec/detail/nf4_loops.hpp want them.
struct NormalLevels {
  static constexpr const std::array<float, 16>& kLevels = nf4::kLevels;
  static constexpr const std::array<float, 16>& kMidpoints = nf4::kMidpoints;
  static constexpr const std::array<float, 16>& kInner = nf4::kInner;
  static constexpr const std::array<float, 16>& kGaps = nf4::kGaps;
};

/// Blocks whose largest magnitude lies below the smallest normal number are held as zeros.
inline constexpr float kSmallest = 1.17549435e-38F;
inline constexpr int kZeroCode = 7;
inline constexpr int kLargestBlock = 4096;
inline constexpr int kScalesPerGroup =
    256;                                ///< block scales that share one fp32 under double_quant
inline constexpr int kCandidates = 12;  ///< of the scale search
/// Candidate i of the search, as a share of the block's largest magnitude.
FOURFOLD_HOST_DEVICE constexpr float candidate(int i) {
  return 1.0F - 0.025F * static_cast<float>(i);
}

/// How many of the 15 sorted thresholds lie below x, by bisection.
FOURFOLD_HOST_DEVICE constexpr int count_below(const std::array<float, 16>& thresholds, float x) {
  int count = 0;
  for (int step = 8; step > 0; step /= 2)
    count += x > thresholds[static_cast<std::size_t>(count + step - 1)] ? step : 0;
  return count;
}

template <class L = NormalLevels>
FOURFOLD_HOST_DEVICE constexpr int encode(float value, float scale) {
  return count_below(L::kMidpoints, value / scale);
}
template <class L = NormalLevels>
FOURFOLD_HOST_DEVICE constexpr int encode(float value, float scale, float u) {
  const float x = value / scale;
  const int low = count_below(L::kInner, x);
  const auto i = static_cast<std::size_t>(low);
  return low + (x - L::kLevels[i] > u * L::kGaps[i] ? 1 : 0);
}
template <class L = NormalLevels>
FOURFOLD_HOST_DEVICE constexpr float decode(int code, float scale) {
  return L::kLevels[static_cast<std::size_t>(code)] * scale;
}

/// Scales under double_quant: (code * step)^2, the square giving small scales a finer grid. The
/// step of a group reaches its largest scale. For stochastic values codes round up, so that no
/// value exceeds its scale (clipping would be a bias); for nearest ones they go to the nearest.
FOURFOLD_HOST_DEVICE inline float decode_scale(int code, float step) {
  const float root = static_cast<float>(code) * step;
  return root * root;
}
FOURFOLD_HOST_DEVICE inline float scale_step(float largest) {
  float step = std::sqrt(largest) * (1.0F / 255.0F);
  while (decode_scale(255, step) < largest) step *= 1.0F + 0x1p-23F;
  while (decode_scale(255, step) > 3.4028234e38F) step *= 1.0F - 0x1p-23F;  // FLT_MAX: saturates
  return step;
}
FOURFOLD_HOST_DEVICE inline int encode_scale(float scale, float step, bool up) {
  if (!(scale > 0)) return 0;
  int code = static_cast<int>(std::fmin(std::sqrt(scale) / step, 254.0F));
  while (code < 255 && decode_scale(code, step) < scale) ++code;
  const bool lower =
      !up && code > 1 && scale - decode_scale(code - 1, step) < decode_scale(code, step) - scale;
  return lower ? code - 1 : code;
}

}  // namespace nf4
}  // namespace fourfold::inline v0

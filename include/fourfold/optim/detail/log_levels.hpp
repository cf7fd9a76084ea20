// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Log4's levels and the 4-bit codes' bf16 scales (optim/state_codes.hpp), for loops and the CUDA
/// kernel alike.
#include <fourfold/core/host_device.hpp>

#include <array>
#include <bit>
#include <cstdint>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Levels, or the midpoints of their roots: level k is the square of 0.05^((15 - k) / 15).
constexpr std::array<float, 16> log_levels(bool midpoints) {
  constexpr double kRatio = 0.8189637274779153;  // 0.05^(1 / 15)
  std::array<float, 16> all{};
  double root = 1;
  for (std::size_t k = 16; k-- > 0; root *= kRatio) {
    const double middle = root * (1 + kRatio) / 2;  // between this one and the one below
    if (!midpoints) all[k] = static_cast<float>(root * root);
    if (midpoints && k > 0) all[k - 1] = static_cast<float>(middle * middle);
  }
  return all;
}
struct LogLevels {
  static constexpr std::array<float, 16> kLevels = log_levels(false);
  static constexpr std::array<float, 16> kMidpoints = log_levels(true);
  static constexpr std::array<float, 16> kInner = [] {
    std::array<float, 16> inner{};
    for (std::size_t i = 0; i < 14; ++i) inner[i] = kLevels[i + 1];
    inner[14] = 2.0F;  // above every value
    return inner;
  }();
  static constexpr std::array<float, 16> kGaps = [] {
    std::array<float, 16> gaps{};
    for (std::size_t i = 0; i < 15; ++i) gaps[i] = kLevels[i + 1] - kLevels[i];
    return gaps;
  }();
};

/// bf16 at or above a scale that is finite and not negative, so that no value lies beyond its scale
/// (up to the largest bf16).
FOURFOLD_HOST_DEVICE inline std::uint16_t scale_up(float scale) {
  const auto bits = std::bit_cast<std::uint32_t>(scale);
  if (bits > 0x7F800000u) return 0x7FC0u;
  const std::uint32_t up = (bits + 0xFFFFu) >> 16;
  return static_cast<std::uint16_t>(up < 0x7F7Fu ? up : 0x7F7Fu);
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Integer group codes by their definition (codec/int_code.hpp), in double and by search, apart
/// from the library's arithmetic and slow on purpose.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <span>

namespace fourfold::reference {

/// A number of 8 significant bits and bf16's range: the nearest one not above x, or not below.
inline double bf16_towards(double x, bool up) {
  if (x == 0) return 0;
  int exponent;
  std::frexp(x, &exponent);                                           // |x| in [2^(e-1), 2^e)
  const double unit = std::ldexp(1.0, std::max(exponent - 8, -133));  // -133: the least of all
  return (up ? std::ceil(x / unit) : std::floor(x / unit)) * unit;
}

struct Group {
  double scale = 0, minimum = 0;
};

/// The minimum rounded down; the least scale of 8 bits with which `levels` steps, in fp32, reach
/// the largest value. For values well inside fp32's range.
inline Group asymmetric_group(std::span<const float> values, int levels) {
  const double lo = *std::min_element(values.begin(), values.end());
  const double hi = *std::max_element(values.begin(), values.end());
  Group group{.minimum = bf16_towards(lo, false)};
  if (hi == group.minimum) return group;
  double scale = bf16_towards((hi - group.minimum) / levels / 1.02, true);  // surely too small
  while (static_cast<float>(group.minimum + levels * scale) < static_cast<float>(hi))
    scale = bf16_towards(scale * (1 + 0x1p-20), true);
  group.scale = scale;
  return group;
}

/// The least fp32 scale with which `levels` steps, in fp32, reach the largest magnitude.
inline Group symmetric_group(std::span<const float> values, int levels) {
  float largest = 0;
  for (float value : values) largest = std::max(largest, std::abs(value));
  float scale = static_cast<float>(largest / levels * (1 - 0x1p-22));
  while (scale * static_cast<float>(levels) < largest) scale = std::nextafter(scale, FLT_MAX);
  return {.scale = scale};
}

}  // namespace fourfold::reference

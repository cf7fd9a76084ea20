// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a user says of a memory budget: `Pipeline pipeline(*model, {.budget = 512_MiB});`
#include <cstdint>

namespace fourfold::inline v0 {

inline namespace literals {

/// Bytes. Signed, as all counts of bytes here, so that a negative one is seen as what it is.
constexpr std::int64_t operator""_KiB(unsigned long long n) {
  return static_cast<std::int64_t>(n) << 10;
}
constexpr std::int64_t operator""_MiB(unsigned long long n) {
  return static_cast<std::int64_t>(n) << 20;
}
constexpr std::int64_t operator""_GiB(unsigned long long n) {
  return static_cast<std::int64_t>(n) << 30;
}

}  // namespace literals

struct PlanOptions {
  /// The most bytes that may live at once in forward and backward: all CPU tensors of the process,
  /// weights, gradients and states among them, as fourfold::Meter counts them.
  std::int64_t budget = 0;
  /// The variance that rounding may add to gradients, as a share of their own (plan/record.hpp).
  double most_variance = 0.1;
  /// Others use the device too. After each step, what they hold then and the step's own peak are
  /// added up: above `high_water` of the device the plan moves to the next that needs less, below
  /// `low_water` back, one a step. high_water = 0: nobody else is watched.
  double high_water = 0.8, low_water = 0.7;
  /// The device's; 0: the machine's memory, or the limit of the process's control group.
  std::int64_t device_bytes = 0;
  /// What all its users hold just now, this process among them; null: what is not available of the
  /// machine's memory or the control group's; where `device_bytes` is given, this process's tensors.
  std::int64_t (*device_used)() = nullptr;
};

}  // namespace fourfold::inline v0

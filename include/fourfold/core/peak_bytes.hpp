// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Bytes now, at most, and altogether. A value: whoever measures fills it in.
#include <cstdint>

namespace fourfold::inline v0 {

struct PeakBytes {
  std::int64_t current = 0;  ///< bytes that live now
  std::int64_t peak = 0;     ///< most that ever lived at once since the peak was last restarted
  std::int64_t total = 0;    ///< sum of all allocations
  [[nodiscard]] double peak_mib() const { return static_cast<double>(peak) / (1 << 20); }
};

}  // namespace fourfold::inline v0

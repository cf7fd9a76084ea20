// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Where a training program's memory lives. Whoever allocates for a place says so with a
/// PlaceGuard; the counting allocator reads it, so that the ledger can tell whose bytes stood at
/// the peak.
#include <array>
#include <cstdint>
#include <string_view>

namespace fourfold {  // not versioned: one variable for all parts of a program

enum class Place : std::uint8_t { kOther, kWeights, kGradients, kOptimizer, kActivations };
inline constexpr std::size_t kPlaces = 5;

constexpr std::string_view name(Place place) {
  constexpr std::array<std::string_view, kPlaces> names{"other", "weights", "gradients",
                                                        "optimizer", "activations"};
  return names[static_cast<std::size_t>(place)];
}

/// The place for which this thread allocates now.
[[gnu::visibility("default")]] inline Place& current_place() {
  static thread_local Place place = Place::kOther;
  return place;
}

class PlaceGuard {
 public:
  explicit PlaceGuard(Place place) : before_(current_place()) { current_place() = place; }
  ~PlaceGuard() { current_place() = before_; }
  PlaceGuard(const PlaceGuard&) = delete;
  PlaceGuard& operator=(const PlaceGuard&) = delete;

 private:
  Place before_;
};

}  // namespace fourfold

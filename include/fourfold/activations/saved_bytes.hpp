// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a forward saved: in bytes, and by what became of each tensor.
#include <fourfold/core/peak_bytes.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fourfold::inline v0 {

/// Number of tensors that autograd handed over, by what became of them.
struct SavedCounts {
  std::int64_t packed = 0;      ///< held by the codec (a tensor that shares a payload counts too)
  std::int64_t masks = 0;       ///< held exactly in fewer bits: masks, offsets, narrow integers
  std::int64_t recomputed = 0;  ///< not held: computed again in backward
  std::int64_t kept = 0;        ///< held as they are
  std::int64_t parameters = 0;  ///< held by the model anyway
  std::int64_t materialised =
      0;                       ///< were to be recomputed, but an input was about to be written to
  std::int64_t payloads = 0;   ///< distinct payloads made
  std::int64_t offloaded = 0;  ///< held as they are, and not in memory

  [[nodiscard]] std::int64_t tensors() const {
    return packed + masks + recomputed + kept + parameters + offloaded;
  }
};

namespace detail {

/// Bytes now and at most, changed by any thread.
class ByteCounter {
 public:
  void add(std::int64_t bytes) {
    const std::int64_t now = current_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    if (bytes > 0) total_.fetch_add(bytes, std::memory_order_relaxed);
    std::int64_t peak = peak_.load(std::memory_order_relaxed);
    while (now > peak && !peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
    }
  }
  void restart_peak() { peak_.store(current_.load()), total_.store(0); }
  [[nodiscard]] PeakBytes bytes() const {
    return {.current = current_.load(), .peak = peak_.load(), .total = total_.load()};
  }

 private:
  std::atomic<std::int64_t> current_{0}, peak_{0}, total_{0};
};

/// Shared by a store and all that it holds: graphs outlive stores.
struct SavedTotals {
  ByteCounter plain;  ///< what LibTorch would hold: distinct storages, without parameters
  ByteCounter held;   ///< payloads and storages that are held
  std::atomic<std::int64_t> packed{0}, masks{0}, recomputed{0}, kept{0}, parameters{0},
      materialised{0}, payloads{0}, offloaded{0};

  [[nodiscard]] SavedCounts counts() const {
    return {packed.load(),     masks.load(),        recomputed.load(), kept.load(),
            parameters.load(), materialised.load(), payloads.load(),   offloaded.load()};
  }
};

}  // namespace detail
}  // namespace fourfold::inline v0

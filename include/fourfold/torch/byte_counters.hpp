// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The bytes that live now, and the most that ever lived at once, by place. Counted as blocks come
/// and go; at the instant of the overall peak the places are written down, so that they add up to
/// it.
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <fourfold/core/peak_bytes.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/pointer_map.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::door {

/// One number for each Place.
using Places = std::array<std::int64_t, kPlaces>;

/// A reading: consistent, taken at one instant.
struct ByteCount {
  PeakBytes all;      ///< over all places; `peak` since it was last restarted
  Places now{};       ///< adds up to all.current
  Places at_peak{};   ///< adds up to all.peak
  Places own_peak{};  ///< each place's own maximum: at least at_peak, at another instant perhaps
  Places total{};     ///< adds up to all.total
  std::int64_t blocks = 0;  ///< allocations so far, those of zero bytes left out
};

/// Told of every change of the counts, one after the other, under the counters' lock: what it was
/// told adds up to any reading. `block` names a block while it lives: its data, or an adopted
/// storage. It must neither allocate tensors nor ask the counters. For a recorder
/// (report/timeline.hpp).
class [[gnu::visibility("default")]] BytesObserver {
 public:
  virtual ~BytesObserver() = default;
  virtual void added(const void* block, std::int64_t bytes, Place place) noexcept = 0;
  virtual void removed(const void* block, std::int64_t bytes, Place place) noexcept = 0;
  virtual void moved(const void* block, std::int64_t bytes, Place from, Place to) noexcept = 0;
};

/// Thread-safe, by one lock: uncontended it costs less than the malloc beside it, and a reading is
/// of one instant. Storages that are not the allocator's own are adopted and followed by weak
/// references: a dead one is dropped before anything is read and before a new peak is believed, so
/// no peak counts bytes that were gone.
template <class = void>
class BasicByteCounters {
 public:
  void add(const void* block, std::int64_t bytes, Place place) {
    std::vector<Adopted> dead;  // let go after the lock
    const std::lock_guard lock(mutex_);
    add_locked(block, bytes, place, dead);
  }

  void subtract(const void* block, std::int64_t bytes, Place place) {
    const std::lock_guard lock(mutex_);
    subtract_locked(block, bytes, place);
  }

  /// Moves a block from `from` (the block's own record, changed under the lock) to another place.
  void move(const void* block, std::int64_t bytes, Place& from, Place to) {
    const std::lock_guard lock(mutex_);
    move_locked(block, bytes, from, to);
  }

  /// Follows a living storage that the counters do not know, as if it had been allocated now for
  /// `place`; one that is followed already is moved to `place`. Counted is its size now: a later
  /// resize is not seen.
  void adopt(c10::weak_intrusive_ptr<c10::StorageImpl> storage, Place place) {
    const c10::StorageImpl* const key = storage._unsafe_get_target();
    const auto bytes = static_cast<std::int64_t>(key->nbytes());
    std::vector<Adopted> dead;
    const std::lock_guard lock(mutex_);
    if (Adopted* known = adopted_.find(key))
      return move_locked(key, known->bytes, known->place, place);
    adopted_.put(key, {std::move(storage), bytes, place});
    add_locked(key, bytes, place, dead);
  }

  /// Whether `storage` is adopted; if so it belongs to `place` from now on.
  bool move_adopted(const c10::StorageImpl* storage, Place place) {
    const std::lock_guard lock(mutex_);
    Adopted* const known = adopted_.find(storage);
    if (known == nullptr) return false;
    move_locked(storage, known->bytes, known->place, place);
    return true;
  }

  [[nodiscard]] ByteCount read() {
    std::vector<Adopted> dead;
    const std::lock_guard lock(mutex_);
    drop_dead(dead);
    return count_;
  }

  /// Tells `observer` from here on; one at a time. `start` is the reading to which what it is told
  /// adds. False, and nothing done, where another one is told already.
  [[nodiscard]] bool observe(BytesObserver& observer, ByteCount& start) {
    std::vector<Adopted> dead;
    const std::lock_guard lock(mutex_);
    if (observer_ != nullptr) return false;
    drop_dead(dead);
    start = count_;
    observer_ = &observer;
    observed_peak_ = count_.all.current;
    return true;
  }
  /// No call to the observer is under way once this has returned. Tells it of the dead first.
  void end_observation() {
    std::vector<Adopted> dead;
    const std::lock_guard lock(mutex_);
    drop_dead(dead);
    observer_ = nullptr;
  }

  /// The peaks start again from what lives now; the totals go on.
  void restart_peak() {
    std::vector<Adopted> dead;
    const std::lock_guard lock(mutex_);
    drop_dead(dead);
    count_.all.peak = count_.all.current;
    count_.at_peak = count_.own_peak = count_.now;
  }

 private:
  struct Adopted {
    c10::weak_intrusive_ptr<c10::StorageImpl>
        storage;  // keeps the address from being used again, not the bytes from being freed
    std::int64_t bytes;
    Place place;
  };

  static std::size_t index(Place place) { return static_cast<std::size_t>(place); }

  void add_locked(const void* block, std::int64_t bytes, Place place, std::vector<Adopted>& dead) {
    const std::size_t at = index(place);
    ++count_.blocks;
    count_.all.total += bytes, count_.total[at] += bytes;
    count_.all.current += bytes, count_.now[at] += bytes;
    if (!adopted_.empty() &&
        (count_.all.current > count_.all.peak || count_.now[at] > count_.own_peak[at] ||
         (observer_ != nullptr && count_.all.current > observed_peak_)))
      drop_dead(dead);
    if (observer_ != nullptr) [[unlikely]] {  // after the dead are gone: it believes no peak either
      observer_->added(block, bytes, place);
      observed_peak_ = std::max(observed_peak_, count_.all.current);
    }
    count_.own_peak[at] = std::max(count_.own_peak[at], count_.now[at]);
    if (count_.all.current > count_.all.peak) {
      count_.all.peak = count_.all.current;
      count_.at_peak = count_.now;
    }
  }

  void subtract_locked(const void* block, std::int64_t bytes, Place place) {
    count_.all.current -= bytes;
    count_.now[index(place)] -= bytes;
    if (observer_ != nullptr) [[unlikely]]
      observer_->removed(block, bytes, place);
  }

  void move_locked(const void* block, std::int64_t bytes, Place& from, Place to) {
    if (observer_ != nullptr) [[unlikely]]
      observer_->moved(block, bytes, from, to);
    const bool at_peak = count_.all.current == count_.all.peak;
    count_.now[index(from)] -= bytes;
    count_.now[index(to)] += bytes;
    from = to;
    count_.own_peak[index(to)] = std::max(count_.own_peak[index(to)], count_.now[index(to)]);
    if (at_peak) count_.at_peak = count_.now;  // the instant has not passed
  }

  void drop_dead(std::vector<Adopted>& dead) {
    adopted_.erase_if([&](Adopted& one) {
      if (!one.storage.expired()) return false;
      subtract_locked(one.storage._unsafe_get_target(), one.bytes, one.place);
      dead.push_back(std::move(one));
      return true;
    });
  }

  std::mutex mutex_;
  ByteCount count_;
  BytesObserver* observer_ = nullptr;  // read under the lock, which is held anyway
  std::int64_t observed_peak_ = 0;     // the most that lived since it is told
  PointerMap<Adopted> adopted_;
};
using ByteCounters = BasicByteCounters<>;

}  // namespace fourfold::door

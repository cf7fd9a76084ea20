// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Where the counting allocator's large blocks come from: page ranges mapped from the system, and
/// free ones kept for the next block, so many and no more, so that resident memory follows the
/// count.
///
/// glibc keeps freed blocks below 32 MiB for itself: 442 MB of live tensors stood in a process of
/// 1400 MB. Mapping each block afresh costs a page fault every 4 KiB: a tenth of a training step.
/// In between: free ranges are kept, best fit first, split and merged with their neighbours, while
///   used + kept <= most ever used + 8 MiB: at the peak, the only instant that the resident peak
///     remembers, next to nothing is kept beside it; and
///   kept <= an allowance, 64 MiB at first. It grows by what was given back and is asked for
///     again (a training loop earns its working set in its second step), and shrinks by what nobody
///     touched while twice the most ever used went by.
/// Transparent huge pages are asked for where the system has them on madvise: one fault for 2 MiB.
/// bench/allocator_bench.cpp shows peak and time of these choices and of others.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fourfold::door {

/// What an arena may keep; all in bytes.
struct ArenaLimits {
  std::size_t allowance = std::size_t{64} << 20;  ///< kept at most, until more is earned
  std::size_t slack = std::size_t{8} << 20;       ///< kept at most beside the most ever used
  bool earns = true;                              ///< whether the allowance moves
  bool huge_pages = true;
};

/// Thread-safe. All sizes are bytes, and multiples of page() where they name ranges.
template <class = void>
class BasicBlockArena {
 public:
  explicit BasicBlockArena(ArenaLimits limits = {})
      : limits_(limits), allowance_(limits.allowance) {
    ranges_.reserve(1024);
  }

  static std::size_t page() {
    static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }
  static std::size_t round_up(std::size_t size) { return (size + page() - 1) & ~(page() - 1); }

  /// A range of `size` bytes, a multiple of page(); null where the system has no more (errno says
  /// why). Its bytes are whatever they were: nobody promises zeros.
  [[nodiscard]] void* take(std::size_t size) {
    const std::lock_guard lock(mutex_);
    retire(size);
    if (void* start = best_fit(size)) {
      use(size);
      untouched_ = std::min(untouched_, kept_);
      return start;
    }
    untouched_ = 0;  // all that is kept was not enough
    trim(size);
    void* start = map(size);
    if (!start) {  // what is kept may be what is missing
      give_back(kept_);
      start = map(size);
    }
    if (!start) return nullptr;
    use(size);
    if (limits_.earns) {
      const std::size_t regretted = std::min(size, given_back_);
      given_back_ -= regretted, allowance_ += regretted;
    }
    return start;
  }

  void give(void* start, std::size_t size) {
    const std::lock_guard lock(mutex_);
    used_ -= size;
    if (size > allowance_) {  // would drive out all the rest, and itself
      given_back_ += size;
      return unmap(static_cast<char*>(start), size);
    }
    insert(static_cast<char*>(start), size);
    trim();
  }

  /// Gives everything that is kept back to the system, and forgets what was earned.
  void release() {
    const std::lock_guard lock(mutex_);
    give_back(kept_);
    allowance_ = limits_.allowance, given_back_ = 0;
  }

  /// From now on; what was earned is forgotten.
  void limit(ArenaLimits limits) {
    const std::lock_guard lock(mutex_);
    limits_ = limits, allowance_ = limits.allowance, given_back_ = 0;
    trim();
  }

  [[nodiscard]] std::size_t kept() const { return locked(kept_); }
  [[nodiscard]] std::size_t used() const { return locked(used_); }
  [[nodiscard]] std::size_t most_used() const { return locked(most_used_); }
  [[nodiscard]] std::size_t allowance() const { return locked(allowance_); }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  struct Range {
    char* start;
    std::size_t size;
    std::uint64_t given;  // when: larger is later
  };

  std::size_t locked(const std::size_t& value) const {
    const std::lock_guard lock(mutex_);
    return value;
  }

  void* best_fit(std::size_t size) {
    auto best = ranges_.end();
    for (auto range = ranges_.begin(); range != ranges_.end(); ++range)
      if (range->size >= size && (best == ranges_.end() || range->size < best->size)) best = range;
    if (best == ranges_.end()) return nullptr;
    char* const start = best->start;
    kept_ -= size;
    best->start += size, best->size -= size;
    if (best->size == 0) ranges_.erase(best);
    return start;
  }

  void insert(char* start, std::size_t size) {
    kept_ += size;
    ++clock_;
    const auto next =
        std::lower_bound(ranges_.begin(), ranges_.end(), start,
                         [](const Range& range, const char* at) { return range.start < at; });
    const bool joins_next = next != ranges_.end() && start + size == next->start;
    if (next != ranges_.begin() && std::prev(next)->start + std::prev(next)->size == start) {
      const auto before = std::prev(next);
      before->size += size, before->given = clock_;
      if (!joins_next) return;
      before->size += next->size;
      ranges_.erase(next);
    } else if (joins_next) {
      *next = Range{start, size + next->size, clock_};
    } else {
      ranges_.insert(next, Range{start, size, clock_});
    }
  }

  void use(std::size_t size) {
    used_ += size;
    most_used_ = std::max(most_used_, used_);
  }

  /// Keeps both rules, as they will stand once `coming` more bytes are used.
  void trim(std::size_t coming = 0) {
    const std::size_t used = used_ + coming;
    const std::size_t room = std::max(most_used_, used) + limits_.slack - used;
    if (kept_ > room) give_back(kept_ - room);
    if (kept_ > allowance_) given_back_ += give_back(kept_ - allowance_);
  }

  /// What nobody touched for so long is nobody's working set.
  void retire(std::size_t taken) {
    if (!limits_.earns || (passed_ += taken) < 2 * most_used_) return;
    const std::size_t idle =
        std::min(untouched_, allowance_ - std::min(allowance_, limits_.allowance));
    allowance_ -= idle;
    if (kept_ > allowance_) give_back(kept_ - allowance_);
    passed_ = 0, untouched_ = kept_;
  }

  /// At least `size` bytes of what is kept: oldest ranges first, of each the end before the start.
  /// Returns how many.
  std::size_t give_back(std::size_t size) {
    std::size_t gone = 0;
    while (gone < size && !ranges_.empty()) {
      const auto oldest =
          std::min_element(ranges_.begin(), ranges_.end(),
                           [](const Range& a, const Range& b) { return a.given < b.given; });
      // Huge pages whole: splitting one costs more than it frees.
      const std::size_t wanted = (size - gone + kHugePage - 1) / kHugePage * kHugePage;
      const std::size_t part = std::min(oldest->size, wanted);
      oldest->size -= part, kept_ -= part, gone += part;
      unmap(oldest->start + oldest->size, part);
      if (oldest->size == 0) ranges_.erase(oldest);
    }
    return gone;
  }

  [[nodiscard]] void* map(std::size_t size) const {
    void* const start =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    // Advice: where it is refused pages are small, and nothing else changes.
    if (limits_.huge_pages) (void)madvise(start, size, MADV_HUGEPAGE);
#endif
    return start;
  }

  static void unmap(char* start, std::size_t size) {
    // A hole may need one mapping more than vm.max_map_count allows; the pages go all the same.
    if (munmap(start, size) != 0) (void)madvise(start, size, MADV_DONTNEED);
  }

  ArenaLimits limits_;
  mutable std::mutex mutex_;
  std::size_t used_ = 0, most_used_ = 0, kept_ = 0;
  std::size_t allowance_;
  std::size_t given_back_ = 0;  // for want of allowance, and not asked for again yet
  std::size_t passed_ = 0;      // bytes taken in this window
  std::size_t untouched_ = 0;   // least kept in this window
  std::uint64_t clock_ = 0;
  std::vector<Range> ranges_;  // free, by address, no two adjacent
};
using BlockArena = BasicBlockArena<>;

}  // namespace fourfold::door

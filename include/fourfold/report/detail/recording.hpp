// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a timeline has recorded, as a value: the changes of the byte counts in their order, the
/// ranges that ran, and what follows from both: the counts at any instant, the peak, its owners.
#include <fourfold/core/place.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace fourfold::inline v0 {

/// A block that lived at the peak, or several that are told as one.
struct BlockOwner {
  std::int64_t bytes = 0;
  Place place = Place::kOther;  ///< at the peak
  std::string name;             ///< the operator that allocated it; empty: none was running
  std::string within;       ///< the node of backward, the user's scope or the operator around it
  double since_us = 0;      ///< when it was allocated; negative: before the recording
  std::int64_t blocks = 1;  ///< 0: not known, they are older than the recording
};

namespace detail {

struct MemoryChange {
  enum class Kind : std::uint8_t { kAdded, kRemoved, kMoved };
  std::int64_t at;  // ns since the recording began
  const void* block;
  std::int64_t bytes;
  std::uint32_t name, within;  // of Recording::names; 0: none
  Place place, from;           // `from`: of a move
  Kind kind;
};

struct RangeSlice {
  enum class Kind : std::uint8_t { kOperator, kBackward, kUser };
  std::int64_t begin, end;  // ns; `end` is -1 while it runs
  std::uint32_t name;
  std::uint16_t thread;  // of Recording::threads
  Kind kind;
};

struct RecordedThread {
  std::int64_t id;  // the system's
  std::string name;
};

using PlaceSums = std::array<std::int64_t, kPlaces>;
inline std::int64_t sum(const PlaceSums& places) {
  std::int64_t all = 0;
  for (const std::int64_t bytes : places) all += bytes;
  return all;
}

struct RecordedPeak {
  std::int64_t bytes = 0;
  PlaceSums places{};
  std::int64_t at = 0;      // ns
  std::size_t changes = 0;  // after so many of them
};

struct Recording {
  PlaceSums start{};  // what lived already
  std::vector<MemoryChange> changes;
  std::vector<RangeSlice> slices;  // in the order in which they began
  std::vector<std::string> names{""};
  std::vector<RecordedThread> threads;
  std::int64_t length = 0;  // ns
  std::int64_t missed_changes = 0, missed_slices = 0;

  /// Calls visit(change, counts after it) for each change.
  template <class Visit>
  void replay(const Visit& visit) const {
    PlaceSums now = start;
    for (const MemoryChange& change : changes) {
      apply(now, change);
      visit(change, now);
    }
  }

  /// By the rule of door::ByteCounters: the first instant of the most bytes, and a move while the
  /// count stands at the peak is still that instant.
  [[nodiscard]] RecordedPeak peak() const {
    RecordedPeak out{.bytes = sum(start), .places = start};
    std::int64_t all = out.bytes;
    std::size_t count = 0;
    replay([&](const MemoryChange& change, const PlaceSums& now) {
      ++count;
      if (change.kind == MemoryChange::Kind::kAdded) all += change.bytes;
      if (change.kind == MemoryChange::Kind::kRemoved) all -= change.bytes;
      const bool moved = change.kind == MemoryChange::Kind::kMoved && all == out.bytes;
      if (all > out.bytes || moved)
        out = {.bytes = all, .places = now, .at = change.at, .changes = count};
    });
    return out;
  }

  /// What lived at `peak`, the largest first: each of the `most` largest blocks by itself, the
  /// others as one a place, and what is older than the recording as one a place. Adds up to the
  /// peak's bytes.
  [[nodiscard]] std::vector<BlockOwner> owners(const RecordedPeak& peak, std::size_t most) const {
    std::unordered_map<const void*, MemoryChange> live;
    PlaceSums older = start;
    for (std::size_t i = 0; i < peak.changes; ++i) {
      const MemoryChange& change = changes[i];
      const auto known = live.find(change.block);
      if (change.kind == MemoryChange::Kind::kAdded)
        live.insert_or_assign(change.block, change);
      else if (known == live.end())
        apply(older, change);
      else if (change.kind == MemoryChange::Kind::kRemoved)
        live.erase(known);
      else
        known->second.place = change.place;
    }
    std::vector<MemoryChange> blocks;
    blocks.reserve(live.size());
    for (const auto& [block, change] : live) blocks.push_back(change);
    std::sort(blocks.begin(), blocks.end(), [](const MemoryChange& a, const MemoryChange& b) {
      return a.bytes != b.bytes ? a.bytes > b.bytes : a.at < b.at;
    });
    std::vector<BlockOwner> out;
    std::array<BlockOwner, kPlaces> rest;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const MemoryChange& block = blocks[i];
      const double since = static_cast<double>(block.at) / 1e3;
      BlockOwner& others = rest[static_cast<std::size_t>(block.place)];
      if (i < most)
        out.push_back({.bytes = block.bytes,
                       .place = block.place,
                       .name = names[block.name],
                       .within = names[block.within],
                       .since_us = since});
      else if (others.bytes == 0)
        others = {.bytes = block.bytes,
                  .place = block.place,
                  .name = "(smaller blocks)",
                  .within = "",
                  .since_us = since};
      else
        others.bytes += block.bytes, ++others.blocks,
            others.since_us = std::min(others.since_us, since);
    }
    for (const BlockOwner& others : rest)
      if (others.bytes > 0) out.push_back(others);
    for (std::size_t i = 0; i < kPlaces; ++i)
      if (older[i] != 0)
        out.push_back({.bytes = older[i],
                       .place = static_cast<Place>(i),
                       .name = "(before the recording)",
                       .within = "",
                       .since_us = -1,
                       .blocks = 0});
    std::stable_sort(out.begin(), out.end(),
                     [](const BlockOwner& a, const BlockOwner& b) { return a.bytes > b.bytes; });
    return out;
  }

 private:
  static void apply(PlaceSums& now, const MemoryChange& change) {
    const auto at = static_cast<std::size_t>(change.place);
    switch (change.kind) {
      case MemoryChange::Kind::kAdded: now[at] += change.bytes; break;
      case MemoryChange::Kind::kRemoved: now[at] -= change.bytes; break;
      case MemoryChange::Kind::kMoved:
        now[static_cast<std::size_t>(change.from)] -= change.bytes, now[at] += change.bytes;
    }
  }
};

}  // namespace detail
}  // namespace fourfold::inline v0

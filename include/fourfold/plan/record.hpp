// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What one step recorded: each storage that it saved, how it can be held, for how long, and what
/// that costs; its blocks; and the bytes of the whole step around it. step_problem.hpp makes the
/// plan's Problem of it.
///
/// The step ran with every storage held as small as it can be, and no block computed again. Positions
/// are the instants at which a storage was saved, read or let go, numbered 0, 1, ... in time: at
/// each stands what lived then (odd), and the most that lived since the one before (even).
#include <c10/core/ScalarType.h>
#include <fourfold/activations/offloading.hpp>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/plan/problem.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace fourfold::inline v0::plan {

/// A codec that a plan may choose: finest first, the policy's own last.
struct Rung {
  std::string name;
  PackFunction pack = nullptr;
};

/// What the pipeline's policies offer a plan.
struct Means {
  std::vector<Rung> rungs{};              ///< empty: nothing is rounded
  PackFunction sensitive = nullptr;       ///< also for the inputs of blocks
  std::shared_ptr<Offloading> offload{};  ///< null: nothing leaves memory
};

/// How a storage is held.
struct Way {
  enum class Kind { kKeep, kExact, kRebuild, kPack, kOffload };
  Kind kind = Kind::kKeep;
  std::size_t rung = 0;  ///< of kPack
};

/// What makes a storage of one step the same as one of another.
struct StorageId {
  std::uint64_t forward = 0, operation = 0, place = 0;  ///< as SavedStorage counts them
  bool made = false;
  friend bool operator==(const StorageId&, const StorageId&) = default;
};

/// The same for a block.
struct BlockId {
  std::uint64_t forward = 0, number = 0;  ///< among the forward's blocks
  std::uint64_t look = 0;                 ///< a hash of its inputs' sizes and dtypes
  friend bool operator==(const BlockId&, const BlockId&) = default;
};

struct RungEstimate {
  double bytes_per_value = 0;
  double noise = 0;  ///< rounding error's power, as a share of the values' own
};

struct StorageRecord {
  StorageId id;
  std::string producer{}, saver{};    ///< operators: who made it, who saved it first
  std::vector<std::int64_t> sizes{};  ///< of the first tensor of it that was saved
  at::ScalarType dtype = at::kFloat;
  std::int64_t bytes = 0;  ///< of the storage, if it is kept
  StoredAs kind = StoredAs::kKept;
  bool sensitive = false;
  bool packable = false;        ///< a codec may hold it, whatever else is open to it
  int block = -1;               ///< the one block within which alone it is saved
  bool input_alone = false;     ///< nobody saves it: a block starts from it
  Span kept{};                  ///< where keeping it needs its bytes: after nobody else holds it
  std::vector<Span> held{};     ///< what was held in its stead, of its own
  std::vector<Span> packed{};   ///< of these the codec's; `bytes` are values
  std::vector<Span> dense{};    ///< copies while they were read
  std::vector<Span> pieces{};   ///< likewise, where it was read in pieces
  std::vector<Span> results{};  ///< of who read it so, over a gradient: else in memory of their own
  double pack_ms = 0, unpack_ms = 0;
  std::vector<RungEstimate> rungs{};     ///< from a sample of its values
  RungEstimate finest{};                 ///< of the sensitive codec; 0 bytes: there is none
  double coding_ms = 0;                  ///< to pack and unpack it, where that was not measured
  double offload_ms = -1;                ///< to a file and back; below 0: it stays in memory
  int saved_at = -1, read_at = -1;       ///< positions; -1: never
  std::vector<RebuildSource> sources{};  ///< storages that it was computed from again
  bool rebuild_fails = false;            ///< under another plan its inputs were not at hand

  /// The ways in which it can be held; keeping it comes first.
  [[nodiscard]] std::vector<Way> ways() const {
    std::vector<Way> out{{}};
    if (input_alone) return out;
    if (kind == StoredAs::kMask) out.push_back({Way::Kind::kExact});
    if (kind == StoredAs::kRebuilt && !rebuild_fails) out.push_back({Way::Kind::kRebuild});
    const bool measured = kind == StoredAs::kPacked;
    if (measured || (kind == StoredAs::kRebuilt && packable)) {
      const std::size_t count = sensitive ? (measured || finest.bytes_per_value > 0 ? 1 : 0)
                                          : std::max<std::size_t>(rungs.size(), measured);
      for (std::size_t i = count; i-- > 0;) out.push_back({Way::Kind::kPack, i});
    }
    if (kind == StoredAs::kOffloaded ||
        ((measured || kind == StoredAs::kRebuilt) && offload_ms >= 0))
      out.push_back({Way::Kind::kOffload});
    return out;
  }
  /// The number of the way in which it is held where it cannot be computed again: the policies' own.
  [[nodiscard]] std::size_t else_held() const {
    const std::vector<Way> all = ways();
    for (const Way::Kind kind : {Way::Kind::kPack, Way::Kind::kOffload})
      for (std::size_t i = 0; i < all.size(); ++i)
        if (all[i].kind == kind) return i;
    return 0;
  }
  [[nodiscard]] double noise(const Way& way) const {
    if (way.kind != Way::Kind::kPack) return 0;
    if (sensitive && finest.bytes_per_value > 0) return finest.noise;
    return way.rung < rungs.size() ? rungs[way.rung].noise : 0;
  }
  /// Of its own, while it is not read.
  [[nodiscard]] std::int64_t bytes_held(const Way& way) const {
    if (way.kind == Way::Kind::kKeep) return bytes;
    std::int64_t sum = 0;
    for (const Span& span : held_as(way)) sum += span.bytes;
    return sum;
  }
  /// Time that it adds to a step.
  [[nodiscard]] double ms(const Way& way) const {
    if (way.kind == Way::Kind::kKeep) return 0;
    if (way.kind == Way::Kind::kOffload && kind != StoredAs::kOffloaded) return offload_ms;
    if (way.kind == Way::Kind::kPack && kind != StoredAs::kPacked) return coding_ms;
    return pack_ms + unpack_ms;
  }
  [[nodiscard]] std::vector<Span> held_as(const Way& way) const {
    if (way.kind == Way::Kind::kOffload) return {};
    std::vector<Span> out = held;
    if (way.kind != Way::Kind::kPack) return out;
    if (kind != StoredAs::kPacked) {  // recorded otherwise
      const RungEstimate& by = sensitive ? finest : rungs[way.rung];
      Span whole{.bytes = coded_bytes(by)};
      if (!held.empty()) whole.first = held.front().first, whole.last = kept.last;
      return {whole};
    }
    if (sensitive || rungs.empty()) return out;
    // What the codec held in the recorded step, which was the last rung, by another one.
    const double change = rungs[way.rung].bytes_per_value - rungs.back().bytes_per_value;
    for (const Span& span : packed)
      out.push_back({span.first, span.last,
                     static_cast<std::int64_t>(change * static_cast<double>(span.bytes))});
    return out;
  }
  [[nodiscard]] std::vector<Span> spans(const Way& way) const {
    if (way.kind == Way::Kind::kKeep) return joined({{kept}, results});
    if (way.kind == Way::Kind::kOffload && read_in_pieces()) return joined({whole(), results});
    return joined({held_as(way), dense, pieces});
  }
  /// Without a copy of all of it.
  [[nodiscard]] bool read_in_pieces() const { return dense.empty() && !pieces.empty(); }
  /// The copy that it needs where it is not, from the event before it was read: a node unpacks all
  /// that it reads before it computes anything. What is computed again needs as much for each source
  /// and for what lies between, when the node begins.
  [[nodiscard]] std::vector<Span> whole() const {
    std::vector<Span> out{{std::max(read_at - 2, 0), kept.last, bytes}};
    const int begins = std::max(read_at - 3, 0);
    if (!sources.empty()) out.push_back({begins, begins, (1 + std::ssize(sources)) * bytes});
    return out;
  }
  static void append(std::vector<Span>& spans, const std::vector<Span>& more) {
    spans.insert(spans.end(), more.begin(), more.end());
  }
  [[nodiscard]] static std::vector<Span> joined(std::initializer_list<std::vector<Span>> parts) {
    std::vector<Span> out;
    for (const std::vector<Span>& part : parts) append(out, part);
    return out;
  }
  [[nodiscard]] std::int64_t coded_bytes(const RungEstimate& by) const {
    const auto values = bytes / static_cast<std::int64_t>(c10::elementSize(dtype));
    return static_cast<std::int64_t>(by.bytes_per_value * static_cast<double>(values));
  }
};

/// How a block is held.
struct BlockWay {
  bool recompute = false;              ///< else storage by storage
  Way::Kind input = Way::Kind::kKeep;  ///< kKeep, kPack (by the sensitive codec) or kOffload
  bool reference = false;  ///< what its second run saves is kept as it is until it is read
};

/// A block as it ran: fourfold::block(), or a child of a Sequential.
struct BlockRecord {
  BlockId id;
  std::vector<std::size_t> inputs{};  ///< storages
  int first = 0, last = 0;            ///< positions of its forward
  int again = -1;                     ///< where its second run would be; -1: it saved nothing
  double ms = 0;                      ///< its forward, without what the codecs took
};

struct StepRecord {
  std::vector<StorageRecord> storages;  ///< in the order of saving
  std::vector<BlockRecord> blocks{};    ///< in the order of running
  std::vector<std::int64_t> bytes;      ///< at each position, above what lived when it began
  std::int64_t base = 0;                ///< what lived when it began
  std::int64_t base_gradients = 0;      ///< of that, gradients
  std::vector<std::int64_t> gradients;  ///< at each position, at least so many of `bytes`
  double ms = 0;                        ///< forward and backward, without what the codecs took
  std::vector<Rung> rungs;

  /// Of the values that a codec may hold: how many bytes they are.
  [[nodiscard]] double packable_bytes() const {
    double sum = 0;
    for (const StorageRecord& storage : storages)
      if (storage.kind == StoredAs::kPacked) sum += static_cast<double>(storage.bytes);
    return sum;
  }

  /// Whether two steps saved the same storages.
  [[nodiscard]] bool same_storages(const StepRecord& other) const {
    if (storages.size() != other.storages.size()) return false;
    for (std::size_t i = 0; i < storages.size(); ++i)
      if (!(storages[i].id == other.storages[i].id) || storages[i].bytes != other.storages[i].bytes)
        return false;
    return true;
  }

  /// Whether a storage comes back to the bit, where `held(i)` is how the i-th is held. Then it is read
  /// whole: a product in pieces would be another sum (torch/packed_backward.hpp).
  template <class Held>
  [[nodiscard]] bool exact(std::size_t storage, const Held& held) const {
    std::vector<bool> seen(storages.size(),
                           false);  // one item stands for all versions of a storage
    std::vector<std::size_t> from{storage};
    while (!from.empty()) {
      const std::size_t i = from.back();
      from.pop_back();
      if (seen[i]) continue;
      seen[i] = true;
      const Way::Kind kind = held(i);
      if (kind == Way::Kind::kPack) return false;
      if (kind != Way::Kind::kRebuild) continue;
      for (const RebuildSource& source : storages[i].sources) from.push_back(source.item);
    }
    return true;
  }
};

}  // namespace fourfold::inline v0::plan

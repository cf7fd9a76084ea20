// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What one step recorded: each storage that it saved, how it can be held, for how long, and what
/// that costs; and the bytes of the whole step around it. From it the plan's Problem is made.
///
/// The step ran with everything held as small as it can be, so no step needs less. Its positions
/// are the instants at which a storage was saved, read or let go, numbered 0, 1, ... in time: at
/// each stands what lived then (odd), and the most that lived since the one before (even).
#include <ATen/core/Tensor.h>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/plan/problem.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace fourfold::inline v0::plan {

/// A codec that a plan may choose: finest first, the policy's own last.
struct Rung {
  std::string name;
  PackFunction pack = nullptr;
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

struct RungEstimate {
  double bytes_per_value = 0;
  double noise = 0;  ///< rounding error's power, as a share of the values' own
};

struct StorageRecord {
  StorageId id;
  std::string producer, saver;      ///< operators: who made it, who saved it first
  std::vector<std::int64_t> sizes;  ///< of the first tensor of it that was saved
  at::ScalarType dtype = at::kFloat;
  std::int64_t bytes = 0;  ///< of the storage, if it is kept
  StoredAs kind = StoredAs::kKept;
  bool sensitive = false;
  Span kept;                   ///< where keeping it needs its bytes: after nobody else holds it
  std::vector<Span> held{};    ///< what was held in its stead, of its own
  std::vector<Span> packed{};  ///< of these the codec's; `bytes` are values
  std::vector<Span> dense{};   ///< copies while they were read
  double pack_ms = 0, unpack_ms = 0;
  std::vector<RungEstimate> rungs{};  ///< from a sample of its values
  double offload_ms = -1;             ///< to a file and back; below 0: it stays in memory
  int saved_at = -1, read_at = -1;    ///< positions; -1: never
  bool rebuild_fails = false;         ///< under another plan its inputs were not at hand

  /// The ways in which it can be held; keeping it comes first.
  [[nodiscard]] std::vector<Way> ways() const {
    std::vector<Way> out{{}};
    if (kind == StoredAs::kMask) out.push_back({Way::Kind::kExact});
    if (kind == StoredAs::kRebuilt && !rebuild_fails) out.push_back({Way::Kind::kRebuild});
    if (kind == StoredAs::kPacked)
      for (std::size_t i = sensitive || rungs.empty() ? 0 : rungs.size(); i-- > 0;)
        out.push_back({Way::Kind::kPack, i});
    if (kind == StoredAs::kPacked && out.size() == 1) out.push_back({Way::Kind::kPack});
    if (kind == StoredAs::kOffloaded || (kind == StoredAs::kPacked && offload_ms >= 0))
      out.push_back({Way::Kind::kOffload});
    return out;
  }
  [[nodiscard]] double noise(const Way& way) const {
    return way.kind == Way::Kind::kPack && way.rung < rungs.size() ? rungs[way.rung].noise : 0;
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
    const bool measured = way.kind != Way::Kind::kOffload || kind == StoredAs::kOffloaded;
    return measured ? pack_ms + unpack_ms : offload_ms;
  }
  [[nodiscard]] std::vector<Span> held_as(const Way& way) const {
    if (way.kind == Way::Kind::kOffload) return {};
    std::vector<Span> out = held;
    if (way.kind != Way::Kind::kPack || sensitive || rungs.empty()) return out;
    // What the codec held in the recorded step, which was the last rung, by another one.
    const double change = rungs[way.rung].bytes_per_value - rungs.back().bytes_per_value;
    for (const Span& span : packed)
      out.push_back({span.first, span.last,
                     static_cast<std::int64_t>(change * static_cast<double>(span.bytes))});
    return out;
  }
  [[nodiscard]] std::vector<Span> spans(const Way& way) const {
    if (way.kind == Way::Kind::kKeep) return {kept};
    std::vector<Span> out = held_as(way);
    out.insert(out.end(), dense.begin(), dense.end());
    return out;
  }
};

struct StepRecord {
  std::vector<StorageRecord> storages;  ///< in the order of saving
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

  /// An item for each storage, an option for each of its ways.
  ///
  /// The variance that stochastic rounding adds to a gradient, as a share of the gradient's own: for
  /// y = x W, dW = sum over rows n of x_n^T dy_n, whose variance over rows is about sum |x_n|^2
  /// |dy_n|^2, and rounding adds sum |e_n|^2 |dy_n|^2 (its error e is independent of all else). The
  /// share is the noise's power over the values', which a sample of the values tells; a plan's is
  /// the mean over what could be packed, by bytes. A share v costs v more steps' time.
  ///
  /// `present`: gradients that are there when the step begins. Backward adds to them, and allocates
  /// no others.
  [[nodiscard]] Problem problem(std::int64_t present) const {
    Problem out;
    out.fixed = bytes;
    out.ms_of_variance = ms;
    const double all = packable_bytes();
    std::vector<std::int64_t> change(bytes.size() + 1, 0);
    for (const StorageRecord& storage : storages) {
      Item item;
      for (const Way& way : storage.ways()) {
        const double share = all > 0 ? static_cast<double>(storage.bytes) / all : 0;
        item.options.push_back({.ms = storage.ms(way),
                                .variance = share * storage.noise(way),
                                .spans = storage.spans(way)});
      }
      if (item.options.size() == 1 && storage.kind == StoredAs::kKept) item.options[0].spans = {};
      out.items.push_back(std::move(item));
      if (storage.kind == StoredAs::kKept) continue;
      for (const auto* spans : {&storage.held, &storage.dense})
        for (const Span& span : *spans) {
          if (span.last < span.first) continue;
          change[static_cast<std::size_t>(span.first)] -= span.bytes;
          change[static_cast<std::size_t>(span.last) + 1] += span.bytes;
        }
    }
    std::int64_t running = 0;
    const std::int64_t more = present - base_gradients;
    for (std::size_t p = 0; p < bytes.size(); ++p)
      out.fixed[p] +=
          (running += change[p]) - std::min(more, std::max<std::int64_t>(gradients[p], 0));
    return out;
  }

  /// Whether two steps saved the same storages.
  [[nodiscard]] bool same_storages(const StepRecord& other) const {
    if (storages.size() != other.storages.size()) return false;
    for (std::size_t i = 0; i < storages.size(); ++i)
      if (!(storages[i].id == other.storages[i].id) || storages[i].bytes != other.storages[i].bytes)
        return false;
    return true;
  }
};

}  // namespace fourfold::inline v0::plan

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Writes a StepRecord while a step runs: it is told what lives at each event, and what was saved,
/// read and let go then. Not thread-safe: plan::Step calls it under its lock.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/item.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <fourfold/activations/offloading.hpp>
#include <fourfold/plan/record.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

class Recorder {
 public:
  /// `base`: what lives when the step begins, `gradients` of it gradients.
  /// `offload` may be null.
  Recorder(std::int64_t base, std::int64_t gradients, std::vector<Rung> rungs,
           std::shared_ptr<Offloading> offload)
      : offload_(std::move(offload)), started_(Clock::now()) {
    record_.base = base, record_.base_gradients = gradients;
    record_.rungs = std::move(rungs);
  }

  /// `peak`: the most that lived since the last event, `now`: what lives, `gradients` of it.
  void event(std::int64_t now, std::int64_t peak, std::int64_t gradients) {
    end_segment(now, peak);
    record_.gradients.back() = gradients - record_.base_gradients;
    // Of which nobody told: it lived when most did, as far as anybody knows.
    forget([](const Living& one) { return one.storage.expired(); });
  }
  /// The block of a storage that saving() or decoded() was given went.
  void freed(const void* block, std::int64_t now, std::int64_t peak) {
    end_segment(now, peak);
    forget([&](const Living& one) { return one.block == block; });
  }

  /// The storage is about to be held, as small as can be. An event is to come first.
  std::uint32_t saving(const StorageId& id, const SavedStorage& storage) {
    saving_ = {.item = find(id), .since = Clock::now()};
    if (saving_.item < record_.storages.size()) return static_cast<std::uint32_t>(saving_.item);
    const at::Tensor& values = *storage.values;
    record_.storages.push_back({.id = id,
                                .producer = std::string(storage.producer),
                                .saver = std::string(storage.saver),
                                .sizes = values.sizes().vec(),
                                .dtype = values.scalar_type(),
                                .bytes = storage.bytes,
                                .sensitive = storage.sensitive,
                                .kept = {.first = 0, .last = -1, .bytes = storage.bytes},
                                .rungs = sample(values),
                                .offload_ms = offload_ ? offload_->cost_ms(storage.bytes) : -1,
                                .saved_at = position()});
    live_.push_back(0);
    originals_.emplace_back(values.storage(), saving_.item);
    saving_.since = Clock::now();
    return static_cast<std::uint32_t>(saving_.item);
  }
  /// It is held so. An event is to follow.
  void held(std::uint32_t item, StoredAs kind, std::int64_t bytes, std::int64_t values) {
    StorageRecord& storage = record_.storages[item];
    ++live_[item];
    if (saving_.item == item) storage.pack_ms += ms_since(saving_.since);
    if (storage.kind != StoredAs::kPacked) storage.kind = kind;
    storage.held.push_back({position(), -1, bytes});
    if (kind == StoredAs::kPacked) storage.packed.push_back({position(), -1, values});
  }
  /// Between two events: before and after.
  void decoding(std::uint32_t item) {
    if (record_.storages[item].read_at < 0) record_.storages[item].read_at = position();
    decodings_.push_back({item, Clock::now(), 0, position()});
  }
  void decoded(std::uint32_t item, const c10::Storage& dense) {
    if (decodings_.empty() || decodings_.back().item != item) return;  // of another thread
    const Decoding done = decodings_.back();
    decodings_.pop_back();
    const double ms = ms_since(done.since);
    StorageRecord& storage = record_.storages[item];
    storage.unpack_ms += std::max(0.0, ms - done.inner_ms);
    if (!decodings_.empty()) decodings_.back().inner_ms += ms;
    storage.dense.push_back({done.position, -1, static_cast<std::int64_t>(dense.nbytes())});
    copies_.emplace_back(dense, item);
  }
  /// After an event.
  void released(std::uint32_t item) {
    const int last = position() - 2;  // where the most lived, as far as anybody knows
    if (--live_[item] > 0) return;
    StorageRecord& storage = record_.storages[item];
    close(storage.held, last);
    close(storage.packed, last);
    storage.kept.last = last;
    ended_ = Clock::now();
  }

  /// What was recorded; `position()` of what still lives is the end.
  [[nodiscard]] StepRecord finish() {
    const int last = position() - 1;
    for (StorageRecord& storage : record_.storages) {
      close(storage.held, last);
      close(storage.packed, last);
      close(storage.dense, last);
      if (storage.kept.last < 0) storage.kept.last = last;
    }
    for (const Living& one : originals_) record_.storages[one.item].kept.first = last + 1;
    record_.ms = std::chrono::duration<double, std::milli>(ended_ - started_).count();
    for (const StorageRecord& storage : record_.storages)
      record_.ms -= storage.pack_ms + storage.unpack_ms;
    record_.ms = std::max(record_.ms, 0.0);
    return std::move(record_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;
  struct Living {
    Living(const c10::Storage& of, std::size_t i)
        : storage(of.getWeakStorageImpl()), block(of.data()), item(i) {}
    WeakStorage storage;
    const void* block;
    std::size_t item;
  };
  struct Saving {
    std::size_t item = ~std::size_t{0};
    Clock::time_point since{};
  };
  struct Decoding {
    std::uint32_t item;
    Clock::time_point since;
    double inner_ms;
    int position;
  };
  static constexpr std::int64_t kSampleRuns = 16, kSampleRun = 256;

  [[nodiscard]] int position() const { return static_cast<int>(record_.bytes.size()); }
  static double ms_since(Clock::time_point since) {
    return std::chrono::duration<double, std::milli>(Clock::now() - since).count();
  }
  static void close(std::vector<Span>& spans, int last) {
    for (Span& span : spans)
      if (span.last < 0) span.last = last;
  }
  void end_segment(std::int64_t now, std::int64_t peak) {
    record_.bytes.push_back(peak - record_.base);
    record_.bytes.push_back(now - record_.base);
    // At most so many when most lived: they only come.
    record_.gradients.resize(record_.bytes.size(),
                             record_.gradients.empty() ? 0 : record_.gradients.back());
  }
  /// They went in the segment that has just ended.
  template <class Dead>
  void forget(const Dead& dead) {
    const int most = position() - 2;
    std::erase_if(originals_, [&](const Living& one) {
      if (!dead(one)) return false;
      record_.storages[one.item].kept.first = most + 1;
      return true;
    });
    std::erase_if(copies_, [&](const Living& one) {
      if (!dead(one)) return false;
      close(record_.storages[one.item].dense, most);
      return true;
    });
  }
  [[nodiscard]] std::size_t find(const StorageId& id) const {
    std::size_t i = 0;
    while (i < record_.storages.size() && !(record_.storages[i].id == id)) ++i;
    return i;
  }

  /// Each rung tried on some of the values: 16 runs of 256, evenly spread.
  [[nodiscard]] std::vector<RungEstimate> sample(const at::Tensor& values) const {
    std::vector<RungEstimate> out;
    const at::ScalarType dtype = values.scalar_type();
    if (record_.rungs.empty() || values.numel() == 0 ||
        (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf))
      return out;
    at::Tensor flat = values;
    if (values.is_non_overlapping_and_dense()) {
      flat = values.as_strided({values.numel()}, {1});
    } else {
      while (flat.dim() > 1) flat = flat.select(0, flat.size(0) / 2);
    }
    std::vector<at::Tensor> runs;
    const std::int64_t run = std::min(kSampleRun, flat.numel());
    const std::int64_t count = std::min(kSampleRuns, flat.numel() / run);
    for (std::int64_t i = 0; i < count; ++i)
      runs.push_back(
          flat.narrow(0, (flat.numel() - run) * i / std::max<std::int64_t>(count - 1, 1), run));
    const at::Tensor some = at::cat(runs);
    const at::Tensor exact = some.to(at::kDouble);
    const double power = exact.square().sum().item<double>();
    for (const Rung& rung : record_.rungs) {
      const auto payload = rung.pack(some, Key{.storage = record_.storages.size()});
      const double error =
          payload->decompress().to(at::kDouble).sub(exact).square().sum().item<double>();
      out.push_back({.bytes_per_value =
                         static_cast<double>(payload->nbytes()) / static_cast<double>(some.numel()),
                     .noise = power > 0 && error <= power ? error / power
                              : error > 0                 ? 1.0
                                                          : 0.0});
    }
    return out;
  }

  StepRecord record_;
  const std::shared_ptr<Offloading> offload_;
  const Clock::time_point started_;
  Clock::time_point ended_{started_};
  Saving saving_;
  std::vector<Decoding> decodings_;
  std::vector<Living> originals_, copies_;
  std::vector<int> live_;
};

}  // namespace fourfold::inline v0::plan

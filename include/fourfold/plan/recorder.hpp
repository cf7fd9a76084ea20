// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Writes a StepRecord while a step runs: it is told what lives at each event, and what was saved,
/// read and let go then. Not thread-safe: plan::Step calls it under its lock.
#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <fourfold/activations/offloading.hpp>
#include <fourfold/plan/detail/sample.hpp>
#include <fourfold/plan/record.hpp>
#include <fourfold/torch/graph_task.hpp>

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
  Recorder(std::int64_t base, std::int64_t gradients, Means means)
      : means_(std::move(means)), started_(Clock::now()) {
    record_.base = base, record_.base_gradients = gradients;
    record_.rungs = means_.rungs;
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
    const bool known = saving_.item < record_.storages.size();
    if (!known) add(id, storage);
    StorageRecord& saved = record_.storages[saving_.item];
    if (!known || saved.input_alone) {  // the first who saves it
      saved.input_alone = false;
      saved.saver = storage.saver;
      saved.sensitive = storage.sensitive, saved.packable = storage.packable;
      saved.saved_at = position();
      saved.block = open_block(id.forward);
      if (known && !is_input(saving_.item, saved.block)) saved.block = -1;  // another block's input
    } else {
      again(static_cast<std::uint32_t>(saving_.item));
    }
    const Clock::time_point now = Clock::now();
    others_ms_ += std::chrono::duration<double, std::milli>(now - saving_.since).count();
    saving_.since = now;
    return static_cast<std::uint32_t>(saving_.item);
  }
  /// Another operator saves it: with its block alone it can no more be computed again.
  void again(std::uint32_t item) {
    StorageRecord& storage = record_.storages[item];
    if (storage.block != open_block(storage.id.forward)) storage.block = -1;
  }
  /// It is held so. An event is to follow.
  void held(std::uint32_t item, StoredAs kind, std::int64_t bytes, std::int64_t values) {
    StorageRecord& storage = record_.storages[item];
    ++live_[item];
    if (saving_.item == item) {
      const double ms = ms_since(saving_.since);
      storage.pack_ms += ms, others_ms_ += ms;
    }
    if (storage.kind != StoredAs::kPacked) storage.kind = kind;
    storage.held.push_back({position(), -1, bytes});
    if (kind == StoredAs::kPacked) storage.packed.push_back({position(), -1, values});
  }
  void rebuilt_from(std::uint32_t item, const std::vector<RebuildSource>& sources) {
    record_.storages[item].sources = sources;
  }
  /// Between two events: before and after.
  void decoding(std::uint32_t item) {
    // What another one is computed from again is read in its stead, if that is held at all.
    if (decodings_.empty()) note_read(record_.storages[item], position());
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
  /// In pieces, from one event to another.
  void reading(std::uint32_t item, std::int64_t overwritten) {
    StorageRecord& storage = record_.storages[item];
    note_read(storage, position());
    if (overwritten > 0) storage.results.push_back({position(), -1, overwritten});
    reading_ = {item, position()};
  }
  void read(std::uint32_t item) {
    if (std::exchange(reading_.item, ~std::uint32_t{0}) != item) return;  // of another thread
    close(record_.storages[item].results, position() - 1);
    for (int p = reading_.since; p < position(); p += 2) {
      const auto most = static_cast<std::size_t>(p);
      if (const std::int64_t more = record_.bytes[most] - record_.bytes[most - 1]; more > 0)
        record_.storages[item].pieces.push_back({p, p, more});
    }
  }
  /// After an event.
  void released(std::uint32_t item) {
    const int last = position() - 2;  // where the most lived, as far as anybody knows
    if (--live_[item] > 0) return;
    StorageRecord& storage = record_.storages[item];
    note_read(storage, last);
    close(storage.held, last);
    close(storage.packed, last);
    storage.kept.last = last;
    ended_ = Clock::now();
  }

  /// A block of this forward begins, and ends; after an event. `inputs`: what it would hold of its
  /// own, were it computed again.
  void block_began(const BlockId& id, std::vector<std::size_t> inputs) {
    BlockRecord block{.id = id, .inputs = std::move(inputs)};
    for (const std::size_t input : block.inputs) {
      StorageRecord& storage = record_.storages[input];
      if (!storage.input_alone) storage.block = -1;  // another block's result, which that one saves
    }
    block.first = position() - 1;
    open_.push_back({record_.blocks.size(), Clock::now(), others_ms_});
    record_.blocks.push_back(std::move(block));
  }
  void block_ended(std::uint64_t forward) {
    const auto open = std::find_if(open_.rbegin(), open_.rend(), [&](const OpenBlock& one) {
      return record_.blocks[one.block].id.forward == forward;
    });
    if (open == open_.rend()) return;
    BlockRecord& block = record_.blocks[open->block];
    block.last = position() - 1;
    block.ms = std::max(0.0, ms_since(open->since) - (others_ms_ - open->others_ms));
    open_.erase(std::next(open).base());
  }
  /// A block's input, as one of the storages.
  std::size_t input(const StorageId& id, const SavedStorage& storage) {
    const Clock::time_point since = Clock::now();
    const std::size_t item = find(id);
    if (item == record_.storages.size()) {
      add(id, storage);
      record_.storages.back().input_alone = true;
    }
    others_ms_ += ms_since(since);
    return item;
  }

  /// What was recorded; `position()` of what still lives is the end.
  [[nodiscard]] StepRecord finish() {
    const int last = position() - 1;
    for (StorageRecord& storage : record_.storages) {
      close(storage.held, last);
      close(storage.packed, last);
      close(storage.dense, last);
      close(storage.results, last);
      if (storage.kept.last < 0) storage.kept.last = last;
    }
    for (const Living& one : originals_) record_.storages[one.item].kept.first = last + 1;
    record_.ms = std::chrono::duration<double, std::milli>(ended_ - started_).count() - others_ms_;
    double coded_ms = 0, coded_bytes = 0;
    for (const StorageRecord& storage : record_.storages) {
      record_.ms -= storage.unpack_ms;
      if (storage.kind == StoredAs::kPacked)
        coded_ms += storage.pack_ms + storage.unpack_ms,
            coded_bytes += static_cast<double>(storage.bytes);
    }
    record_.ms = std::max(record_.ms, 0.0);
    const double ms_per_byte = coded_bytes > 0 ? coded_ms / coded_bytes : sample_.ms_per_byte();
    for (StorageRecord& storage : record_.storages) {
      storage.coding_ms = ms_per_byte * static_cast<double>(storage.bytes);
      if (storage.block < 0) continue;
      BlockRecord& block = record_.blocks[static_cast<std::size_t>(storage.block)];
      if (!storage.input_alone && storage.read_at > block.last &&
          (block.again < 0 || storage.read_at < block.again))
        block.again = storage.read_at;
    }
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
  struct Reading {
    std::uint32_t item = ~std::uint32_t{0};
    int since = 0;
  };
  struct Saving {
    std::size_t item = ~std::size_t{0};
    Clock::time_point since{};
  };
  struct OpenBlock {
    std::size_t block;
    Clock::time_point since;
    double others_ms;  // until it began
  };
  struct Decoding {
    std::uint32_t item;
    Clock::time_point since;
    double inner_ms;
    int position;
  };

  /// A forward may read, too: what an input that is written to depends on is computed before.
  static void note_read(StorageRecord& storage, int position) {
    if (storage.read_at < 0 && door::current_graph_task() != -1) storage.read_at = position;
  }
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
  /// Of the forward, or -1.
  [[nodiscard]] int open_block(std::uint64_t forward) const {
    for (auto one = open_.rbegin(); one != open_.rend(); ++one)
      if (record_.blocks[one->block].id.forward == forward) return static_cast<int>(one->block);
    return -1;
  }
  [[nodiscard]] bool is_input(std::size_t item, int block) const {
    if (block < 0) return false;
    const std::vector<std::size_t>& inputs = record_.blocks[static_cast<std::size_t>(block)].inputs;
    return std::find(inputs.begin(), inputs.end(), item) != inputs.end();
  }
  void add(const StorageId& id, const SavedStorage& storage) {
    const at::Tensor& values = *storage.values;
    StorageRecord one{.id = id,
                      .producer = std::string(storage.producer),
                      .sizes = values.sizes().vec(),
                      .dtype = values.scalar_type(),
                      .bytes = storage.bytes,
                      .kept = {.first = 0, .last = -1, .bytes = storage.bytes}};
    sample_.take(values, means_, record_.storages.size(), one);
    if (means_.offload) one.offload_ms = means_.offload->cost_ms(storage.bytes);
    record_.storages.push_back(std::move(one));
    live_.push_back(0);
    originals_.emplace_back(values.storage(), record_.storages.size() - 1);
  }
  [[nodiscard]] std::size_t find(const StorageId& id) const {
    std::size_t i = 0;
    while (i < record_.storages.size() && !(record_.storages[i].id == id)) ++i;
    return i;
  }

  StepRecord record_;
  const Means means_;
  const Clock::time_point started_;
  Clock::time_point ended_{started_};
  Saving saving_;
  Reading reading_;
  detail::Sample sample_;
  double others_ms_ = 0;  // what the codecs took in forward, and samples
  std::vector<OpenBlock> open_;
  std::vector<Decoding> decodings_;
  std::vector<Living> originals_, copies_;
  std::vector<int> live_;
};

}  // namespace fourfold::inline v0::plan

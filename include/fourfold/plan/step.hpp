// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One step: from the first forward whose graph is new until the last of what it saved is let go,
/// so that several forwards before one backward are one step. Measures its peak; records it, if
/// asked to.
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/plan/recorder.hpp>
#include <fourfold/torch/allocator.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

/// Owned by the planner and by what is held, which may outlive it. Any thread.
class Step final : public StoredWatch, public std::enable_shared_from_this<Step> {
 public:
  Step() {
    counters_.watch(watch_);
    const door::ByteCount count = counters_.read(watch_);
    base_ = count.all.current, gradients_ = gradients_of(count);
  }
  ~Step() override { counters_.end_watch(watch_); }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  /// Before anything of it is held.
  void record(const Means& means) {
    const std::lock_guard lock(mutex_);
    recorder_.emplace(base_, gradients_, means);
    event();
    watch_.freed = &Watch::note;
  }

  /// The number of the forward that begins.
  std::uint64_t forward_began() {
    const std::lock_guard lock(mutex_);
    ++open_;
    return forwards_++;
  }
  void forward_ended() {
    const std::lock_guard lock(mutex_);
    --open_;
    event();
    settle();
  }
  /// Whether a forward runs, or something is held.
  [[nodiscard]] bool alive() const {
    const std::lock_guard lock(mutex_);
    return open_ > 0 || held_ > 0;
  }

  /// What lived when it began, and at most until its graph had gone; CPU tensors of the process.
  [[nodiscard]] std::int64_t base() const { return base_; }
  /// Of the base: gradients that are there already, so that backward adds to them.
  [[nodiscard]] std::int64_t gradients() const { return gradients_; }
  [[nodiscard]] std::int64_t peak() const {
    const std::lock_guard lock(mutex_);
    return peak_;
  }
  /// The most since then: the optimizer's part. Ends the measurement.
  [[nodiscard]] std::int64_t peak_after() {
    const std::lock_guard lock(mutex_);
    event();
    return pending_;
  }

  [[nodiscard]] std::uint32_t saving(const StorageId& id, const SavedStorage& storage) {
    const std::lock_guard lock(mutex_);
    event();
    watch_.follow(storage.values->storage());
    const std::uint32_t item = recorder_->saving(id, storage);
    pending_ = std::max(pending_, counters_.read(watch_).all.peak);  // samples are no step's need
    return item;
  }
  /// A block begins, in a step that is recorded.
  void block_began(const BlockId& block,
                   const std::vector<std::pair<StorageId, SavedStorage>>& inputs) {
    const std::lock_guard lock(mutex_);
    event();
    std::vector<std::size_t> items;
    for (const auto& [id, input] : inputs) {
      watch_.follow(input.values->storage());
      items.push_back(recorder_->input(id, input));
    }
    pending_ = std::max(pending_, counters_.read(watch_).all.peak);
    recorder_->block_began(block, std::move(items));
  }
  void block_ended(std::uint64_t forward) {
    const std::lock_guard lock(mutex_);
    if (!recorder_) return;
    event();
    recorder_->block_ended(forward);
  }
  /// The step lasts while it lives.
  [[nodiscard]] std::shared_ptr<void> token() {
    struct Token {
      explicit Token(std::shared_ptr<Step> of) : step(std::move(of)) {
        const std::lock_guard lock(step->mutex_);
        ++step->held_;
      }
      ~Token() { step->let_go(); }
      const std::shared_ptr<Step> step;
    };
    return std::make_shared<Token>(shared_from_this());
  }

  void held(std::uint32_t item, StoredAs kind, std::int64_t bytes, std::int64_t values) override {
    const std::lock_guard lock(mutex_);
    ++held_;
    if (item < kinds_.size()) kinds_[item] = kind;
    if (!recorder_) return;
    recorder_->held(item, kind, bytes, values);
    event();
  }
  void rebuilt_from(std::uint32_t item, const std::vector<RebuildSource>& sources) override {
    const std::lock_guard lock(mutex_);
    if (recorder_) recorder_->rebuilt_from(item, sources);
  }
  void decoding(std::uint32_t item) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!recorder_) return;
    event();
    recorder_->decoding(item);
  }
  void decoded(std::uint32_t item, const c10::Storage& dense) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!recorder_) return;
    event();  // first: a block that has gone may have come again as this one
    watch_.follow(dense);
    recorder_->decoded(item, dense);
  }
  void reading(std::uint32_t item, std::int64_t overwritten) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!recorder_) return;
    event();
    recorder_->reading(item, overwritten);
  }
  void read(std::uint32_t item) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!recorder_) return;
    event();
    recorder_->read(item);
  }
  void again(std::uint32_t item) noexcept override {
    const std::lock_guard lock(mutex_);
    if (recorder_) recorder_->again(item);
  }
  void released(std::uint32_t item) noexcept override { let_go(item); }

  /// How each of so many storages came to be held, last; kKept until then.
  void follow(std::size_t items) {
    const std::lock_guard lock(mutex_);
    kinds_.assign(items, StoredAs::kKept);
  }
  [[nodiscard]] std::vector<StoredAs> kinds() const {
    const std::lock_guard lock(mutex_);
    return kinds_;
  }

  /// Of a recorded step that has ended.
  [[nodiscard]] StepRecord take_record() {
    const std::lock_guard lock(mutex_);
    StepRecord out = recorder_->finish();
    recorder_.reset();
    return out;
  }

 private:
  /// The step's peak, and between its events the instants at which storages that it follows went.
  struct Watch : door::PeakWatch {
    struct Freed {
      const void* block;
      std::int64_t now, peak;
    };
    /// Under the counters' lock; its own is the innermost of all.
    static void note(door::PeakWatch& base, const void* block, std::int64_t now) noexcept {
      auto& self = static_cast<Watch&>(base);
      const std::lock_guard lock(self.mutex);
      if (self.followed.find(block) == nullptr) return;
      self.followed.erase(block);
      self.freed_blocks.push_back({block, now, std::exchange(self.peak, now)});
    }
    void follow(const c10::Storage& storage) {
      const std::lock_guard lock(mutex);
      followed.put(storage.data(), true);
    }
    std::vector<Freed> take() {
      const std::lock_guard lock(mutex);
      return std::exchange(freed_blocks, {});
    }
    std::mutex mutex;
    PointerMap<bool> followed;
    std::vector<Freed> freed_blocks;
  };

  void let_go(std::optional<std::uint32_t> item = {}) noexcept {
    const std::lock_guard lock(mutex_);
    --held_;
    event();
    if (recorder_ && item) recorder_->released(*item);
    settle();
  }
  void event() noexcept {
    if (!recorder_ && held_ > 0) return;  // one reading is enough
    const door::ByteCount count = counters_.read(watch_);
    for (const Watch::Freed& one : watch_.take()) {
      pending_ = std::max(pending_, one.peak);
      if (recorder_) recorder_->freed(one.block, one.now, one.peak);
    }
    pending_ = std::max(pending_, count.all.peak);
    if (recorder_) recorder_->event(count.all.current, count.all.peak, gradients_of(count));
  }
  static std::int64_t gradients_of(const door::ByteCount& count) {
    return count.now[static_cast<std::size_t>(Place::kGradients)];
  }
  void settle() noexcept {
    if (held_ == 0) peak_ = std::max(peak_, std::exchange(pending_, 0));
  }

  door::ByteCounters& counters_ = door::counters();
  Watch watch_;
  mutable std::mutex mutex_;
  std::optional<Recorder> recorder_;
  std::vector<StoredAs> kinds_;
  std::int64_t base_ = 0, gradients_ = 0, pending_ = 0, peak_ = 0;
  std::int64_t held_ = 0, open_ = 0;
  std::uint64_t forwards_ = 0;
};

}  // namespace fourfold::inline v0::plan

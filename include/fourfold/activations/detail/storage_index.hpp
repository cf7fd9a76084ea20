// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What is held, by storage: once, however many nodes and views save it.
///
/// Ownership goes graph node -> door::Saved -> Stored -> StorageUse -> StorageIndex; the index
/// knows all of them weakly. So everything goes with the graph, and a graph may outlive its store.
#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <fourfold/activations/detail/storage_view.hpp>
#include <fourfold/activations/saved_bytes.hpp>
#include <fourfold/activations/saved_plan.hpp>  // StoredAs, StoredWatch
#include <fourfold/core/pointer_map.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

template <class = void>
class BasicStorageIndex;
using StorageIndex = BasicStorageIndex<>;

/// A storage that the graph reads somehow: what plain LibTorch would hold. A weak reference keeps
/// the StorageImpl's address from being used again.
template <class = void>
class BasicStorageUse {
 public:
  BasicStorageUse(std::shared_ptr<StorageIndex> index, WeakStorage storage, std::int64_t bytes)
      : index_(std::move(index)), storage_(std::move(storage)), bytes_(bytes) {}
  ~BasicStorageUse();

  /// Autograd saved it; else it only stands between what is held and what is computed from it.
  void note_saved();

  [[nodiscard]] c10::StorageImpl* key() const { return storage_._unsafe_get_target(); }
  [[nodiscard]] const WeakStorage& storage() const { return storage_; }
  [[nodiscard]] const std::shared_ptr<StorageIndex>& index() const { return index_; }

 private:
  std::shared_ptr<StorageIndex> index_;
  WeakStorage storage_;
  std::int64_t bytes_;
  std::atomic<bool> saved_{false};
};
using StorageUse = BasicStorageUse<>;

/// The storage itself, held; its bytes count once however many tensors hold it.
template <class = void>
class BasicHeldStorage {
 public:
  BasicHeldStorage(c10::Storage storage, std::shared_ptr<SavedTotals> totals)
      : storage_(std::move(storage)),
        bytes_(static_cast<std::int64_t>(storage_.nbytes())),
        totals_(std::move(totals)) {
    totals_->held.add(bytes_);
  }
  ~BasicHeldStorage() { totals_->held.add(-bytes_); }
  BasicHeldStorage(const BasicHeldStorage&) = delete;
  BasicHeldStorage& operator=(const BasicHeldStorage&) = delete;

  [[nodiscard]] const c10::Storage& storage() const { return storage_; }

 private:
  c10::Storage storage_;
  std::int64_t bytes_;
  std::shared_ptr<SavedTotals> totals_;
};
using HeldStorage = BasicHeldStorage<>;

/// A dense copy of what is held otherwise, while anybody reads it. A leaf may take it for its gradient
/// (where a custom Function returns what it saved) and add to that: the copy is none any more then.
/// Under its owner's lock.
template <class = void>
class BasicDenseCopy {
 public:
  void set(const c10::Storage& storage) {
    storage_ = storage.getWeakStorageImpl();
    storage.unsafeGetStorageImpl()->set_resizable(false);  // others read it: no result's
    version_ = c10::VariableVersion(0);
  }
  [[nodiscard]] c10::intrusive_ptr<c10::StorageImpl> lock() const {
    return written() ? c10::intrusive_ptr<c10::StorageImpl>() : storage_.lock();
  }
  [[nodiscard]] bool expired() const { return storage_.expired(); }
  [[nodiscard]] bool written() const {
    return version_.enabled() && version_.current_version() != 0;
  }
  [[nodiscard]] const c10::VariableVersion& version() const { return version_; }

 private:
  WeakStorage storage_{c10::Storage().getWeakStorageImpl()};
  c10::VariableVersion version_{c10::VariableVersion::DISABLED};
};
using DenseCopy = BasicDenseCopy<>;

/// Values of one storage at one version, held somehow. `copy()` may be called by any thread.
template <class = void>
class BasicStored {
 public:
  BasicStored(std::shared_ptr<StorageUse> use, std::int64_t version, at::ScalarType dtype,
              Extent extent)
      : use_(std::move(use)), version_(version), dtype_(dtype), extent_(std::move(extent)) {}
  virtual ~BasicStored() {
    if (watch_ != nullptr) watch_->released(item_);
  }
  BasicStored(const BasicStored&) = delete;
  BasicStored& operator=(const BasicStored&) = delete;

  /// Dense; its first value is value `first()` of the original storage. All its tensors have one
  /// version, so that a write to it is seen by whoever reads it next.
  struct Copy {
    c10::Storage storage;
    c10::VariableVersion version;
  };
  [[nodiscard]] virtual Copy copy() = 0;
  [[nodiscard]] c10::Storage storage() { return copy().storage; }
  [[nodiscard]] virtual std::int64_t first() const { return extent_.begin; }
  /// Whether the values come back to the bit.
  [[nodiscard]] virtual bool exact() const = 0;
  [[nodiscard]] virtual StoredAs kind() const = 0;
  /// Bytes that are held for it alone.
  [[nodiscard]] virtual std::int64_t own_bytes() const { return 0; }
  /// The storage that it stands for is about to be written to.
  virtual void before_write() {}
  /// What it is computed from is about to be written to.
  virtual void before_input_write() {}

  /// Values that a piece begins with a whole number of; 0: it is read whole, or is there already.
  [[nodiscard]] virtual std::int64_t granule() { return 0; }
  /// Values [begin, end) of storage(), where granule() is not 0: in a row, not to be written to.
  [[nodiscard]] virtual at::Tensor piece(std::int64_t begin, std::int64_t end) {
    TORCH_INTERNAL_ASSERT(false, "no piece [", begin, ", ", end, ") of what is read whole");
  }
  [[nodiscard]] virtual at::Device device() const { return at::kCPU; }

  [[nodiscard]] at::Tensor view(const StorageView& view) {
    const Copy values = copy();
    const at::Tensor tensor = view.on(values.storage, first());
    if (values.version.enabled() && !tensor.is_inference())
      tensor.unsafeGetTensorImpl()->set_version_counter(values.version);
    return tensor;
  }
  [[nodiscard]] bool has(std::int64_t version, at::ScalarType dtype, const Extent& extent) const {
    return version_ == version && dtype_ == dtype && extent_.covers(extent);
  }
  [[nodiscard]] const Extent& extent() const { return extent_; }
  [[nodiscard]] at::ScalarType dtype() const { return dtype_; }
  [[nodiscard]] const std::shared_ptr<StorageUse>& use() const { return use_; }

  /// Before anybody else knows of it.
  void watch(std::shared_ptr<StoredWatch> watch, std::uint32_t item) {
    watch_ = std::move(watch), item_ = item;
    watch_->held(item, kind(), own_bytes(), extent_.numel());
    if (kind() != StoredAs::kRebuilt) return;
    std::vector<RebuildSource> sources;
    add_sources(watch_.get(), sources);
    watch_->rebuilt_from(item, sources);
  }
  /// What the watch knows it by; none: nobody watches.
  [[nodiscard]] std::optional<std::uint32_t> item() const {
    return watch_ != nullptr ? std::optional(item_) : std::nullopt;
  }
  /// The items of all that is rounded and that its values come from.
  virtual void add_rounded(std::vector<std::uint32_t>& items) const { static_cast<void>(items); }
  /// An operator, by its time on the tape, saved it.
  void note_saver(std::uint64_t time) {
    const std::lock_guard lock(savers_mutex_);
    if (savers_.empty() || savers_.back() != time) savers_.push_back(time);
  }
  [[nodiscard]] bool saved_by(std::uint64_t time) {
    const std::lock_guard lock(savers_mutex_);
    return time != 0 && std::find(savers_.begin(), savers_.end(), time) != savers_.end();
  }
  /// The items, as `watch` knows them, from which it is computed again.
  virtual void add_sources(const StoredWatch* watch, std::vector<RebuildSource>& items) const {
    static_cast<void>(watch), static_cast<void>(items);
  }
  /// The item itself where `watch` knows it, else what it is computed from.
  void add_as_source(const StoredWatch* watch, bool even_kept,
                     std::vector<RebuildSource>& items) const {
    if (watch_.get() == watch)
      items.push_back({item_, even_kept});
    else
      add_sources(watch, items);
  }
  /// It is read in pieces, from here to there (StoredWatch).
  void note_reading(std::int64_t overwritten) const {
    if (watch_ != nullptr) watch_->reading(item_, overwritten);
  }
  void note_read() const noexcept {
    if (watch_ != nullptr) watch_->read(item_);
  }
  /// Another operator saves it.
  void note_again() const {
    use_->note_saved();
    if (watch_ != nullptr) watch_->again(item_);
  }

 protected:
  void note_decoding() const {
    if (watch_ != nullptr) watch_->decoding(item_);
  }
  void note_decoded(const c10::Storage& dense) const {
    if (watch_ != nullptr) watch_->decoded(item_, dense);
  }

  const std::shared_ptr<StorageUse> use_;
  const std::int64_t version_;
  const at::ScalarType dtype_;
  const Extent extent_;

 private:
  std::shared_ptr<StoredWatch> watch_;  // null: nobody asks
  std::uint32_t item_ = 0;
  std::mutex savers_mutex_;
  std::vector<std::uint64_t> savers_;
};
using Stored = BasicStored<>;

/// All that is held, by storage. Any thread.
template <class>
class BasicStorageIndex : public std::enable_shared_from_this<BasicStorageIndex<>> {
 public:
  explicit BasicStorageIndex(std::shared_ptr<SavedTotals> totals) : totals_(std::move(totals)) {}

  [[nodiscard]] SavedTotals& totals() const { return *totals_; }
  [[nodiscard]] const std::shared_ptr<SavedTotals>& shared_totals() const { return totals_; }

  /// Later than all before: what one tape noted may be looked up on another.
  [[nodiscard]] std::uint64_t tick() { return clock_.fetch_add(1, std::memory_order_relaxed) + 1; }

  [[nodiscard]] std::shared_ptr<StorageUse> use(const WeakStorage& storage, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[storage._unsafe_get_target()];
    std::shared_ptr<StorageUse> use = entry.use.lock();
    if (use == nullptr) {
      entry = Entry{};
      use = std::make_shared<StorageUse>(shared_from_this(), storage, bytes);
      entry.use = use;
    }
    return use;
  }
  [[nodiscard]] std::shared_ptr<StorageUse> use(const c10::Storage& storage) {
    return use(storage.getWeakStorageImpl(), static_cast<std::int64_t>(storage.nbytes()));
  }

  [[nodiscard]] std::shared_ptr<HeldStorage> hold(const StorageUse& use,
                                                  const c10::Storage& storage) {
    const std::lock_guard lock(mutex_);
    Entry& entry = entry_of(use.key());
    std::shared_ptr<HeldStorage> held = entry.held.lock();
    if (held == nullptr) {
      held = std::make_shared<HeldStorage>(storage, totals_);
      entry.held = held;
    }
    return held;
  }

  void add(const std::shared_ptr<Stored>& stored) {
    const std::lock_guard lock(mutex_);
    std::vector<std::weak_ptr<Stored>>& all = entry_of(stored->use()->key()).stored;
    std::erase_if(all, [](const auto& one) { return one.expired(); });
    all.push_back(stored);
  }

  /// What has these values, or null. `key` may be dead: an index entry keeps the address taken.
  [[nodiscard]] std::shared_ptr<Stored> find(c10::StorageImpl* key, std::int64_t version,
                                             at::ScalarType dtype, const Extent& extent) {
    for (std::shared_ptr<Stored>& one : all_of(key))
      if (one->has(version, dtype, extent)) return std::move(one);
    return nullptr;
  }

  /// An in-place operator is about to run: what is held so far is not what this storage will be.
  void before_write(c10::StorageImpl* key) {
    for (const std::shared_ptr<Stored>& one : all_of(key)) one->before_write();
    const std::lock_guard lock(mutex_);
    if (Entry* found = entries_.find(key)) found->stored.clear();
    decoded_.erase(key);
  }

  /// Storages that are the model's own, or made of them alone: never packed.
  void mark_exact(const c10::Storage& storage) {
    const std::lock_guard lock(mutex_);
    if (exact_.size() >= sweep_at_) {
      exact_.erase_if([](const WeakStorage& one) { return one.expired(); });
      sweep_at_ = std::max<std::size_t>(64, 2 * exact_.size());
    }
    exact_.put(storage.unsafeGetStorageImpl(), storage.getWeakStorageImpl());
  }
  [[nodiscard]] bool is_exact(c10::StorageImpl* key) const {
    const std::lock_guard lock(mutex_);
    return exact_.find(key) != nullptr;
  }

  /// `storage` is what the dense `source` decoded to. Where it is saved again (an input of a block
  /// that is recomputed), it is not rounded again.
  void mark_decoded(const c10::Storage& storage, std::weak_ptr<Stored> source) {
    const std::lock_guard lock(mutex_);
    decoded_.erase_if([](const Decoding& one) { return one.storage.expired(); });
    decoded_.put(storage.unsafeGetStorageImpl(), {storage.getWeakStorageImpl(), std::move(source)});
  }
  /// What `key` was decoded from, or null.
  [[nodiscard]] std::shared_ptr<Stored> decoded_from(c10::StorageImpl* key) const {
    const std::lock_guard lock(mutex_);
    const Decoding* const one = decoded_.find(key);
    return one != nullptr ? one->source.lock() : nullptr;
  }

 private:
  template <class>
  friend class BasicStorageUse;
  struct Entry {
    std::weak_ptr<StorageUse> use;
    std::weak_ptr<HeldStorage> held;
    std::vector<std::weak_ptr<Stored>> stored;
  };

  struct Decoding {
    WeakStorage storage;
    std::weak_ptr<Stored> source;
  };

  Entry& entry_of(c10::StorageImpl* key) {
    Entry* const found = entries_.find(key);
    TORCH_INTERNAL_ASSERT(found != nullptr);
    return *found;
  }

  void forget(c10::StorageImpl* key) {
    const std::lock_guard lock(mutex_);
    Entry* const found = entries_.find(key);
    if (found != nullptr && found->use.expired()) entries_.erase(key);
  }

  /// Locked copies, so that none is destroyed under the mutex.
  std::vector<std::shared_ptr<Stored>> all_of(c10::StorageImpl* key) {
    std::vector<std::shared_ptr<Stored>> all;
    const std::lock_guard lock(mutex_);
    Entry* const found = entries_.find(key);
    if (found == nullptr) return all;
    for (const std::weak_ptr<Stored>& one : found->stored)
      if (auto strong = one.lock()) all.push_back(std::move(strong));
    return all;
  }

  const std::shared_ptr<SavedTotals> totals_;
  std::atomic<std::uint64_t> clock_{0};
  mutable std::mutex mutex_;
  PointerMap<Entry> entries_;
  PointerMap<WeakStorage> exact_;
  std::size_t sweep_at_ = 64;
  PointerMap<Decoding> decoded_;  // what is decoded just now: few
};

template <class T>
void BasicStorageUse<T>::note_saved() {
  if (!saved_.exchange(true)) index_->totals().plain.add(bytes_);
}
template <class T>
BasicStorageUse<T>::~BasicStorageUse() {
  if (saved_.load()) index_->totals().plain.add(-bytes_);
  index_->forget(key());
}

}  // namespace fourfold::inline v0::detail

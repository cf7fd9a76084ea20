// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What is held of a storage that autograd saves: once, however many nodes and views save it.
///
/// Ownership goes graph node -> door::Saved -> Stored -> StorageUse -> StorageIndex; the index
/// knows all of them weakly. So everything goes with the graph, and a graph may outlive its store.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <fourfold/activations/saved_bytes.hpp>
#include <fourfold/activations/storage_view.hpp>
#include <fourfold/core/payload.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/operators.hpp>      // OperatorsPause
#include <fourfold/torch/saved_tensors.hpp>  // Saved

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

template <class = void>
class BasicStorageIndex;
using StorageIndex = BasicStorageIndex<>;

enum class StoredAs { kKept, kPacked, kMask, kRebuilt };

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

/// Values of one storage at one version, held somehow. `storage()` may be called by any thread.
template <class = void>
class BasicStored {
 public:
  BasicStored(std::shared_ptr<StorageUse> use, std::int64_t version, at::ScalarType dtype,
              Extent extent)
      : use_(std::move(use)), version_(version), dtype_(dtype), extent_(std::move(extent)) {}
  virtual ~BasicStored() = default;
  BasicStored(const BasicStored&) = delete;
  BasicStored& operator=(const BasicStored&) = delete;

  /// Dense; its first value is value `first()` of the original storage.
  [[nodiscard]] virtual c10::Storage storage() = 0;
  [[nodiscard]] virtual std::int64_t first() const { return extent_.begin; }
  /// Whether the values come back to the bit.
  [[nodiscard]] virtual bool exact() const = 0;
  [[nodiscard]] virtual StoredAs kind() const = 0;
  /// The storage that it stands for is about to be written to.
  virtual void before_write() {}
  /// What it is computed from is about to be written to.
  virtual void before_input_write() {}

  [[nodiscard]] at::Tensor view(const StorageView& view) { return view.on(storage(), first()); }
  [[nodiscard]] bool has(std::int64_t version, at::ScalarType dtype, const Extent& extent) const {
    return version_ == version && dtype_ == dtype && extent_.covers(extent);
  }
  [[nodiscard]] const Extent& extent() const { return extent_; }
  [[nodiscard]] at::ScalarType dtype() const { return dtype_; }
  [[nodiscard]] const std::shared_ptr<StorageUse>& use() const { return use_; }

 protected:
  const std::shared_ptr<StorageUse> use_;
  const std::int64_t version_;
  const at::ScalarType dtype_;
  const Extent extent_;
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

/// The storage as it is. What is computed from it again must be before it is written to.
template <class = void>
class BasicKept final : public Stored {
 public:
  BasicKept(std::shared_ptr<StorageUse> use, const at::Tensor& tensor, std::int64_t values)
      : Stored(std::move(use), tensor._version(), tensor.scalar_type(), Extent::whole(values)),
        held_(use_->index()->hold(*use_, tensor.storage())),
        counter_(tensor.unsafeGetTensorImpl()->version_counter()) {}

  c10::Storage storage() override {
    TORCH_CHECK(counter_.current_version() == version_,
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation after the forward: fourfold needs a tensor that was saved, of ",
                extent_.span, " values, to compute an activation again; it is at version ",
                counter_.current_version(), "; expected version ", version_,
                " instead. Write to it before backward inside the pipeline's scope only, or keep "
                "this activation (no Recompute for its operator)");
    return held_->storage();
  }
  std::int64_t first() const override { return 0; }
  bool exact() const override { return true; }
  StoredAs kind() const override { return StoredAs::kKept; }
  void before_write() override {
    std::vector<std::weak_ptr<Stored>> dependents;
    {
      const std::lock_guard lock(mutex_);
      dependents.swap(dependents_);
    }
    for (const auto& weak : dependents)
      if (const auto one = weak.lock()) one->before_input_write();
  }
  /// An operator, by its time on the tape, saved it.
  void note_saver(std::uint64_t time) {
    const std::lock_guard lock(mutex_);
    if (savers_.empty() || savers_.back() != time) savers_.push_back(time);
  }
  [[nodiscard]] bool saved_by(std::uint64_t time) {
    const std::lock_guard lock(mutex_);
    return time != 0 && std::find(savers_.begin(), savers_.end(), time) != savers_.end();
  }
  void add_dependent(std::weak_ptr<Stored> stored) {
    const std::lock_guard lock(mutex_);
    dependents_.push_back(std::move(stored));
  }

 private:
  const std::shared_ptr<HeldStorage> held_;
  const c10::VariableVersion counter_;
  std::mutex mutex_;
  std::vector<std::weak_ptr<Stored>> dependents_;
  std::vector<std::uint64_t> savers_;
};
using Kept = BasicKept<>;

/// A payload. While anybody reads what it decompressed to, everybody reads the same copy.
template <class = void>
class BasicPacked final : public Stored, public std::enable_shared_from_this<BasicPacked<>> {
 public:
  /// `borrowed`: the payload is somebody else's (a packed parameter's), its bytes are not ours.
  BasicPacked(std::shared_ptr<StorageUse> use, std::int64_t version, at::ScalarType dtype,
              Extent extent, std::shared_ptr<const Payload> payload, bool exact,
              bool borrowed = false)
      : Stored(std::move(use), version, dtype, std::move(extent)),
        payload_(std::move(payload)),
        exact_(exact),
        bytes_(borrowed ? 0 : payload_->nbytes()) {
    use_->index()->totals().held.add(bytes_);
    if (!borrowed) use_->index()->totals().payloads.fetch_add(1, std::memory_order_relaxed);
  }
  ~BasicPacked() override { use_->index()->totals().held.add(-bytes_); }

  c10::Storage storage() override {
    const std::lock_guard lock(mutex_);
    if (auto alive = dense_.lock()) return c10::Storage(std::move(alive));
    const door::OperatorsPause pause;
    at::Tensor values = payload_->decompress();
    TORCH_INTERNAL_ASSERT(values.numel() == extent_.numel() && values.is_contiguous() &&
                          values.storage_offset() == 0 && values.scalar_type() == dtype_);
    if (!extent_.dense()) {
      const at::Tensor around = at::empty({extent_.span}, values.options());
      extent_.view(dtype_).on(around.storage(), extent_.begin).copy_(values.view(extent_.sizes));
      values = around;
    }
    dense_ = values.storage().getWeakStorageImpl();
    if (extent_.dense()) use_->index()->mark_decoded(values.storage(), weak_from_this());
    return values.storage();
  }
  bool exact() const override { return exact_; }
  StoredAs kind() const override { return exact_ ? StoredAs::kMask : StoredAs::kPacked; }

 private:
  const std::shared_ptr<const Payload> payload_;
  const bool exact_;
  const std::int64_t bytes_;
  std::mutex mutex_;
  WeakStorage dense_{c10::Storage().getWeakStorageImpl()};
};
using Packed = BasicPacked<>;

/// What another payload decoded to, saved once more: held by that payload.
template <class = void>
class BasicDecoded final : public Stored {
 public:
  BasicDecoded(std::shared_ptr<StorageUse> use, std::shared_ptr<Stored> source)
      : Stored(std::move(use), /*version=*/0, source->dtype(),
               Extent::whole(source->extent().span)),
        source_(std::move(source)) {}

  c10::Storage storage() override { return source_->storage(); }
  bool exact() const override { return true; }  // it decodes to the same values each time
  StoredAs kind() const override { return source_->kind(); }

 private:
  const std::shared_ptr<Stored> source_;
};
using Decoded = BasicDecoded<>;

/// In the graph: one saved tensor as a view of what is stored.
template <class = void>
class BasicSavedView final : public door::Saved {
 public:
  BasicSavedView(std::shared_ptr<Stored> stored, StorageView view)
      : stored_(std::move(stored)), view_(std::move(view)) {}
  at::Tensor unpack() override { return stored_->view(view_); }

 private:
  const std::shared_ptr<Stored> stored_;
  const StorageView view_;
};
using SavedView = BasicSavedView<>;

/// In the graph: a few values out of a large storage, which may go.
template <class = void>
class BasicSavedPiece final : public door::Saved {
 public:
  BasicSavedPiece(const at::Tensor& tensor, std::shared_ptr<StorageUse> use)
      : copy_(tensor.clone(at::MemoryFormat::Contiguous)),
        strides_(tensor.strides()),
        use_(std::move(use)) {
    use_->note_saved();
    use_->index()->totals().held.add(static_cast<std::int64_t>(copy_.nbytes()));
  }
  ~BasicSavedPiece() override {
    use_->index()->totals().held.add(-static_cast<std::int64_t>(copy_.nbytes()));
  }
  at::Tensor unpack() override {
    if (copy_.strides() == at::IntArrayRef(strides_)) return copy_;
    const door::OperatorsPause pause;
    return at::empty_strided(copy_.sizes(), strides_, copy_.options()).copy_(copy_);
  }

 private:
  const at::Tensor copy_;
  const c10::DimVector strides_;
  const std::shared_ptr<StorageUse> use_;
};
using SavedPiece = BasicSavedPiece<>;

/// In the graph: the tensor itself, detached. The door compares versions.
template <class = void>
class BasicSavedAsIs final : public door::Saved {
 public:
  explicit BasicSavedAsIs(at::Tensor tensor, std::shared_ptr<Stored> stored = nullptr)
      : tensor_(std::move(tensor)), stored_(std::move(stored)) {}
  at::Tensor unpack() override { return tensor_; }

 private:
  const at::Tensor tensor_;
  const std::shared_ptr<Stored> stored_;  // null: not counted
};
using SavedAsIs = BasicSavedAsIs<>;

}  // namespace fourfold::inline v0::detail

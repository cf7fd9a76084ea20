// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The ways in which values of a storage are held: as they are, by a payload, or by what another
/// payload decodes to. (Computed again: rebuilt.hpp.)
#include <ATen/ops/empty.h>
#include <fourfold/activations/detail/storage_index.hpp>
#include <fourfold/core/payload.hpp>
#include <fourfold/cuda/stream_order.hpp>
#include <fourfold/torch/operators.hpp>  // OperatorsPause

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// The storage as it is. What is computed from it again must be before it is written to.
template <class = void>
class BasicKept final : public Stored {
 public:
  BasicKept(std::shared_ptr<StorageUse> use, const at::Tensor& tensor, std::int64_t values)
      : Stored(std::move(use), tensor._version(), tensor.scalar_type(), Extent::whole(values)),
        held_(use_->index()->hold(*use_, tensor.storage())),
        counter_(tensor.unsafeGetTensorImpl()->version_counter()) {}

  Stored::Copy copy() override {
    TORCH_CHECK(counter_.current_version() == version_,
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation after the forward: fourfold needs a tensor that was saved, of ",
                extent_.span, " values, to compute an activation again; it is at version ",
                counter_.current_version(), "; expected version ", version_,
                " instead. Write to it before backward inside the pipeline's scope only, or keep "
                "this activation (no Recompute for its operator)");
    return {held_->storage(), counter_};
  }
  std::int64_t first() const override { return 0; }
  std::int64_t granule() override { return 1; }
  at::Tensor piece(std::int64_t begin, std::int64_t end) override {
    return run_of(storage(), begin, end, dtype_);
  }
  at::Device device() const override { return held_->storage().device(); }
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
  void add_dependent(std::weak_ptr<Stored> stored) {
    const std::lock_guard lock(mutex_);
    dependents_.push_back(std::move(stored));
  }

 private:
  const std::shared_ptr<HeldStorage> held_;
  const c10::VariableVersion counter_;
  std::mutex mutex_;
  std::vector<std::weak_ptr<Stored>> dependents_;
};
using Kept = BasicKept<>;

/// A payload. While anybody reads what it decompressed to, everybody reads the same copy.
template <class = void>
class BasicPacked final : public Stored, public std::enable_shared_from_this<BasicPacked<>> {
 public:
  /// `borrowed`: the payload is somebody else's (a packed parameter's), its bytes are not ours.
  BasicPacked(std::shared_ptr<StorageUse> use, std::int64_t version, at::ScalarType dtype,
              Extent extent, std::shared_ptr<const Payload> payload, StoredAs kind,
              bool borrowed = false)
      : Stored(std::move(use), version, dtype, std::move(extent)),
        payload_(std::move(payload)),
        packed_on_(cuda::current_stream(payload_->device())),
        kind_(kind),
        bytes_(borrowed ? 0 : payload_->nbytes()) {
    use_->index()->totals().held.add(bytes_);
    if (!borrowed) use_->index()->totals().payloads.fetch_add(1, std::memory_order_relaxed);
  }
  ~BasicPacked() override { use_->index()->totals().held.add(-bytes_); }

  Stored::Copy copy() override {
    const std::lock_guard lock(mutex_);
    if (auto alive = dense_.lock()) {
      c10::Storage shared(std::move(alive));
      cuda::read_on_current_stream(shared, decoded_on_);
      return {std::move(shared), dense_.version()};
    }
    const door::OperatorsPause pause;
    note_decoding();
    read_here();
    at::Tensor values = payload_->decompress();
    TORCH_INTERNAL_ASSERT(values.numel() == extent_.numel() && values.is_contiguous() &&
                          values.storage_offset() == 0 && values.scalar_type() == dtype_);
    if (!extent_.dense()) {
      const at::Tensor around = at::empty({extent_.span}, values.options());
      extent_.view(dtype_).on(around.storage(), extent_.begin).copy_(values.view(extent_.sizes));
      values = around;
    }
    if (values.storage().unsafeGetStorageImpl() == use_->key())
      return {values.storage(), c10::VariableVersion::DISABLED};  // as it is
    dense_.set(values.storage());
    decoded_on_ = cuda::current_stream(values.device());
    note_decoded(values.storage());
    if (extent_.dense()) use_->index()->mark_decoded(values.storage(), weak_from_this());
    return {values.storage(), dense_.version()};
  }
  std::int64_t granule() override {
    const std::lock_guard lock(mutex_);
    return extent_.dense() && dense_.expired() ? payload_->granule() : 0;
  }
  at::Tensor piece(std::int64_t begin, std::int64_t end) override {
    const door::OperatorsPause pause;
    read_here();
    return payload_->decompress(begin, end);
  }
  at::Device device() const override { return payload_->device(); }
  bool exact() const override { return kind_ != StoredAs::kPacked; }
  StoredAs kind() const override { return kind_; }
  std::int64_t own_bytes() const override { return bytes_; }
  void before_write() override { payload_->before_source_changes(); }
  void add_rounded(std::vector<std::uint32_t>& items) const override {
    if (kind_ == StoredAs::kPacked && this->item()) items.push_back(*this->item());
  }

 private:
  void read_here() const {
    for (const at::Tensor& buffer : payload_->buffers())
      cuda::read_on_current_stream(buffer.storage(), packed_on_);
  }

  const std::shared_ptr<const Payload> payload_;
  const std::optional<c10::Stream> packed_on_;
  const StoredAs kind_;
  const std::int64_t bytes_;
  std::mutex mutex_;
  DenseCopy dense_;
  std::optional<c10::Stream> decoded_on_;
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

  Stored::Copy copy() override { return source_->copy(); }
  std::int64_t granule() override { return source_->granule(); }
  at::Tensor piece(std::int64_t begin, std::int64_t end) override {
    return source_->piece(begin, end);
  }
  at::Device device() const override { return source_->device(); }
  bool exact() const override { return true; }  // it decodes to the same values each time
  StoredAs kind() const override { return source_->kind(); }
  void add_rounded(std::vector<std::uint32_t>& items) const override {
    source_->add_rounded(items);
  }
  void add_sources(const StoredWatch* watch, std::vector<RebuildSource>& items) const override {
    source_->add_as_source(watch, /*even_kept=*/true, items);
  }

 private:
  const std::shared_ptr<Stored> source_;
};
using Decoded = BasicDecoded<>;

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a graph node holds of a tensor that it saved: a view of what is stored, or the tensor.
#include <ATen/ops/empty_strided.h>
#include <fourfold/activations/detail/stored_payload.hpp>
#include <fourfold/torch/operators.hpp>      // OperatorsPause
#include <fourfold/torch/saved_tensors.hpp>  // Saved

#include <cstdint>
#include <memory>
#include <utility>

namespace fourfold::inline v0::detail {

/// In the graph: one saved tensor as a view of what is stored.
template <class = void>
class BasicSavedView final : public door::Saved {
 public:
  BasicSavedView(std::shared_ptr<Stored> stored, StorageView view)
      : stored_(std::move(stored)), view_(std::move(view)) {}
  at::Tensor unpack() override { return stored_->view(view_); }
  at::Tensor unpack_packed() override { return packed_or_plain(stored_, view_); }

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

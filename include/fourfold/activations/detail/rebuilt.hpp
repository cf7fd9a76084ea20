// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A value that is not held: its operator runs again, on what is held anyway.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_strided.h>
#include <fourfold/activations/detail/stored.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/operators.hpp>  // OperatorsPause

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// One operator as it ran: its arguments, tensors among them weakly.
struct OperatorCall {
  struct Argument {
    at::IValue constant;  ///< what is not a tensor; a wrapped number; an undefined tensor
    bool tensor = false;  ///< the rest says which
    bool requires_grad = false;
    StorageView view;
    std::int64_t version = 0, numel = 0, bytes = 0;
    WeakStorage storage{c10::Storage().getWeakStorageImpl()};
    c10::VariableVersion counter;
    /// Of what an in-place operator wrote to: who had made it before. Its storage holds it no more.
    std::shared_ptr<const OperatorCall> previous;
    std::size_t previous_result = 0;

    /// Whether the tensor is still what the operator read, as far as versions tell.
    [[nodiscard]] bool unchanged() const {
      return !counter.enabled() || counter.current_version() == version;
    }
  };
  struct Result {
    StorageView view;
    std::int64_t version = 0, values = 0;  ///< values: of its storage
    bool defined = false;
  };

  explicit OperatorCall(const c10::OperatorHandle& handle) : op(handle) {}

  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<Result> results;
  std::uint64_t time = 0;  ///< on the tape's clock, when it began
  int writes = 0;          ///< how many calls before it wrote to what it writes to

  /// Made this value, whole, as it was at this version; `result` of its results.
  [[nodiscard]] bool made(std::size_t result, std::int64_t version) const {
    return result < results.size() && results[result].defined && results[result].version == version;
  }
};

template <class = void>
class BasicRebuilt final : public Stored, public std::enable_shared_from_this<BasicRebuilt<>> {
 public:
  struct Input {
    at::IValue constant;             ///< if `stored` is null
    std::shared_ptr<Stored> stored;  ///< else its view
    StorageView view;
  };

  BasicRebuilt(std::shared_ptr<StorageUse> use, std::shared_ptr<const OperatorCall> call,
               std::size_t result, std::vector<Input> inputs)
      : Stored(std::move(use), call->results[result].version, call->results[result].view.dtype,
               Extent::whole(call->results[result].values)),
        call_(std::move(call)),
        result_(result),
        inputs_(std::move(inputs)) {
    for (const Input& input : inputs_) {
      if (input.stored != nullptr) depth_ = std::max(depth_, 1 + depth_of(*input.stored));
      if (input.stored == nullptr) {
        if (input.constant.isTensor() && input.constant.toTensor().defined())
          cloned_ += static_cast<std::int64_t>(input.constant.toTensor().nbytes());
      } else {
        exact_ = exact_ && input.stored->exact();
      }
    }
    use_->index()->totals().held.add(cloned_);
  }
  ~BasicRebuilt() override { use_->index()->totals().held.add(-cloned_); }

  /// How many operators run one after the other to compute it; 0: it is held.
  [[nodiscard]] static int depth_of(const Stored& stored) {
    return stored.kind() == StoredAs::kRebuilt ? static_cast<const BasicRebuilt&>(stored).depth_
                                               : 0;
  }

  /// To be told before what it is computed from is written to.
  void depend() {
    for (const Input& input : inputs_)
      if (input.stored != nullptr && input.stored->kind() == StoredAs::kKept)
        static_cast<Kept&>(*input.stored).add_dependent(weak_from_this());
  }

  c10::Storage storage() override {
    const std::lock_guard lock(mutex_);
    if (held_ != nullptr) return held_->storage();
    if (auto alive = dense_.lock()) return c10::Storage(std::move(alive));
    note_decoding();
    const at::Tensor values = compute();
    dense_ = values.storage().getWeakStorageImpl();
    note_decoded(values.storage());
    return values.storage();
  }
  bool exact() const override { return exact_; }
  StoredAs kind() const override { return StoredAs::kRebuilt; }
  std::int64_t own_bytes() const override { return cloned_; }
  void add_rounded(std::vector<std::uint32_t>& items) const override {
    for (const Input& input : inputs_)
      if (input.stored != nullptr) input.stored->add_rounded(items);
  }

  /// What it is computed from is about to be written to: computed now, and held.
  void before_input_write() override {
    const std::lock_guard lock(mutex_);
    if (held_ != nullptr) return;
    const PlaceGuard place(Place::kActivations);
    c10::Storage values;
    if (auto alive = dense_.lock()) {
      values = c10::Storage(std::move(alive));
    } else {
      try {
        note_decoding();
        values = compute().storage();
        note_decoded(values);
      } catch (const c10::Error&) {
        return;  // an input is gone already, and unpacking will say so
      }
    }
    held_ = std::make_shared<HeldStorage>(std::move(values), use_->index()->shared_totals());
    use_->index()->totals().materialised.fetch_add(1, std::memory_order_relaxed);
    inputs_.clear();
  }

 private:
  at::Tensor compute() {
    const door::OperatorsPause pause;
    const at::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    c10::Stack stack;
    stack.reserve(inputs_.size());
    for (const Input& input : inputs_)
      stack.push_back(input.stored ? at::IValue(input.stored->view(input.view)) : input.constant);
    call_->op.callBoxed(stack);
    at::Tensor values = std::move(stack.at(result_)).toTensor();
    const StorageView& expected = call_->results[result_].view;
    TORCH_INTERNAL_ASSERT(
        values.scalar_type() == expected.dtype && values.sizes() == at::IntArrayRef(expected.sizes),
        call_->op.operator_name(), " gave another result when it ran again");
    if (values.strides() != at::IntArrayRef(expected.strides) || values.storage_offset() != 0)
      values = at::empty_strided(expected.sizes, expected.strides, values.options()).copy_(values);
    return values;
  }

  const std::shared_ptr<const OperatorCall> call_;
  const std::size_t result_;
  std::vector<Input> inputs_;
  std::int64_t cloned_ = 0;
  int depth_ = 1;
  bool exact_ = true;
  std::mutex mutex_;
  WeakStorage dense_{c10::Storage().getWeakStorageImpl()};
  std::shared_ptr<HeldStorage> held_;
};
using Rebuilt = BasicRebuilt<>;

}  // namespace fourfold::inline v0::detail

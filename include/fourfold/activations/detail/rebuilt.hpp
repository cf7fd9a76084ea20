// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A value that is not held: its operator runs again, on what is held anyway.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/FunctionRef.h>
#include <fourfold/activations/detail/stored.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/operators.hpp>  // OperatorsPause

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <numeric>
#include <string_view>
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

/// What an operator reads when it runs again: values that are stored, or a constant.
struct RebuiltInput {
  at::IValue constant;             ///< if `stored` is null
  std::shared_ptr<Stored> stored;  ///< else its view
  StorageView view;
  bool even_kept = true;  ///< also were `stored` kept (written_is_an_error)
};

/// Values of a result of `call` that can be computed from as many of each input: 1 where the operator
/// is elementwise, a row of a layer_norm; a multiple of both that and of what the inputs can be read
/// in. 0: only the whole can.
template <class = void>
std::int64_t row_by_row(const OperatorCall& call, std::size_t result,
                        const std::vector<RebuiltInput>& inputs) {
  constexpr std::size_t kShape = 1, kFormat = 6;  // of native_layer_norm, of _to_copy
  constexpr auto kElementwise = std::to_array<std::string_view>(
      {"gelu", "relu", "silu", "sigmoid", "tanh", "mul", "add", "sub", "_to_copy"});
  std::string_view name = call.op.schema().name();
  if (!name.starts_with("aten::")) return 0;
  name.remove_prefix(6);
  const StorageView& made = call.results[result].view;
  if (!made.contiguous() || made.numel() != call.results[result].values) return 0;
  const bool normalises = name == "native_layer_norm" && result == 0;
  if (!normalises &&
      std::find(kElementwise.begin(), kElementwise.end(), name) == kElementwise.end())
    return 0;
  if (name == "_to_copy" && !inputs.at(kFormat).constant.isNone()) {
    const auto format = inputs[kFormat].constant.toMemoryFormat();
    if (format != at::MemoryFormat::Preserve && format != at::MemoryFormat::Contiguous) return 0;
  }
  std::int64_t step = 1;
  if (normalises)
    for (const std::int64_t size : inputs.at(kShape).constant.toIntVector()) step *= size;
  for (std::size_t i = 0; i < inputs.size() && !(normalises && i > 0); ++i) {
    const RebuiltInput& input = inputs[i];
    if (input.stored == nullptr) {
      const bool wide = input.constant.isTensor() && input.constant.toTensor().defined() &&
                        input.constant.toTensor().numel() != 1;
      if (wide || normalises) return 0;
      continue;
    }
    const std::int64_t granule = input.stored->granule();
    if (granule == 0 || !input.view.contiguous() || input.view.numel() != made.numel() ||
        (input.view.offset - input.stored->first()) % granule != 0)
      return 0;
    step = std::lcm(step, granule);
  }
  return step;
}

template <class = void>
class BasicRebuilt final : public Stored, public std::enable_shared_from_this<BasicRebuilt<>> {
 public:
  using Input = RebuiltInput;

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

  Stored::Copy copy() override {
    const std::lock_guard lock(mutex_);
    auto alive = held_ == nullptr ? dense_.lock() : c10::intrusive_ptr<c10::StorageImpl>();
    if (held_ != nullptr || alive) {
      TORCH_CHECK(
          held_ == nullptr || !dense_.written(),
          "one of the variables needed for gradient computation has been modified by an "
          "inplace operation: fourfold had computed an activation of ",
          extent_.span,
          " values again, and what it gave out was written to. Clone what a custom Function "
          "returns of what it saved");
      c10::Storage shared = held_ != nullptr ? held_->storage() : c10::Storage(std::move(alive));
      cuda::read_on_current_stream(shared, computed_on_);
      return {std::move(shared), dense_.version()};
    }
    note_decoding();
    const at::Tensor values = compute();
    dense_.set(values.storage());
    note_decoded(values.storage());
    return {values.storage(), dense_.version()};
  }
  std::int64_t granule() override {
    const std::lock_guard lock(mutex_);
    return held_ == nullptr && dense_.expired() ? row_by_row(*call_, result_, inputs_) : 0;
  }
  at::Tensor piece(std::int64_t begin, std::int64_t end) override;
  at::Device device() const override {
    for (const Input& input : inputs_)
      if (input.stored != nullptr) return input.stored->device();
    return at::kCPU;
  }
  bool exact() const override { return exact_; }
  StoredAs kind() const override { return StoredAs::kRebuilt; }
  std::int64_t own_bytes() const override { return cloned_; }
  void add_rounded(std::vector<std::uint32_t>& items) const override {
    for (const Input& input : inputs_)
      if (input.stored != nullptr) input.stored->add_rounded(items);
  }
  void add_sources(const StoredWatch* watch, std::vector<RebuildSource>& items) const override {
    for (const Input& input : inputs_)
      if (input.stored != nullptr) input.stored->add_as_source(watch, input.even_kept, items);
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
        dense_.set(values);
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
  /// The operator's result, of what read(input, its index) gives for each input that is stored.
  at::Tensor run(c10::function_ref<at::Tensor(const Input&, std::size_t)> read) {
    const door::OperatorsPause pause;
    const at::NoGradGuard no_grad;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    c10::Stack stack;
    stack.reserve(inputs_.size());
    for (std::size_t i = 0; i < inputs_.size(); ++i)
      stack.push_back(inputs_[i].stored ? at::IValue(read(inputs_[i], i)) : inputs_[i].constant);
    call_->op.callBoxed(stack);
    return std::move(stack.at(result_)).toTensor();
  }
  at::Tensor compute() {
    at::Tensor values =
        run([](const Input& input, std::size_t) { return input.stored->view(input.view); });
    computed_on_ = cuda::current_stream(values.device());
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
  DenseCopy dense_;
  std::shared_ptr<HeldStorage> held_;
  std::optional<c10::Stream> computed_on_;
};
using Rebuilt = BasicRebuilt<>;

template <class T>
at::Tensor BasicRebuilt<T>::piece(std::int64_t begin, std::int64_t end) {
  const std::lock_guard lock(mutex_);
  if (held_ != nullptr) return run_of(held_->storage(), begin, end, dtype_);
  // Of a layer_norm the first input alone goes by rows; its weight and bias are the same for all.
  const bool normalises = call_->op.schema().name() == "aten::native_layer_norm";
  at::Tensor values = run([&](const Input& input, std::size_t i) {
    if (normalises && i > 0) return input.stored->view(input.view);
    const std::int64_t at = input.view.offset - input.stored->first();
    at::Tensor run = input.stored->piece(at + begin, at + end);
    if (!normalises) return run;
    std::vector<std::int64_t> sizes = inputs_[1].constant.toIntVector();
    sizes.insert(sizes.begin(), -1);
    return run.view(sizes);
  });
  TORCH_INTERNAL_ASSERT(values.numel() == end - begin && values.scalar_type() == dtype_);
  return values.view({end - begin});
}

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Where the storages of a forward come from. Knows them weakly; forgets all when backward begins.
#include <ATen/core/grad_mode.h>
#include <c10/util/SmallVector.h>
#include <fourfold/activations/detail/operator_traits.hpp>
#include <fourfold/activations/detail/rebuilt.hpp>
#include <fourfold/activations/detail/stored.hpp>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/autocast.hpp>
#include <fourfold/torch/operators.hpp>
#include <fourfold/torch/saved_tensors.hpp>  // is_parameter

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// Whether a tensor's values lie in a storage that a view of them describes: dense or strided, of a
/// plain dtype, on a device; not packed, not of functorch, not quantised.
inline bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kStrange =
      c10::DispatchKeySet(c10::DispatchKey::Python) |
      c10::DispatchKeySet(c10::DispatchKey::Functionalize) |
      c10::DispatchKeySet(c10::DispatchKey::FuncTorchBatched) |
      c10::DispatchKeySet(c10::DispatchKey::FuncTorchGradWrapper) |
      c10::DispatchKeySet(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) |
      c10::DispatchKeySet(c10::DispatchKey::TESTING_ONLY_GenericWrapper) |
      c10::DispatchKeySet(c10::DispatchKey::Conjugate) |
      c10::DispatchKeySet(c10::DispatchKey::Negative) |
      c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);
  return tensor.defined() && tensor.layout() == at::kStrided && tensor.has_storage() &&
         !tensor.key_set().has_any(kStrange) && !tensor.is_quantized() && !tensor.is_meta() &&
         !tensor.is_inference() && !tensor.is_nested() &&
         !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
         tensor.storage().nbytes() > 0;
}

template <class T = void>
class BasicTape final : public door::OperatorObserver {
  using Stored = BasicStored<T>;
  using StorageIndex = BasicStorageIndex<T>;
  using OperatorTraits = BasicOperatorTraits<T>;

 public:
  /// What is known of a storage.
  struct Origin {
    WeakStorage storage{c10::Storage().getWeakStorageImpl()};
    std::shared_ptr<const OperatorCall> call;  ///< of a cheap operator; else null
    std::size_t result = 0;
    const OperatorTraits* traits = nullptr;  ///< of its operator
    std::uint64_t number = 0;                ///< of its operator, in this forward
    std::uint64_t began = 0, time = 0;       ///< its operator; 0: it comes from outside
    std::uint64_t written = 0;               ///< when it was last written to in place
    bool assembled = false;                  ///< parts of it may never have been written
    bool two_values = false;
  };

  /// The operator that this thread is in. An operator's tensors are packed within it.
  struct Frame {
    const OperatorTraits* traits = nullptr;
    std::uint64_t time = 0;
    std::uint64_t number = 0;                 ///< operators of this forward before it
    c10::SmallVector<at::Tensor, 6> tensors;  ///< its arguments
    c10::SmallVector<std::pair<c10::StorageImpl*, std::int64_t>, 2> written;  ///< version before
    std::shared_ptr<OperatorCall> call;
    std::vector<at::IValue> arguments;  ///< of operators whose exact code depends on them
    std::vector<std::shared_ptr<const Stored>> saved;  ///< if somebody listens

    [[nodiscard]] const at::Tensor* argument(c10::StorageImpl* key) const {
      for (const at::Tensor& tensor : tensors)
        if (tensor.storage().unsafeGetStorageImpl() == key) return &tensor;
      return nullptr;
    }
    /// Whether it has yet to write to this argument: the noise of rrelu is saved so.
    [[nodiscard]] bool unwritten(c10::StorageImpl* key, std::int64_t version) const {
      for (const auto& [storage, before] : written)
        if (storage == key && version == before) return true;
      return false;
    }
  };

  BasicTape(std::shared_ptr<StorageIndex> index, std::vector<std::string_view> cheap)
      : index_(std::move(index)), cheap_(std::move(cheap)) {}

  bool before(const c10::OperatorHandle& op, const c10::Stack& stack) override {
    const OperatorTraits& traits = traits_of(op);
    const at::ArrayRef<at::IValue> arguments = last(stack, traits.arguments);
    Frame& frame = push();
    try {
      frame.traits = &traits;
      frame.time = index_->tick();
      frame.number = operators_++;
      for (const at::IValue& value : arguments) collect(value, frame.tensors);
      if (traits.pools > 0 || traits.powers || traits.gates()) frame.arguments = arguments.vec();
      const bool repeats = (traits.cheap || traits.cheap_in_place) && at::GradMode::is_enabled() &&
                           !door::autocasting(traits.casts);
      if (repeats) frame.call = record(op, traits, arguments, frame.time);
      if (frame.call != nullptr && traits.cheap_in_place && !note_previous(*frame.call))
        frame.call = nullptr;
      for (std::size_t i : traits.written) note_write(frame, arguments[i]);
    } catch (...) {
      pop();
      throw;
    }
    return true;
  }

  void after(const c10::OperatorHandle&, const c10::Stack& stack) override {
    Frame& frame = *frames_[depth_ - 1];
    const at::ArrayRef<at::IValue> results = last(stack, frame.traits->results);
    const std::uint64_t now = index_->tick();
    bool fresh = false;
    for (std::size_t i = 0; i < results.size(); ++i) {
      if (!results[i].isTensor()) continue;  // lists of results are views or rare
      const at::Tensor& tensor = results[i].toTensor();
      if (!is_plain(tensor)) continue;
      c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
      if (frame.argument(key) != nullptr) {  // a view, or written in place
        if (frame.traits->cheap_in_place && frame.call != nullptr)
          note_result(frame, i, tensor, origin_of(tensor.storage()));
        continue;
      }
      Origin& origin = origin_of(tensor.storage());
      fresh = true;
      if (origin.time > frame.time) continue;  // an operator within this one knows better
      origin.began = frame.time, origin.time = now, origin.written = 0;
      origin.traits = frame.traits, origin.number = frame.number, origin.result = i;
      origin.two_values = false;
      origin.assembled = frame.traits->assembles;
      origin.call = nullptr;
      if (frame.call != nullptr) note_result(frame, i, tensor, origin);
    }
    if (fresh && of_exact_alone(frame))
      for (const at::IValue& value : results)
        if (value.isTensor() && is_plain(value.toTensor()))
          index_->mark_exact(value.toTensor().storage());
    if (!frame.saved.empty()) tell(frame, results);
    pop();
  }
  void failed() noexcept override { pop(); }
  void backward_began() noexcept override {
    if (!origins_.empty()) origins_.clear();
  }
  /// For another forward.
  void begin(std::uint64_t forward) {
    forward_ = forward;
    storages_ = operators_ = parts_ = 0;
  }
  /// Operators are numbered from here on as if nobody knew how many there were before: a block runs
  /// a few more where it is to be computed again.
  void begin_part() { operators_ = ++parts_ << 24; }
  [[nodiscard]] std::uint64_t forward() const { return forward_; }
  [[nodiscard]] std::uint64_t operators() const { return operators_; }  ///< of this forward so far
  /// From now on `plan` is told of operators that save; null: nobody is.
  void told_to(SavedPlan* plan) { plan_ = plan; }
  /// The operator that runs just now saved it.
  void note_saved(const std::shared_ptr<Stored>& stored) {
    if (plan_ != nullptr && depth_ > 0) frames_[depth_ - 1]->saved.push_back(stored);
  }
  [[nodiscard]] std::uint64_t next_storage() { return storages_++; }
  void clear() {
    origins_.clear();
    frames_.clear();
    depth_ = 0;
  }

  /// Null outside of every operator.
  [[nodiscard]] const Frame* frame() const {
    return depth_ == 0 ? nullptr : frames_[depth_ - 1].get();
  }
  [[nodiscard]] const Origin* origin(c10::StorageImpl* key) const { return origins_.find(key); }
  [[nodiscard]] const std::shared_ptr<StorageIndex>& index() const { return index_; }

 private:
  static constexpr int kMostWrites = 8;  ///< in place, to one result, that are run again

  static at::ArrayRef<at::IValue> last(const c10::Stack& stack, std::size_t count) {
    return at::ArrayRef<at::IValue>(stack).slice(stack.size() - count, count);
  }
  static void collect(const at::IValue& value, c10::SmallVector<at::Tensor, 6>& tensors) {
    if (value.isTensor()) {
      if (is_plain(value.toTensor())) tensors.push_back(value.toTensor());
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      for (const at::IValue& one : value.toListRef()) collect(one, tensors);
    }
  }

  void note_write(Frame& frame, const at::IValue& value) {
    c10::SmallVector<at::Tensor, 6> targets;
    collect(value, targets);
    for (const at::Tensor& tensor : targets) {
      c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
      frame.written.emplace_back(key, tensor._version());
      index_->before_write(key);
      Origin& origin = origin_of(tensor.storage());
      origin.call = nullptr;
      origin.written = frame.time;
      const bool scaled = frame.traits->scales_in_place && origin.two_values &&
                          (frame.tensors.size() == 1 || frame.tensors.back().numel() == 1);
      origin.two_values = scaled || frame.traits->draws_two_values;
    }
  }

  /// Null where it cannot be run again. A batch norm in training does not read its running
  /// statistics and is run again without them; another one reads what may change unseen.
  static std::shared_ptr<OperatorCall> record(const c10::OperatorHandle& op,
                                              const OperatorTraits& traits,
                                              at::ArrayRef<at::IValue> arguments,
                                              std::uint64_t time) {
    constexpr std::size_t kMean = 3, kVariance = 4, kTraining = 5;
    if (traits.batch_norm && !arguments[kTraining].toBool()) return nullptr;
    auto call = std::make_shared<OperatorCall>(op);
    call->time = time;
    call->arguments.resize(arguments.size());
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      OperatorCall::Argument& argument = call->arguments[i];
      const at::IValue& value = arguments[i];
      if (traits.batch_norm && (i == kMean || i == kVariance)) continue;  // none
      if (value.isTensorList() || value.isOptionalTensorList() || value.isGenerator() ||
          value.isObject())
        return nullptr;
      if (!value.isTensor() || !value.toTensor().defined() ||
          value.toTensor().unsafeGetTensorImpl()->is_wrapped_number()) {
        argument.constant = value;
        continue;
      }
      const at::Tensor& tensor = value.toTensor();
      if (!is_plain(tensor)) return nullptr;
      argument.tensor = true;
      argument.view = StorageView(tensor);
      argument.version = tensor._version();
      argument.requires_grad = tensor.requires_grad();
      argument.numel = tensor.numel();
      argument.counter = tensor.unsafeGetTensorImpl()->version_counter();
      argument.bytes = static_cast<std::int64_t>(tensor.nbytes());
      argument.storage = tensor.storage().getWeakStorageImpl();
    }
    return call;
  }

  /// Of an in-place operator's call: who made what it is about to write to, which can be had again
  /// in no other way. False where nobody knows.
  bool note_previous(OperatorCall& call) const {
    OperatorCall::Argument& argument = call.arguments.front();
    if (!argument.tensor) return false;
    const Origin* const known = origin(argument.storage._unsafe_get_target());
    if (known == nullptr || known->call == nullptr || known->written > known->call->time ||
        !known->call->made(known->result, argument.version) || known->call->writes >= kMostWrites)
      return false;
    call.writes = known->call->writes + 1;
    argument.previous = known->call, argument.previous_result = known->result;
    return true;
  }

  static void note_result(Frame& frame, std::size_t index, const at::Tensor& tensor,
                          Origin& origin) {
    OperatorCall& call = *frame.call;
    const auto values =
        static_cast<std::int64_t>(tensor.storage().nbytes() / tensor.element_size());
    if (tensor.storage_offset() != 0 || tensor.numel() != values) return;
    if (call.results.size() <= index) call.results.resize(index + 1);
    call.results[index] = {StorageView(tensor), tensor._version(), values, true};
    origin.call = frame.call;
    origin.result = index;
  }

  /// Whether all that an operator read is the model's own (a weight's cast, a normalised weight):
  /// then so is its result. Of a leaf that nobody has named (it may be the model's input), only
  /// copies.
  bool of_exact_alone(const Frame& frame) const {
    if (frame.tensors.empty()) return false;
    return std::all_of(frame.tensors.begin(), frame.tensors.end(), [&](const at::Tensor& tensor) {
      return index_->is_exact(tensor.storage().unsafeGetStorageImpl()) ||
             (frame.traits->copies && door::is_parameter(tensor));
    });
  }

  Origin& origin_of(const c10::Storage& storage) {
    if (origins_.size() >= sweep_at_) {
      origins_.erase_if([](const Origin& one) { return one.storage.expired(); });
      sweep_at_ = std::max<std::size_t>(256, 2 * origins_.size());
    }
    if (Origin* known = origins_.find(storage.unsafeGetStorageImpl())) return *known;
    Origin& made = origins_[storage.unsafeGetStorageImpl()];
    made.storage = storage.getWeakStorageImpl();
    return made;
  }

  const OperatorTraits& traits_of(const c10::OperatorHandle& op) {
    const OperatorTraits* const known = traits_.find(&op.schema());
    return known != nullptr ? *known : traits_.put(&op.schema(), OperatorTraits(op, cheap_));
  }

  void tell(const Frame& frame, at::ArrayRef<at::IValue> results) const {
    if (plan_ == nullptr || results.empty() || !results.front().isTensor()) return;
    std::vector<SavingOperator::Saved> saved;
    for (const std::shared_ptr<const Stored>& one : frame.saved) {
      if (!one->item()) continue;
      saved.push_back({.item = *one->item()});
      one->add_rounded(saved.back().rounded);
    }
    plan_->ran({.forward = forward_,
                .name = frame.traits->name,
                .multiplies = frame.traits->multiplies,
                .arguments = frame.tensors,
                .result = &results.front().toTensor(),
                .saved = saved});
  }

  Frame& push() {
    if (depth_ == frames_.size()) frames_.emplace_back(std::make_unique<Frame>());
    return *frames_[depth_++];
  }
  void pop() {
    Frame& frame = *frames_[--depth_];
    frame.tensors.clear();
    frame.written.clear();
    frame.arguments.clear();
    frame.saved.clear();
    frame.call = nullptr;
  }

  const std::shared_ptr<StorageIndex> index_;
  const std::vector<std::string_view> cheap_;
  PointerMap<OperatorTraits> traits_;  // by schema
  PointerMap<Origin> origins_;
  std::size_t sweep_at_ = 256;
  std::vector<std::unique_ptr<Frame>> frames_;
  std::size_t depth_ = 0;
  std::uint64_t forward_ = 0, storages_ = 0, operators_ = 0, parts_ = 0;
  SavedPlan* plan_ = nullptr;
};
using Tape = BasicTape<>;

}  // namespace fourfold::inline v0::detail

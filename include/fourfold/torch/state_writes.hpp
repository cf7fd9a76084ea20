// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a forward writes beside its result: running statistics, counters, moving averages. A block
/// that is computed again must not write them again, and must read what its forward read.
/// (FairScale patches batch norm modules for this; here any write is seen, through LibTorch's
/// RecordFunction.)
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/Storage.h>
#include <fourfold/torch/operators.hpp>  // OperatorsPause

#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

namespace detail {
/// RecordFunction::inputs() checks a flag that a release build of LibTorch never sets, so a program
/// built without NDEBUG cannot call it. An explicit instantiation may name a private member.
c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& fn);
template <auto Inputs>
struct ExposeInputs {
  friend c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& fn) {
    return fn.*Inputs;
  }
};
template struct ExposeInputs<&at::RecordFunction::inputs_>;
}  // namespace detail

/// Notes, while it lives, each storage of a leaf that this thread writes to in place, by name of
/// the operator ("..._", an out overload, a batch norm's running statistics). Watches nest.
template <class = void>
class [[nodiscard]] BasicStateWrites {
 public:
  /// Larger ones are put back as they were, but a second run reads their newest value.
  static constexpr std::size_t kMostBytesKept = 1 << 16;

  struct Written {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    at::Tensor before;  // its bytes before the first write; undefined where they were too many
  };

  /// Notes into `written`, which keeps at the end what is still alive: what only the watched code
  /// knew is gone by then.
  explicit BasicStateWrites(std::vector<Written>& written)
      : written_(written), outer_(innermost()), handle_(add_callback()) {
    innermost() = this;
  }
  ~BasicStateWrites() {
    at::removeCallback(handle_);
    innermost() = outer_;
    std::erase_if(written_, [](const Written& one) { return one.storage.expired(); });
  }
  BasicStateWrites(const BasicStateWrites&) = delete;
  BasicStateWrites& operator=(const BasicStateWrites&) = delete;

  /// The bytes of what was written, put back when it dies; while it lives, what the first run
  /// found.
  class [[nodiscard]] Rewind {
   public:
    explicit Rewind(const std::vector<Written>& written) {
      const at::NoGradGuard no_grad;
      const at::RecordFunctionGuard unobserved(
          /*is_enabled=*/false);  // `written` may be watched now
      for (const Written& one : written) {
        c10::intrusive_ptr<c10::StorageImpl> storage = one.storage.lock();
        if (!storage) continue;
        at::Tensor live = bytes_of(c10::Storage(std::move(storage)));
        now_.emplace_back(live, live.clone());
        if (one.before.defined() && one.before.numel() == live.numel()) live.copy_(one.before);
      }
    }
    ~Rewind() {
      const at::NoGradGuard no_grad;
      const at::RecordFunctionGuard unobserved(/*is_enabled=*/false);
      for (auto& [live, bytes] : now_)
        if (live.numel() == bytes.numel()) live.copy_(bytes);
    }
    Rewind(const Rewind&) = delete;
    Rewind& operator=(const Rewind&) = delete;

   private:
    std::vector<std::pair<at::Tensor, at::Tensor>> now_;
  };

 private:
  static at::CallbackHandle add_callback() {
    return at::addThreadLocalCallback(at::RecordFunctionCallback(&before_operator)
                                          .needsInputs(true)
                                          .scopes({at::RecordScope::FUNCTION}));
  }
  static BasicStateWrites*& innermost() {
    static thread_local BasicStateWrites* writes = nullptr;
    return writes;
  }

  /// A storage seen as bytes, with a version counter of its own: the user's versions stay.
  static at::Tensor bytes_of(const c10::Storage& storage) {
    at::Tensor bytes = at::empty({0}, at::TensorOptions(at::kByte).device(storage.device()));
    return bytes.set_(storage);
  }

  static std::unique_ptr<at::ObserverContext> before_operator(const at::RecordFunction& fn) {
    const std::string_view name = fn.name();
    const c10::ArrayRef<const c10::IValue> inputs = detail::inputs_of(fn);
    if (inputs.empty() || innermost() == nullptr) return nullptr;
    const at::RecordFunctionGuard unobserved(/*is_enabled=*/false);
    if (name.ends_with('_') && !name.ends_with("__")) {
      innermost()->note(inputs.front());
    } else if (name.ends_with("batch_norm") && inputs.size() > 5 && inputs[5].isBool()) {
      if (!inputs[5].toBool()) return nullptr;
      innermost()->note(inputs[3]), innermost()->note(inputs[4]);  // running_mean, running_var
    } else if (std::strstr(fn.overload_name(), "out") != nullptr) {
      innermost()->note(inputs.back());
    }
    return nullptr;
  }

  void note(const at::IValue& value) {
    if (value.isTensor()) return note(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) note(tensor);
  }
  void note(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_leaf() || tensor.layout() != at::kStrided ||
        tensor.is_meta() || !tensor.has_storage() ||
        tensor.key_set().has(c10::DispatchKey::TESTING_ONLY_GenericWrapper))
      return;
    for (BasicStateWrites* writes = this; writes != nullptr; writes = writes->outer_)
      writes->note(tensor.storage());
  }
  void note(const c10::Storage& storage) {
    for (const Written& one : written_)
      if (one.storage._unsafe_get_target() == storage.unsafeGetStorageImpl()) return;
    const at::NoGradGuard no_grad;
    const door::OperatorsPause pause;
    at::Tensor before;
    if (storage.nbytes() <= kMostBytesKept) before = bytes_of(storage).clone();
    written_.push_back({storage.getWeakStorageImpl(), std::move(before)});
  }

  std::vector<Written>& written_;
  BasicStateWrites* const outer_;
  const at::CallbackHandle handle_;
};
using StateWrites = BasicStateWrites<>;

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The engine behind door one (saved_tensors.hpp), and the interface of packers.
///
/// The engine is also the door's state: LibTorch holds exactly one in a process, so two shared
/// libraries that include this header find each other through it, however they were built and
/// loaded; they speak through its virtual functions, whose order and meaning kAbi numbers. Not in
/// the inline version namespace for that reason.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <c10/util/Type.h>  // demangle
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/autograd/variable.h>
#include <fourfold/torch/node.hpp>
#include <fourfold/torch/packed_nodes.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <typeinfo>
#include <utility>
#include <vector>

namespace fourfold::door {

/// One saved tensor, as a SavedTensors holds it. Lives as long as the graph node that saved it.
class Saved {
 public:
  virtual ~Saved() = default;
  /// The tensor as it was saved: sizes, strides, dtype, device. Called any number of times
  /// (retain_graph, double backward), on any thread, needing no thread-local state; under NoGrad
  /// and with autocast off. What it returns is never written to.
  [[nodiscard]] virtual at::Tensor unpack() = 0;
  /// The same for a reader that takes packed tensors (torch/packed_backward.hpp): it may come back
  /// as one, whose values are decoded where they are read.
  [[nodiscard]] virtual at::Tensor unpack_packed() { return unpack(); }
};

/// What a packer knows of a tensor that a checkpoint saves and drops (SavedTensors::foresee).
struct Foreseen {
  /// The operator that saves it, by the packer's count; 0: none.
  std::uint64_t saver = 0;
  /// How to do without it in the second run; null: it must be made.
  std::shared_ptr<const void> result{};
};

/// What a scope does with the tensors that autograd saves on its thread.
class SavedTensors {
 public:
  virtual ~SavedTensors() = default;
  /// Under NoGrad and with autocast off, once for each saved tensor; `tensor` is detached from the
  /// graph already and shares the storage of what was saved. Not null.
  [[nodiscard]] virtual std::shared_ptr<Saved> pack(const at::Tensor& tensor) = 0;
  /// What else must be on while tensors are packed (the operators' tape); held during a recompute.
  [[nodiscard]] virtual std::shared_ptr<void> activate() { return nullptr; }
  /// For packers that ask where a tensor comes from: `attached` is the same tensor in the graph
  /// (grad_fn, is_leaf). Keeping it makes a cycle that is never freed; keep `tensor`.
  [[nodiscard]] virtual std::shared_ptr<Saved> pack_attached(const at::Tensor& tensor,
                                                             const at::Tensor& attached) {
    static_cast<void>(attached);
    return pack(tensor);
  }
  /// An input of a checkpoint: what its second run starts from, so its error reaches all of it.
  [[nodiscard]] virtual std::shared_ptr<Saved> pack_block_input(const at::Tensor& tensor,
                                                                const at::Tensor& attached) {
    return pack_attached(tensor, attached);
  }
  /// For a checkpoint's second run, which may end before an operator whose result would not be held
  /// but computed again, from what the operator itself saved. Asked in the first run of each tensor;
  /// `maker`: the saver of the one before, whose result this may be.
  [[nodiscard]] virtual Foreseen foresee(const at::Tensor& tensor, const at::Tensor& attached,
                                         std::uint64_t maker) {
    static_cast<void>(tensor), static_cast<void>(attached), static_cast<void>(maker);
    return {};
  }
  /// In the second run, when the maker has saved the last of its own: what stands for the tensor of
  /// which foresee() returned `result`, computed of that. Null: the run must go on.
  [[nodiscard]] virtual std::shared_ptr<Saved> pack_foreseen(
      const std::shared_ptr<const void>& result) {
    static_cast<void>(result);
    return nullptr;
  }
  /// A checkpoint drops what it is given and computes it again later; it says so, and `around` is
  /// who holds payloads in its stead (null: nobody, they are referenced).
  [[nodiscard]] virtual bool recomputes() const { return false; }
  [[nodiscard]] virtual std::shared_ptr<SavedTensors> around() const { return nullptr; }
};

namespace detail {

/// What stands between a tensor saved and the same tensor written to in place since.
template <class = void>
class VersionCheck {
 public:
  VersionCheck() = default;
  /// `tensor` is defined. Keeps its counter, not its storage.
  explicit VersionCheck(const at::Tensor& tensor) : options_(tensor.options()) {
    if (tensor.is_inference()) return;
    if (!tensor.is_nested()) sizes_ = tensor.sizes().vec();
    counter_ = torch::autograd::impl::version_counter(tensor);
    expected_ = counter_.current_version();
    if (!tensor.requires_grad() || tensor.is_leaf()) return;
    producer_ = WeakNodePtr(tensor.grad_fn());
    output_nr_ = static_cast<std::uint32_t>(tensor.output_nr());
  }

  /// Throws what SavedVariable::unpack throws without hooks.
  void check() const {
    if (!counter_.enabled() || counter_.current_version() == expected_) return;
    std::ostringstream message;
    message << "one of the variables needed for gradient computation has been modified by an "
               "inplace operation: ["
            << at::toString(options_.computeDispatchKey())
            << at::toString(options_.dtype().toScalarType()) << "Type ";
    if (sizes_) message << at::IntArrayRef(*sizes_);
    message << "]";
    if (const auto node = producer_.lock())
      message << ", which is output " << output_nr_ << " of " << node->name() << ",";
    message
        << " is at version " << counter_.current_version() << "; expected version " << expected_
        << " instead. Hint: enable anomaly detection to find the operation that failed to compute "
           "its gradient, with torch.autograd.set_detect_anomaly(True).";
    TORCH_CHECK(false, message.str());
  }

  [[nodiscard]] const std::optional<std::vector<std::int64_t>>& sizes() const { return sizes_; }

 private:
  c10::VariableVersion counter_;  // disabled: nothing to check
  std::uint32_t expected_ = 0;
  std::uint32_t output_nr_ = 0;
  WeakNodePtr producer_{NodePtr()};
  at::TensorOptions options_;
  std::optional<std::vector<std::int64_t>> sizes_;  // none: nested
};

template <class T = void>
class SavedReference final : public Saved {
 public:
  explicit SavedReference(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    const at::NoGradGuard no_grad;
    check_ = VersionCheck<T>(tensor);
    tensor_ = tensor.detach();
  }
  at::Tensor unpack() override {
    check_.check();
    return tensor_;
  }

 private:
  VersionCheck<T> check_;
  at::Tensor tensor_;
};

/// One scope, shared by its guard and by the stack of its thread.
struct OpenScope {
  std::shared_ptr<SavedTensors> packer;
  bool in_backward = false;
  std::thread::id thread;
  std::atomic<bool> closed{false};  // set by a guard that dies on another thread
  std::atomic<std::int64_t> packed{0};
  std::atomic<std::int64_t> passed{0};

  [[nodiscard]] bool passes_through() const {
    return !in_backward &&
           (torch::autograd::get_current_graph_task_id() != -1 || !at::GradMode::is_enabled());
  }
};

/// `tensor` into the hands of `packer`, under what packers are promised.
template <class = void>
std::shared_ptr<Saved> pack_with(SavedTensors& packer, const at::Tensor& tensor,
                                 bool block_input = false) {
  const at::NoGradGuard no_grad;
  // A packer's own arithmetic is not the model's: autocast must not round it.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::shared_ptr<Saved> saved = block_input ? packer.pack_block_input(tensor.detach(), tensor)
                                             : packer.pack_attached(tensor.detach(), tensor);
  TORCH_CHECK(
      saved != nullptr,
      "a SavedTensors returned null from pack(); it must return what unpacks to the tensor, "
      "at least saved_reference(tensor)");
  return saved;
}

inline at::Tensor unpack_from(Saved& saved, bool packed = false) {
  const at::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor tensor = packed ? saved.unpack_packed() : saved.unpack();
  TORCH_INTERNAL_ASSERT(tensor.defined(), "a Saved unpacked to an undefined tensor");
  return tensor;
}

/// What LibTorch keeps in place of a saved tensor.
template <class T = void>
class SavedTensorHooks final : public torch::autograd::SavedVariableHooks {
 public:
  explicit SavedTensorHooks(std::shared_ptr<OpenScope> scope) : scope_(std::move(scope)) {}

  void call_pack_hook(const at::Tensor& tensor) override {
    check_ = VersionCheck<T>(tensor);
    saved_ = pack_with(*scope_->packer, tensor);
    scope_->packed.fetch_add(1, std::memory_order_relaxed);
    scope_.reset();  // a graph may outlive its scope; it needs the payload alone
  }

  at::Tensor call_unpack_hook() override {
    check_.check();
    at::Tensor tensor = unpack_from(*saved_, node_takes_packed());
    if (check_.sizes() && !tensor.is_nested())
      TORCH_INTERNAL_ASSERT(tensor.sizes() == at::IntArrayRef(*check_.sizes()),
                            "a Saved unpacked to sizes ", tensor.sizes(), ", saved were ",
                            at::IntArrayRef(*check_.sizes()));
    return tensor;
  }

 private:
  std::shared_ptr<OpenScope> scope_;  // until packed
  VersionCheck<T> check_;
  std::shared_ptr<Saved> saved_;
};

/// Changes with OpenScope, Saved, SavedTensors and SavedTensorsEngine.
inline constexpr int kSavedTensorsAbi = 4;

template <class T = void>
class [[gnu::visibility("default")]] SavedTensorsEngine final : public torch::autograd::Engine {
 public:
  [[nodiscard]] int abi() const { return abi_; }

  std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
    if (open_.load(std::memory_order_relaxed) == 0) return nullptr;
    std::shared_ptr<OpenScope> scope = innermost();
    if (scope == nullptr) {
      if (at::GradMode::is_enabled() && torch::autograd::get_current_graph_task_id() == -1)
        outside_.fetch_add(1, std::memory_order_relaxed);
      return nullptr;
    }
    if (scope->passes_through()) {
      scope->passed.fetch_add(1, std::memory_order_relaxed);
      return nullptr;
    }
    return std::make_unique<SavedTensorHooks<T>>(std::move(scope));
  }

  virtual std::shared_ptr<OpenScope> open(std::shared_ptr<SavedTensors> packer, bool in_backward) {
    Stack& stack = this_thread();
    prune(stack);
    if (!in_backward)
      for (const auto& scope : stack)
        TORCH_CHECK(
            scope->packer != packer,
            "fourfold: a scope of this pipeline is open on this thread already (", stack.size(),
            " deep); forward() opens one itself, so leave yours first, or drop one of the two");
    auto scope = std::make_shared<OpenScope>();
    scope->packer = std::move(packer);
    scope->in_backward = in_backward;
    scope->thread = std::this_thread::get_id();
    stack.push_back(scope);
    open_.fetch_add(1, std::memory_order_relaxed);
    return scope;
  }

  virtual void close(const std::shared_ptr<OpenScope>& scope) noexcept {
    open_.fetch_sub(1, std::memory_order_relaxed);
    if (scope->thread != std::this_thread::get_id()) {
      scope->closed.store(true);
      warn(
          "a scope was left on another thread than it was entered on; its own thread "
          "drops it at the next tensor that it saves. Leave a scope where it was entered");
      return;
    }
    Stack& stack = this_thread();
    const auto found = std::find(stack.begin(), stack.end(), scope);
    if (found == stack.end()) return;  // this thread's end was faster
    if (found + 1 != stack.end() && !(*(found + 1))->closed.load())
      warn(
          "a scope was left before a scope that was entered inside it; the inner one "
          "stays. Leave scopes in the reverse order");
    stack.erase(found);
  }

  /// Null where this thread has none.
  virtual std::shared_ptr<OpenScope> innermost() {
    Stack* stack = stack_of_thread();
    if (stack == nullptr) return nullptr;
    prune(*stack);
    return stack->empty() ? nullptr : stack->back();
  }

  /// How many recomputes this thread is in.
  [[nodiscard]] virtual int& recomputing() {
    static thread_local int depth = 0;
    return depth;
  }

  [[nodiscard]] virtual std::int64_t outside() const {
    return outside_.load(std::memory_order_relaxed);
  }

 private:
  using Stack = std::vector<std::shared_ptr<OpenScope>>;

  /// Asked also after this thread's thread-locals are gone (static destructors): hence the pointer,
  /// which has no destructor, beside the object that clears it.
  static Stack*& stack_of_thread() {
    static thread_local Stack* stack = nullptr;
    return stack;
  }
  static Stack& this_thread() {
    struct Reaper {
      ~Reaper() {
        delete stack_of_thread();
        stack_of_thread() = nullptr;
      }
    };
    static thread_local Reaper reaper;
    static_cast<void>(reaper);
    if (stack_of_thread() == nullptr) stack_of_thread() = new Stack;
    return *stack_of_thread();
  }
  static void prune(Stack & stack) {
    while (!stack.empty() && stack.back()->closed.load()) stack.pop_back();
  }
  static void warn(const char* message) noexcept {
    try {
      TORCH_WARN(message);
    } catch (...) {  // warnings may have been made errors; a destructor has nobody to tell
    }
  }

  int abi_ = kSavedTensorsAbi;
  std::atomic<std::int64_t> open_{0};
  std::atomic<std::int64_t> outside_{0};
};

/// Ours, if it is LibTorch's engine now. By name: two libraries may each have their own type_info.
/// The ABI is a template argument, so that parts of two versions do not share this very check.
template <int Abi = kSavedTensorsAbi>
SavedTensorsEngine<>* installed_saved_tensors_engine() {
  torch::autograd::Engine& engine = torch::autograd::Engine::get_default_engine();
  static std::atomic<SavedTensorsEngine<>*> known{nullptr};
  if (&engine == known.load(std::memory_order_acquire))
    return known.load(std::memory_order_relaxed);
  if (std::strcmp(typeid(engine).name(), typeid(SavedTensorsEngine<>).name()) != 0) return nullptr;
  auto* ours = static_cast<SavedTensorsEngine<>*>(&engine);
  TORCH_CHECK(ours->abi() == Abi,
              "fourfold: two parts of this program were built with different versions of it: saved "
              "tensors have door ABI ",
              ours->abi(), " where installed and ", Abi, " here; build all parts with one version");
  known.store(ours, std::memory_order_release);
  return ours;
}

/// Ours, installed on first use.
template <int Abi = kSavedTensorsAbi>
SavedTensorsEngine<>& saved_tensors_engine() {
  using torch::autograd::Engine;
  if (SavedTensorsEngine<>* ours = installed_saved_tensors_engine<Abi>()) return *ours;
  const Engine& theirs = Engine::get_default_engine();
  TORCH_CHECK(
      &theirs == &Engine::get_base_engine(),
      "fourfold: cannot see what autograd saves, since another engine is installed in this "
      "process: ",
      c10::demangle(typeid(theirs).name()),
      ". LibTorch has room for one. In a Python process (PythonEngine) use "
      "torch.autograd.graph.saved_tensors_hooks; elsewhere do not install the other engine");
  static auto* const engine = new SavedTensorsEngine<>;  // leaked: device threads use it
  torch::autograd::set_default_engine_stub([]() -> Engine& { return *engine; });
  SavedTensorsEngine<>* ours = installed_saved_tensors_engine<Abi>();
  TORCH_INTERNAL_ASSERT(ours != nullptr);
  return *ours;
}

}  // namespace detail
}  // namespace fourfold::door

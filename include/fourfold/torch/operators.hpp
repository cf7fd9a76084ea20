// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Door three: the operators that a thread runs.
///
/// A boxed fallback on TESTING_ONLY_GenericMode (c10/core/DispatchKey.h: above functorch, autocast
/// and autograd; LibTorch puts nothing of its own there) tells the innermost observer of the thread
/// about each operator, and passes it on. It is registered when the first scope opens. The key is
/// on inside a scope alone, so a program without one pays nothing.
///
/// Told: operators of the thread that opened the scope, above autograd, outside of InferenceMode,
/// and outside of backward unless the scope says so. LibTorch carries the key to threads of its own
/// (at::ThreadLocalState); there nobody is told. Operators nest: what a composite operator calls is
/// told between its `before` and its `after`, and what it saves for backward is packed there.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <fourfold/torch/door_state.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace fourfold::door {

class [[gnu::visibility("default")]] OperatorObserver {
 public:
  virtual ~OperatorObserver() = default;
  /// The operator's arguments are the last on the stack, `op.schema().arguments().size()` of them.
  /// Returns whether `after` (or `failed`) is to be called.
  virtual bool before(const c10::OperatorHandle& op, const c10::Stack& stack) = 0;
  /// Its results are the last on the stack.
  virtual void after(const c10::OperatorHandle& op, const c10::Stack& stack) = 0;
  /// It threw.
  virtual void failed() noexcept = 0;
  /// This thread works for a backward pass now, and is no longer told.
  virtual void backward_began() noexcept {}
};

inline constexpr c10::DispatchKey kOperatorsKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

namespace detail {

struct OpenObserver {
  OperatorObserver* observer = nullptr;
  bool in_backward = false;
  std::thread::id thread;
  OpenObserver* outer = nullptr;
  std::atomic<bool> closed{false};  // by a scope that was left on another thread
};

struct [[gnu::visibility("default")]] OperatorsState {
  static constexpr std::uint32_t kAbi = 2;
  static constexpr const char* kName = "operators";
  /// The thread's innermost scope: through a pointer, so that every library uses the same variable.
  OpenObserver*& (*innermost)() = []() -> OpenObserver*& {
    static thread_local OpenObserver* top = nullptr;
    return top;
  };
  std::mutex mutex;
  std::shared_ptr<void> registration;  ///< of the fallback; it lives with the process
};

inline OpenObserver* innermost_observer(OperatorsState& state) {
  OpenObserver*& top = state.innermost();
  while (top != nullptr && top->closed.load(std::memory_order_acquire)) {
    OpenObserver* closed = top;
    top = top->outer;
    delete closed;
  }
  return top;
}

inline void observe(const c10::OperatorHandle& op, c10::DispatchKeySet keys, c10::Stack* stack) {
  constexpr c10::DispatchKeySet kBelow(c10::DispatchKeySet::FULL_AFTER, kOperatorsKey);
  static OperatorsState& state = door_state<OperatorsState>();
  OpenObserver* open = state.innermost() == nullptr ? nullptr : innermost_observer(state);
  // Below autograd an operator is a detail of another one, whose schema has told all.
  if (open == nullptr ||
      c10::impl::tls_local_dispatch_key_set().excluded_.isSupersetOf(c10::autograd_dispatch_keyset))
    return op.redispatchBoxed(keys & kBelow, stack);
  if (!open->in_backward && torch::autograd::get_current_graph_task_id() != -1) {
    open->observer->backward_began();
    return op.redispatchBoxed(keys & kBelow, stack);
  }
  OperatorObserver* const observer = open->observer;
  if (!observer->before(op, *stack)) return op.redispatchBoxed(keys & kBelow, stack);
  try {
    op.redispatchBoxed(keys & kBelow, stack);
  } catch (...) {
    observer->failed();
    throw;
  }
  observer->after(op, *stack);
}

inline void register_operators_fallback(OperatorsState& state) {
  const std::lock_guard lock(state.mutex);
  if (state.registration != nullptr) return;
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  TORCH_CHECK(!dispatcher.hasBackendFallbackForDispatchKey(kOperatorsKey),
              "fourfold: cannot see the operators of a forward, since a fallback for the dispatch "
              "key ",
              kOperatorsKey,
              " is registered in this process already: by something else, or by another copy of "
              "fourfold that the loader keeps apart (RTLD_LOCAL); LibTorch has room for one. Load "
              "both with RTLD_GLOBAL, or use one");
  state.registration = std::make_shared<c10::RegistrationHandleRAII>(dispatcher.registerFallback(
      kOperatorsKey, c10::KernelFunction::makeFromBoxedFunction<&observe>(), "fourfold operators"));
}

}  // namespace detail

/// While it lives, `observer` is told about this thread's operators; the innermost scope wins.
/// Passes through in backward unless `in_backward`. Left on another thread, it goes as soon as its
/// own thread runs an operator.
class [[nodiscard]] OperatorsScope {
 public:
  explicit OperatorsScope(OperatorObserver& observer, bool in_backward = false)
      : state_(door_state<detail::OperatorsState>()) {
    detail::register_operators_fallback(state_);
    detail::OpenObserver*& top = state_.innermost();
    open_ = new detail::OpenObserver;
    open_->observer = &observer, open_->in_backward = in_backward, open_->outer = top;
    open_->thread = std::this_thread::get_id();
    top = open_;
    c10::impl::tls_set_dispatch_key_included(kOperatorsKey, true);
  }
  ~OperatorsScope() {
    if (open_->thread != std::this_thread::get_id()) {
      open_->closed.store(true, std::memory_order_release);
      return;
    }
    detail::OpenObserver** link = &state_.innermost();
    while (*link != nullptr && *link != open_) link = &(*link)->outer;
    if (*link != nullptr) *link = open_->outer;
    delete open_;
    if (state_.innermost() == nullptr)
      c10::impl::tls_set_dispatch_key_included(kOperatorsKey, false);
  }
  OperatorsScope(const OperatorsScope&) = delete;
  OperatorsScope& operator=(const OperatorsScope&) = delete;

 private:
  detail::OperatorsState& state_;
  detail::OpenObserver* open_;
};

/// This thread's innermost observer, or null.
inline OperatorObserver* current_operator_observer() {
  detail::OpenObserver* open = detail::innermost_observer(door_state<detail::OperatorsState>());
  return open == nullptr ? nullptr : open->observer;
}

/// While it lives, this thread's operators are nobody's: for what an observer computes itself.
class [[nodiscard]] OperatorsPause {
 public:
  OperatorsPause() : exclude_(kOperatorsKey) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_;
};

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What the process runs, as LibTorch itself reports it to its profiler (ATen/record_function.h):
/// operators as the dispatcher is called for them, forward and backward, nodes of backward, and
/// ranges that the program names with RECORD_USER_SCOPE. Of all threads.
///
///   fourfold::door::RangesScope scope(observer);   // told from here on, until the scope ends
///
/// Not told: what runs below a thread's at::DisableRecordFunctionGuard, and ranges that had begun
/// before the scope. Without a scope nothing is registered and nothing costs.
///
/// Leans on: at::addGlobalCallback and at::removeCallback while other threads run operators. Their
/// comments warn of it, and LibTorch's own on-demand profiler does so; each thread takes a new list
/// of callbacks from under a lock at its next operator (tests/report/timeline_test.cpp tries).
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <fourfold/torch/door_state.hpp>

#include <memory>
#include <mutex>

namespace fourfold::door {

/// Told of ranges one at a time, whatever their threads. A range ends on the thread that began it,
/// innermost first, but for LibTorch's asynchronous ones (RPC).
class RangeObserver {
 public:
  virtual ~RangeObserver() = default;
  /// `range` names it until it ends; `name` is the caller's, to be copied.
  virtual void began(const void* range, const char* name, at::RecordScope scope) noexcept = 0;
  virtual void ended(const void* range) noexcept = 0;
};

namespace detail {

/// Where LibTorch's plain functions find the observer.
struct [[gnu::visibility("default")]] RangesState {
  static constexpr std::uint32_t kAbi = 1;
  static constexpr const char* kName = "ranges";
  std::mutex mutex;
  RangeObserver* observer = nullptr;
};
inline RangesState& ranges_state() { return door_state<RangesState>(); }

inline std::unique_ptr<at::ObserverContext> range_began(const at::RecordFunction& range) {
  RangesState& state = ranges_state();
  const std::lock_guard lock(state.mutex);
  if (state.observer != nullptr) state.observer->began(&range, range.name(), range.scope());
  return nullptr;
}
inline void range_ended(const at::RecordFunction& range, at::ObserverContext*) {
  RangesState& state = ranges_state();
  const std::lock_guard lock(state.mutex);
  if (state.observer != nullptr) state.observer->ended(&range);
}

}  // namespace detail

/// One at a time in a process; the caller sees to it.
class [[nodiscard]] RangesScope {
 public:
  explicit RangesScope(RangeObserver& observer) {
    detail::RangesState& state = detail::ranges_state();
    {
      const std::lock_guard lock(state.mutex);
      TORCH_INTERNAL_ASSERT(state.observer == nullptr);
      state.observer = &observer;
    }
    handle_ = at::addGlobalCallback(
        at::RecordFunctionCallback(&detail::range_began, &detail::range_ended)
            .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION,
                     at::RecordScope::USER_SCOPE}));
  }
  /// No call to the observer is under way once this has returned.
  ~RangesScope() {
    at::removeCallback(handle_);
    detail::RangesState& state = detail::ranges_state();
    const std::lock_guard lock(state.mutex);
    state.observer = nullptr;
  }
  RangesScope(const RangesScope&) = delete;
  RangesScope& operator=(const RangesScope&) = delete;

 private:
  at::CallbackHandle handle_ = at::INVALID_CALLBACK_HANDLE;
};

}  // namespace fourfold::door

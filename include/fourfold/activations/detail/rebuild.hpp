// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Whether a result need not be held: what its operator read must be held anyway (or be small, or
/// follow in the same way), and must not have been written to since.
#include <fourfold/activations/detail/rebuilt.hpp>
#include <fourfold/activations/detail/tape.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

inline constexpr std::int64_t kMostBytesCloned = 1 << 16;  ///< of an input that nothing holds

template <class T>
std::shared_ptr<Stored> rebuild(const BasicTape<T>& tape,
                                const typename BasicTape<T>::Origin& origin, std::int64_t version,
                                int depth);
template <class T>
std::shared_ptr<BasicRebuilt<T>> rebuild_call(const BasicTape<T>& tape, const WeakStorage& storage,
                                              std::shared_ptr<const OperatorCall> call,
                                              std::size_t result, int depth);

/// Whether plain LibTorch would throw too, should the input be written to before backward and out
/// of our sight: the operator saved its input itself, or the input's own operator did. (Of a copy,
/// or what is computed, nobody asks.)
template <class Origin>
bool written_is_an_error(Stored& held, const OperatorCall& call,
                         const OperatorCall::Argument& argument, const Origin* origin) {
  if (held.saved_by(call.time)) return true;
  return argument.requires_grad && origin != nullptr &&
         (held.saved_by(origin->began) || held.saved_by(origin->written));
}

template <class T>
std::optional<RebuiltInput> rebuild_input(const BasicTape<T>& tape, const OperatorCall& call,
                                          const OperatorCall::Argument& argument, int depth) {
  if (!argument.tensor) return RebuiltInput{argument.constant, nullptr, {}};
  if (argument.numel == 0) return std::nullopt;
  if (argument.previous != nullptr) {  // nobody else's, so that it may be written to
    if (depth <= 1) return std::nullopt;
    auto before = rebuild_call(tape, argument.storage, argument.previous, argument.previous_result,
                               depth - 1);
    if (before == nullptr) return std::nullopt;
    return RebuiltInput{{}, std::move(before), argument.view};
  }
  c10::StorageImpl* const key = argument.storage._unsafe_get_target();
  const auto* origin = tape.origin(key);
  if (!argument.unchanged() || (origin != nullptr && origin->written > call.time))
    return std::nullopt;
  const Extent extent(argument.view);
  std::shared_ptr<Stored> held =
      tape.index()->find(key, argument.version, argument.view.dtype, extent);
  if (held != nullptr && BasicRebuilt<T>::depth_of(*held) < depth) {
    const bool even_kept = written_is_an_error(*held, call, argument, origin);
    if (even_kept || held->kind() != StoredAs::kKept)
      return RebuiltInput{{}, std::move(held), argument.view, even_kept};
  }
  if (depth > 1 && origin != nullptr && origin->call != nullptr)
    if (std::shared_ptr<Stored> result = rebuild(tape, *origin, argument.version, depth - 1))
      return RebuiltInput{{}, std::move(result), argument.view};
  if (argument.bytes <= kMostBytesCloned)
    if (auto alive = argument.storage.lock())
      return RebuiltInput{argument.view.on(c10::Storage(std::move(alive))).clone(), nullptr, {}};
  return std::nullopt;
}

/// Null where it must be held.
template <class T>
std::shared_ptr<Stored> rebuild(const BasicTape<T>& tape,
                                const typename BasicTape<T>::Origin& origin, std::int64_t version,
                                int depth) {
  if (!origin.call->made(origin.result, version) || origin.written > origin.call->time)
    return nullptr;
  const auto rebuilt = rebuild_call(tape, origin.storage, origin.call, origin.result, depth);
  if (rebuilt != nullptr) tape.index()->add(rebuilt);
  return rebuilt;
}

/// The same of any call that wrote to `storage`; nobody else knows of it.
template <class T>
std::shared_ptr<BasicRebuilt<T>> rebuild_call(const BasicTape<T>& tape, const WeakStorage& storage,
                                              std::shared_ptr<const OperatorCall> call,
                                              std::size_t result, int depth) {
  const std::int64_t bytes =
      call->results[result].values *
      static_cast<std::int64_t>(c10::elementSize(call->results[result].view.dtype));
  std::vector<RebuiltInput> inputs;
  inputs.reserve(call->arguments.size());
  std::int64_t cloned = 0;
  for (const OperatorCall::Argument& argument : call->arguments) {
    std::optional<RebuiltInput> input = rebuild_input(tape, *call, argument, depth);
    if (!input) return nullptr;
    if (argument.tensor && input->stored == nullptr) cloned += argument.bytes;
    inputs.push_back(std::move(*input));
  }
  if (2 * cloned > bytes) return nullptr;
  auto rebuilt = std::make_shared<BasicRebuilt<T>>(tape.index()->use(storage, bytes),
                                                   std::move(call), result, std::move(inputs));
  rebuilt->depend();
  return rebuilt;
}

/// Whether what an in-place operator of one tensor writes just now can be computed again, exactly.
template <class T>
bool repeats_in_place(const BasicTape<T>& tape, const typename BasicTape<T>::Frame& frame,
                      int depth) {
  if (!frame.traits->cheap_in_place || frame.call == nullptr || depth <= 1) return false;
  const OperatorCall::Argument& argument = frame.call->arguments.front();
  const auto before =
      rebuild_call(tape, argument.storage, argument.previous, argument.previous_result, depth - 1);
  return before != nullptr && before->exact();
}

}  // namespace fourfold::inline v0::detail

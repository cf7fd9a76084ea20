// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A result that a block's second run need not make: it would not be held, but computed again from
/// what its operator saves (the gelu between the two linears of a feed-forward block). The second run
/// ends before the operator, so the result's memory is never there beside its input's.
#include <fourfold/activations/detail/rebuild.hpp>
#include <fourfold/activations/detail/tape.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

namespace fourfold::inline v0::detail {

/// As the first run saw it.
struct ForeseenResult {
  std::shared_ptr<const OperatorCall> call;
  std::size_t result = 0;  ///< of the call's
  StorageView view;        ///< what was saved of it
  bool may_round =
      false;  ///< whether whoever saved it bears the rounding of what it is computed from
};

/// Who made `tensor`, if it was an operator that may run again: nobody wrote to its result, nor to
/// what it read. Else null.
template <class T>
const typename BasicTape<T>::Origin* fresh_result(const BasicTape<T>& tape,
                                                  const at::Tensor& tensor) {
  if (!is_plain(tensor) || tensor.numel() == 0 || tensor.scalar_type() == at::kBool ||
      tensor._version() != 0)
    return nullptr;
  c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
  const auto* const origin = tape.origin(key);
  if (origin == nullptr || origin->call == nullptr || origin->two_values ||
      origin->written > origin->call->time || !origin->call->made(origin->result, /*version=*/0) ||
      tape.index()->is_exact(key))
    return nullptr;
  for (const OperatorCall::Argument& argument : origin->call->arguments) {
    if (!argument.tensor) continue;
    const auto* const read = tape.origin(argument.storage._unsafe_get_target());
    if (!argument.unchanged() || (read != nullptr && read->written > origin->call->time))
      return nullptr;
  }
  return origin;
}

/// Whether both are calls of one operator with arguments of the same sizes.
template <class = void>
bool alike(const OperatorCall& one, const OperatorCall& other) {
  return one.op == other.op &&
         std::equal(one.arguments.begin(), one.arguments.end(), other.arguments.begin(),
                    other.arguments.end(), [](const auto& a, const auto& b) {
                      return a.tensor == b.tensor && a.view.sizes == b.view.sizes &&
                             a.view.strides == b.view.strides && a.view.dtype == b.view.dtype;
                    });
}

/// The result of the operator that runs just now, which has saved what it reads; null where that is
/// another operator, or its inputs are not all at hand.
template <class T>
std::shared_ptr<Stored> rebuild_foreseen(const BasicTape<T>& tape, const ForeseenResult& foreseen,
                                         int depth) {
  const auto* const frame = tape.frame();
  if (frame == nullptr || frame->call == nullptr || !alike(*frame->call, *foreseen.call))
    return nullptr;
  auto call = std::make_shared<OperatorCall>(*frame->call);
  call->results = foreseen.call->results;
  const c10::Storage never_made(c10::Storage::use_byte_size_t{}, 0, at::DataPtr(),
                                /*allocator=*/nullptr, /*resizable=*/false);
  const std::shared_ptr<Stored> rebuilt =
      rebuild_call(tape, never_made.getWeakStorageImpl(), std::move(call), foreseen.result, depth);
  return rebuilt != nullptr && (foreseen.may_round || rebuilt->exact()) ? rebuilt : nullptr;
}

}  // namespace fourfold::inline v0::detail

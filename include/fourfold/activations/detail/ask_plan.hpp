// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A saved tensor as a plan knows it: by the operator that made it or saves it.
#include <fourfold/activations/detail/tape.hpp>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/torch/graph_task.hpp>

#include <cstdint>

namespace fourfold::inline v0::detail {

template <class T>
SavedStorage saved_storage(const at::Tensor& tensor, const BasicTape<T>& tape) {
  const c10::Storage& storage = tensor.storage();
  c10::StorageImpl* const key = storage.unsafeGetStorageImpl();
  const auto* const origin = tape.origin(key);
  const auto* const frame = tape.frame();
  SavedStorage saved{.forward = tape.forward(),
                     .bytes = static_cast<std::int64_t>(storage.nbytes()),
                     .packable = tensor.scalar_type() == at::kFloat ||
                                 tensor.scalar_type() == at::kBFloat16 ||
                                 tensor.scalar_type() == at::kHalf,
                     .values = &tensor};
  const bool result = frame != nullptr && frame->argument(key) == nullptr;
  if (frame != nullptr) {
    const BasicOperatorTraits<T>& traits = *frame->traits;
    if (traits.reads_nonzero || traits.reads_positive || traits.gates())
      saved.packable = false;  // its exact code
    saved.operation = frame->number, saved.saver = traits.name;
    while (saved.place < frame->tensors.size() &&
           !frame->tensors[saved.place].storage().is_alias_of(storage))
      ++saved.place;
  }
  if (origin != nullptr && origin->time != 0) {
    saved.operation = origin->number, saved.place = origin->result, saved.made = true;
    saved.producer = origin->traits->name;
  } else if (result) {  // its operator saves it before it is done
    saved.made = true, saved.producer = saved.saver;
  }
  return saved;
}

/// How `plan` would hold it. `sensitive`: it is not for `pack`. Not asked of what a block saves when
/// it runs again: that goes at once.
template <class T>
SavedPlan::Choice ask_plan(SavedPlan& plan, const at::Tensor& tensor, bool sensitive, bool packs,
                           const BasicTape<T>& tape) {
  if (door::current_graph_task() != -1) return {};
  SavedStorage saved = saved_storage(tensor, tape);
  saved.sensitive = sensitive, saved.packable = saved.packable && packs;
  SavedPlan::Choice choice = plan.choose(saved);
  if (saved.sensitive && !choice.even_sensitive) choice.pack = nullptr;
  return choice;
}

}  // namespace fourfold::inline v0::detail

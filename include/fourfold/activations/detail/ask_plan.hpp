// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A saved tensor as a plan knows it: by the operator that made it or saves it.
#include <torch/csrc/autograd/graph_task.h>
#include <fourfold/activations/detail/tape.hpp>
#include <fourfold/activations/saved_plan.hpp>

#include <cstdint>

namespace fourfold::inline v0::detail {

/// How `plan` would hold it. `sensitive`: it is not for `pack`. Not asked of what a block saves when
/// it runs again: that goes at once.
template <class = void>
SavedPlan::Choice ask_plan(SavedPlan& plan, const at::Tensor& tensor, bool sensitive,
                           const Tape& tape) {
  if (torch::autograd::get_current_graph_task_id() != -1) return {};
  const c10::Storage& storage = tensor.storage();
  c10::StorageImpl* const key = storage.unsafeGetStorageImpl();
  const Tape::Origin* const origin = tape.origin(key);
  const Tape::Frame* const frame = tape.frame();
  SavedStorage saved{.forward = tape.forward(),
                     .bytes = static_cast<std::int64_t>(storage.nbytes()),
                     .sensitive = sensitive,
                     .values = &tensor};
  const bool result = frame != nullptr && frame->argument(key) == nullptr;
  if (frame != nullptr) {
    saved.operation = frame->number, saved.saver = frame->traits->name;
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
  SavedPlan::Choice choice = plan.choose(saved);
  if (saved.sensitive && !choice.even_sensitive) choice.pack = nullptr;
  return choice;
}

}  // namespace fourfold::inline v0::detail

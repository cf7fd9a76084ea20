// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The momentum of a group, by whatever name its optimizer's options have it.
#include <fourfold/optim/detail/cycled_momentum.hpp>

#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>
#include <tuple>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Calls `set` with the momentum of LibTorch's options (the first of Adam's and AdamW's betas, or
/// SGD's and RMSprop's momentum) or of ours. False where they have none.
template <class Set>
bool visit_momentum(::torch::optim::OptimizerOptions& options, const Set& set) {
  if (auto* adam = dynamic_cast<::torch::optim::AdamOptions*>(&options))
    set(std::get<0>(adam->betas()));
  else if (auto* adamw = dynamic_cast<::torch::optim::AdamWOptions*>(&options))
    set(std::get<0>(adamw->betas()));
  else if (auto* sgd = dynamic_cast<::torch::optim::SGDOptions*>(&options))
    set(sgd->momentum());
  else if (auto* rmsprop = dynamic_cast<::torch::optim::RMSpropOptions*>(&options))
    set(rmsprop->momentum());
  else if (auto* ours = dynamic_cast<CycledMomentum*>(&options); ours && ours->cycled_momentum())
    set(*ours->cycled_momentum());
  else
    return false;
  return true;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

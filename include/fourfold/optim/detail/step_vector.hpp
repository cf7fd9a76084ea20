// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What rules for matrices do with vectors (biases, norms), which are few: AdamW.
#include <fourfold/optim/adamw.hpp>

#include <tuple>

namespace fourfold::inline v0 {
namespace optim::detail {

/// The rule's options name betas and eps as AdamW's do.
template <class State, class Options>
void step_vector(const at::Tensor& p, const at::Tensor& grad, State& state, const Options& options,
                 const StepCount& count, const StepKeys& keys, bool maximize) {
  const auto [beta1, beta2] = options.betas();
  const AdamWFactors factors(options.lr(), beta1, beta2, options.eps(), options.weight_decay(),
                             count.step);
  step_values<AdamWRule>(p, grad, state, factors, keys, maximize);
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

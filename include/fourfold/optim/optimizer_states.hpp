// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The policy for optimizer states, and the plain optimizer of pipelines that have none.
#include <fourfold/core/place.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/optim/adamw.hpp>
#include <fourfold/torch/allocator.hpp>  // retag

namespace fourfold::inline v0 {

/// States are where LibTorch's are.
struct InMemory {
  template <class Optimizer>
  using Holding = Optimizer;
};

/// AdamW's moments held by C: OptimizerStates<Int8> has 8 bits a value, on curves made for moments.
/// `MasterCodec`: what is kept of 16-bit weights (optim/master_codec.hpp). `Where`: OnFile<>
/// (optim/offload.hpp) has them in a memory-mapped file.
template <class C, class MasterCodec = optim::RoundNearest, class Where = InMemory>
struct OptimizerStates {
  static constexpr Role role = Role::kOptimizerStates;
  using Format = C;
  using Optimizer = typename Where::template Holding<optim::AdamWOf<C, MasterCodec>>;
};

namespace optim {

/// torch::optim::AdamW, whose moments the ledger finds in their place. Bit for bit the same.
template <class = void>
class BasicPlainAdamW final : public ::torch::optim::AdamW {
 public:
  using AdamW::AdamW;

  at::Tensor step(LossClosure closure = nullptr) override {
    at::Tensor loss = AdamW::step(std::move(closure));
    if (state_.size() != counted_) {  // moments appear in the first step that sees a gradient
      counted_ = state_.size();
      for (const auto& [key, state] : state_) {
        const auto& moments = static_cast<const ::torch::optim::AdamWParamState&>(*state);
        door::retag(moments.exp_avg(), Place::kOptimizer);
        door::retag(moments.exp_avg_sq(), Place::kOptimizer);
        if (moments.max_exp_avg_sq().defined())
          door::retag(moments.max_exp_avg_sq(), Place::kOptimizer);
      }
    }
    return loss;
  }

 private:
  std::size_t counted_ = 0;
};
using PlainAdamW = BasicPlainAdamW<>;

}  // namespace optim

static_assert(Policy<OptimizerStates<Int8>>, "OptimizerStates must stay a Policy");

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) with torch::optim::AdamOptions: weight decay is
/// added to the gradient, as torch::optim::Adam adds it. amsgrad is refused.
///   optim::AdamOf<Int8> optimizer(model->parameters(), torch::optim::AdamOptions(1e-3));
#include <fourfold/optim/adamw.hpp>

#include <torch/optim/adam.h>
#include <algorithm>

namespace fourfold::inline v0 {
namespace optim {
namespace detail {

struct AdamFactors {
  AdamWFactors adamw;
  double weight_decay = 0;
};
/// out = g + weight_decay * p
struct AddWeightDecay {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict out, const T* __restrict g, const T* __restrict p,
                                std::int64_t n, T weight_decay) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      out[i] = add_weight_decay(g[i], p[i], weight_decay);
    });
  }
};

}  // namespace detail

struct AdamRule {
  using Options = ::torch::optim::AdamOptions;
  using Factors = detail::AdamFactors;

  static std::string name() { return "Adam"; }
  static void check(const Options& options, const std::string& whose) {
    detail::check_adam_options(options, whose, "Adam");
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) { return {p.numel(), p.numel()}; }
  static Factors factors(const Options& options, const StepCount& count) {
    const auto [beta1, beta2] = options.betas();
    return {{options.lr(), beta1, beta2, options.eps(), /*weight_decay=*/0, count.step},
            options.weight_decay()};
  }
  template <class T>
  static void update(T* p, const T* g, float* m, float* v, std::int64_t n, const Factors& k,
                     Isa isa) {
    if (k.weight_decay == 0) return detail::update(p, g, m, v, n, k.adamw, isa);
    constexpr std::int64_t kPart = 256;
    alignas(64) T decayed[kPart];
    for (std::int64_t i = 0; i < n; i += kPart) {
      const std::int64_t part = std::min(kPart, n - i);
      detail::run_vectorised<detail::AddWeightDecay>(isa, static_cast<T*>(decayed), g + i,
                                                     static_cast<const T*>(p + i), part,
                                                     static_cast<T>(k.weight_decay));
      detail::update(p + i, decayed, m + i, v + i, part, k.adamw, isa);
    }
  }
  static KernelUpdate in_kernel(const Factors& k, const MomentSizes&) {
    return detail::adamw_in_kernel(k.adamw, k.weight_decay);
  }
};
static_assert(ElementwiseRule<AdamRule>);

template <class MomentCodec, class SecondMomentCodec, class MasterCodec = RoundNearest>
using Adam = Optimizer<AdamRule, MomentCodec, SecondMomentCodec, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using AdamOf = Adam<typename StatesOf<C>::First, typename StatesOf<C>::Second, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

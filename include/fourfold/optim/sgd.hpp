// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Stochastic gradient descent with momentum, dampening, Nesterov and weight decay as torch::optim::SGD
/// has them, and torch::optim::SGDOptions (Sutskever et al., ICML 2013).
///   optim::SGDOf<Int8> optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
///   optim::SGD<optim::Fp32> ascent(..., torch::optim::SGDOptions(0.1), {.maximize = true});
/// Without momentum it keeps nothing.
#include <fourfold/optim/detail/update_code.hpp>
#include <fourfold/optim/optimizer.hpp>

#include <torch/optim/sgd.h>

namespace fourfold::inline v0 {
namespace optim {
namespace detail {

struct SGDFactors {
  double weight_decay = 0, momentum = 0, keep = 0, take = 1, rate = 0;
  bool nesterov = false;
};

template <bool Momentum, bool Nesterov>
struct SGDLoop {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict p, const T* __restrict g, float* __restrict m,
                                std::int64_t n, SGDFactors k) {
    const SGDNumbers<T> of{static_cast<T>(k.weight_decay), static_cast<T>(k.momentum),
                           static_cast<T>(k.keep), static_cast<T>(k.take), static_cast<T>(k.rate)};
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      float none = 0;
      update_sgd<Momentum>(p[i], g[i], Momentum ? m[i] : none, Nesterov, of);
    });
  }
};

}  // namespace detail

struct SGDRule {
  using Options = ::torch::optim::SGDOptions;
  using Factors = detail::SGDFactors;

  static std::string name() { return "SGD"; }
  static void check(const Options& options, const std::string& whose) {
    detail::check_learning_rate(options.lr(), whose);
    detail::check_option(options.momentum() >= 0, "momentum value", options.momentum(), whose,
                         "is 0 or more");
    detail::check_weight_decay(options.weight_decay(), whose);
    TORCH_CHECK(!options.nesterov() || (options.momentum() > 0 && options.dampening() == 0),
                "Nesterov momentum requires a momentum and zero dampening, and ", whose,
                " has momentum ", options.momentum(), " and dampening ", options.dampening());
  }
  static MomentSizes moments(const at::Tensor& p, const Options& options) {
    return {options.momentum() == 0 ? 0 : p.numel(), 0};
  }
  static Factors factors(const Options& options, const StepCount& count) {
    return {options.weight_decay(),
            options.momentum(),
            options.momentum(),
            count.fresh ? 1.0 : 1.0 - options.dampening(),  // a first gradient is not dampened
            -options.lr(),
            options.nesterov()};
  }
  template <class T>
  static void update(T* p, const T* g, float* m, float*, std::int64_t n, const Factors& k,
                     Isa isa) {
    if (m == nullptr)
      detail::run_vectorised<detail::SGDLoop<false, false>>(isa, p, g, m, n, k);
    else if (k.nesterov)
      detail::run_vectorised<detail::SGDLoop<true, true>>(isa, p, g, m, n, k);
    else
      detail::run_vectorised<detail::SGDLoop<true, false>>(isa, p, g, m, n, k);
  }
  static KernelUpdate in_kernel(const Factors& k, const MomentSizes& sizes) {
    const auto number = [](double x) { return static_cast<float>(x); };
    return {sizes.first == 0 ? 1
            : k.nesterov     ? 3
                             : 2,
            {number(k.weight_decay), number(k.momentum), number(k.keep), number(k.take),
             number(k.rate)}};
  }
};
static_assert(ElementwiseRule<SGDRule>);

template <class MomentCodec, class MasterCodec = RoundNearest>
using SGD = Optimizer<SGDRule, MomentCodec, Fp32, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using SGDOf = SGD<typename StatesOf<C>::First, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

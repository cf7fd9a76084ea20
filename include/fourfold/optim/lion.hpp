// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Lion: the sign of an interpolated momentum, one moment a parameter (Chen et al., arXiv 2302.06675,
/// program 1). Learning rates are 3 to 10 times smaller than AdamW's, weight decay as much larger.
///   optim::LionOf<Int8> optimizer(model->parameters(), optim::LionOptions(1e-4).weight_decay(0.1));
#include <fourfold/optim/detail/update_code.hpp>
#include <fourfold/optim/optimizer.hpp>
#include <fourfold/optim/options.hpp>

#include <tuple>

namespace fourfold::inline v0 {
namespace optim {

struct LionOptions : detail::OptionsOf<LionOptions> {
  LionOptions(double lr = 1e-4) : lr_(lr) {}
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-4;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.99);
  TORCH_ARG(double, weight_decay) = 0;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("betas", betas()), archive("weight_decay", weight_decay());
  }
};

namespace detail {

struct LionFactors {
  double keep_step = 0, take_step = 0, keep = 0, take = 0, rate = 0, decay = 1;
};

struct LionLoop {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict p, const T* __restrict g, float* __restrict m,
                                std::int64_t n, LionFactors k) {
    const LionNumbers<T> of{static_cast<T>(k.keep_step), static_cast<T>(k.take_step),
                            static_cast<T>(k.keep),      static_cast<T>(k.take),
                            static_cast<T>(k.rate),      static_cast<T>(k.decay)};
    for_each_value(n,
                   [&](std::int64_t i) FOURFOLD_LOOP_BODY { update_lion(p[i], g[i], m[i], of); });
  }
};

}  // namespace detail

struct LionRule {
  using Options = LionOptions;
  using Factors = detail::LionFactors;

  static std::string name() { return "Lion"; }
  static void check(const Options& options, const std::string& whose) {
    const auto [beta1, beta2] = options.betas();
    detail::check_learning_rate(options.lr(), whose);
    detail::check_betas(beta1, beta2, whose);
    detail::check_weight_decay(options.weight_decay(), whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) { return {p.numel(), 0}; }
  static Factors factors(const Options& options, const StepCount&) {
    const auto [beta1, beta2] = options.betas();
    return {beta1,     1 - beta1,     beta2,
            1 - beta2, -options.lr(), 1 - options.lr() * options.weight_decay()};
  }
  template <class T>
  static void update(T* p, const T* g, float* m, float*, std::int64_t n, const Factors& k,
                     Isa isa) {
    detail::run_vectorised<detail::LionLoop>(isa, p, g, m, n, k);
  }
  static KernelUpdate in_kernel(const Factors& k, const MomentSizes&) {
    const auto number = [](double x) { return static_cast<float>(x); };
    return {4,
            {number(k.keep_step), number(k.take_step), number(k.keep), number(k.take),
             number(k.rate), number(k.decay)}};
  }
};
static_assert(ElementwiseRule<LionRule>);

template <class MomentCodec, class MasterCodec = RoundNearest>
using Lion = Optimizer<LionRule, MomentCodec, Fp32, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using LionOf = Lion<typename StatesOf<C>::First, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

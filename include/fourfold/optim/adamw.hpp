// SPDX-License-Identifier: Apache-2.0
#pragma once
/// AdamW with packed moments (Loshchilov and Hutter, arXiv 1711.05101; 8-bit companded states after
/// FlashOptim, arXiv 2602.23349), with torch::optim::AdamWOptions.
///   optim::AdamW<Companded<8, Softsign>, Companded<8, Sqrt>> optimizer(model->parameters(), 1e-3);
///   optim::AdamWOf<Int8> same(model->parameters(), torch::optim::AdamWOptions(1e-3));
///   optim::AdamWOf<optim::Fp32> exact(...);   // torch::optim::AdamW but for rounding
///
/// What all optimizers promise, of scratch, noise, errors and files: optim/optimizer.hpp. amsgrad is
/// refused.
#include <fourfold/optim/detail/adamw_update.hpp>
#include <fourfold/optim/optimizer.hpp>

#include <torch/optim/adamw.h>
#include <tuple>

namespace fourfold::inline v0 {
namespace optim {

namespace detail {
/// What AdamW and Adam check alike.
template <class Options>
void check_adam_options(const Options& options, const std::string& whose, const char* theirs) {
  const auto [beta1, beta2] = options.betas();
  check_learning_rate(options.lr(), whose);
  check_option(options.eps() >= 0, "epsilon value", options.eps(), whose, "is 0 or more");
  check_betas(beta1, beta2, whose);
  check_weight_decay(options.weight_decay(), whose);
  TORCH_CHECK(!options.amsgrad(), "amsgrad is set in ", whose,
              ", and packed states have no third moment for it; use torch::optim::", theirs,
              ", or amsgrad(false)");
}
inline KernelUpdate adamw_in_kernel(const AdamWFactors& k, double weight_decay) {
  return {0,
          {k.decay, k.keep_first, k.take_first, k.keep_second, k.take_second, k.root, k.eps, k.rate,
           static_cast<float>(weight_decay)}};
}
}  // namespace detail

struct AdamWRule {
  using Options = ::torch::optim::AdamWOptions;
  using Factors = detail::AdamWFactors;

  static std::string name() { return "AdamW"; }
  static void check(const Options& options, const std::string& whose) {
    detail::check_adam_options(options, whose, "AdamW");
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) { return {p.numel(), p.numel()}; }
  static Factors factors(const Options& options, const StepCount& count) {
    const auto [beta1, beta2] = options.betas();
    return {options.lr(), beta1, beta2, options.eps(), options.weight_decay(), count.step};
  }
  template <class T>
  static void update(T* p, const T* g, float* m, float* v, std::int64_t n, const Factors& factors,
                     Isa isa) {
    detail::update(p, g, m, v, n, factors, isa);
  }
  static KernelUpdate in_kernel(const Factors& k, const MomentSizes&) {
    return detail::adamw_in_kernel(k, /*weight_decay=*/0);
  }
};
static_assert(ElementwiseRule<AdamWRule>);

/// The rule that AdamW follows with a second moment in C; optim/factored.hpp has another.
template <class C>
struct AdamWBy {
  using Rule = AdamWRule;
  using Second = C;
};

template <class MomentCodec, class SecondMomentCodec, class MasterCodec = RoundNearest>
using AdamW = Optimizer<typename AdamWBy<SecondMomentCodec>::Rule, MomentCodec,
                        typename AdamWBy<SecondMomentCodec>::Second, MasterCodec>;

/// AdamW by one word for both moments: AdamWOf<Int8> has 8-bit companded moments, AdamWOf<Fp32>
/// plain.
template <class C, class MasterCodec = RoundNearest>
using AdamWOf = AdamW<typename StatesOf<C>::First, typename StatesOf<C>::Second, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

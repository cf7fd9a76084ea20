// SPDX-License-Identifier: Apache-2.0
#pragma once
/// SCALE: gradient descent with each output's gradient brought to length 1, and momentum for the last
/// layer alone (Glentis et al., arXiv 2506.16659, algorithm 1): no states but those.
///   optim::Scale<Companded<8, Softsign>> optimizer(
///       {torch::optim::OptimizerParamGroup(body), torch::optim::OptimizerParamGroup(head,
///            std::make_unique<optim::ScaleOptions>(optim::ScaleOptions(1e-3).momentum(0.9)))},
///       optim::ScaleOptions(1e-3));
///
/// A matrix W of (outputs, inputs), as LibTorch's Linear has it, steps by lr * m_row / |m_row|: the
/// paper's columns are our rows. Convolutions are (outputs, the rest). Vectors (biases, norms) are
/// stepped by AdamW with betas() and eps(), whose moments are small.
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/detail/matrix_step.hpp>
#include <fourfold/optim/options.hpp>

namespace fourfold::inline v0 {
namespace optim {

struct ScaleOptions : detail::OptionsOf<ScaleOptions> {
  ScaleOptions(double lr = 1e-3) : lr_(lr) {}
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(double, momentum) = 0;  ///< of matrices; 0.9 for the last layer
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);  ///< of vectors
  TORCH_ARG(double, eps) = 1e-8;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("momentum", momentum()), archive("weight_decay", weight_decay());
    archive("betas", betas()), archive("eps", eps());
  }
};

namespace detail {

/// AdamW of a vector under a rule for matrices, whose options name betas and eps as AdamW's do.
template <class State, class Options>
void step_vector(const at::Tensor& p, const at::Tensor& grad, State& state, const Options& options,
                 const StepCount& count, const StepKeys& keys, bool maximize) {
  const auto [beta1, beta2] = options.betas();
  const AdamWFactors factors(options.lr(), beta1, beta2, options.eps(), options.weight_decay(),
                             count.step);
  step_values<AdamWRule>(p, grad, state, factors, keys, maximize);
}

/// m = keep * m + take * g
struct Momentum {
  FOURFOLD_LOOP static void run(float* __restrict m, const float* __restrict g, std::int64_t n,
                                float keep, float take) {
    for_each_value(
        n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { m[i] = std::fma(g[i], take, m[i] * keep); });
  }
};
/// p = p * decay + x * rate
struct AddScaled {
  FOURFOLD_LOOP static void run(float* __restrict p, const float* __restrict x, std::int64_t n,
                                float decay, float rate) {
    for_each_value(
        n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { p[i] = std::fma(x[i], rate, p[i] * decay); });
  }
};

}  // namespace detail

struct ScaleRule {
  using Options = ScaleOptions;
  static constexpr bool kByRows = true;

  static std::string name() { return "Scale"; }
  static void check(const Options& options, const std::string& whose) {
    const auto [beta1, beta2] = options.betas();
    detail::check_learning_rate(options.lr(), whose);
    detail::check_option(0 <= options.momentum() && options.momentum() < 1, "momentum value",
                         options.momentum(), whose, "lies in [0, 1)");
    detail::check_weight_decay(options.weight_decay(), whose);
    detail::check_betas(beta1, beta2, whose);
    detail::check_option(options.eps() >= 0, "epsilon value", options.eps(), whose, "is 0 or more");
  }
  static MomentSizes moments(const at::Tensor& p, const Options& options) {
    if (p.dim() < 2) return {p.numel(), p.numel()};
    return {options.momentum() > 0 ? p.numel() : 0, 0};
  }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount& count, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    if (p.dim() < 2) return detail::step_vector(p, grad, state, options, count, keys, maximize);
    const auto decay = static_cast<float>(1 - options.lr() * options.weight_decay());
    const auto keep = static_cast<float>(options.momentum());
    const auto take = static_cast<float>(1 - options.momentum());
    detail::step_matrix(p, grad, state, keys, maximize, name(), isa, [&](const auto& step) {
      std::vector<double> squares;
      if (options.momentum() > 0) {  // lengths are the new momentum's, which is stored below
        squares.resize(static_cast<std::size_t>(step.rows));
        const auto parts = momentum_squares(step, keep, take);
        for (std::size_t i = 0; i < parts.size(); ++i)
          squares[static_cast<std::size_t>(parts[i].row)] += parts[i].sum;
      } else {
        squares = step.row_squares();
      }
      std::vector<float> rates(squares.size());
      for (std::size_t i = 0; i < rates.size(); ++i)
        rates[i] = static_cast<float>(-options.lr() / (std::sqrt(squares[i]) + options.eps()));
      step.update([&](std::int64_t begin, std::int64_t n, float* weights, const float* g, float* m,
                      float*) {
        if (m != nullptr) detail::run_vectorised<detail::Momentum>(isa, m, g, n, keep, take);
        const float* way = m != nullptr ? m : g;
        detail::for_each_row_part(
            begin, n, step.columns, [&](std::int64_t row, std::int64_t from, std::int64_t to) {
              detail::run_vectorised<detail::AddScaled>(isa, weights + from, way + from, to - from,
                                                        decay,
                                                        rates[static_cast<std::size_t>(row)]);
            });
      });
    });
  }

 private:
  struct Part {
    std::int64_t row = 0;
    double sum = 0;
  };
  /// Sums of the new momentum's squares: one for each row's part of each tile, in order.
  template <class Step>
  static std::vector<Part> momentum_squares(const Step& step, float keep, float take) {
    std::vector<std::vector<Part>> tiles(static_cast<std::size_t>(step.tiles()));
    static_cast<void>(
        step.sum([&](std::int64_t begin, std::int64_t n, const float*, const float* g) {
          alignas(64) float scratch[detail::kTile], next[detail::kTile];
          std::copy_n(step.state.first.load(begin, n, scratch, step.isa), n, next);
          detail::run_vectorised<detail::Momentum>(step.isa, static_cast<float*>(next), g, n, keep,
                                                   take);
          auto& parts = tiles[static_cast<std::size_t>(begin / detail::kTile)];
          detail::for_each_row_part(
              begin, n, step.columns, [&](std::int64_t row, std::int64_t from, std::int64_t to) {
                parts.push_back({row, detail::sum_of_squares(next + from, to - from, step.isa)});
              });
          return 0.0;
        }));
    std::vector<Part> all;
    for (const auto& parts : tiles) all.insert(all.end(), parts.begin(), parts.end());
    return all;
  }
};
static_assert(UpdateRule<ScaleRule>);

template <class MomentCodec, class MasterCodec = RoundNearest, class SecondMomentCodec = Fp32>
using Scale = Optimizer<ScaleRule, MomentCodec, SecondMomentCodec, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using ScaleOf = Scale<typename StatesOf<C>::First, MasterCodec, typename StatesOf<C>::Second>;

}  // namespace optim
}  // namespace fourfold::inline v0

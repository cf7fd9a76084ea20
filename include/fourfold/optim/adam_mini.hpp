// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Adam-mini: AdamW with one second moment for a block of values that share a curvature (Zhang et
/// al., arXiv 2406.16793, algorithm 1): half of AdamW's states, and the same options.
///   optim::AdamMiniOf<Int8> optimizer(model->parameters(), optim::AdamMiniOptions(1e-3));
///
/// A block is a row: an output of a Linear or convolution, a token of an embedding. For queries and
/// keys it is a head: put them in a group with rows_per_block(head_size). A vector is one block.
#include <fourfold/optim/detail/matrix_step.hpp>
#include <fourfold/optim/optimizer.hpp>
#include <fourfold/optim/options.hpp>

namespace fourfold::inline v0 {
namespace optim {

struct AdamMiniOptions : detail::OptionsOf<AdamMiniOptions> {
  AdamMiniOptions(double lr = 1e-3) : lr_(lr) {}
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 1e-2;
  TORCH_ARG(std::int64_t, rows_per_block) = 1;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("betas", betas()), archive("eps", eps());
    archive("weight_decay", weight_decay()), archive("rows_per_block", rows_per_block());
  }
};

namespace detail {

/// m is averaged, and p goes by rate * m, with a rate for each row.
struct AdamMiniLoop {
  FOURFOLD_LOOP static void run(float* __restrict p, const float* __restrict g, float* __restrict m,
                                std::int64_t n, float keep, float take, float decay, float rate) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      m[i] = std::fma(g[i], take, m[i] * keep);
      p[i] = std::fma(m[i], rate, p[i] * decay);
    });
  }
};

}  // namespace detail

struct AdamMiniRule {
  using Options = AdamMiniOptions;
  static constexpr bool kByRows = true;

  static std::string name() { return "AdamMini"; }
  static void check(const Options& options, const std::string& whose) {
    const auto [beta1, beta2] = options.betas();
    detail::check_learning_rate(options.lr(), whose);
    detail::check_option(options.eps() >= 0, "epsilon value", options.eps(), whose, "is 0 or more");
    detail::check_betas(beta1, beta2, whose);
    detail::check_weight_decay(options.weight_decay(), whose);
    detail::check_option(options.rows_per_block() >= 1, "rows_per_block", options.rows_per_block(),
                         whose, "is 1 or more");
  }
  static MomentSizes moments(const at::Tensor& p, const Options& options) {
    if (p.numel() == 0) return {};
    const std::int64_t rows = p.dim() < 2 ? 1 : p.size(0), share = options.rows_per_block();
    return {p.numel(), (rows + share - 1) / share};
  }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount& count, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    const auto [beta1, beta2] = options.betas();
    const auto step = static_cast<double>(count.step);
    const double rate = options.lr() / (1 - std::pow(beta1, step));
    const double root = 1 / std::sqrt(1 - std::pow(beta2, step));
    const auto keep = static_cast<float>(beta1), take = static_cast<float>(1 - beta1);
    const auto decay = static_cast<float>(1 - options.lr() * options.weight_decay());
    detail::step_matrix(p, grad, state, keys, maximize, name(), isa, [&](const auto& matrix) {
      const std::vector<double> squares = matrix.row_squares();
      const std::int64_t blocks = state.second.numel(), share = options.rows_per_block();
      std::vector<float> rates(static_cast<std::size_t>(blocks));
      for (std::int64_t begin = 0; begin < blocks; begin += detail::kTile) {
        alignas(64) float scratch[detail::kTile];
        const std::int64_t n = std::min(detail::kTile, blocks - begin);
        float* v = state.second.load(begin, n, scratch, isa);
        for (std::int64_t i = 0; i < n; ++i) {
          const std::int64_t first = (begin + i) * share,
                             last = std::min(matrix.rows, first + share);
          double sum = 0;
          for (std::int64_t row = first; row < last; ++row)
            sum += squares[static_cast<std::size_t>(row)];
          const double mean = sum / static_cast<double>((last - first) * matrix.columns);
          v[i] = static_cast<float>(beta2 * v[i] + (1 - beta2) * mean);
          rates[static_cast<std::size_t>(begin + i)] =
              static_cast<float>(-rate / (std::sqrt(double{v[i]}) * root + options.eps()));
        }
        state.second.store(begin, n, v, keys.second, isa);
      }
      matrix.update([&](std::int64_t begin, std::int64_t n, float* weights, const float* g,
                        float* m, float*) {
        detail::for_each_row_part(begin, n, matrix.columns,
                                  [&](std::int64_t row, std::int64_t from, std::int64_t to) {
                                    detail::run_vectorised<detail::AdamMiniLoop>(
                                        isa, weights + from, g + from, m + from, to - from, keep,
                                        take, decay, rates[static_cast<std::size_t>(row / share)]);
                                  });
      });
    });
  }
};
static_assert(UpdateRule<AdamMiniRule>);

template <class MomentCodec, class MasterCodec = RoundNearest>
using AdamMini = Optimizer<AdamMiniRule, MomentCodec, Fp32, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using AdamMiniOf = AdamMini<typename StatesOf<C>::First, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// APOLLO: gradient descent, scaled by how much Adam would scale the gradient in a random subspace
/// (Zhu et al., arXiv 2412.05270, algorithm 1). ApolloMini sees it through one direction and scales
/// whole matrices: states of one row.
///   optim::ApolloOf<Fp32> optimizer(model->parameters(), optim::ApolloOptions(1e-2).rank(256));
///   optim::ApolloMiniOf<Fp32> least(model->parameters(), optim::ApolloMiniOptions(1e-2));
///
/// The projection is drawn from a seed every update_proj_gap() steps, and again in each step: it is
/// not kept. A step takes rank times as long as one of Scale. The step's length grows by at most a
/// hundredth from one step to the next (Fira's limiter, arXiv 2410.01623). Vectors (biases, norms)
/// are stepped by AdamW; embeddings and heads are, in the paper, too: give them to one of their own.
#include <fourfold/optim/detail/projection.hpp>
#include <fourfold/optim/detail/step_vector.hpp>
#include <fourfold/optim/optimizer.hpp>
#include <fourfold/optim/options.hpp>

namespace fourfold::inline v0 {
namespace optim {

template <bool Mini>
struct ApolloOptionsOf : detail::OptionsOf<ApolloOptionsOf<Mini>> {
  ApolloOptionsOf(double lr = 1e-2) : lr_(lr) {}
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-2;
  TORCH_ARG(std::int64_t, rank) = Mini ? 1 : 256;  ///< directions of the subspace
  TORCH_ARG(std::int64_t, update_proj_gap) = 200;  ///< steps that share a projection
  TORCH_ARG(double, scale) = Mini ? 128 : 1;       ///< the step is multiplied by its root
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-6;
  TORCH_ARG(double, weight_decay) = 0;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("rank", rank()), archive("update_proj_gap", update_proj_gap());
    archive("scale", scale()), archive("betas", betas()), archive("eps", eps());
    archive("weight_decay", weight_decay());
  }
};
using ApolloOptions = ApolloOptionsOf<false>;
using ApolloMiniOptions = ApolloOptionsOf<true>;

namespace detail {

/// p = p * decay + g * rate * scales[i]
struct ApolloLoop {
  FOURFOLD_LOOP static void run(float* __restrict p, const float* __restrict g,
                                const float* __restrict scales, std::int64_t n, float decay,
                                float rate) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      p[i] = std::fma(g[i] * scales[i], rate, p[i] * decay);
    });
  }
};

/// Lengths of the channels of a projected gradient: columns of (rank, columns), rows of (rows, rank).
template <class = void>
std::vector<double> channel_squares(const Floats& r, bool columns) {
  std::vector<double> sums(static_cast<std::size_t>(columns ? r.columns : r.rows));
  for (std::int64_t i = 0; i < r.rows; ++i)
    for (std::int64_t j = 0; j < r.columns; ++j)
      sums[static_cast<std::size_t>(columns ? j : i)] += double{r.row(i)[j]} * r.row(i)[j];
  return sums;
}

}  // namespace detail

template <bool Mini>
struct ApolloRuleOf {
  using Options = ApolloOptionsOf<Mini>;
  static constexpr bool kByRows = true;

  static std::string name() { return Mini ? "ApolloMini" : "Apollo"; }
  static void check(const Options& options, const std::string& whose) {
    const auto [beta1, beta2] = options.betas();
    detail::check_learning_rate(options.lr(), whose);
    detail::check_option(options.rank() >= 1, "rank", options.rank(), whose, "is 1 or more");
    detail::check_option(options.update_proj_gap() >= 1, "update_proj_gap",
                         options.update_proj_gap(), whose, "is 1 or more");
    detail::check_option(options.scale() > 0, "scale", options.scale(), whose, "is above 0");
    detail::check_option(options.eps() >= 0, "epsilon value", options.eps(), whose, "is 0 or more");
    detail::check_betas(beta1, beta2, whose);
    detail::check_weight_decay(options.weight_decay(), whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options& options) {
    if (p.dim() < 2 || p.numel() == 0) return {p.numel(), p.numel()};
    const std::int64_t rows = p.size(0), columns = p.numel() / rows;
    const std::int64_t n =
        std::min(options.rank(), std::min(rows, columns)) * std::max(rows, columns);
    return {n, n};
  }
  /// The length of the last step, for the limiter.
  static std::vector<std::vector<std::int64_t>> extra(const at::Tensor& p, const Options&) {
    if (p.dim() < 2) return {};
    return {{1}};
  }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount& count, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    if (p.dim() < 2) return detail::step_vector(p, grad, state, options, count, keys, maximize);
    const auto [beta1, beta2] = options.betas();
    const auto decay = static_cast<float>(1 - options.lr() * options.weight_decay());
    detail::step_matrix(
        p, grad, state, keys, maximize, name(), isa,
        [&, beta1 = beta1, beta2 = beta2](const auto& matrix) {
          const std::int64_t shorter = std::min(matrix.rows, matrix.columns);
          Key key = keys.matrix;
          key.step = static_cast<std::uint64_t>((count.step - 1) / options.update_proj_gap());
          const detail::Floats r = detail::project(
              matrix, detail::random_projection(key, std::min(options.rank(), shorter), shorter));
          const detail::Floats direction =
              detail::adam_direction(r, state, beta1, beta2, options.eps(), count.step, keys, isa);
          const bool wide = matrix.rows <= matrix.columns;
          const std::vector<float> scales = scales_of(r, direction, wide);
          const auto each_part = [&](std::int64_t begin, std::int64_t n, const auto& f) {
            detail::for_each_row_part(
                begin, n, matrix.columns,
                [&](std::int64_t row, std::int64_t from, std::int64_t to) {
                  f(from, to, scales.data() + (wide ? begin + from - row * matrix.columns : 0),
                    wide ? 1.0F : scales[static_cast<std::size_t>(row)]);
                });
          };
          const std::vector<float> ones(wide ? 0 : detail::kTile, 1.0F);
          const auto go = [&](float* to, const float* g, std::int64_t begin, std::int64_t n,
                              float keep, float rate) {
            each_part(
                begin, n,
                [&](std::int64_t from, std::int64_t end, const float* by_column, float by_row) {
                  detail::run_vectorised<detail::ApolloLoop>(isa, to + from, g + from,
                                                             wide ? by_column : ones.data(),
                                                             end - from, keep, rate * by_row);
                });
          };
          const double squares =
              matrix.sum([&](std::int64_t begin, std::int64_t n, const float*, const float* g) {
                alignas(64) float way[detail::kTile];
                std::fill_n(way, n, 0.0F);
                go(way, g, begin, n, 0.0F, 1.0F);
                return detail::sum_of_squares(way, n, isa);
              });
          const double limit =
              limiter(state.extra[0].template mutable_data_ptr<float>()[0], std::sqrt(squares));
          const auto rate = static_cast<float>(-options.lr() * std::sqrt(options.scale()) / limit);
          matrix.update_weights([&](std::int64_t begin, std::int64_t n, float* weights,
                                    const float* g) { go(weights, g, begin, n, decay, rate); });
        });
  }

 private:
  /// How much longer Adam's direction is than the gradient, channel by channel; one for all if Mini.
  static std::vector<float> scales_of(const detail::Floats& r, const detail::Floats& direction,
                                      bool columns) {
    const auto from = detail::channel_squares(r, columns);
    const auto to = detail::channel_squares(direction, columns);
    std::vector<float> scales(from.size());
    const double all = std::sqrt(detail::total(to)) / (std::sqrt(detail::total(from)) + 1e-8);
    for (std::size_t i = 0; i < scales.size(); ++i)
      scales[i] = static_cast<float>(Mini ? all : std::sqrt(to[i]) / (std::sqrt(from[i]) + 1e-8));
    return scales;
  }
  /// What a step of `length` is divided by, so that it is at most 1.01 times as long as the last one.
  static double limiter(float& last, double length) {
    constexpr double kGrowth = 1.01;
    const double limit = last > 0 ? std::max(length / (last + 1e-8), kGrowth) / kGrowth : 1.0;
    last = static_cast<float>(length / limit);
    return limit;
  }
};
using ApolloRule = ApolloRuleOf<false>;
using ApolloMiniRule = ApolloRuleOf<true>;
static_assert(UpdateRule<ApolloRule> && UpdateRule<ApolloMiniRule>);

template <class MomentCodec, class SecondMomentCodec, class MasterCodec = RoundNearest>
using Apollo = Optimizer<ApolloRule, MomentCodec, SecondMomentCodec, MasterCodec>;
template <class MomentCodec, class SecondMomentCodec, class MasterCodec = RoundNearest>
using ApolloMini = Optimizer<ApolloMiniRule, MomentCodec, SecondMomentCodec, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using ApolloOf = Apollo<typename StatesOf<C>::First, typename StatesOf<C>::Second, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using ApolloMiniOf =
    ApolloMini<typename StatesOf<C>::First, typename StatesOf<C>::Second, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

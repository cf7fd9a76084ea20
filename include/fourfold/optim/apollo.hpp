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
#include <fourfold/optim/projected_options.hpp>

namespace fourfold::inline v0 {
namespace optim {

namespace detail {
template <bool Mini>
struct ApolloDefaults {
  static constexpr std::int64_t rank = Mini ? 1 : 256;
  static constexpr double scale = Mini ? 128 : 1;  ///< the step is multiplied by its root
  static constexpr double eps = 1e-6;
};
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

using ApolloOptions = ProjectedOptions<detail::ApolloDefaults<false>>;
using ApolloMiniOptions = ProjectedOptions<detail::ApolloDefaults<true>>;

template <bool Mini>
struct ApolloRuleOf {
  using Options = ProjectedOptions<detail::ApolloDefaults<Mini>>;
  static constexpr bool kByRows = true;

  static std::string name() { return Mini ? "ApolloMini" : "Apollo"; }
  static void check(const Options& options, const std::string& whose) {
    detail::check_projected_options(options, whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options& options) {
    return detail::projected_moments(p, options);
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
          const detail::ProjectedShape shape(p, options);
          Key key = keys.matrix;
          key.step = static_cast<std::uint64_t>((count.step - 1) / options.update_proj_gap());
          const detail::Floats r =
              detail::project(matrix, detail::random_projection(key, shape.rank, shape.shorter));
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

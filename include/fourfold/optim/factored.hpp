// SPDX-License-Identifier: Apache-2.0
#pragma once
/// AdamW whose second moment is held as means of rows and columns, 4 * (rows + columns) bytes a matrix
/// (the "Factor" optimizer of Li et al., arXiv 2309.01507, section 4.3).
///   optim::AdamW<optim::Normal4, optim::Factored> optimizer(model->parameters(), 1e-3);
/// A vector's second moment, and a first moment, are as ever. Tensors of more dimensions are matrices of
/// dimension 0 and the rest.
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/detail/factored_moment.hpp>

#include <tuple>

namespace fourfold::inline v0 {
namespace optim {

/// In the place of AdamW's second codec.
struct Factored {};

namespace detail {
/// out = columns * row
struct FactoredLoop {
  FOURFOLD_LOOP static void run(float* __restrict out, const float* __restrict columns,
                                std::int64_t n, float row) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = columns[i] * row; });
  }
};
}  // namespace detail

struct AdamWFactoredRule {
  using Options = ::torch::optim::AdamWOptions;
  static constexpr bool kByRows = true;

  static std::string name() { return "AdamWFactored"; }
  static void check(const Options& options, const std::string& whose) {
    AdamWRule::check(options, whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) {
    return {p.numel(), p.dim() < 2 ? p.numel() : 0};
  }
  static std::vector<std::vector<std::int64_t>> extra(const at::Tensor& p, const Options&) {
    return detail::factored_sizes(p);
  }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount& count, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    detail::AdamWFactors factors = AdamWRule::factors(options, count);
    if (p.dim() < 2)
      return detail::step_values<AdamWRule>(p, grad, state, factors, keys, maximize, isa);
    const double take = 1 - std::get<1>(options.betas());
    factors.keep_second = 1, factors.take_second = 0;  // v comes as it is to be used
    detail::step_matrix(p, grad, state, keys, maximize, name(), isa, [&](const auto& matrix) {
      const detail::FactoredMoment moment = detail::update_factors(matrix, take);
      const double inverse = moment.mean > 0 ? 1 / moment.mean : 0;
      matrix.update([&](std::int64_t begin, std::int64_t n, float* weights, const float* g,
                        float* m, float*) {
        alignas(64) float v[detail::kTile];
        detail::for_each_row_part(
            begin, n, matrix.columns, [&](std::int64_t row, std::int64_t from, std::int64_t to) {
              detail::run_vectorised<detail::FactoredLoop>(
                  isa, v + from, moment.columns + (begin + from - row * matrix.columns), to - from,
                  static_cast<float>(moment.rows[row] * inverse));
            });
        detail::update(weights, g, m, static_cast<float*>(v), n, factors, isa);
      });
    });
  }
};
static_assert(UpdateRule<AdamWFactoredRule>);

template <>
struct AdamWBy<Factored> {
  using Rule = AdamWFactoredRule;
  using Second = Fp32;
};

}  // namespace optim
}  // namespace fourfold::inline v0

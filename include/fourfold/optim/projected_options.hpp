// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Options of the rules that see a gradient through few directions: Apollo, ApolloMini, GaLore. A
/// matrix (rows, columns) is projected to `rank` directions of its shorter dimension; what is not a
/// matrix (biases, norms) is not projected.
#include <ATen/core/Tensor.h>
#include <fourfold/optim/options.hpp>
#include <fourfold/optim/rule.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

namespace fourfold::inline v0 {
namespace optim {

/// `Defaults` has those of a paper: rank, scale, eps.
template <class Defaults>
struct ProjectedOptions : detail::OptionsOf<ProjectedOptions<Defaults>> {
  ProjectedOptions(double lr = 1e-2) : lr_(lr) {}
  typedef std::tuple<double, double> betas_t;
  TORCH_ARG(double, lr) = 1e-2;
  TORCH_ARG(std::int64_t, rank) = Defaults::rank;  ///< directions of the subspace
  TORCH_ARG(std::int64_t, update_proj_gap) = 200;  ///< steps that share a projection
  TORCH_ARG(double, scale) = Defaults::scale;      ///< of the step: see each rule
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = Defaults::eps;
  TORCH_ARG(double, weight_decay) = 0;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("rank", rank()), archive("update_proj_gap", update_proj_gap());
    archive("scale", scale()), archive("betas", betas()), archive("eps", eps());
    archive("weight_decay", weight_decay());
  }
};

namespace detail {

template <class Defaults>
void check_projected_options(const ProjectedOptions<Defaults>& options, const std::string& whose) {
  const auto [beta1, beta2] = options.betas();
  check_learning_rate(options.lr(), whose);
  check_option(options.rank() >= 1, "rank", options.rank(), whose, "is 1 or more");
  check_option(options.update_proj_gap() >= 1, "update_proj_gap", options.update_proj_gap(), whose,
               "is 1 or more");
  check_option(options.scale() > 0, "scale", options.scale(), whose, "is above 0");
  check_option(options.eps() >= 0, "epsilon value", options.eps(), whose, "is 0 or more");
  check_betas(beta1, beta2, whose);
  check_weight_decay(options.weight_decay(), whose);
}

/// Of the projection of a matrix: (rank, shorter); a projected gradient has rank * longer values.
struct ProjectedShape {
  std::int64_t rank, shorter, longer;

  template <class Options>
  ProjectedShape(const at::Tensor& p, const Options& options)
      : shorter(std::min(p.size(0), p.numel() / p.size(0))), longer(p.numel() / shorter) {
    rank = std::min(options.rank(), shorter);
  }
  /// Dimension 0 counts rows, the others are one row's values.
  static bool has(const at::Tensor& p) { return p.dim() >= 2 && p.numel() > 0; }
};

/// Of two moments, those of the projected gradient.
template <class Options>
MomentSizes projected_moments(const at::Tensor& p, const Options& options) {
  if (!ProjectedShape::has(p)) return {p.numel(), p.numel()};
  const ProjectedShape shape(p, options);
  return {shape.rank * shape.longer, shape.rank * shape.longer};
}

}  // namespace detail
}  // namespace optim
}  // namespace fourfold::inline v0

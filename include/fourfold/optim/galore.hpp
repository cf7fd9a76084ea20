// SPDX-License-Identifier: Apache-2.0
#pragma once
/// GaLore: Adam in the subspace of the gradient's leading singular vectors, found anew from time to
/// time (Zhao et al., arXiv 2403.03507, algorithm 2).
///   optim::GaLoreOf<Int8> optimizer(model->parameters(), optim::GaLoreOptions(1e-2).rank(128));
///
/// A matrix keeps its directions in fp32 and moments of rank times its longer dimension. Directions
/// are found by three steps of subspace iteration from the last ones (the paper: a whole SVD), so that
/// nothing of the gradient's size is made. Vectors (biases, norms) are stepped by AdamW. Directions
/// are LibTorch's QR and eigenvectors, which round differently on other numbers of threads.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/mm.h>
#include <fourfold/optim/detail/projection.hpp>
#include <fourfold/optim/detail/step_vector.hpp>
#include <fourfold/optim/optimizer.hpp>
#include <fourfold/optim/projected_options.hpp>

namespace fourfold::inline v0 {
namespace optim {

namespace detail {
struct GaLoreDefaults {
  static constexpr std::int64_t rank = 128;
  static constexpr double scale = 0.25;  ///< alpha: the step is multiplied by it
  static constexpr double eps = 1e-8;
};

inline at::Tensor tensor_of(Floats& x) {
  return at::from_blob(x.values.data(), {x.rows, x.columns}, at::kFloat);
}
inline Floats floats_of(const at::Tensor& x) {
  Floats out(x.size(0), x.size(1));
  tensor_of(out).copy_(x);
  return out;
}

/// Brings `q` (rank, the shorter dimension) to the leading singular vectors of g, strongest first.
template <class Matrix>
Floats leading_directions(const Matrix& g, Floats q) {
  const bool wide = g.rows <= g.columns;
  for (int i = 0; i < 3; ++i) {
    const Floats z = project(g, q);  // then G G^T q^T, or G^T G q^T, as rows
    Floats next = wide ? transposed(project_rows(g, z)) : project_columns(g, transposed(z));
    q = floats_of(std::get<0>(at::linalg_qr(tensor_of(next).t())).t());
  }
  Floats z = project(g, q);
  const at::Tensor r = tensor_of(z), gram = wide ? at::mm(r, r.t()) : at::mm(r.t(), r);
  const at::Tensor axes = std::get<1>(at::linalg_eigh(gram)).flip({1});
  return floats_of(at::mm(axes.t(), tensor_of(q)));
}

}  // namespace detail

using GaLoreOptions = ProjectedOptions<detail::GaLoreDefaults>;

struct GaLoreRule {
  using Options = GaLoreOptions;
  static constexpr bool kByRows = true;

  static std::string name() { return "GaLore"; }
  static void check(const Options& options, const std::string& whose) {
    detail::check_projected_options(options, whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options& options) {
    return detail::projected_moments(p, options);
  }
  static std::vector<std::vector<std::int64_t>> extra(const at::Tensor& p, const Options& options) {
    if (!detail::ProjectedShape::has(p)) return {};
    const detail::ProjectedShape shape(p, options);
    return {{shape.rank, shape.shorter}};
  }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount& count, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    if (p.dim() < 2) return detail::step_vector(p, grad, state, options, count, keys, maximize);
    const auto [beta1, beta2] = options.betas();
    const auto decay = static_cast<float>(1 - options.lr() * options.weight_decay());
    const auto rate = static_cast<float>(-options.lr() * options.scale());
    detail::step_matrix(
        p, grad, state, keys, maximize, name(), isa,
        [&, beta1 = beta1, beta2 = beta2](const auto& matrix) {
          detail::Floats q = directions(matrix, options, count, keys);
          const detail::Floats r = detail::project(matrix, q);
          const detail::Floats way =
              detail::adam_direction(r, state, beta1, beta2, options.eps(), count.step, keys, isa);
          // Back: row i of the step is the sum over k of q[k, i] way[k], or of way[i, k] q[k].
          const bool wide = matrix.rows <= matrix.columns;
          const detail::Floats& long_side = wide ? way : q;
          matrix.update_weights([&](std::int64_t begin, std::int64_t n, float* weights,
                                    const float*) {
            alignas(64) float step[detail::kTile];
            std::fill_n(step, n, 0.0F);
            detail::for_each_row_part(
                begin, n, matrix.columns,
                [&](std::int64_t row, std::int64_t from, std::int64_t to) {
                  for (std::int64_t k = 0; k < q.rows; ++k)
                    detail::run_vectorised<detail::AddScaled>(
                        isa, step + from, long_side.row(k) + (begin + from - row * matrix.columns),
                        to - from, 1.0F, wide ? q.row(k)[row] : way.row(row)[k]);
                });
            detail::run_vectorised<detail::AddScaled>(isa, weights, static_cast<const float*>(step),
                                                      n, decay, rate);
          });
        });
  }

 private:
  /// The directions kept, or new ones where it is time.
  template <class Matrix>
  static detail::Floats directions(const Matrix& matrix, const Options& options,
                                   const StepCount& count, const detail::StepKeys& keys) {
    at::Tensor& kept = matrix.state.extra[0];
    if (!count.fresh && (count.step - 1) % options.update_proj_gap() != 0)
      return detail::floats_of(kept);
    if (!std::isfinite(detail::total(matrix.row_squares()))) return detail::floats_of(kept);
    const detail::Floats found = detail::leading_directions(
        matrix, count.fresh ? detail::random_projection(keys.matrix, kept.size(0), kept.size(1))
                            : detail::floats_of(kept));
    std::copy(found.values.begin(), found.values.end(), kept.mutable_data_ptr<float>());
    return found;
  }
};
static_assert(UpdateRule<GaLoreRule>);

template <class MomentCodec, class SecondMomentCodec, class MasterCodec = RoundNearest>
using GaLore = Optimizer<GaLoreRule, MomentCodec, SecondMomentCodec, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using GaLoreOf = GaLore<typename StatesOf<C>::First, typename StatesOf<C>::Second, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

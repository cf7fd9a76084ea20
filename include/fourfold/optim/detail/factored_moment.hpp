// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A second moment held as the means of its rows and of its columns: v = R C^T / mean(R) (Shazeer and
/// Stern, arXiv 1804.04235, section 3). A rule keeps both in State::extra.
#include <fourfold/optim/detail/matrix_step.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Sizes of what is kept of a matrix: nothing of a vector.
template <class = void>
std::vector<std::vector<std::int64_t>> factored_sizes(const at::Tensor& p) {
  if (p.dim() < 2 || p.numel() == 0) return {};
  return {{p.size(0)}, {p.numel() / p.size(0)}};
}

/// R and C, and R's mean.
struct FactoredMoment {
  const float* rows;
  const float* columns;
  double mean;
};

/// Both means go `take` of the way to the gradient's.
template <class Matrix>
FactoredMoment update_factors(const Matrix& matrix, double take) {
  const auto update = [&](at::Tensor& means, const std::vector<double>& squares, double count) {
    float* mean = means.mutable_data_ptr<float>();
    for (std::size_t i = 0; i < squares.size(); ++i)
      mean[i] = static_cast<float>(mean[i] + take * (squares[i] / count - mean[i]));
    return mean;
  };
  FactoredMoment moment{
      update(matrix.state.extra[0], matrix.row_squares(), static_cast<double>(matrix.columns)),
      update(matrix.state.extra[1], matrix.column_squares(), static_cast<double>(matrix.rows)), 0};
  for (std::int64_t i = 0; i < matrix.rows; ++i) moment.mean += moment.rows[i];
  moment.mean /= static_cast<double>(matrix.rows);
  return moment;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

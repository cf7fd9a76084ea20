// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How much a gradient differs from batch to batch, and how large it is: what the variance that
/// rounding adds is measured against, as GACT does (arXiv:2206.11357).
///
/// GradientVariance keeps averages of 256 of a gradient's values and of their squares, which forget
/// the step of t steps ago as 0.9^t, in place of a copy of the gradient.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/squares.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0::plan {

/// Sum of squares, the same on any number of threads.
template <class = void>
double sum_of_squares(const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = values.detach().to(at::kCPU, at::kFloat);
  const at::Tensor flat =
      x.is_non_overlapping_and_dense() ? x.as_strided({x.numel()}, {1}) : x.contiguous().view({-1});
  std::array<double, fourfold::detail::kSquareLanes> lanes{};
  fourfold::detail::add_squares(lanes.data(), flat.const_data_ptr<float>(), flat.numel(), isa());
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

class GradientVariance {
 public:
  static constexpr std::int64_t kSample = 256;
  static constexpr double kDecay = 0.9;

  /// One batch's gradient; all of one size. One that is not finite is left out.
  template <class = void>
  void add(const at::Tensor& gradient) {
    const at::NoGradGuard no_grad;
    at::Tensor flat = gradient.detach();
    flat = flat.is_non_overlapping_and_dense() ? flat.as_strided({flat.numel()}, {1})
                                               : flat.reshape({-1});
    numel_ = flat.numel();
    if (numel_ == 0) return;
    const std::int64_t count = std::min(kSample, numel_), every = numel_ / count;
    const at::Tensor some =
        flat.slice(0, 0, count * every, every).to(at::kCPU, at::kDouble).contiguous();
    const double* x = some.const_data_ptr<double>();
    if (!std::all_of(x, x + count, [](double value) { return std::isfinite(value); })) return;
    mean_.resize(static_cast<std::size_t>(count)), square_.resize(mean_.size());
    for (std::size_t i = 0; i < mean_.size(); ++i) {
      mean_[i] += (1 - kDecay) * (x[i] - mean_[i]);
      square_[i] += (1 - kDecay) * (x[i] * x[i] - square_[i]);
    }
    weight_ += (1 - kDecay) * (1 - weight_);
    squared_weights_ = kDecay * kDecay * squared_weights_ + (1 - kDecay) * (1 - kDecay);
    ++batches_;
  }

  [[nodiscard]] std::int64_t batches() const { return batches_; }
  /// Sum over all values of their variance between batches, unbiased; 0 before the second batch.
  [[nodiscard]] double variance() const {
    if (batches_ < 2) return 0;
    double sum = 0;
    for (std::size_t i = 0; i < mean_.size(); ++i) {
      const double mean = mean_[i] / weight_;
      sum += std::max(0.0, square_[i] / weight_ - mean * mean);
    }
    const double scale = static_cast<double>(numel_) / static_cast<double>(mean_.size());
    return sum * scale / (1 - squared_weights_ / (weight_ * weight_));
  }

 private:
  std::vector<double> mean_, square_;
  std::int64_t numel_ = 0, batches_ = 0;
  double weight_ = 0, squared_weights_ = 0;
};

}  // namespace fourfold::inline v0::plan

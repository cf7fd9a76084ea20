// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What tests/reference/optimizers.py ran in Python, run here.
#include <tests/reference/optimizers.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <span>
#include <vector>

namespace oracle {

inline at::Tensor start(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto i = torch::arange(c10::multiply_integers(sizes), torch::kLong);
  return ((i * 37).remainder(101) - 50).to(torch::kDouble).div(64).view(sizes).to(dtype);
}
inline at::Tensor gradient(const at::Tensor& p, std::int64_t step) {
  const auto i = torch::arange(p.numel(), torch::kLong);
  const auto whole = (i * 7919 + step * 104729 + i * step * 31).remainder(2001) - 800;
  const auto size = torch::pow(2.0, i.remainder(5).to(torch::kDouble));
  return (whole.to(torch::kDouble) / 1024 / size).view(p.sizes()).to(p.scalar_type());
}

/// The largest error of a tensor after 100 steps, as a share of its largest value.
template <class Make>
double error_of(std::span<const double> expected, const Make& make,
                const std::vector<std::vector<std::int64_t>>& all_sizes = {{12, 10}, {7}},
                at::ScalarType dtype = at::kFloat) {
  std::vector<at::Tensor> parameters;
  for (const auto& sizes : all_sizes) parameters.push_back(start(sizes, dtype).requires_grad_());
  auto optimizer = make(parameters);
  for (std::int64_t step = 1; step <= 100; ++step) {
    for (at::Tensor& p : parameters) p.mutable_grad() = gradient(p, step);
    optimizer->step();
  }
  double worst = 0;
  std::size_t at = 0;
  for (const at::Tensor& p : parameters) {
    const auto seen = p.detach().to(torch::kDouble).contiguous();
    double error = 0, largest = 0;
    for (std::int64_t i = 0; i < seen.numel(); ++i, ++at) {
      error = std::max(error, std::abs(seen.const_data_ptr<double>()[i] - expected[at]));
      largest = std::max(largest, std::abs(expected[at]));
    }
    worst = std::max(worst, error / largest);
  }
  EXPECT_EQ(at, expected.size());
  return worst;
}

}  // namespace oracle

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Modules packed and decompressed, run on the same inputs: what every test of the weights' place
/// compares.
#include <fourfold/weights/compress_weights.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "tests/support/message_of.hpp"

#include <functional>
#include <string>
#include <vector>

namespace fourfold::tests {

/// Every matrix, also a small one.
inline bool every_matrix(const std::string&, const at::Tensor& parameter) {
  return parameter.dim() >= 2;
}

/// Modules are compared in fp64, where codes decode to the same values as plain ones hold, and only
/// the order of sums differs: the largest sums here have 2^10 terms and pass 2^5 layers and steps,
/// so |difference| <= 2^15 * 2^-53 of the largest value or partial sum met on the way, taken as 2^7
/// times the largest of the result.
inline testing::AssertionResult same_up_to_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type())
    return testing::AssertionFailure()
           << "sizes or dtypes differ: " << a.sizes() << " and " << b.sizes();
  if (a.numel() == 0) return testing::AssertionSuccess();
  EXPECT_EQ(a.scalar_type(), at::kDouble);
  const double error = (a - b).abs().max().item<double>();
  const double bound = std::ldexp(1.0, 15 + 7 - 53) * std::max(1.0, b.abs().max().item<double>());
  if (error <= bound) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "differs by " << error << ", more than " << bound;
}

/// Forward and gradients (of the input, if it is floating, and of all parameters that are plain).
struct Outcome {
  at::Tensor output;
  std::vector<at::Tensor> gradients;
};

using Forward = std::function<at::Tensor(const at::Tensor&)>;

inline Outcome run(const NamedTensors& parameters, const Forward& forward, const at::Tensor& input,
                   const std::vector<std::string>& of) {
  at::Tensor x = input.detach().clone();
  if (x.is_floating_point()) x.requires_grad_(true);
  const at::Tensor y = forward(x);
  std::vector<at::Tensor> leaves;
  if (x.is_floating_point()) leaves.push_back(x);
  for (const auto& [name, parameter] : parameters)
    if (std::find(of.begin(), of.end(), name) != of.end()) leaves.push_back(parameter);
  // Weighted, so that no gradient is a constant.
  const at::Tensor weights = torch::linspace(-1, 1, y.numel(), y.options()).view(y.sizes());
  Outcome outcome{y.detach(), {}};
  if (!leaves.empty()) outcome.gradients = torch::autograd::grad({(y * weights).sum()}, leaves);
  return outcome;
}

/// Packs `module` by C, runs it, decompresses it, runs it: the same up to the order of sums.
template <class C, class M>
void expect_as_decompressed(M module, const Forward& forward, const at::Tensor& input) {
  module->to(torch::kDouble);
  const CompressedWeights packed = compress_weights<C>(module, every_matrix);
  std::vector<std::string> plain;
  std::int64_t matrices = 0;
  for (const auto& [name, parameter] : parameters_of(module, "test")) {
    if (parameter.dim() >= 2) {
      EXPECT_TRUE(door::is_packed(parameter)) << name;
      EXPECT_FALSE(parameter.requires_grad()) << name;
      ++matrices;
    } else {
      EXPECT_FALSE(door::is_packed(parameter)) << name;
      plain.push_back(name);
    }
  }
  EXPECT_EQ(static_cast<std::int64_t>(packed.names.size()), matrices);
  const Outcome with_codes = run(parameters_of(module, "test"), forward, input, plain);
  decompress(module);
  for (const auto& [name, parameter] : parameters_of(module, "test"))
    EXPECT_TRUE(!door::is_packed(parameter) && parameter.requires_grad()) << name;
  const Outcome with_values = run(parameters_of(module, "test"), forward, input, plain);
  EXPECT_TRUE(same_up_to_order(with_codes.output, with_values.output));
  ASSERT_EQ(with_codes.gradients.size(), with_values.gradients.size());
  for (std::size_t i = 0; i < with_codes.gradients.size(); ++i)
    EXPECT_TRUE(same_up_to_order(with_codes.gradients[i], with_values.gradients[i]))
        << "gradient " << i;
}

}  // namespace fourfold::tests

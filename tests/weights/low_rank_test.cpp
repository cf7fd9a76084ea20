// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/codec/packed_matmul.hpp>
// what is tested comes first
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <memory>
#include <vector>

namespace fourfold {
namespace {

using Codec8 = LowRank<8>;

/// The factors of `weight` as leaves that train.
std::vector<at::Tensor> trainable_factors(const at::Tensor& weight) {
  std::vector<at::Tensor> factors = Codec8{}.compress(weight).buffers;
  for (at::Tensor& factor : factors) factor.requires_grad_();
  return factors;
}

/// x (left right)^T without the product of the factors.
at::Tensor linear(const at::Tensor& x, const std::vector<at::Tensor>& factors) {
  return at::matmul(at::matmul(x, factors[1].t()), factors[0].t());
}

TEST(LowRankFactors, HaveTheGradientsOfTheirProduct) {
  torch::manual_seed(0);
  const at::Tensor weight = torch::randn({24, 36}, at::kDouble);
  const at::Tensor x = torch::randn({10, 36}, at::kDouble), g = torch::randn({10, 24}, at::kDouble);
  const std::vector<at::Tensor> factors = trainable_factors(weight);
  linear(x, factors).backward(g);
  // d loss / d W = g^T x, and by the chain rule of W = left right:
  const at::Tensor dense = at::mm(g.t(), x);
  const at::Tensor left = at::mm(dense, factors[1].detach().t());
  const at::Tensor right = at::mm(factors[0].detach().t(), dense);
  EXPECT_LE((factors[0].grad() - left).norm().item<double>(), 1e-13 * left.norm().item<double>());
  EXPECT_LE((factors[1].grad() - right).norm().item<double>(), 1e-13 * right.norm().item<double>());
}

TEST(LowRankFactors, LearnWhatTruncationLost) {
  torch::manual_seed(1);
  // A layer that weighs its inputs unevenly: truncating its weight is not the best that 8
  // directions can do for its outputs, so training must find better factors than the
  // decomposition's.
  const at::Tensor weight = torch::randn({32, 48});
  const at::Tensor spread = at::pow(2.0, torch::linspace(2, -4, 48));
  const std::vector<at::Tensor> factors = trainable_factors(weight);
  torch::optim::Adam optimizer(factors, torch::optim::AdamOptions(0.03));
  const at::Tensor validation = torch::randn({512, 48}) * spread;
  const auto loss_on = [&](const at::Tensor& x) {
    return torch::mse_loss(linear(x, factors), at::linear(x, weight));
  };
  const double before = loss_on(validation).item<double>();
  for (int step = 0; step < 400; ++step) {
    optimizer.zero_grad();
    loss_on(torch::randn({64, 48}) * spread).backward();
    optimizer.step();
  }
  const double after = loss_on(validation).item<double>();
  // The best for these inputs: the decomposition of W diag(spread), and an output's mean square.
  const at::Tensor singular = at::linalg_svdvals((weight * spread).to(at::kDouble));
  const double best = singular.slice(0, 8).square().sum().item<double>() / 32;
  EXPECT_GT(before, 2 * best);
  EXPECT_LT(after, 1.25 * best);
}

TEST(LowRankFactors, MultiplyPackedAsTheyDoInTraining) {
  torch::manual_seed(2);
  std::vector<at::Tensor> factors = trainable_factors(torch::randn({20, 30}));
  torch::optim::SGD optimizer(factors, 0.1);
  linear(torch::randn({4, 30}), factors).square().sum().backward();
  optimizer.step();
  // A payload that holds the very factors sees every step, and copies nothing.
  const CodecPayload<Codec8> packed({factors, {20, 30}, at::kFloat});
  const at::Tensor x = torch::randn({5, 30});
  EXPECT_TRUE(torch::equal(packed_linear(x, packed), linear(x, factors).detach()));
  EXPECT_FALSE(packed_linear(x, packed).requires_grad());
  EXPECT_EQ(packed.nbytes(), (20 + 30) * 8 * 4);
  const at::Tensor dense = at::mm(factors[0], factors[1]).detach();
  EXPECT_TRUE(at::allclose(packed.decompress(), dense, 1e-5, 1e-5));
  EXPECT_FALSE(packed.decompress().requires_grad());
  optimizer.zero_grad();
  linear(x, factors).sum().backward();
  optimizer.step();
  EXPECT_TRUE(torch::equal(packed_linear(x, packed), linear(x, factors).detach()));
}

TEST(LowRankFactors, TrainWithinTheirBytes) {
  // Gradients and states are of the factors' size: nothing of (rows, columns) lives after a step.
  const std::vector<at::Tensor> factors = trainable_factors(torch::randn({64, 96}));
  linear(torch::randn({3, 96}), factors).sum().backward();
  EXPECT_EQ(factors[0].grad().nbytes() + factors[1].grad().nbytes(), (64U + 96U) * 8 * 4);
}

}  // namespace
}  // namespace fourfold

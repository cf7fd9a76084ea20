// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/quantised.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/fourfold.hpp>
#include <fourfold/gradients/release.hpp>
#include "tests/support/message_of.hpp"

namespace {

using fourfold::Gradients, fourfold::Int4, fourfold::Int8, fourfold::quantise_gradients;
using fourfold::QuantisedGradients;
using testing::HasSubstr;

torch::Tensor gradient_of(const torch::Tensor& w, const torch::Tensor& by) {
  w.mutable_grad().reset();
  (w * by).sum().backward();
  return w.grad();
}

/// A value x is rounded to its neighbours a or b: the mean over N seeds has the standard error
/// sqrt((x - a) (b - x) / N). Where both come often enough for the normal law to hold (1 % of the
/// time or more), all means lie within 4 of them but for 6e-5 of the values, and the mean of their
/// squares is 1 but for sqrt(2 / values); 16 bits of noise move a mean by 2^-17 of a step.
TEST(QuantisedGradients, AreUnbiased) {
  torch::manual_seed(0);
  const auto exact = torch::randn({64, 64}) * torch::exp(torch::randn({64, 64}));
  constexpr int kSeeds = 4096;
  auto sum = torch::zeros({64, 64}, torch::kDouble);
  auto low = torch::full({64, 64}, 1e30), high = -low;
  for (int seed = 0; seed < kSeeds; ++seed) {
    torch::manual_seed(static_cast<std::uint64_t>(seed));
    const auto w = torch::ones({64, 64}).requires_grad_();
    const QuantisedGradients quantised = quantise_gradients<Int4>({w});
    const auto rounded = gradient_of(w, exact);
    sum += rounded, low = torch::minimum(low, rounded), high = torch::maximum(high, rounded);
  }
  const auto x = exact.to(torch::kDouble), step = (high - low).to(torch::kDouble);
  const auto error = (sum / kSeeds - x).abs();
  const auto whole = 2 * Int4{}.error_bound(exact).to(torch::kDouble);  // a step, at least
  EXPECT_TRUE((error <= 4 * whole / 2 / std::sqrt(kSeeds)).all().item<bool>());
  const auto share = (x - low) / step;
  const auto often = (share > 0.01).logical_and(share < 0.99);
  const auto z =
      ((sum / kSeeds - x) / step / (share * (1 - share) / kSeeds).sqrt()).masked_select(often);
  EXPECT_GT(z.numel(), 3500);
  EXPECT_LE((z.abs() > 4).sum().item<std::int64_t>(), 2);
  EXPECT_NEAR(z.square().mean().item<double>(), 1, 4 * std::sqrt(2.0 / z.numel()));
  EXPECT_LE(std::abs(z.mean().item<double>()), 4 / std::sqrt(z.numel()));
}

TEST(QuantisedGradients, AreTheCodecsValuesAndRepeat) {
  const auto by = torch::randn({100, 100});
  const auto run = [&] {
    torch::manual_seed(5);
    const auto w = torch::ones({100, 100}).requires_grad_();
    const auto quantised = quantise_gradients<Int4>({w, w});
    EXPECT_EQ(quantised.size(), 1u);
    const auto first = gradient_of(w, by).clone(), second = gradient_of(w, by).clone();
    return std::pair(first, second);
  };
  const auto [a, b] = run();
  const auto [again, and_again] = run();
  EXPECT_TRUE(a.equal(again));
  EXPECT_TRUE(b.equal(and_again));
  EXPECT_FALSE(a.equal(b)) << "each pass has its own noise";
  EXPECT_TRUE(((a - by).abs() <= 2 * Int4{}.error_bound(by)).all().item<bool>());
  for (std::int64_t group = 0; group < 10000 / 64; ++group)
    EXPECT_LE(std::get<0>(at::_unique(a.flatten().slice(0, 64 * group, 64 * group + 64))).numel(),
              16);
}

TEST(QuantisedGradients, EndWithTheGuardAndLeaveSmallOnesAlone) {
  const auto w = torch::ones({100, 100}).requires_grad_(),
             small = torch::ones({9}).requires_grad_();
  auto frozen = torch::ones({100, 100});
  const auto by = torch::randn({100, 100});
  {
    QuantisedGradients quantised = quantise_gradients<Int4>({w, small, frozen, torch::Tensor()});
    EXPECT_EQ(quantised.size(), 2u);
    const QuantisedGradients moved = std::move(quantised);
    EXPECT_FALSE(gradient_of(w, by).equal(by));
    EXPECT_TRUE(gradient_of(small, torch::arange(9)).equal(torch::arange(9).to(torch::kFloat)));
  }
  EXPECT_TRUE(gradient_of(w, by).equal(by));
  auto gone = torch::ones({100, 100}).requires_grad_();
  QuantisedGradients late = quantise_gradients<Int4>({gone});
  gone.reset();
  late.remove();
  EXPECT_THAT(message_of([&] {
                (void)quantise_gradients<Int4>({w, w * 2});
              }),
              HasSubstr("tensor 1 of sizes [100, 100] is no leaf but the result of an operation; "
                        "pass parameters"));
  EXPECT_TRUE(gradient_of(w, by).equal(by)) << "nothing was hooked";
}

TEST(QuantisedGradients, TheRoundingIsPassedThroughByDoubleBackward) {
  const auto w = torch::randn({80, 80}).requires_grad_();
  const auto quantised = quantise_gradients<Int4>({w});
  const auto first = torch::autograd::grad({w.pow(3).sum()}, {w}, {}, {}, /*create_graph=*/true)[0];
  EXPECT_FALSE(first.detach().equal(3 * w.detach().square()));
  const auto second = torch::autograd::grad({first.sum()}, {w})[0];
  const auto exact = 6 * w.detach();
  EXPECT_TRUE(((second - exact).abs() <= 2 * Int4{}.error_bound(exact)).all().item<bool>());
}

TEST(QuantisedGradients, WhatIsNotFiniteIsSeen) {
  const auto w = torch::ones({100, 100}).requires_grad_();
  const auto quantised = quantise_gradients<Int4>({w});
  auto by = torch::ones({100, 100});
  by[3][3] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(gradient_of(w, by).isfinite().all().item<bool>());
}

/// A policy beside others: released, the rounded gradient is what steps.
TEST(QuantisedGradients, IsAPolicyOfAPipeline) {
  using namespace fourfold;
  const auto run = [](bool released) {
    torch::manual_seed(1);
    torch::nn::Sequential model(torch::nn::Linear(80, 80), torch::nn::ReLU(),
                                torch::nn::Linear(80, 80));
    const auto x = torch::randn({16, 80});
    std::vector<double> losses;
    const auto train = [&](auto pipeline) {
      const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
      for (int step = 0; step < 20; ++step) {
        const auto loss = pipeline.forward([&] { return (model->forward(x) - x).square().mean(); });
        loss.backward();
        if (!released) optimizer->step(), optimizer->zero_grad();
        losses.push_back(loss.template item<double>());
      }
    };
    if (released)
      train(CompressionPipeline<Gradients<Int4>, Release, OptimizerStates<Int8>>(model));
    else
      train(CompressionPipeline<Gradients<Int4>, OptimizerStates<Int8>>(model));
    EXPECT_LT(losses.back(), 0.5 * losses.front());
    (model->forward(x) * 1.0).sum().backward();
    return losses;
  };
  EXPECT_EQ(run(true), run(false));
}

}  // namespace

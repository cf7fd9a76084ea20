// SPDX-License-Identifier: Apache-2.0
#include <fourfold/precision.hpp>

#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/fourfold.hpp>
#include <fourfold/gradients/grad_scaler.hpp>
#include "tests/support/message_of.hpp"

#include <thread>

namespace {

using fourfold::AutocastGuard, fourfold::BFloat16, fourfold::Half, fourfold::Precision;
using fourfold::door::AutocastState;
using testing::HasSubstr;

torch::Tensor product(const torch::Tensor& w) { return torch::mm(torch::ones({2, 4}), w); }

TEST(AutocastGuard, CastsWhileItLives) {
  const auto before = AutocastState::current();
  const auto w = torch::full({4, 4}, 0.37F).requires_grad_();
  {
    EXPECT_FALSE(fourfold::door::autocasting());
    const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
    EXPECT_TRUE(fourfold::door::autocasting());
    EXPECT_EQ(product(w).scalar_type(), torch::kBFloat16);
    EXPECT_EQ(torch::mse_loss(product(w), product(w)).scalar_type(), torch::kFloat);
    {
      const AutocastGuard off(torch::kCPU, {.enabled = false});
      EXPECT_EQ(product(w).scalar_type(), torch::kFloat);
      const AutocastGuard half(torch::kCPU, torch::kHalf);
      EXPECT_EQ(product(w).scalar_type(), torch::kHalf);
    }
    EXPECT_EQ(product(w).scalar_type(), torch::kBFloat16);
    const AutocastGuard gpu(torch::kCUDA);  // another device's region changes nothing here
    EXPECT_EQ(product(w).scalar_type(), torch::kBFloat16);
  }
  EXPECT_EQ(product(w).scalar_type(), torch::kFloat);
  EXPECT_EQ(AutocastState::current(), before);
  const AutocastGuard by_default(torch::kCPU);
  EXPECT_EQ(product(w).scalar_type(), torch::kBFloat16);
}

/// LibTorch keeps a weight's cast until the outermost region ends, and does not notice that a region
/// within has another dtype.
TEST(AutocastGuard, KeptCastsEndWithTheOutermostRegion) {
  const auto w = torch::ones({4, 4}).requires_grad_();
  const auto value = [&] { return product(w)[0][0].item<float>(); };
  const auto set = [&](float to) {
    const torch::NoGradGuard no_grad;
    w.fill_(to);
  };
  {
    const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
    EXPECT_EQ(value(), 4);
    set(2);
    EXPECT_EQ(value(), 4) << "the cast is kept";
    {
      const AutocastGuard inner(torch::kCPU, torch::kBFloat16);
      EXPECT_EQ(value(), 4);
    }
    EXPECT_EQ(value(), 4) << "not the outermost";
    {
      const AutocastGuard fresh(torch::kCPU, torch::kBFloat16, {.cache = false});
      EXPECT_EQ(value(), 8);
    }
    EXPECT_EQ(value(), 4);
    {
      const AutocastGuard half(torch::kCPU, torch::kHalf);
      EXPECT_EQ(product(w).scalar_type(), torch::kHalf);
      EXPECT_EQ(value(), 8);
    }
    EXPECT_EQ(product(w).scalar_type(), torch::kBFloat16) << "not the cast of the region within";
  }
  const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
  EXPECT_EQ(value(), 8);
}

TEST(AutocastGuard, AnExceptionLeavesTheRegion) {
  const auto before = AutocastState::current();
  try {
    const AutocastGuard autocast(torch::kCPU, torch::kHalf, {.cache = false});
    throw std::runtime_error("in forward");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQ(AutocastState::current(), before);
  EXPECT_THAT(message_of([] { AutocastGuard bad(torch::kCPU, torch::kFloat); }),
              HasSubstr("AutocastGuard casts to BFloat16 or Half, but was given Float; for fp32 "
                        "leave it out, or give {.enabled = false}"));
  EXPECT_THAT(
      message_of([] { AutocastGuard bad(torch::kMeta, torch::kHalf); }),
      HasSubstr("there is no autocast for meta; give the device type that the model is on"));
  EXPECT_EQ(AutocastState::current(), before);
}

TEST(AutocastGuard, IsItsThreads) {
  const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
  std::thread([] { EXPECT_FALSE(AutocastState::current().any()); }).join();
  std::optional<AutocastGuard> given(std::in_place, torch::kCPU, torch::kHalf);
  std::thread([&] {
    const auto theirs = AutocastState::current();
    given.reset();
    EXPECT_EQ(AutocastState::current(), theirs) << "another thread's state is not touched";
  }).join();
  at::autocast::decrement_nesting();  // what the lost guard has left here
}

/// As Python's: the same calls, written out.
TEST(AutocastGuard, IsPythonsAutocast) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(16, 32), torch::nn::GELU(),
                              torch::nn::Linear(32, 4));
  const auto x = torch::randn({8, 16});
  const auto gradients = [&](bool guard) {
    model->zero_grad();
    torch::Tensor loss;
    if (guard) {
      const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
      loss = model->forward(x).to(torch::kFloat).square().mean();
    } else {
      at::autocast::set_autocast_enabled(torch::kCPU, true);
      at::autocast::set_autocast_dtype(torch::kCPU, torch::kBFloat16);
      at::autocast::increment_nesting();
      loss = model->forward(x).to(torch::kFloat).square().mean();
      if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(torch::kCPU, false);
    }
    loss.backward();
    std::vector<torch::Tensor> all{loss.detach()};
    for (const auto& p : model->parameters()) all.push_back(p.grad().clone());
    return all;
  };
  const auto ours = gradients(true), pythons = gradients(false);
  for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_TRUE(ours[i].equal(pythons[i])) << i;
}

TEST(AutocastGuard, ACheckpointComputesAgainAsItsForwardDid) {
  torch::nn::Linear linear(64, 64);
  const auto x = torch::randn({8, 64}).requires_grad_();
  const auto gradient = [&](bool checkpointed) {
    const auto fn = [&](const torch::Tensor& t) { return linear(torch::gelu(linear(t))); };
    linear->zero_grad();
    torch::Tensor loss;
    {
      const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
      loss = (checkpointed ? fourfold::checkpoint(fn, x) : fn(x)).to(torch::kFloat).sum();
    }
    loss.backward();
    return linear->weight.grad().clone();
  };
  EXPECT_TRUE(gradient(true).equal(gradient(false)));
}

torch::nn::Sequential net() {
  torch::manual_seed(0);
  return torch::nn::Sequential(torch::nn::Linear(64, 128),
                               torch::nn::LayerNorm(std::vector<long>{128}), torch::nn::GELU(),
                               torch::nn::Linear(128, 64));
}

TEST(Precision, APipelinesScopesComputeInIt) {
  const auto x = torch::randn({32, 64});
  auto plain = net(), piped = net();
  torch::Tensor expected;
  {
    const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
    expected = plain->forward(x);
  }
  expected.square().mean().backward();
  fourfold::CompressionPipeline<Precision<BFloat16>> pipeline(piped);
  const auto got = pipeline.forward([&] { return piped->forward(x); });
  EXPECT_FALSE(AutocastState::current().any());
  EXPECT_EQ(got.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(got.equal(expected));
  got.square().mean().backward();
  for (std::size_t i = 0; i < plain->parameters().size(); ++i) {
    EXPECT_EQ(piped->parameters()[i].grad().scalar_type(), torch::kFloat);
    EXPECT_TRUE(piped->parameters()[i].grad().equal(plain->parameters()[i].grad())) << i;
  }
  EXPECT_THROW(pipeline.forward([&]() -> torch::Tensor { throw std::runtime_error("forward"); }),
               std::runtime_error);
  EXPECT_FALSE(AutocastState::current().any());
}

/// Exact modes stay exact under it; weights' casts are parameters still, never packed.
TEST(Precision, ComposesWithActivationsAndRecompute) {
  using namespace fourfold;
  const auto gradients = [&]<class Pipeline>(std::type_identity<Pipeline>) {
    auto model = net();
    Pipeline pipeline(model);
    const auto x = torch::randn({256, 64}, torch::make_generator<torch::CPUGeneratorImpl>(7UL));
    const auto out = pipeline.forward([&] { return model->forward(x); });
    out.to(torch::kFloat).square().sum().backward();
    std::vector<torch::Tensor> all;
    for (const auto& p : model->parameters()) all.push_back(p.grad());
    return all;
  };
  const auto exact = gradients(std::type_identity<CompressionPipeline<Precision<BFloat16>>>{});
  const auto recomputed =
      gradients(std::type_identity<
                CompressionPipeline<Precision<BFloat16>, Recompute<CheapOps>, Blocks<>>>{});
  for (std::size_t i = 0; i < exact.size(); ++i) EXPECT_TRUE(exact[i].equal(recomputed[i])) << i;
  const auto rounded =
      gradients(std::type_identity<CompressionPipeline<Precision<BFloat16>, Activations<Int8>>>{});
  for (std::size_t i = 0; i < exact.size(); ++i)
    EXPECT_LT((exact[i] - rounded[i]).norm().item<double>(), 0.02 * exact[i].norm().item<double>());
}

/// Half needs a scaler: gradients below 6e-8 would be zero.
TEST(Precision, HalfTrainsWithAScaler) {
  auto model = net();
  fourfold::CompressionPipeline<Precision<Half>, fourfold::OptimizerStates<fourfold::Int8>>
      pipeline(model);
  const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
  fourfold::GradScaler scaler({.init_scale = 1024});
  const auto x = torch::randn({32, 64}), y = torch::randn({32, 64});
  std::vector<double> losses;
  for (int step = 0; step < 30; ++step) {
    optimizer->zero_grad();
    const auto loss = pipeline.forward(
        [&] { return torch::mse_loss(model->forward(x).to(torch::kFloat), y) * 1e-6; });
    scaler.scale(loss * 1e6).backward();
    scaler.step(*optimizer);
    scaler.update();
    losses.push_back(loss.item<double>());
  }
  EXPECT_LT(losses.back(), 0.5 * losses.front());
}

TEST(Precision, ADeviceWithoutAutocastIsNamed) {
  struct Nowhere : torch::nn::Module {
    Nowhere() { register_parameter("weight", torch::ones({2}, torch::kMeta)); }
  } model;
  EXPECT_THAT(
      message_of([&] { fourfold::CompressionPipeline<Precision<BFloat16>> pipeline(model); }),
      HasSubstr("Precision<> computes on a CPU or on CUDA, but the model is on meta"));
}

}  // namespace

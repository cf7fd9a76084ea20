// SPDX-License-Identifier: Apache-2.0
#include <fourfold/pipeline.hpp>
#include <fourfold/plan/budget.hpp>

#include "../pipeline/models.hpp"
#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace fourfold::literals;
using fourfold::Activations, fourfold::Budget, fourfold::CheapOps, fourfold::CompressionPipeline,
    fourfold::Int4, fourfold::Int8, fourfold::Meter, fourfold::PlanOptions, fourfold::Recompute;
using pipeline_models::Case;
using ::testing::HasSubstr;
namespace nn = torch::nn;

using Plain = CompressionPipeline<>;
using Planned = CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, Budget<>>;
using ExactPlanned = CompressionPipeline<Recompute<CheapOps>, Budget<>>;

constexpr std::int64_t kNoLimit = 4_GiB;

/// A module whose forward is written here.
struct Net : nn::Module {
  template <class M>
  M add(const std::string& name, M module) {
    return register_module(name, module);
  }
};

Case mlp() {
  auto net = nn::Sequential(nn::Linear(64, 256), nn::ReLU(), nn::Linear(256, 256), nn::GELU(),
                            nn::LayerNorm(nn::LayerNormOptions({256})), nn::Dropout(0.2),
                            nn::Linear(256, 256), nn::Tanh(), nn::Linear(256, 10));
  auto x = torch::randn({512, 64});
  auto target = torch::randint(10, {512}, torch::kLong);
  return {"MLP", net.ptr(),
          [=]() mutable { return torch::cross_entropy_loss(net->forward(x), target); }};
}
Case convolutions() {
  const auto conv = [](int in, int out) {
    return nn::Conv2d(nn::Conv2dOptions(in, out, 3).padding(1));
  };
  auto net = nn::Sequential(conv(3, 16), nn::BatchNorm2d(16), nn::ReLU(nn::ReLUOptions(true)),
                            conv(16, 32), nn::MaxPool2d(2), nn::BatchNorm2d(32), nn::ReLU(),
                            conv(32, 32), nn::BatchNorm2d(32), nn::SiLU(), nn::AvgPool2d(2),
                            nn::Flatten(), nn::Linear(32 * 8 * 8, 10));
  auto x = torch::randn({16, 3, 32, 32});
  auto target = torch::randint(10, {16}, torch::kLong);
  return {"convolutions", net.ptr(),
          [=]() mutable { return torch::cross_entropy_loss(net->forward(x), target); }};
}
Case encoder() {
  auto net = nn::TransformerEncoder(
      nn::TransformerEncoderOptions(nn::TransformerEncoderLayerOptions(64, 4)
                                        .dim_feedforward(256)
                                        .dropout(0.1)
                                        .activation(torch::kGELU),
                                    3));
  auto x = torch::randn({64, 8, 64});
  return {"TransformerEncoder", net.ptr(),
          [=]() mutable { return net->forward(x).square().mean(); }};
}

std::vector<std::function<Case()>> models() {
  return {mlp, convolutions, encoder, pipeline_models::recurrent, pipeline_models::by_hand};
}

/// The peak of one step, gradients in and out.
template <class Pipeline>
std::int64_t step(Pipeline& pipeline, const Case& model) {
  for (const at::Tensor& parameter : pipeline.parameters()) parameter.mutable_grad() = at::Tensor();
  const Meter meter;
  meter.restart_peak();
  pipeline.forward(model.loss).backward();
  return meter.bytes().peak;
}

Case seeded(const std::function<Case()>& make) {
  static const Meter meter;  // inputs are counted, too
  torch::manual_seed(0);
  return make();
}

template <class Pipeline>
void expect_budgets_obeyed(const std::function<Case()>& make) {
  std::int64_t plain = 0;
  {
    const Case model = seeded(make);
    Plain pipeline(*model.module);
    plain = step(pipeline, model);
  }
  const Case model = seeded(make);
  SCOPED_TRACE(model.name);
  Pipeline pipeline(*model.module, {.budget = kNoLimit});
  const std::int64_t first = step(pipeline, model);
  const std::int64_t all = step(pipeline, model);
  EXPECT_EQ(all, plain) << "with room for everything, everything is kept";
  const std::int64_t least = pipeline.plan().least;
  EXPECT_LE(least, first);
  std::int64_t before = 0;
  double cost_before = std::numeric_limits<double>::infinity();
  for (int i = 0; i <= 6; ++i) {
    const std::int64_t budget = least + (plain - least) * i / 6 + plain / 50;
    pipeline.set_budget(budget);
    for (int steps = 0; steps < 4; ++steps) {
      const std::int64_t peak = step(pipeline, model);
      const auto plan = pipeline.plan();
      EXPECT_LE(peak, budget) << i << ", step " << steps;
      EXPECT_EQ(plan.last.peak, peak);
      EXPECT_NEAR(static_cast<double>(plan.last.predicted), peak, 0.03 * peak) << i << ' ' << steps;
      EXPECT_LE(plan.variance, 0.1);
    }
    const auto plan = pipeline.plan();
    std::printf("%s: budget %ld peak %ld predicted %ld (plain %ld, least %ld) ms %.3f\n",
                model.name.c_str(), budget, plan.last.peak, plan.last.predicted, plain, least,
                plan.ms);
    EXPECT_GE(plan.last.peak, before) << i;
    const double cost = plan.ms + plan.step_ms * plan.variance;
    EXPECT_LE(cost, cost_before) << i;
    before = plan.last.peak, cost_before = cost;
  }
}

TEST(Budget, IsObeyedFromTheLeastToPlain) {
  for (const auto& make : models()) expect_budgets_obeyed<Planned>(make);
}
TEST(Budget, IsObeyedByExactChoicesToo) {
  for (const auto& make : models()) expect_budgets_obeyed<ExactPlanned>(make);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Offloading as one of a plan's choices.
#include <fourfold/activations/offload.hpp>
#include <fourfold/pipeline.hpp>
#include <fourfold/plan/budget.hpp>

#include "planned_step.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace {

using fourfold::Activations, fourfold::Budget, fourfold::CheapOps, fourfold::CompressionPipeline,
    fourfold::Int4, fourfold::Meter, fourfold::Offload, fourfold::OffloadOptions,
    fourfold::Recompute;
using plan_tests::kNoLimit;
using ::testing::HasSubstr;
namespace nn = torch::nn;

struct Small {
  static OffloadOptions options() { return {.min_bytes = 1 << 14}; }
};
using Plain = CompressionPipeline<>;
using ExactPlanned = CompressionPipeline<Recompute<CheapOps>, Budget<>>;
using Offloaded = CompressionPipeline<Recompute<CheapOps>, Offload<Small>, Budget<>>;
using OffloadAlone = CompressionPipeline<Offload<Small>, Budget<>>;
using WithCodes = CompressionPipeline<Activations<Int4>, Offload<Small>, Budget<>>;

struct Model {
  Model() {
    static const Meter meter;  // inputs are counted, too
    torch::manual_seed(0);
    net =
        nn::Sequential(nn::Linear(64, 256), nn::GELU(), nn::Linear(256, 256), nn::Tanh(),
                       nn::LayerNorm(nn::LayerNormOptions({256})), nn::Linear(256, 256),
                       nn::Dropout(0.2), nn::Linear(256, 256), nn::Sigmoid(), nn::Linear(256, 10));
    x = torch::randn({512, 64});
    target = torch::randint(10, {512}, torch::kLong);
  }
  nn::Sequential net{nullptr};
  torch::Tensor x, target;
};

struct Step {
  std::int64_t peak = 0;
  float loss = 0;
  torch::Tensor gradient;
};
template <class Pipeline>
Step step(Pipeline& pipeline, Model& model) {
  for (const at::Tensor& parameter : pipeline.parameters()) parameter.mutable_grad() = at::Tensor();
  torch::manual_seed(5);  // the same dropout
  const Meter meter;
  meter.restart_peak();
  auto loss = pipeline.forward(
      [&] { return torch::cross_entropy_loss(model.net->forward(model.x), model.target); });
  loss.backward();
  Step out{meter.bytes().peak, loss.template item<float>(), {}};
  out.gradient = pipeline.parameters().front().grad().clone();
  return out;
}

template <class Pipeline>
void expect_budgets_obeyed(bool exact) {
  Model plain_model;
  Plain plain_pipeline(*plain_model.net);
  const Step plain = step(plain_pipeline, plain_model);
  plain_model = Model();
  Model model;
  Pipeline pipeline(*model.net, {.budget = kNoLimit, .high_water = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const std::int64_t least = pipeline.plan().least, most = pipeline.plan().last.peak;
  ASSERT_LT(least, most);
  for (int i = 0; i <= 4; ++i) {
    const std::int64_t budget = least + (most - least) * i / 4 + least / 25;
    SCOPED_TRACE(budget);
    pipeline.set_budget(budget);
    for (int repeat = 0; repeat < 3; ++repeat) {
      const Step ours = step(pipeline, model);
      EXPECT_LE(ours.peak, budget);
      if (exact) {
        EXPECT_EQ(ours.loss, plain.loss);
        EXPECT_TRUE(torch::equal(ours.gradient, plain.gradient));
      }
    }
    const auto last = pipeline.plan().last;
    EXPECT_NEAR(static_cast<double>(last.predicted), last.peak, 0.03 * last.peak);
  }
}

TEST(OffloadPlan, BudgetsAreObeyedAndGradientsAreThoseOfPlain) {
  expect_budgets_obeyed<Offloaded>(/*exact=*/true);
  expect_budgets_obeyed<OffloadAlone>(/*exact=*/true);
}
TEST(OffloadPlan, BudgetsAreObeyedBesideACodec) { expect_budgets_obeyed<WithCodes>(false); }

TEST(OffloadPlan, LessCanBeMetThanWithout) {
  const auto least = [](auto pipeline_of) {
    Model model;
    auto pipeline = pipeline_of(model);
    for (int i = 0; i < 2; ++i) step(pipeline, model);
    return pipeline.plan().least;
  };
  const std::int64_t without =
      least([](Model& m) { return ExactPlanned(*m.net, {.budget = kNoLimit, .high_water = 0}); });
  const std::int64_t with =
      least([](Model& m) { return Offloaded(*m.net, {.budget = kNoLimit, .high_water = 0}); });
  // Inputs of linears that no cheap operator makes again: at least one of 512 x 256 values goes.
  EXPECT_LE(with, without - 512 * 256 * 4);
}

TEST(OffloadPlan, WithoutRoomForNoiseItTakesTheCodecsPlace) {
  Model model;
  WithCodes pipeline(*model.net, {.budget = kNoLimit, .most_variance = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const auto plan = pipeline.plan();
  pipeline.set_budget((plan.least + plan.last.peak) / 2);
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  EXPECT_EQ(pipeline.plan().variance, 0);
  std::ostringstream text;
  text << pipeline.plan();
  EXPECT_THAT(text.str(), HasSubstr("offload: [512, 256]"));
}

TEST(OffloadPlan, AFullDiskCostsNoStep) {
  Model model, other;
  Plain plain(*other.net);
  const Step expected = step(plain, other);
  Offloaded pipeline(*model.net, {.budget = kNoLimit, .high_water = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const auto plan = pipeline.plan();
  pipeline.set_budget((plan.least + plan.last.peak) / 2);
  ::rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  ::rlimit limit = before;
  limit.rlim_cur = 1 << 16;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const Step full = step(pipeline, model);
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(full.loss, expected.loss);
  EXPECT_TRUE(torch::equal(full.gradient, expected.gradient));
}

}  // namespace

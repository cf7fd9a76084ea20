// SPDX-License-Identifier: Apache-2.0
#include <fourfold/pipeline.hpp>
#include <fourfold/plan/budget.hpp>
#include <fourfold/precision.hpp>

#include "../pipeline/models.hpp"
#include "../support/message_of.hpp"
#include "planned_step.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <exception>
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
using plan_tests::Case, plan_tests::expect_obeyed, plan_tests::kNoLimit, plan_tests::seeded,
    plan_tests::step;
using ::testing::AnyOf, ::testing::HasSubstr;
namespace nn = torch::nn;

using Plain = CompressionPipeline<>;
using Planned = CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, Budget<>>;
using ExactPlanned = CompressionPipeline<Recompute<CheapOps>, Budget<>>;

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
  auto net = nn::TransformerEncoder(nn::TransformerEncoderOptions(
      nn::TransformerEncoderLayerOptions(64, 4).dim_feedforward(256).dropout(0.1).activation(
          torch::kGELU),
      3));
  auto x = torch::randn({64, 8, 64});
  return {"TransformerEncoder", net.ptr(),
          [=]() mutable { return net->forward(x).square().mean(); }};
}

std::vector<std::function<Case()>> models() {
  return {mlp, convolutions, encoder, pipeline_models::recurrent, pipeline_models::by_hand};
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
  Pipeline pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  const std::int64_t first = step(pipeline, model);
  const std::int64_t all = step(pipeline, model);
  EXPECT_EQ(all, plain) << "with room for everything, everything is kept";
  const std::int64_t least = pipeline.plan().least;
  EXPECT_LE(least, first);
  std::int64_t before = 0;
  double cost_before = std::numeric_limits<double>::infinity();
  for (int i = 0; i <= 6; ++i) {
    const std::int64_t budget = least + (plain - least) * i / 6 + plain / 50;
    SCOPED_TRACE(i);
    expect_obeyed(pipeline, model, budget);
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

TEST(Budget, IsObeyedWithAnOptimizerAndAccumulatedGradients) {
  const Case model = seeded(encoder);
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
  const Meter meter;
  const auto train = [&](std::int64_t budget) {
    std::int64_t peak = 0;
    optimizer->zero_grad();
    for (int micro = 0; micro < 3; ++micro) {  // the second and third add to gradients
      meter.restart_peak();
      pipeline.forward(model.loss).backward();
      peak = std::max(peak, meter.bytes().peak);
      const auto last = pipeline.plan().last;
      if (last.predicted > 0) {
        EXPECT_NEAR(static_cast<double>(last.predicted), last.peak, 0.03 * last.peak) << micro;
      }
    }
    optimizer->step();
    EXPECT_LE(peak, budget);
    return pipeline.plan().least;
  };
  train(kNoLimit);
  std::int64_t least = 0;
  for (int i = 0; i < 2; ++i) least = std::max(least, train(kNoLimit));
  pipeline.set_budget(least + least / 20);
  for (int i = 0; i < 4; ++i) train(least + least / 20);
}

TEST(Budget, ExactChoicesAreBitEqualOverTwentySteps) {
  for (const auto& make : models()) {
    const auto losses = [&](auto pipeline_of, auto each) {
      const Case model = seeded(make);
      auto pipeline = pipeline_of(*model.module);
      const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
      std::vector<float> out;
      for (int i = 0; i < 20; ++i) {
        optimizer->zero_grad();
        auto loss = pipeline.forward(model.loss);
        loss.backward();
        optimizer->step();
        out.push_back(loss.template item<float>());
        each(pipeline, i);
      }
      return out;
    };
    const auto plain = losses([](nn::Module& module) { return Plain(module); }, [](auto&, int) {});
    const auto planned = losses(
        [](nn::Module& module) {
          return ExactPlanned(module, {.budget = kNoLimit, .high_water = 0});
        },
        [](ExactPlanned& pipeline, int i) {
          if (i % 5 != 1) return;
          const auto plan = pipeline.plan();  // another budget, in between
          pipeline.set_budget(plan.least + (plan.last.peak - plan.least) * i / 20 + (1 << 19));
        });
    EXPECT_EQ(plain, planned) << seeded(make).name;
  }
}

TEST(Budget, ErrorsSayWhatCameAndWhatIsWanted) {
  const Case model = seeded(mlp);
  const auto made = [&](PlanOptions options) {
    return message_of([&] { Planned(*model.module, options); });
  };
  EXPECT_THAT(made({.budget = 0}), HasSubstr("got a budget of 0 bytes; give the most bytes"));
  EXPECT_THAT(made({.budget = -5_MiB}), HasSubstr("got a budget of -5242880 bytes; give"));
  EXPECT_THAT(made({.budget = std::int64_t{1} << 60}),
              HasSubstr("got a budget of 1152921504606846976 bytes, and the device has"));
  EXPECT_THAT(made({.budget = 64_MiB, .device_bytes = 32_MiB}),
              HasSubstr("and the device has 33554432; give what it can hold"));
  EXPECT_THAT(made({.budget = 4_KiB}), HasSubstr("the model's trainable parameters alone are"));
  EXPECT_THAT(made({.budget = 64_MiB, .most_variance = -1}), HasSubstr("most_variance is -1"));
  EXPECT_THAT(made({.budget = 64_MiB, .high_water = 0.5, .low_water = 0.6}),
              HasSubstr("low_water is 0.6 and high_water 0.5"));
  Planned none(*model.module);
  EXPECT_THAT(message_of([&] { static_cast<void>(none.plan()); }),
              HasSubstr("made without a budget, so there is no plan"));
  Planned pipeline(*model.module, {.budget = 64_MiB});
  EXPECT_THAT(message_of([&] { pipeline.set_budget(-1); }), HasSubstr("got a budget of -1 bytes"));
}

TEST(Budget, WeightsCountAsTheyWillBeHeld) {
  using fourfold::AllWeights, fourfold::BFloat16, fourfold::Precision;
  using Whole = CompressionPipeline<Precision<BFloat16>, Recompute<CheapOps>, Budget<>>;
  using Halved =
      CompressionPipeline<Precision<BFloat16, AllWeights>, Recompute<CheapOps>, Budget<>>;
  nn::Linear shared(512, 512);
  nn::Sequential net(nn::Linear(512, 512), shared, shared);  // tied: counted once, halved once
  const std::int64_t bytes = 2 * (512 * 512 + 512) * 4;
  const auto refused = HasSubstr("the model's trainable parameters alone are " +
                                 std::to_string(bytes) + "; give more");
  const PlanOptions between{.budget = bytes * 3 / 4};
  EXPECT_THAT(message_of([&] { const Whole pipeline(*net, between); }), refused);
  EXPECT_THAT(message_of([&] { const Halved pipeline(*net, {.budget = bytes / 2}); }),
              HasSubstr("parameters alone are " + std::to_string(bytes / 2)));
  EXPECT_EQ(shared->weight.scalar_type(), torch::kFloat) << "a refusal changes nothing";
  const Halved pipeline(*net, between);
  EXPECT_EQ(shared->weight.scalar_type(), torch::kBFloat16);
}

TEST(Budget, BelowTheLeastIsRefusedAndTheLeastIsNamed) {
  const Case model = seeded(encoder);
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  step(pipeline, model);
  step(pipeline, model);
  const std::int64_t least = pipeline.plan().least;
  pipeline.set_budget(least - 1000);
  const std::string refused = message_of([&] { step(pipeline, model); });
  EXPECT_THAT(refused, HasSubstr("cannot be met: a step of this model needs at least " +
                                 std::to_string(least) + " bytes"));
  EXPECT_EQ(pipeline.plan().least, least);
  std::ostringstream printed;
  printed << pipeline.plan();
  EXPECT_THAT(printed.str(), HasSubstr("the last step was refused, for it needs"));
  const std::int64_t held = Meter().bytes().current;
  // What it names is enough, and nothing is left of the forward that was refused.
  pipeline.set_budget(least);
  for (int i = 0; i < 4; ++i) EXPECT_LE(step(pipeline, model), i == 0 ? least + least / 20 : least);
  EXPECT_LE(Meter().bytes().current, held + (1 << 20));
}

/// Large enough that backward reads in pieces what is packed, and writes gelu's gradient over the one
/// that came in: what is kept instead needs more than its own bytes.
TEST(Budget, TheLeastIsMetWhereBackwardReadsInPieces) {
  const Case model = seeded([] {
    nn::Sequential net(nn::Linear(256, 256));
    for (int i = 0; i < 3; ++i) {
      net->push_back(nn::Linear(256, 1024));
      net->push_back(nn::GELU());
      net->push_back(nn::Dropout(0.1));
      net->push_back(nn::Linear(1024, 256));
    }
    const auto x = torch::randn({2048, 256});
    return Case{"feed-forward", net.ptr(),
                [=]() mutable { return net->forward(x).square().mean(); }};
  });
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  step(pipeline, model), step(pipeline, model);
  const std::int64_t least = pipeline.plan().least;
  for (const double share : {0.0, 0.1, 0.3}) {
    const auto budget = static_cast<std::int64_t>(static_cast<double>(least) * (1 + share));
    SCOPED_TRACE(share);
    expect_obeyed(pipeline, model, budget, /*steps=*/3, /*within=*/0.01);
  }
}

/// What a storage held before it was written to and what it holds after are one item of a plan, which
/// may so be computed from what was computed from it. Its bytes are predicted less well, but planned
/// it is: each step runs, or is refused in words.
TEST(Budget, AStorageThatIsSavedBeforeAndAfterAWriteIsPlanned) {
  struct Written : nn::Module {
    nn::Linear a = register_module("a", nn::Linear(256, 256)),
               b = register_module("b", nn::Linear(256, 256)),
               c = register_module("c", nn::Linear(256, 256)),
               d = register_module("d", nn::Linear(256, 256));
  };
  const Case model = seeded([] {
    const auto net = std::make_shared<Written>();
    const auto x = torch::randn({4096, 256});
    return Case{"Written", net, [=] {
                  const auto p = net->a(x), q = net->b(x), h = p * q, y = torch::gelu(h);
                  const auto g = y.detach();
                  const auto z = net->c(g) + net->b(torch::silu(g));
                  h.add_(g);
                  return (z + net->d(torch::silu(h))).square().mean();
                }};
  });
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  step(pipeline, model);
  const std::int64_t most = step(pipeline, model), least = pipeline.plan().least;
  for (int i = 0; i <= 8; ++i) {
    const std::int64_t budget = least + (most - least) * i / 8;
    pipeline.set_budget(budget);
    EXPECT_THAT(message_of([&] { step(pipeline, model); }),
                AnyOf("no error", HasSubstr("cannot be met: a step of this model needs")));
  }
}

TEST(Budget, FormsOfAStepThatChangeAreRecordedAndRemembered) {
  auto net = nn::Sequential(nn::Linear(64, 256), nn::GELU(), nn::Linear(256, 256), nn::GELU(),
                            nn::Linear(256, 8));
  Planned pipeline(net, {.budget = kNoLimit, .high_water = 0});
  const auto run = [&](std::int64_t rows) {
    const Meter meter;
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    const auto x = torch::randn({rows, 64});
    meter.restart_peak();
    pipeline.forward([&] { return net->forward(x).square().mean(); }).backward();
    return std::pair(meter.bytes().peak, pipeline.plan());
  };
  std::int64_t largest = 0;
  for (std::int64_t rows = 64; rows <= 1024; rows += 64) {  // each step another one
    const auto [peak, plan] = run(rows);
    EXPECT_EQ(plan.last.predicted, 0) << rows;
    largest = std::max(largest, plan.least);
  }
  pipeline.set_budget(largest + (1 << 17));
  for (std::int64_t rows = 1024; rows >= 64; rows -= 192) {  // all of them known
    const auto [peak, plan] = run(rows);
    EXPECT_GT(plan.last.predicted, 0) << rows;
    EXPECT_LE(peak, plan.budget);
  }
  EXPECT_EQ(run(1000).second.last.predicted, 0);
  EXPECT_GT(run(1000).second.last.predicted, 0);
}

/// The first `same` operators alike, then another width: the plan's prefix fits.
TEST(Budget, AStepThatTurnsIntoAnotherOneRunsAndIsRecordedNext) {
  torch::manual_seed(0);
  nn::Linear first(128, 512), wide(512, 1024), narrow(512, 64);
  auto both = nn::Sequential(first, wide, narrow);  // their parameters; it is never run
  Planned pipeline(both, {.budget = kNoLimit, .high_water = 0});
  const auto x = torch::randn({256, 128});
  const auto run = [&](bool is_wide) {
    auto loss = pipeline.forward([&] {
      const auto h = torch::gelu(first(torch::gelu(x * 1)));
      return torch::gelu(is_wide ? wide(h) : narrow(h)).square().mean();
    });
    loss.backward();
    return pipeline.plan().last;
  };
  EXPECT_EQ(run(true).predicted, 0);
  EXPECT_GT(run(true).predicted, 0);
  run(false);                          // finds out in its middle
  EXPECT_EQ(run(false).predicted, 0);  // recorded
  EXPECT_GT(run(false).predicted, 0);
  EXPECT_GT(run(true).predicted, 0);  // both are known: the second finds its plan by itself
  run(false);
  EXPECT_GT(run(false).predicted, 0);
}

TEST(Budget, AnErrorInForwardOrBackwardFreesAllAndTheNextStepWorks) {
  const Case model = seeded(encoder);
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  step(pipeline, model), step(pipeline, model);
  const auto plan = pipeline.plan();
  const std::int64_t budget = (plan.least + plan.last.peak) / 2;
  pipeline.set_budget(budget);
  step(pipeline, model), step(pipeline, model);
  const auto clean = [&] {
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    return Meter().bytes().current;
  };
  const std::int64_t before = clean();
  EXPECT_EQ(message_of<std::exception>([&] {
              pipeline.forward([&]() -> torch::Tensor {
                const auto loss = model.loss();
                throw std::runtime_error("in the middle");
              });
            }),
            "in the middle");
  EXPECT_EQ(clean(), before);
  EXPECT_LE(step(pipeline, model), budget);
  EXPECT_EQ(clean(), before);
  struct Fails : torch::autograd::Function<Fails> {
    static torch::Tensor forward(torch::autograd::AutogradContext*, torch::Tensor x) { return x; }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                   torch::autograd::variable_list) {
      throw std::runtime_error("in backward");
    }
  };
  {
    auto* const encoder = model.module->as<nn::TransformerEncoder>();
    auto loss = pipeline.forward([&] {
      const auto x = torch::randn({64, 8, 64}).requires_grad_();
      return encoder->forward(Fails::apply(encoder->forward(x) * 1)).square().mean();
    });
    EXPECT_THAT(message_of<std::exception>([&] { loss.backward(); }), HasSubstr("in backward"));
  }
  EXPECT_EQ(clean(), before);
  for (int i = 0; i < 3; ++i) EXPECT_LE(step(pipeline, model), budget);
}

TEST(Budget, NotANumberIsCarriedThroughWhereverItComes) {
  torch::manual_seed(0);
  auto net = nn::Sequential(nn::Linear(64, 256), nn::Tanh(), nn::Linear(256, 256), nn::GELU(),
                            nn::Linear(256, 8));
  Planned pipeline(net, {.budget = kNoLimit, .high_water = 0});
  const auto x = torch::randn({512, 64});
  const auto run = [&](const torch::Tensor& input) {
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    pipeline.forward([&] { return net->forward(input).square().mean(); }).backward();
    return pipeline.parameters().front().grad().isnan().any().item<bool>();
  };
  auto bad = x.clone();
  bad[3][5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(run(bad));  // while it is recorded
  EXPECT_FALSE(run(x));
  const auto plan = pipeline.plan();
  pipeline.set_budget(plan.least + (1 << 18));
  EXPECT_FALSE(run(x));
  EXPECT_TRUE(run(bad));  // by a plan
  EXPECT_FALSE(run(x));
  EXPECT_LE(pipeline.plan().variance, 0.1);
}

TEST(Budget, BackwardOnAnotherThreadAndAfterThePipeline) {
  const Case model = seeded(encoder);
  torch::Tensor loss;
  std::int64_t budget = 0;
  {
    Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
    for (int i = 0; i < 2; ++i) step(pipeline, model);
    const auto plan = pipeline.plan();
    budget = (plan.least + plan.last.peak) / 2;
    pipeline.set_budget(budget);
    const Meter meter;
    for (int i = 0; i < 3; ++i) {
      for (const at::Tensor& parameter : pipeline.parameters())
        parameter.mutable_grad() = at::Tensor();
      meter.restart_peak();
      auto one = pipeline.forward(model.loss);
      std::thread([&] { one.backward(); }).join();
      EXPECT_LE(meter.bytes().peak, budget);
      const auto last = pipeline.plan().last;
      EXPECT_EQ(last.peak, meter.bytes().peak);
      EXPECT_NEAR(static_cast<double>(last.predicted), last.peak, 0.03 * last.peak);
    }
    loss = pipeline.forward(model.loss);
  }
  loss.backward();  // what it saved still unpacks
  EXPECT_TRUE(model.module->parameters().front().grad().isfinite().all().item<bool>());
}

TEST(Budget, SeveralForwardsBeforeOneBackwardAreOneStep) {
  const Case model = seeded(encoder);
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  const Meter meter;
  const auto twice = [&](bool retain) {
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    meter.restart_peak();
    const auto first = pipeline.forward(model.loss), second = pipeline.forward(model.loss);
    const auto loss = first + second;
    if (retain) loss.backward({}, /*retain_graph=*/true);
    loss.backward();
    return meter.bytes().peak;
  };
  for (int i = 0; i < 2; ++i) twice(false);
  const auto plan = pipeline.plan();
  const std::int64_t budget = (2 * plan.least + plan.last.peak) / 3;
  pipeline.set_budget(budget);
  for (int i = 0; i < 3; ++i) {
    EXPECT_LE(twice(i == 2), budget + (i == 2 ? budget / 5 : 0));  // a graph that is retained
    const auto last = pipeline.plan().last;
    if (i < 2) {
      EXPECT_NEAR(static_cast<double>(last.predicted), last.peak, 0.03 * last.peak);
    }
  }
  {
    const torch::NoGradGuard no_grad;  // a forward that saves nothing is no step
    pipeline.forward(model.loss);
  }
  EXPECT_LE(twice(false), budget);
}

TEST(Budget, OthersOnTheDeviceMoveThePlan) {
  const Case model = seeded(encoder);
  Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const std::int64_t plain = pipeline.plan().last.peak;
  Planned shared(*model.module, {.budget = 2 * plain, .device_bytes = 2 * plain});
  for (int i = 0; i < 3; ++i) step(shared, model);
  EXPECT_EQ(shared.plan().notches, 0);
  EXPECT_EQ(shared.plan().last.peak, plain) << "everything is kept";
  {
    const auto theirs = torch::empty({plain * 8 / 10}, torch::kByte);
    std::int64_t before = plain + theirs.numel();
    for (int i = 0; i < 12; ++i) {
      const std::int64_t peak = step(shared, model);
      EXPECT_LE(peak, before + before / 100) << i;
      before = peak;
    }
    EXPECT_GT(shared.plan().notches, 0);
    EXPECT_LE(before, 1.6 * plain) << "below the high-water mark";
    std::ostringstream text;
    text << shared.plan();
    EXPECT_THAT(text.str(), HasSubstr("plans below what the budget allows"));
  }
  for (int i = 0; i < 24; ++i) step(shared, model);
  EXPECT_EQ(shared.plan().notches, 0);
  EXPECT_EQ(shared.plan().last.peak, plain) << "they have gone";
}

TEST(Budget, ThePlanIsPrinted) {
  const Case model = seeded(convolutions);
  Planned pipeline(*model.module, {.budget = 64_MiB});
  std::ostringstream before, after;
  before << pipeline.plan();
  EXPECT_EQ(before.str(),
            "budget 64.0 MiB: no step was recorded yet; the first one that saves "
            "anything is\n");
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const auto plan = pipeline.plan();
  after << plan;
  for (const char* words :
       {"budget 64.0 MiB, the least that can be met is ", "variance", "aten::relu",
        "keep: [16, 16, 32, 32], saved by aten::native_batch_norm", "what else could be had"})
    EXPECT_THAT(after.str(), HasSubstr(words));
  EXPECT_GE(plan.curve.size(), 3u);
  for (std::size_t i = 1; i < plan.curve.size(); ++i) {
    EXPECT_GE(plan.curve[i].bytes, plan.curve[i - 1].bytes);
    EXPECT_LT(plan.curve[i].ms + plan.step_ms * plan.curve[i].variance,
              plan.curve[i - 1].ms + plan.step_ms * plan.curve[i - 1].variance);
  }
  EXPECT_EQ(pipeline.report().predicted_peak_bytes, plan.last.predicted);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Blocks that are computed again as one of a plan's choices.
#include <fourfold/activations/offload.hpp>
#include <fourfold/pipeline.hpp>
#include <fourfold/plan/budget.hpp>

#include "../../examples/models/transformer.hpp"
#include "../support/message_of.hpp"
#include "planned_step.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

using fourfold::Activations, fourfold::Blocks, fourfold::Budget, fourfold::CheapOps,
    fourfold::CompressionPipeline, fourfold::Int4, fourfold::Meter, fourfold::Offload,
    fourfold::OffloadOptions, fourfold::Recompute;
using plan_tests::Case, plan_tests::expect_obeyed, plan_tests::kNoLimit, plan_tests::seeded,
    plan_tests::step;
using ::testing::HasSubstr;
namespace nn = torch::nn;

struct Small {
  static OffloadOptions options() { return {.min_bytes = 1 << 14}; }
};
using Plain = CompressionPipeline<>;
using Checkpointed = CompressionPipeline<Blocks<>>;
using Planned = CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, Blocks<>, Budget<>>;
using WithoutBlocks = CompressionPipeline<Recompute<CheapOps>, Budget<>>;
using ExactPlanned = CompressionPipeline<Recompute<CheapOps>, Blocks<>, Budget<>>;
using Offloaded = CompressionPipeline<Recompute<CheapOps>, Offload<Small>, Blocks<>, Budget<>>;

/// A Sequential that may stand in another one.
struct ChainImpl : nn::SequentialImpl {
  using nn::SequentialImpl::SequentialImpl;
  torch::Tensor forward(torch::Tensor x) { return nn::SequentialImpl::forward(x); }
};
TORCH_MODULE(Chain);

/// Blocks that are named in the model's forward.
Case transformer() {
  const models::TransformerOptions options{
      .vocabulary = 64, .width = 128, .layers = 4, .heads = 4, .context = 64};
  models::Transformer model(options);
  const auto tokens = torch::randint(options.vocabulary, {8, options.context + 1}, torch::kLong);
  const auto input = tokens.slice(1, 0, options.context).contiguous();
  const auto target = tokens.slice(1, 1).contiguous();
  return {"transformer", model.ptr(), [=]() mutable { return model->loss(input, target); }};
}
/// A Sequential's children, dropout and a batch norm's statistics among them.
Case residual() {
  struct ResidualImpl : nn::Module {
    ResidualImpl() { register_module("inner", inner); }
    torch::Tensor forward(const torch::Tensor& x) { return x + inner->forward(x).tanh(); }
    nn::Sequential inner{nn::Linear(128, 512), nn::BatchNorm1d(512), nn::GELU(), nn::Dropout(0.1),
                         nn::Linear(512, 128)};
  };
  auto net = nn::Sequential(nn::Linear(32, 128));
  for (int i = 0; i < 4; ++i) net->push_back(std::make_shared<ResidualImpl>());
  net->push_back(nn::Linear(128, 8));
  const auto x = torch::randn({256, 32});
  return {"residual", net.ptr(), [=]() mutable { return net->forward(x).square().mean(); }};
}
std::vector<std::function<Case()>> models_of_blocks() { return {transformer, residual}; }

template <class Pipeline>
std::int64_t peak_of(const std::function<Case()>& make) {
  const Case model = seeded(make);
  Pipeline pipeline(*model.module);
  step(pipeline, model);
  return step(pipeline, model);
}

std::int64_t recomputed(const fourfold::plan::PlanReport& plan) {
  return std::count_if(plan.rows.begin(), plan.rows.end(), [](const auto& row) {
    return row.producer.starts_with("block ") && row.way.starts_with("computed again");
  });
}

/// `blocks_pay`: four bits a value of all that a small block saves are cheaper than its second run.
template <class Pipeline>
void expect_budgets_obeyed(const std::function<Case()>& make, bool blocks_pay = true) {
  const std::int64_t plain = peak_of<Plain>(make);
  const Case model = seeded(make);
  SCOPED_TRACE(model.name);
  Pipeline pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  step(pipeline, model);
  EXPECT_EQ(step(pipeline, model), plain) << "with room for everything, everything is kept";
  EXPECT_EQ(recomputed(pipeline.plan()), 0);
  const std::int64_t least = pipeline.plan().least;
  std::int64_t before = 0, most = 0;
  for (int i = 0; i <= 8; ++i) {
    const std::int64_t budget = least + (plain - least) * i / 8 + plain / 50;
    SCOPED_TRACE(i);
    expect_obeyed(pipeline, model, budget);
    const auto plan = pipeline.plan();
    EXPECT_GE(plan.last.peak, before) << i;
    before = plan.last.peak;
    most = std::max(most, recomputed(plan));
  }
  if (blocks_pay) {
    EXPECT_GT(most, 0);
  }
}

TEST(BlockPlan, BudgetsAreObeyedFromTheLeastToPlain) {
  for (const auto& make : models_of_blocks())
    expect_budgets_obeyed<Planned>(make, /*blocks_pay=*/false);
}
TEST(BlockPlan, BudgetsAreObeyedByExactChoicesToo) {
  for (const auto& make : models_of_blocks()) expect_budgets_obeyed<ExactPlanned>(make);
}
// Whether a file or a second run is cheaper is for the clocks to say.
TEST(BlockPlan, BudgetsAreObeyedBesideOffloading) {
  expect_budgets_obeyed<Offloaded>(transformer, /*blocks_pay=*/false);
}

TEST(BlockPlan, LessCanBeMetThanWithout) {
  const auto least = [](auto pipeline_of) {
    const Case model = seeded(transformer);
    auto pipeline = pipeline_of(model);
    for (int i = 0; i < 2; ++i) step(pipeline, model);
    return pipeline.plan().least - pipeline.plan().last.base;
  };
  const std::int64_t without = least([](const Case& m) {
    return WithoutBlocks(*m.module, {.budget = kNoLimit, .high_water = 0});
  });
  const std::int64_t with = least(
      [](const Case& m) { return ExactPlanned(*m.module, {.budget = kNoLimit, .high_water = 0}); });
  EXPECT_LT(with, without * 8 / 10);
}

/// Not in bytes and in time at once, at any budget. Times are the plan's: clocks of tests lie.
TEST(BlockPlan, IsNeverWorseThanBlockCheckpointing) {
  for (const auto& make : models_of_blocks()) {
    const std::int64_t plain = peak_of<Plain>(make), checkpointed = peak_of<Checkpointed>(make);
    const Case model = seeded(make);
    SCOPED_TRACE(model.name);
    Planned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
    for (int i = 0; i < 2; ++i) step(pipeline, model);
    ASSERT_TRUE(pipeline.plan().every_block.has_value());
    EXPECT_NEAR(static_cast<double>(pipeline.plan().every_block->bytes), checkpointed,
                0.03 * checkpointed);
    const double ms = pipeline.plan().every_block->ms;
    EXPECT_GT(ms, 0);
    const std::int64_t least = pipeline.plan().least;
    int where_it_fits = 0;
    for (int i = 0; i < 20; ++i) {
      pipeline.set_budget(least + (plain - least) * i / 19);
      std::int64_t peak = 0;
      for (int steps = 0; steps < 3; ++steps) peak = std::max(peak, step(pipeline, model));
      const auto plan = pipeline.plan();
      EXPECT_LE(peak, plan.budget) << i;
      const double cost = plan.ms + plan.step_ms * plan.variance;
      if (plan.last.peak <= checkpointed && plan.budget < checkpointed * 103 / 100) continue;
      ++where_it_fits;
      EXPECT_LE(cost, ms) << i;
    }
    EXPECT_GT(where_it_fits, 3);
  }
}

TEST(BlockPlan, ExactChoicesAreBitEqualOverTwentySteps) {
  for (const auto& make : models_of_blocks()) {
    const auto train = [&](auto pipeline_of, auto each) {
      const Case model = seeded(make);
      auto pipeline = pipeline_of(*model.module);
      const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
      std::vector<torch::Tensor> out;
      for (int i = 0; i < 20; ++i) {
        optimizer->zero_grad();
        auto loss = pipeline.forward(model.loss);
        loss.backward();
        optimizer->step();
        out.push_back(loss.detach());
        each(pipeline, i);
      }
      for (const auto& buffer : model.module->buffers()) out.push_back(buffer);  // updated once
      return out;
    };
    const auto plain = train([](nn::Module& m) { return Plain(m); }, [](auto&, int) {});
    std::int64_t blocks = 0;
    const auto move = [&](auto& pipeline, int i) {
      const auto plan = pipeline.plan();
      blocks = std::max(blocks, recomputed(plan));
      if (i % 4 == 1)  // another budget, in between
        pipeline.set_budget(plan.least + (plan.last.peak - plan.least) * i / 20 + (1 << 20));
    };
    const auto exact = train(
        [](nn::Module& m) { return ExactPlanned(m, {.budget = kNoLimit, .high_water = 0}); }, move);
    const auto offloaded = train(
        [](nn::Module& m) { return Offloaded(m, {.budget = kNoLimit, .high_water = 0}); }, move);
    EXPECT_GT(blocks, 0);
    ASSERT_EQ(plain.size(), exact.size());
    for (std::size_t i = 0; i < plain.size(); ++i) {
      EXPECT_TRUE(torch::equal(plain[i], exact[i])) << i;
      EXPECT_TRUE(torch::equal(plain[i], offloaded[i])) << i;
    }
  }
}

/// By a plan that computes blocks again: an error in a block, in backward and in a second run.
TEST(BlockPlan, AnErrorFreesAllAndTheNextStepWorks) {
  struct BlockImpl : nn::Module {
    BlockImpl() { register_module("inner", inner); }
    torch::Tensor forward(const torch::Tensor& x) {
      TORCH_CHECK(!(fails_in_forward && !fourfold::is_recomputing()), "in forward");
      TORCH_CHECK(!(fails_again && fourfold::is_recomputing()), "in the second run");
      return x + inner->forward(x);
    }
    nn::Sequential inner{nn::Linear(128, 512), nn::GELU(), nn::Linear(512, 128)};
    bool fails_in_forward = false, fails_again = false;
  };
  std::vector<std::shared_ptr<BlockImpl>> blocks;
  nn::Sequential net(nn::Linear(32, 128));
  for (int i = 0; i < 3; ++i) net->push_back(blocks.emplace_back(std::make_shared<BlockImpl>()));
  const auto x = torch::randn({256, 32});
  const Case model{"fails", net.ptr(), [&] { return net->forward(x).square().mean(); }};
  ExactPlanned pipeline(*net, {.budget = kNoLimit, .high_water = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const auto plan = pipeline.plan();
  const std::int64_t budget = plan.least + (plan.last.peak - plan.least) / 10;
  pipeline.set_budget(budget);
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  EXPECT_GT(recomputed(pipeline.plan()), 0);
  const auto clean = [&] {
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    return Meter().bytes().current;
  };
  const std::int64_t before = clean();
  for (bool BlockImpl::*const fails : {&BlockImpl::fails_in_forward, &BlockImpl::fails_again}) {
    int failed = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      (*blocks[i]).*fails = true;
      const std::string message = message_of([&] { step(pipeline, model); });
      (*blocks[i]).*fails = false;
      // Which of them run again is the plan's choice, by times that it measured.
      const auto runs = pipeline.plan().rows.at(i + 1);  // the first row is the Linear's
      ASSERT_EQ(runs.producer, "block " + std::to_string(i + 1));
      const bool again = runs.way.starts_with("computed again");
      if (fails == &BlockImpl::fails_in_forward)
        EXPECT_THAT(message, HasSubstr("in forward"));
      else
        EXPECT_THAT(message, HasSubstr(again ? "in the second run" : "no error")) << runs.way;
      failed += message != "no error";
      EXPECT_EQ(clean(), before);
      EXPECT_LE(step(pipeline, model), budget);
      EXPECT_EQ(clean(), before);
    }
    EXPECT_GT(failed, 0);
  }
}

TEST(BlockPlan, BackwardOnAnotherThreadAndAfterThePipeline) {
  const Case model = seeded(residual);
  torch::Tensor loss;
  {
    ExactPlanned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
    for (int i = 0; i < 2; ++i) step(pipeline, model);
    const auto plan = pipeline.plan();
    pipeline.set_budget(plan.least + (plan.last.peak - plan.least) / 10);
    const Meter meter;
    for (int i = 0; i < 3; ++i) {
      for (const at::Tensor& parameter : pipeline.parameters())
        parameter.mutable_grad() = at::Tensor();
      meter.restart_peak();
      auto one = pipeline.forward(model.loss);
      std::thread([&] { one.backward(); }).join();
      const auto last = pipeline.plan().last;
      EXPECT_EQ(last.peak, meter.bytes().peak);
      EXPECT_LE(last.peak, pipeline.plan().budget);
    }
    EXPECT_GT(recomputed(pipeline.plan()), 0);
    model.module->zero_grad();
    loss = pipeline.forward(model.loss);
  }
  loss.backward();  // what it saved still unpacks, and its blocks still run again
  EXPECT_TRUE(model.module->parameters().front().grad().isfinite().all().item<bool>());
}

TEST(BlockPlan, ShapesThatChangeAreRecordedAndRemembered) {
  nn::Sequential net(nn::Linear(64, 128));
  for (int i = 0; i < 3; ++i)
    net->push_back(Chain(nn::Linear(128, 512), nn::GELU(), nn::Linear(512, 128)));
  ExactPlanned pipeline(*net, {.budget = kNoLimit, .high_water = 0});
  const auto run = [&](std::int64_t rows) {
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    const auto x = torch::randn({rows, 64});
    pipeline.forward([&] { return net->forward(x).square().mean(); }).backward();
    return pipeline.plan();
  };
  std::int64_t largest = 0;
  for (std::int64_t rows = 128; rows <= 1024; rows += 128) {  // each step another one
    EXPECT_EQ(run(rows).last.predicted, 0) << rows;
    largest = std::max(largest, pipeline.plan().least);
  }
  pipeline.set_budget(largest + (1 << 18));
  for (std::int64_t rows = 1024; rows >= 128; rows -= 256) {
    const auto plan = run(rows);
    EXPECT_GT(plan.last.predicted, 0) << rows;
    EXPECT_LE(plan.last.peak, plan.budget) << rows;
    if (rows == 1024) {
      EXPECT_GT(recomputed(plan), 0);
    }
  }
}

TEST(BlockPlan, IsPrinted) {
  const Case model = seeded(transformer);
  ExactPlanned pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const auto words = [&] {
    std::ostringstream text;
    text << pipeline.plan();
    return text.str();
  };
  EXPECT_THAT(words(), HasSubstr("storage by storage"));
  EXPECT_THAT(words(), HasSubstr("every block computed again"));
  pipeline.set_budget(pipeline.plan().least);
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  EXPECT_THAT(words(), HasSubstr("block 2"));
  EXPECT_THAT(words(), HasSubstr("computed again: ["));
  EXPECT_THAT(words(), HasSubstr("saved by block "));
}

TEST(BlockPlan, EveryNthBlockIsACandidate) {
  using fourfold::Checkpoint, fourfold::EveryNth;
  static_assert(std::is_same_v<Checkpoint<EveryNth<2>>, Blocks<2>>);
  static_assert(std::is_same_v<Checkpoint<>, Blocks<>>);
  using EverySecond = CompressionPipeline<Activations<Int4>, Checkpoint<EveryNth<2>>, Budget<>>;
  const Case model = seeded(transformer);
  EverySecond pipeline(*model.module, {.budget = kNoLimit, .high_water = 0});
  for (int i = 0; i < 2; ++i) step(pipeline, model);
  const auto plan = pipeline.plan();
  EXPECT_EQ(std::count_if(plan.rows.begin(), plan.rows.end(),
                          [](const auto& row) { return row.producer.starts_with("block "); }),
            2);
}

}  // namespace

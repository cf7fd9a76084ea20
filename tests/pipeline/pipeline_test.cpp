// SPDX-License-Identifier: Apache-2.0
#include <fourfold/pipeline.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/presets.hpp>

#include <sstream>
#include <thread>

#include "models.hpp"

namespace {

using namespace fourfold;
using testing::HasSubstr;

using None = CompressionPipeline<>;
using Whole8 = CompressionPipeline<Activations<Int8>>;
using Whole4 = CompressionPipeline<Activations<Int4>>;

struct Trained {
  std::vector<float> losses;
  std::vector<torch::Tensor> gradients;  ///< of the last step
  std::vector<torch::Tensor> parameters;
};

/// `steps` steps of a model made from `seed`; random operators draw from `draws`.
template <class Pipeline>
Trained train(const std::function<pipeline_models::Case()>& make, int steps,
              std::uint64_t draws = 1) {
  torch::manual_seed(0);
  auto model = make();
  torch::manual_seed(draws);
  Pipeline pipeline(*model.module);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
  Trained run;
  for (int step = 0; step < steps; ++step) {
    optimizer->zero_grad();
    auto loss = pipeline.forward([&] { return model.loss(); });
    loss.backward();
    run.losses.push_back(loss.template item<float>());
    run.gradients.clear();
    for (const auto& p : model.module->parameters()) run.gradients.push_back(p.grad().clone());
    optimizer->step();
  }
  for (const auto& p : model.module->parameters()) run.parameters.push_back(p.detach().clone());
  return run;
}

Trained plain(const std::function<pipeline_models::Case()>& make, int steps,
              std::uint64_t draws = 1) {
  torch::manual_seed(0);
  auto model = make();
  torch::manual_seed(draws);
  torch::optim::AdamW optimizer(model.module->parameters(), torch::optim::AdamWOptions(1e-2));
  Trained run;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    auto loss = model.loss();
    loss.backward();
    run.losses.push_back(loss.item<float>());
    run.gradients.clear();
    for (const auto& p : model.module->parameters()) run.gradients.push_back(p.grad().clone());
    optimizer.step();
  }
  for (const auto& p : model.module->parameters()) run.parameters.push_back(p.detach().clone());
  return run;
}

void expect_equal(const Trained& a, const Trained& b, const std::string& what) {
  EXPECT_EQ(a.losses, b.losses) << what;
  for (std::size_t i = 0; i < a.gradients.size(); ++i) {
    EXPECT_TRUE(torch::equal(a.gradients[i], b.gradients[i])) << what << ", gradient " << i;
    EXPECT_TRUE(torch::equal(a.parameters[i], b.parameters[i])) << what << ", parameter " << i;
  }
}

TEST(Pipeline, WithoutPoliciesAndExactAreBitEqualToPlainLibTorch) {
  for (const auto& make : pipeline_models::all()) {
    const Trained expected = plain(make, 10);
    expect_equal(train<None>(make, 10), expected, make().name + ", none");
    expect_equal(train<Exact>(make, 10), expected, make().name + ", exact");
    expect_equal(train<CompressionPipeline<Blocks<>>>(make, 10), expected,
                 make().name + ", blocks");
    expect_equal(train<CompressionPipeline<Recompute<CheapOps>, Blocks<2>>>(make, 10), expected,
                 make().name + ", blocks of two");
  }
}

double distance(const Trained& a, const Trained& b) {
  double squares = 0, norm = 0;
  for (std::size_t i = 0; i < a.gradients.size(); ++i) {
    squares += (a.gradients[i] - b.gradients[i]).square().sum().item<double>();
    norm += b.gradients[i].square().sum().item<double>();
  }
  return std::sqrt(squares / norm);
}

// The error that packing brings into a gradient is, to first order, linear in the code's step. With
// the same groups a step of 8 bits is 15 / 255 of one of 4; Int8's groups of 128 instead of 64
// widen their range by less than 2. So the 8-bit error is at most 2 * 15 / 255 = 0.118 of the 4-bit
// one, up to the randomness of both, for which a factor of 2 is left.
TEST(Pipeline, TheGradientsErrorShrinksWithTheStepOfTheCode) {
  for (const auto& make : pipeline_models::all()) {
    const Trained expected = plain(make, 1);
    const double eight = distance(train<Whole8>(make, 1), expected);
    const double four = distance(train<Whole4>(make, 1), expected);
    EXPECT_GT(four, 0) << make().name << ": nothing was packed";
    EXPECT_LE(eight, 2 * 2 * 15.0 / 255.0 * four) << make().name;
  }
}

TEST(Pipeline, PresetsTrainTheFiveModels) {
  for (const auto& make : pipeline_models::all()) {
    const Trained expected = plain(make, 40);
    for (const Trained& run : {train<Balanced>(make, 40), train<Smallest>(make, 40)}) {
      const float learnt = expected.losses.front() - expected.losses.back();
      EXPECT_GT(learnt, 0);
      // 90 % of what plain training gains, on models small enough to overfit within 40 steps
      EXPECT_GT(run.losses.front() - run.losses.back(), 0.9F * learnt) << make().name;
    }
  }
}

TEST(Pipeline, RunsRepeatOnAnyNumberOfThreads) {
  const int threads = at::get_num_threads();
  for (const auto& make : {pipeline_models::linear, pipeline_models::by_hand}) {
    at::set_num_threads(1);
    const Trained one = train<Balanced>(make, 5);
    const Trained again = train<Balanced>(make, 5);
    expect_equal(one, again, "one thread");
    at::set_num_threads(threads);
    expect_equal(train<Balanced>(make, 5), train<Balanced>(make, 5), "all threads");
  }
}

TEST(Pipeline, TakesAModelInEveryFormAndOutlivesIt) {
  auto shared = std::make_shared<pipeline_models::ByHand>();
  torch::nn::Linear holder(8, 8);
  torch::nn::Sequential sequential(torch::nn::Linear(8, 8), torch::nn::ReLU());
  Balanced a(*shared), b(shared), c(holder), d(sequential);
  EXPECT_EQ(a.parameters().size(), 3u);
  EXPECT_EQ(c.parameters().size(), 2u);
  EXPECT_EQ(d.parameters().size(), 2u);
  shared.reset();
  holder = nullptr;
  EXPECT_GE(c.report()[Place::kWeights].now, 4 * (8 * 8 + 8));  // the optimizer may need them yet
  EXPECT_THAT(c.explain(), HasSubstr("no forward ran"));
  EXPECT_NO_THROW(c.optimizer()->step());
  EXPECT_EQ(c.forward([] { return 3; }), 3);
  torch::nn::Linear empty{nullptr};
  EXPECT_THAT([&] { Balanced pipeline(empty); },
              testing::ThrowsMessage<c10::Error>(HasSubstr("construct the module first")));
  torch::nn::ReLU nothing;
  EXPECT_THAT([&] { Balanced pipeline(nothing); },
              testing::ThrowsMessage<c10::Error>(HasSubstr("the module has no parameters")));
}

TEST(Pipeline, IsAHandleThatMayBeCopiedAndMoved) {
  torch::nn::Linear layer(8, 8);
  Balanced first(layer);
  Balanced second(std::move(first));
  EXPECT_EQ(first.forward([] { return 3; }), 3);  // NOLINT: a move copies
  EXPECT_EQ(second.parameters().size(), first.parameters().size());
}

TEST(Pipeline, WithoutWorkForAScopeThereIsNothingToExplain) {
  torch::nn::Linear layer(8, 8);
  EXPECT_EQ(CompressionPipeline<OptimizerStates<Int8>>(layer).explain(), "");
}

TEST(Pipeline, PoliciesAreFoundInAnyOrder) {
  using Turned = CompressionPipeline<OptimizerStates<Int8>, Recompute<CheapOps>, Activations<Int4>>;
  expect_equal(train<Turned>(pipeline_models::linear, 5),
               train<Balanced>(pipeline_models::linear, 5), "turned");
  using Wrapped =
      CompressionPipeline<Blocks<>, OptimizerStates<Int8>, Activations<Int4>, Recompute<CheapOps>>;
  expect_equal(train<Wrapped>(pipeline_models::linear, 5),
               train<Smallest>(pipeline_models::linear, 5), "turned");
}

// -inf among the values would make its group of 64 NaN: such a tensor is held as it is.
TEST(Pipeline, InfinitiesThatAreSavedDoNotSpoilTheirNeighbours) {
  torch::manual_seed(2);
  torch::nn::Linear layer(64, 256);
  const auto x = torch::randn({128, 64});
  const auto hidden = torch::arange(256).remainder(3).eq(0);
  const auto target = torch::randint(1, 2, {128}, torch::kLong);
  const auto gradient_of = [&](auto&& run) {
    layer->zero_grad();
    run([&] {
      const auto logits = layer->forward(x).masked_fill(hidden, -INFINITY);
      return torch::nll_loss(torch::log_softmax(logits, 1), target);
    }).backward();
    return layer->weight.grad().clone();
  };
  const auto plain = gradient_of([](auto&& f) { return f(); });
  Balanced pipeline(layer);
  const auto ours = gradient_of([&](auto&& f) { return pipeline.forward(f); });
  EXPECT_TRUE(ours.isfinite().all().item<bool>());
  EXPECT_LT((ours - plain).norm().item<float>(), 0.1 * plain.norm().item<float>());
}

TEST(Pipeline, ExplainsWhyNothingWasSaved) {
  torch::nn::Linear layer(64, 64);
  const auto x = torch::randn({64, 64});
  Balanced pipeline(layer);
  EXPECT_THAT(pipeline.explain(), HasSubstr("no forward ran inside the pipeline's scope"));
  {
    const auto scope = pipeline.scope();
    std::thread([&] { layer->forward(x).sum().backward(); }).join();
  }
  EXPECT_THAT(pipeline.explain(),
              AllOf(HasSubstr("no tensor passed: "),
                    HasSubstr("tensors were saved on threads without a scope: hold ")));
  pipeline.forward([&] { return layer->forward(x); });
  EXPECT_EQ(pipeline.explain(), "");
}

TEST(Pipeline, ExplainsWhichCauseItWas) {
  const auto why = [](bool frozen, bool disabled) {
    torch::nn::Linear layer(64, 64);
    if (frozen)
      for (auto& parameter : layer->parameters()) parameter.requires_grad_(false);
    Balanced pipeline(layer);
    const at::AutoGradMode mode(!disabled);
    pipeline.forward([&] {
      return disabled || frozen ? layer->forward(torch::ones({64, 64})) : at::Tensor();
    });
    return pipeline.explain();
  };
  EXPECT_THAT(why(false, true), HasSubstr("gradients were disabled"));
  EXPECT_THAT(why(true, false), HasSubstr("no parameter requires gradients"));
  EXPECT_THAT(why(false, false), HasSubstr("the model did not run inside the scope"));
}

TEST(Pipeline, SaysWhereAnotherOptimizersStatesAreCounted) {
  const auto notes_with = [](auto&& optimizer_of) {
    torch::nn::Linear layer(64, 64);
    Balanced pipeline(layer);
    const auto optimizer = optimizer_of(pipeline, layer);
    pipeline.forward([&] { return layer->forward(torch::ones({64, 64})).sum(); }).backward();
    optimizer->step();
    return pipeline.report().notes;
  };
  EXPECT_THAT(
      notes_with([](auto&, auto& layer) {
        return std::make_shared<torch::optim::AdamW>(layer->parameters());
      }),
      testing::ElementsAre(HasSubstr("optimizer: what LibTorch's own optimizers hold is "
                                     "counted under \"other\"; take pipeline.optimizer()")));
  EXPECT_THAT(notes_with([](auto& pipeline, auto&) { return pipeline.optimizer(); }),
              testing::IsEmpty());
}

TEST(Pipeline, AScopeIsEnteredOnce) {
  torch::nn::Linear layer(8, 8);
  Balanced pipeline(layer);
  const auto scope = pipeline.scope();
  EXPECT_THAT(
      [&] { const auto again = pipeline.scope(); },
      testing::ThrowsMessage<c10::Error>(HasSubstr(
          "a scope of this pipeline is open on this thread already (1 deep); forward() opens "
          "one itself")));
}

TEST(Pipeline, SaysThatNoBlockRan) {
  torch::nn::Linear layer(64, 64);
  const auto x = torch::randn({64, 64});
  Smallest without(layer);
  without.forward([&] { return layer->forward(x); }).sum().backward();
  EXPECT_THAT(without.explain(), HasSubstr("Blocks<>: no block ran"));
  Smallest with(layer);
  with.forward([&] { return fourfold::block(layer, x); }).sum().backward();
  EXPECT_EQ(with.explain(), "");
}

TEST(Pipeline, ScopesOfTwoPipelinesNest) {
  torch::nn::Linear first(64, 64), second(64, 64);
  const auto x = torch::randn({64, 64}, torch::requires_grad());
  Whole4 outer(first);
  Exact inner(second);
  auto y = outer.forward([&] {
    auto h = first->forward(x);
    return inner.forward([&] { return second->forward(h); });
  });
  y.sum().backward();
  EXPECT_TRUE(x.grad().defined());
  EXPECT_EQ(outer.explain(), "");
  EXPECT_EQ(inner.explain(), "");
}

TEST(Pipeline, AnExceptionInForwardOrBackwardFreesWhatWasSaved) {
  torch::nn::Linear layer(256, 256);
  Whole4 pipeline(layer);
  const auto x = torch::randn({256, 256});
  const auto before = pipeline.report().bytes.current;
  EXPECT_THROW(pipeline.forward([&]() -> torch::Tensor {
    auto y = layer->forward(x);
    throw std::runtime_error("in the middle of forward");
  }),
               std::runtime_error);
  EXPECT_EQ(pipeline.report().bytes.current, before);
  {
    auto y = pipeline.forward([&] { return layer->forward(x); });
    y.register_hook([](const torch::Tensor&) { throw std::runtime_error("in backward"); });
    EXPECT_THROW(y.sum().backward(), std::exception);
  }
  EXPECT_EQ(pipeline.report().bytes.current, before);
  pipeline.forward([&] { return layer->forward(x); }).sum().backward();
  EXPECT_TRUE(layer->weight.grad().defined());
}

TEST(Pipeline, AnErrorLeavesTheModelAsItWas) {
  torch::nn::SequentialImpl unowned(torch::nn::Linear(64, 64));
  using Packing = CompressionPipeline<Weights<Int8>, Blocks<>>;
  EXPECT_THAT([&] { Packing pipeline(unowned); },
              testing::ThrowsMessage<c10::Error>(HasSubstr("make it a torch::nn::Sequential")));
  for (const auto& p : unowned.parameters()) EXPECT_FALSE(door::is_packed(p));
}

TEST(Pipeline, WeightsAreFrozenPackedAndReported) {
  torch::nn::Sequential net(torch::nn::Linear(128, 256), torch::nn::Tanh(),
                            torch::nn::Linear(256, 64));
  CompressionPipeline<Weights<Int8>> pipeline(net);
  EXPECT_EQ(pipeline.parameters().size(), 2u) << "the biases";
  std::ostringstream out;
  out << pipeline.report();
  EXPECT_THAT(out.str(), HasSubstr("2 parameters packed"));
  auto optimizer = pipeline.optimizer();
  pipeline.forward([&] { return net->forward(torch::randn({32, 128})); }).sum().backward();
  optimizer->step();
  EXPECT_EQ(net->named_parameters().size(), 4u);
}

TEST(Pipeline, LowRankFactorsAreTrained) {
  torch::manual_seed(0);
  torch::nn::Linear layer(96, 64);
  CompressionPipeline<Weights<LowRank<8>>, OptimizerStates<Int8>> pipeline(layer);
  EXPECT_EQ(pipeline.parameters().size(), 3u) << "bias and two factors";
  const auto x = torch::randn({64, 96}), target = torch::randn({64, 64}) * 0.1;
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
  std::vector<float> losses;
  for (int step = 0; step < 30; ++step) {
    optimizer->zero_grad();
    auto loss = pipeline.forward([&] { return torch::mse_loss(layer->forward(x), target); });
    loss.backward();
    optimizer->step();
    losses.push_back(loss.item<float>());
  }
  EXPECT_LT(losses.back(), 0.7F * losses.front());
}

TEST(Pipeline, TheLedgersPlacesAddUpToThePeakAndSavedBytesShrink) {
  const auto ledger_of = [](auto pipeline_type) {
    using Pipeline = typename decltype(pipeline_type)::type;
    torch::manual_seed(0);
    torch::nn::Sequential net(torch::nn::Linear(128, 512), torch::nn::GELU(),
                              torch::nn::Linear(512, 128));
    Pipeline pipeline(net);
    auto optimizer = pipeline.optimizer();
    Meter{}.restart_peak();
    for (int i = 0; i < 2; ++i) {
      optimizer->zero_grad();
      pipeline.forward([&] {
                return net->forward(torch::randn({1024, 128})).square().mean();
              })
          .backward();
      optimizer->step();
    }
    return pipeline.report();
  };
  const Ledger none = ledger_of(std::type_identity<None>{});
  const Ledger balanced = ledger_of(std::type_identity<Balanced>{});
  for (const Ledger& ledger : {none, balanced}) {
    std::int64_t sum = 0;
    for (const PlaceBytes& place : ledger.places) sum += place.at_peak;
    EXPECT_EQ(sum, ledger.bytes.peak);
  }
  constexpr std::int64_t kParameters = 2 * 128 * 512 + 512 + 128;
  EXPECT_GE(none[Place::kWeights].now, 4 * kParameters);
  EXPECT_EQ(none[Place::kGradients].now, 4 * kParameters);
  EXPECT_EQ(none[Place::kOptimizer].now, 8 * kParameters);
  EXPECT_LT(balanced[Place::kOptimizer].now, 2.2 * kParameters + 16 * 1024);
  EXPECT_EQ(none.saved_bytes, none.saved_plain_bytes);
  EXPECT_LT(balanced.saved_bytes, 0.2 * static_cast<double>(none.saved_bytes));
}

struct FeedForward : torch::nn::Module {
  FeedForward() { register_module("layers", layers); }
  torch::Tensor forward(const torch::Tensor& x) { return layers->forward(x); }
  torch::nn::Sequential layers{torch::nn::Linear(64, 256), torch::nn::GELU(),
                               torch::nn::Linear(256, 64),
                               torch::nn::LayerNorm(torch::nn::LayerNormOptions({64}))};
};

TEST(Pipeline, EachPresetLowersTheMeasuredPeak) {
  const auto peak_of = [](auto pipeline_type) {
    using Pipeline = typename decltype(pipeline_type)::type;
    torch::manual_seed(0);
    torch::nn::Sequential net;
    for (int i = 0; i < 4; ++i) net->push_back(FeedForward());
    Pipeline pipeline(net);
    auto optimizer = pipeline.optimizer();
    const auto x = torch::randn({4096, 64});
    const auto before = Meter{}.ledger().bytes.current;
    Meter{}.restart_peak();
    for (int i = 0; i < 2; ++i) {
      optimizer->zero_grad();
      pipeline.forward([&] { return net->forward(x).square().mean(); }).backward();
      optimizer->step();
    }
    return pipeline.report().bytes.peak - before;
  };
  const auto none = peak_of(std::type_identity<None>{});
  const auto exact = peak_of(std::type_identity<Exact>{});
  const auto balanced = peak_of(std::type_identity<Balanced>{});
  const auto smallest = peak_of(std::type_identity<Smallest>{});
  // Of 4 blocks plain LibTorch keeps Linear's and GELU's inputs (1 + 4 + 4 MiB) and LayerNorm's (1);
  // exact leaves out GELU's output (4 of 10); 4 bits are 4.5 / 32 of what is left.
  EXPECT_LT(exact, 0.75 * static_cast<double>(none));
  EXPECT_LT(balanced, 0.45 * static_cast<double>(none));  // transients of one block are 9 MiB
  EXPECT_LT(smallest, balanced);
}

/// A policy from outside of the library: the seam is open. It names bf16-like moments by a codec
/// pair.
struct PlainStates {
  static constexpr Role role = Role::kOptimizerStates;
  using Format = optim::Fp32;
  using Optimizer = optim::AdamWOf<optim::Fp32>;
};

TEST(Pipeline, TakesAPolicyOfTheUsersOwn) {
  torch::nn::Linear layer(8, 8);
  CompressionPipeline<PlainStates> pipeline(layer);
  EXPECT_NE(dynamic_cast<PlainStates::Optimizer*>(pipeline.optimizer().get()), nullptr);
  const Trained own = train<CompressionPipeline<PlainStates>>(pipeline_models::linear, 5);
  const Trained expected = plain(pipeline_models::linear, 5);
  for (std::size_t i = 0; i < own.losses.size(); ++i)
    EXPECT_NEAR(own.losses[i], expected.losses[i], 1e-4F * expected.losses[i]);
}

}  // namespace

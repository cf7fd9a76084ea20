// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/release.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/fourfold.hpp>
#include <fourfold/optim/lion.hpp>
#include <fourfold/optim/schedulers.hpp>
#include "tests/support/message_of.hpp"

#include <sstream>
#include <thread>

namespace {

using fourfold::ClipGradients, fourfold::GradientRelease, fourfold::GradientReleaseOptions;
using fourfold::GradScaler, fourfold::Int4, fourfold::Int8, fourfold::optim::Fp32;
using testing::HasSubstr;
using torch::optim::AdamWOptions;
template <class C>
using AdamW = fourfold::optim::AdamWOf<C>;

/// An embedding tied to the head, a convolution of one channel, batch norm, a parameter that
/// nothing uses, and a frozen one. Its loss is that of `step`'s batch.
struct NetImpl : torch::nn::Module {
  NetImpl() {
    table = register_module("table", torch::nn::Embedding(80, 64));
    body =
        register_module("body", torch::nn::Sequential(torch::nn::Linear(64, 96), torch::nn::GELU(),
                                                      torch::nn::LayerNorm(std::vector<long>{96}),
                                                      torch::nn::Linear(96, 64)));
    norm = register_module("norm", torch::nn::BatchNorm1d(64));
    unused = register_parameter("unused", torch::randn({5000}));
    frozen = register_parameter("frozen", torch::randn({64}), /*requires_grad=*/false);
  }
  torch::Tensor logits(const torch::Tensor& tokens) {
    const auto x = fourfold::block([this](const torch::Tensor& one) { return body->forward(one); },
                                   table(tokens) + frozen);
    return torch::linear(norm(x), table->weight);
  }
  torch::Tensor loss(int step) {
    auto draws = torch::make_generator<torch::CPUGeneratorImpl>(std::uint64_t(1000 + step));
    const auto tokens = torch::randint(80, {33}, draws, torch::kLong);
    return torch::nn::functional::cross_entropy(logits(tokens.slice(0, 0, 32)), tokens.slice(0, 1));
  }
  torch::nn::Embedding table{nullptr};
  torch::nn::Sequential body{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  torch::Tensor unused, frozen;
};
using Net = std::shared_ptr<NetImpl>;

Net net() {
  torch::manual_seed(0);
  return std::make_shared<NetImpl>();
}
std::string saved(const torch::optim::Optimizer& optimizer) {
  std::ostringstream out;
  torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  archive.save_to(out);
  return out.str();
}
void expect_equal(const Net& a, const Net& b) {
  const auto mine = a->named_parameters(), theirs = b->named_parameters();
  for (const auto& one : mine)
    EXPECT_TRUE(one.value().equal(theirs[one.key()])) << one.key() << " differs";
}

template <class C>
class Released : public testing::Test {};
using Codecs = testing::Types<Fp32, Int8>;
TYPED_TEST_SUITE(Released, Codecs);

TYPED_TEST(Released, EndsBitForBitWhereStepWould) {
  const Net plain = net(), released = net();
  AdamW<TypeParam> a(plain->parameters(), AdamWOptions(1e-2)),
      b(released->parameters(), AdamWOptions(1e-2));
  const GradientRelease release(b);
  for (int step = 0; step < 6; ++step) {
    a.zero_grad();
    plain->loss(step).backward();
    a.step();
    released->loss(step).backward();
    for (const auto& p : released->parameters()) EXPECT_FALSE(p.grad().defined());
  }
  expect_equal(plain, released);
  EXPECT_EQ(saved(a), saved(b));
  EXPECT_EQ(release.steps(), 6);
}

/// What saves activations packed, rebuilds or recomputes them reads no weight after its step.
template <class Pipeline>
void expect_equal_under() {
  std::vector<Net> nets;
  for (const bool released : {false, true}) {
    nets.push_back(net());
    Pipeline pipeline(nets.back());
    const auto optimizer = pipeline.optimizer(AdamWOptions(1e-2));
    auto& ours = dynamic_cast<AdamW<Int8>&>(*optimizer);
    std::optional<GradientRelease<>> release;
    if (released) release.emplace(ours);
    for (int step = 0; step < 4; ++step) {
      if (!released) optimizer->zero_grad();
      pipeline.forward([&] { return nets.back()->loss(step); }).backward();
      if (!released) optimizer->step();
    }
  }
  expect_equal(nets[0], nets[1]);
}
TEST(GradientRelease, IsTheSameUnderCompressedAndRecomputedActivations) {
  using namespace fourfold;
  expect_equal_under<CompressionPipeline<OptimizerStates<Int8>>>();
  expect_equal_under<CompressionPipeline<Recompute<CheapOps>, OptimizerStates<Int8>>>();
  expect_equal_under<CompressionPipeline<Blocks<>, OptimizerStates<Int8>>>();
  expect_equal_under<Balanced>();
  expect_equal_under<Smallest>();
}

/// The policy, with packed states and with plain ones.
template <class Pipeline, class Optimizer>
void expect_policy_releases() {
  const Net plain = net(), released = net();
  Optimizer reference(fourfold::CompressionPipeline<>(plain).parameters(), AdamWOptions(1e-2));
  auto optimizer = [&] {
    Pipeline pipeline(released);
    return pipeline.optimizer(AdamWOptions(1e-2));
  }();
  for (int step = 0; step < 3; ++step) {
    plain->zero_grad();
    plain->loss(step).backward();
    reference.step();
    released->loss(step).backward();
  }
  expect_equal(plain, released);
  EXPECT_THAT(message_of([&] { optimizer->step(); }), HasSubstr("leave step() out"));
  optimizer.reset();
  for (const auto& p : released->parameters())
    if (p.requires_grad()) {
      EXPECT_EQ(torch::autograd::impl::post_acc_grad_hooks(p), nullptr);
    }
}
TEST(GradientRelease, IsAPolicyOfAPipeline) {
  using namespace fourfold;
  expect_policy_releases<CompressionPipeline<Release, OptimizerStates<Int8>>, AdamW<Int8>>();
  expect_policy_releases<CompressionPipeline<Release>, AdamW<Fp32>>();
}

TEST(GradientRelease, GradientsDoNotExistAtOnce) {
  fourfold::Meter meter;
  torch::nn::Sequential model;
  for (int i = 0; i < 8; ++i) model->push_back(torch::nn::Linear(128, 128));
  fourfold::CompressionPipeline<> pipeline(model);
  AdamW<Int8> optimizer(model->parameters());
  const GradientRelease release(optimizer);
  const auto x = torch::randn({4, 128});
  model->forward(x).sum().backward();
  meter.restart_peak();
  model->forward(x).sum().backward();
  const std::int64_t one = (128 * 128 + 128) * 4;
  EXPECT_LE(pipeline.report()[fourfold::Place::kGradients].own_peak, one);
  EXPECT_GT(pipeline.report()[fourfold::Place::kGradients].own_peak, 0);
}

TEST(GradientRelease, SteppingByHandIsAnError) {
  const Net model = net();
  AdamW<Int8> optimizer(model->parameters());
  {
    const GradientRelease release(optimizer);
    model->loss(0).backward();
    const auto before = model->table->weight.detach().clone();
    const char* words =
        "step() was called on an optimizer whose gradients are released: its "
        "parameters have been stepped in backward, and their gradients are gone; "
        "leave step() out, or destroy the GradientRelease first";
    EXPECT_THAT(message_of([&] { optimizer.step(); }), HasSubstr(words));
    EXPECT_THAT(message_of([&] { optimizer.step([&] { return model->loss(1); }); }),
                HasSubstr(words));
    EXPECT_TRUE(model->table->weight.equal(before));
    EXPECT_THAT(message_of([&] { const GradientRelease second(optimizer); }),
                HasSubstr("released already; one GradientRelease is for one optimizer"));
    optimizer.zero_grad();  // harmless
    model->loss(1).backward();
    EXPECT_EQ(release.steps(), 2);
  }
  optimizer.step();
}

TEST(GradientRelease, LeavesModelAndOptimizerAsTheyWere) {
  const Net model = net(), plain = net();
  AdamW<Int8> a(model->parameters()), b(plain->parameters());
  {
    GradientRelease release(a);
    GradientRelease moved = std::move(release);
    model->loss(0).backward();
    release = std::move(moved);
    model->loss(1).backward();
  }
  for (const auto& p : model->parameters())
    EXPECT_EQ(torch::autograd::impl::post_acc_grad_hooks(p), nullptr);
  for (const int step : {0, 1}) {
    plain->zero_grad();
    plain->loss(step).backward();
    b.step();
  }
  model->loss(2).backward();
  EXPECT_TRUE(model->table->weight.grad().defined());
  a.step();
  plain->zero_grad();
  plain->loss(2).backward();
  b.step();
  expect_equal(model, plain);
}

TEST(GradientRelease, TheOptimizerMayMoveAndAnOptimizerThatIsGoneIsNamed) {
  const auto weight = torch::ones({3}).requires_grad_();
  std::optional<GradientRelease<>> release;
  {
    AdamW<Fp32> first({weight});
    release.emplace(first);
    AdamW<Fp32> optimizer = std::move(first);
    weight.sum().backward();
    EXPECT_LT(weight[0].item<float>(), 1);
    EXPECT_THAT(message_of([&] { optimizer.step(); }), HasSubstr("are released"));
  }
  const auto before = weight.detach().clone();
  EXPECT_THAT(message_of([&] { weight.sum().backward(); }),
              HasSubstr("the optimizer is gone, and a gradient of sizes [3] has nobody to step it; "
                        "keep the optimizer as long as its GradientRelease"));
  EXPECT_TRUE(weight.equal(before));
  release.reset();
  weight.sum().backward();
  EXPECT_TRUE(weight.grad().defined());
}

TEST(GradientRelease, ParametersMayBeTiedFrozenUnfrozenAndAddedLater) {
  const auto run = [](bool released) {
    torch::manual_seed(4);
    const auto a = torch::randn({70, 70}).requires_grad_(), b = torch::randn({70}).requires_grad_();
    const auto late = torch::randn({70}).requires_grad_(), x = torch::randn({5, 70});
    b.requires_grad_(false);
    AdamW<Int8> optimizer({a, b}, AdamWOptions(1e-2));
    std::optional<GradientRelease<>> release;
    if (released) release.emplace(optimizer);
    const auto step = [&](const torch::Tensor& loss) {
      loss.backward();
      if (!released) optimizer.step(), optimizer.zero_grad();
    };
    step((x.mm(a).mm(a.t()) + b).square().mean());  // a twice, b frozen
    b.requires_grad_(true);
    step((x.mm(a) + b).square().mean());
    a.requires_grad_(false);
    step((x.mm(a) + b).square().mean());
    a.requires_grad_(true);
    optimizer.add_param_group(torch::optim::OptimizerParamGroup({late}));
    for (int i = 0; i < 3; ++i) step((x.mm(a) + b * late).square().mean());
    return torch::cat({a.detach().flatten(), b.detach(), late.detach()});
  };
  EXPECT_TRUE(run(true).equal(run(false)));
}

TEST(GradientRelease, APackedFrozenWeightIsLeftAloneAndCounted) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(64, 64), torch::nn::Linear(64, 64));
  fourfold::compress_weights<Int8>(*model->named_modules()["0"]);
  AdamW<Int8> optimizer(model->parameters());
  const GradientRelease release(optimizer);
  const auto before = model->forward(torch::ones({1, 64})).detach();
  model->forward(torch::ones({1, 64})).sum().backward();
  EXPECT_GE(optimizer.skipped(), 1);
  EXPECT_FALSE(model->forward(torch::ones({1, 64})).equal(before))
      << "the second layer has stepped";
}

TEST(GradientRelease, ASchedulersRatesAreThoseOfTheStep) {
  const auto run = [](bool released) {
    const Net model = net();
    AdamW<Int8> optimizer(model->parameters(), AdamWOptions(1e-2));
    fourfold::optim::CosineAnnealingLR scheduler(optimizer, {.T_max = 5});
    std::optional<GradientRelease<>> release;
    if (released) release.emplace(optimizer);
    for (int step = 0; step < 5; ++step) {
      model->loss(step).backward();
      if (!released) optimizer.step(), optimizer.zero_grad();
      scheduler.step();
    }
    return model;
  };
  expect_equal(run(true), run(false));
}

TEST(GradientRelease, GradientsOfGradientsByAutogradGrad) {
  const auto run = [](bool released) {
    const Net model = net();
    AdamW<Int8> optimizer(model->parameters(), AdamWOptions(1e-2));
    std::optional<GradientRelease<>> release;
    if (released) release.emplace(optimizer);
    for (int step = 0; step < 3; ++step) {
      const auto loss = model->loss(step);
      const auto gradient =
          torch::autograd::grad({loss}, {model->table->weight}, {}, {}, /*create_graph=*/true)[0];
      (loss + gradient.square().sum()).backward();
      if (!released) optimizer.step(), optimizer.zero_grad();
    }
    return model;
  };
  expect_equal(run(true), run(false));
}

TEST(GradientRelease, AGraphIsGoneBackThroughOnce) {
  const Net model = net();
  AdamW<Int8> optimizer(model->parameters());
  const GradientRelease release(optimizer);
  const auto before = model->table->weight.detach().clone();
  EXPECT_THAT(message_of([&] { model->loss(0).backward({}, {}, /*create_graph=*/true); }),
              HasSubstr("backward was called with create_graph while gradients are released, which "
                        "changes the weights that the new graph needs; get such gradients by "
                        "torch::autograd::grad()"));
  EXPECT_TRUE(model->table->weight.equal(before));
  model->zero_grad();
  const auto loss = model->loss(0);
  loss.backward({}, /*retain_graph=*/true);
  EXPECT_THAT(message_of([&] { loss.backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST(GradientRelease, AfterAnExceptionInTheMiddleTrainingGoesOn) {
  const auto run = [](bool released) {
    const Net model = net();
    AdamW<Int8> optimizer(model->parameters(), AdamWOptions(1e-2));
    std::optional<GradientRelease<>> release;
    if (released) release.emplace(optimizer);
    bool fails = true;
    const auto x = model->table->weight.detach().mean() * 0;
    const auto loss = [&](int step) {
      auto hidden = model->body->forward(model->table(torch::arange(16)));
      hidden.register_hook([&](const torch::Tensor& gradient) {
        TORCH_CHECK(!fails, "a hook of the user's");
        return gradient;
      });
      return (model->norm(hidden) * (step + 1)).square().mean();
    };
    const auto body = model->body->parameters();
    const auto before = body[0].detach().clone(), norm = model->norm->weight.detach().clone();
    EXPECT_THAT(message_of([&] { loss(0).backward(); }), HasSubstr("a hook of the user's"));
    EXPECT_TRUE(body[0].equal(before)) << "not reached";
    if (released) {
      EXPECT_FALSE(model->norm->weight.equal(norm)) << "complete before the exception";
      EXPECT_EQ(release->steps(), 0);
    } else {
      optimizer.step(), optimizer.zero_grad();  // with what gradients there are
    }
    fails = false;
    for (int step = 1; step < 4; ++step) {
      loss(step).backward();
      if (!released) optimizer.step(), optimizer.zero_grad();
    }
    return model;
  };
  expect_equal(run(true), run(false));
}

TEST(GradientRelease, BackwardMayRunOnOtherThreads) {
  const Net plain = net();
  AdamW<Int8> reference(plain->parameters());
  for (int step = 0; step < 3; ++step) {
    plain->zero_grad();
    plain->loss(step).backward();
    reference.step();
  }
  const Net first = net(), second = net();
  AdamW<Int8> a(first->parameters()), b(second->parameters());
  const GradientRelease one(a), other(b);
  const auto train = [](const Net& model) {
    for (int step = 0; step < 3; ++step) model->loss(step).backward();
  };
  std::thread thread([&] { train(first); });
  train(second);
  thread.join();
  expect_equal(first, plain);
  expect_equal(second, plain);
}

TEST(GradientRelease, ClippedByTheGlobalNormIsClippedThenStepped) {
  for (const double max_norm : {0.05, 100.0}) {
    const Net plain = net(), released = net();
    AdamW<Int8> a(plain->parameters(), AdamWOptions(1e-2)),
        b(released->parameters(), AdamWOptions(1e-2));
    GradientRelease release(b, {.clip = ClipGradients::kGlobalNorm, .max_norm = max_norm});
    for (int step = 0; step < 4; ++step) {
      a.zero_grad();
      plain->loss(step).backward();
      const double norm = fourfold::clip_grad_norm_(plain->parameters(), max_norm);
      a.step();
      release.backward(released->loss(step));
      EXPECT_EQ(release.last_norm(), norm);
    }
    expect_equal(plain, released);
    EXPECT_EQ(saved(a), saved(b));
    EXPECT_EQ(release.steps(), 4);
  }
}

TEST(GradientRelease, PlainBackwardWhereTwoPassesAreNeededIsAnError) {
  const Net model = net();
  AdamW<Int8> optimizer(model->parameters());
  GradientRelease release(optimizer, {.clip = ClipGradients::kGlobalNorm});
  const auto before = model->table->weight.detach().clone();
  EXPECT_THAT(message_of([&] { model->loss(0).backward(); }),
              HasSubstr("GradientRelease clips by the norm of all gradients, which takes two "
                        "passes: call release.backward(loss) in place of loss.backward()"));
  EXPECT_TRUE(model->table->weight.equal(before));
}

TEST(GradientRelease, ClippedByTheLastNormAndByEachGradientsOwn) {
  for (const auto clip : {ClipGradients::kLastNorm, ClipGradients::kLocalNorm}) {
    constexpr double kMax = 0.05;
    const Net plain = net(), released = net();
    AdamW<Int8> a(plain->parameters(), AdamWOptions(1e-2)),
        b(released->parameters(), AdamWOptions(1e-2));
    const GradientRelease release(b, {.clip = clip, .max_norm = kMax});
    double last = 0;
    for (int step = 0; step < 4; ++step) {
      a.zero_grad();
      plain->loss(step).backward();
      if (clip == ClipGradients::kLocalNorm) {
        for (const auto& p : plain->parameters()) fourfold::clip_grad_norm_({p}, kMax);
      } else {
        const double norm =
            fourfold::clip_grad_norm_(plain->parameters(), std::numeric_limits<double>::max());
        const double coefficient = step == 0 ? 1 : std::min(1.0, kMax / (last + 1e-6));
        for (const auto& p : plain->parameters())
          if (p.grad().defined()) p.mutable_grad().mul_(coefficient);
        last = norm;
      }
      a.step();
      released->loss(step).backward();
      if (clip == ClipGradients::kLastNorm) {
        EXPECT_EQ(release.last_norm(), last);
      }
    }
    expect_equal(plain, released);
  }
}

TEST(GradientRelease, ANormThatIsNotFiniteStepsNothing) {
  const auto weight = torch::ones({3}).requires_grad_(), other = torch::ones({2}).requires_grad_();
  AdamW<Fp32> optimizer({weight, other});
  GradientRelease release(optimizer, {.clip = ClipGradients::kGlobalNorm});
  const auto loss = [&](float bad) { return weight.sum() + (other * bad).sum(); };
  EXPECT_THAT(message_of([&] { release.backward(loss(NAN)); }),
              HasSubstr("the norm of all gradients is nan, so no parameter was stepped; look for "
                        "where it comes from, or give GradientReleaseOptions a scaler"));
  EXPECT_TRUE(weight.equal(torch::ones({3})));
  EXPECT_EQ(optimizer.state_bytes(), 0);
  release.backward(loss(1));
  EXPECT_FALSE(weight.equal(torch::ones({3})));
  EXPECT_EQ(release.steps(), 1);
}

/// Unscaling by a power of two changes no bits. A step that is not finite is left out, states
/// untouched, and the scale falls.
TEST(GradientRelease, AScalersStepsAreItsOwn) {
  const auto run = [](bool released) {
    const Net model = net();
    AdamW<Int8> optimizer(model->parameters(), AdamWOptions(1e-2));
    GradScaler scaler({.init_scale = 1024, .growth_interval = 2});
    std::optional<GradientRelease<>> release;
    if (released)
      release.emplace(optimizer,
                      GradientReleaseOptions{
                          .clip = ClipGradients::kGlobalNorm, .max_norm = 0.1, .scaler = &scaler});
    std::vector<double> scales;
    std::string states;
    for (int step = 0; step < 6; ++step) {
      const bool bad = step == 2 || step == 3;
      auto loss = scaler.scale(model->loss(step));
      if (bad) loss = loss * std::numeric_limits<float>::infinity();
      if (released) {
        release->backward(loss);
      } else {
        loss.backward();
        scaler.unscale_(optimizer);
        if (!bad) fourfold::clip_grad_norm_(model->parameters(), 0.1);
        scaler.step(optimizer);
        optimizer.zero_grad();
      }
      if (bad) {
        EXPECT_EQ(saved(optimizer), states);
      }
      states = saved(optimizer);
      scaler.update();
      scales.push_back(scaler.get_scale());
    }
    if (released) {
      EXPECT_EQ(release->steps(), 4);
    }
    EXPECT_THAT(scales, testing::ElementsAre(1024, 2048, 1024, 512, 512, 1024));
    return model;
  };
  expect_equal(run(true), run(false));
}

/// Small sums stay as they are: the same bits as LibTorch's accumulation.
TEST(GradientRelease, MicroBatchesAccumulate) {
  for (const auto clip : {ClipGradients::kNone, ClipGradients::kGlobalNorm}) {
    const Net plain = net(), released = net();
    AdamW<Int8> a(plain->parameters(), AdamWOptions(1e-2)),
        b(released->parameters(), AdamWOptions(1e-2));
    GradientRelease release(
        b, {.clip = clip, .max_norm = 0.05, .micro_batches = 3, .min_packed_elements = 1 << 20});
    for (int step = 0; step < 2; ++step) {
      a.zero_grad();
      for (int micro = 0; micro < 3; ++micro) {
        plain->loss(3 * step + micro).backward();
        const auto before = released->table->weight.detach().clone();
        release.backward(released->loss(3 * step + micro));
        EXPECT_EQ(released->table->weight.equal(before), micro < 2);
      }
      if (clip != ClipGradients::kNone) fourfold::clip_grad_norm_(plain->parameters(), 0.05);
      a.step();
    }
    expect_equal(plain, released);
    EXPECT_EQ(release.steps(), 2);
  }
}

/// What only the first micro-batches reach steps too, from its codes. sgd-like: AdamW's first step
/// is lr * sign(gradient) wherever |gradient| is far above eps.
TEST(GradientRelease, SumsInCodesStepWithTheLastMicroBatch) {
  torch::manual_seed(0);
  const auto a = torch::randn({100, 100}).requires_grad_();
  const auto b = torch::randn({100, 100}).requires_grad_();
  const auto x = torch::randn({100, 100}), y = torch::randn({100, 100});
  AdamW<Fp32> optimizer({a, b}, AdamWOptions(1e-3).weight_decay(0));
  GradientRelease<Int4> release(optimizer, {.micro_batches = 2});
  const auto before_a = a.detach().clone(), before_b = b.detach().clone();
  ((a * x).sum() + (b * y).sum()).backward();
  EXPECT_TRUE(a.equal(before_a));
  EXPECT_FALSE(a.grad().defined());
  // 4.5 bits of code and 4.5 of error; 16 bytes: rounded up to whole groups.
  EXPECT_NEAR(release.buffer_bytes(), 2 * 10000 * 9.0 / 8, 2 * 16);
  (a * x).sum().backward();
  EXPECT_EQ(release.buffer_bytes(), 0);
  const auto sign = [](const torch::Tensor& g) {
    return (g.abs() > 0.05).to(torch::kFloat) * g.sign();
  };
  const auto moved = [](const torch::Tensor& p, const torch::Tensor& before) {
    return (p.detach() - before) / -1e-3;
  };
  EXPECT_TRUE(torch::allclose(moved(a, before_a) * sign(x).abs(), sign(x), 1e-3, 1e-3));
  EXPECT_TRUE(torch::allclose(moved(b, before_b) * sign(y).abs(), sign(y), 1e-3, 1e-3));
  (a * x).sum().backward();
  release.reset();
  EXPECT_EQ(release.buffer_bytes(), 0);
  EXPECT_EQ(release.steps(), 1);
}

/// AdamA's algorithm 1, in double: m takes up the sum of a step's gradients, v that of their squares.
/// `b` is reached by the first micro-batch of each step alone. 3 eps of each of 2 * 3 updates.
TEST(GradientRelease, MomentsTakeUpMicroBatchesWithoutABuffer) {
  torch::manual_seed(0);
  const auto a = torch::randn({100, 50}).requires_grad_(), b = torch::randn({100, 50});
  b.requires_grad_();
  AdamW<Fp32> optimizer({a, b}, AdamWOptions(1e-2).weight_decay(0.1));
  GradientRelease<> release(
      optimizer, {.micro_batches = 3, .accumulate = fourfold::AccumulateGradients::kMoments});
  struct Reference {
    explicit Reference(const torch::Tensor& start)
        : p(start.detach().to(torch::kDouble)), m(torch::zeros_like(p)), v(torch::zeros_like(p)) {}
    void begin() { m.mul_(0.9), v.mul_(0.999); }
    void take(const torch::Tensor& g) { m.add_(0.1 * g), v.add_(0.001 * g.square()); }
    void end(int step) {
      const auto root = (v / (1 - std::pow(0.999, step))).sqrt();
      p.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * (m / (1 - std::pow(0.9, step))) / (root + 1e-8));
    }
    torch::Tensor p, m, v;
  } of_a(a), of_b(b);
  for (int step = 1; step <= 2; ++step) {
    of_a.begin(), of_b.begin();
    for (int micro = 0; micro < 3; ++micro) {
      const auto x = torch::randn({100, 50}), y = torch::randn({100, 50});
      const auto before = a.detach().clone();
      auto loss = (a * x).sum();
      if (micro == 0) loss = loss + (b * y).sum(), of_b.take(y.to(torch::kDouble));
      loss.backward();
      of_a.take(x.to(torch::kDouble));
      EXPECT_FALSE(a.grad().defined());
      EXPECT_EQ(a.equal(before), micro < 2);
      EXPECT_EQ(release.buffer_bytes(), 0);
    }
    of_a.end(step), of_b.end(step);
    for (const auto& [p, expected] : {std::pair{a, of_a.p}, {b, of_b.p}})
      EXPECT_LT((p.detach().to(torch::kDouble) - expected).abs().max().item<double>(),
                18 * 0x1p-24 * expected.abs().max().item<double>());
  }
  EXPECT_EQ(release.steps(), 2);
}
/// One gradient a step is a step, in every code and whatever the rounding.
TEST(GradientRelease, OneMicroBatchInMomentsIsAStep) {
  const auto plain = net(), released = net();
  AdamW<Int8> a(plain->parameters(), AdamWOptions(1e-2)), b(released->parameters(), 1e-2);
  GradientRelease<> release(b, {.accumulate = fourfold::AccumulateGradients::kMoments});
  for (int step = 0; step < 3; ++step) {
    a.zero_grad(), plain->loss(step).backward(), a.step();
    released->loss(step).backward();
  }
  expect_equal(plain, released);
}
TEST(GradientRelease, RulesThatCannotFoldAreNamedWhenItIsMade) {
  const auto p = torch::ones({3}).requires_grad_();
  fourfold::optim::LionOf<Fp32> lion({p}, 1e-2);
  const auto of = [&](std::int64_t micro_batches) {
    return GradientRelease<>(lion, {.micro_batches = micro_batches,
                                    .accumulate = fourfold::AccumulateGradients::kMoments});
  };
  EXPECT_THAT(message_of([&] { static_cast<void>(of(2)); }),
              HasSubstr("Lion cannot take up a step's gradients one by one, which AdamW can"));
  lion.step();  // refused, it is not released
  const auto release = of(1);
  p.sum().backward();
  EXPECT_FALSE(p.equal(torch::ones({3})));
}
TEST(GradientRelease, AnOptimizerThatCannotBeHookedIsNotReleased) {
  const auto p = torch::ones({3}), w = torch::ones({3}).requires_grad_();
  AdamW<Fp32> optimizer({p, w});
  p.mul_(w);  // no leaf any more
  EXPECT_THAT(message_of([&] { const GradientRelease release(optimizer); }),
              HasSubstr("is no leaf but the result of an operation"));
  optimizer.step();
  EXPECT_EQ(torch::autograd::impl::post_acc_grad_hooks(w), nullptr);
}

TEST(GradientRelease, BadOptionsAreNamed) {
  const auto weight = torch::ones({3}).requires_grad_();
  AdamW<Fp32> optimizer({weight});
  const auto words = [&](const GradientReleaseOptions& options) {
    return message_of([&] { const GradientRelease release(optimizer, options); });
  };
  GradScaler scaler;
  EXPECT_THAT(words({.max_norm = 0}), HasSubstr("max_norm is 0; give the largest norm that"));
  EXPECT_THAT(words({.max_norm = NAN}), HasSubstr("max_norm is nan; give"));
  EXPECT_THAT(
      words({.micro_batches = 0}),
      HasSubstr("micro_batches is 0; give the number of backward passes a step, 1 or more"));
  EXPECT_THAT(
      words({.scaler = &scaler}),
      HasSubstr("known before the first parameter steps after two passes alone; set clip to "
                "ClipGradients::kGlobalNorm (max_norm may be infinite)"));
  EXPECT_THAT(words({.clip = ClipGradients::kLastNorm,
                     .accumulate = fourfold::AccumulateGradients::kMoments}),
              HasSubstr("takes up each gradient before the others are known"));
  optimizer.step();  // refused, it is not released
}

TEST(GradientRelease, AStepThatTheOptimizerRefusesStops) {
  const auto weight = torch::ones({5, 2}).requires_grad_();
  AdamW<Int8> optimizer({weight});
  const GradientRelease release(optimizer);
  static_cast<AdamWOptions&>(optimizer.param_groups()[0].options()).lr(-1);
  EXPECT_THAT(message_of([&] { weight.sum().backward(); }), HasSubstr("Invalid learning rate: -1"));
  EXPECT_TRUE(weight.equal(torch::ones({5, 2})));
}

}  // namespace

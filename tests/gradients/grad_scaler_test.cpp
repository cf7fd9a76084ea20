// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/grad_scaler.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/gradients/scripted_runs.hpp"

#include <sstream>

namespace {

using fourfold::GradScaler, fourfold::GradScalerOptions, fourfold::tests::ScaledParameter;
using testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();

std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}
std::string saved(const auto& what) {
  std::ostringstream out;
  torch::save(what, out);
  return out.str();
}
void load(auto& what, const std::string& bytes) {
  std::istringstream in(bytes);
  torch::load(what, in);
}

/// What the header leans on: LibTorch has both kernels for a CPU, for each floating type.
TEST(GradScaler, LibTorchHasItsKernelsForACpu) {
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf}) {
    std::vector<torch::Tensor> gradients{torch::full({3}, 8, dtype), torch::full({2}, 4, dtype)};
    auto found_inf = torch::zeros({});
    at::_amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, torch::tensor(0.5F));
    EXPECT_TRUE(gradients[0].equal(torch::full({3}, 4, dtype))) << dtype;
    EXPECT_EQ(found_inf.item<float>(), 0);
    gradients[1][1] = NAN;
    at::_amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, torch::tensor(0.5F));
    EXPECT_EQ(found_inf.item<float>(), 1) << dtype;
  }
  auto scale = torch::tensor(8.0F), tracker = torch::tensor(1, torch::kInt);
  at::_amp_update_scale_(scale, tracker, torch::zeros({}), 4, 0.5, 2);
  EXPECT_EQ(scale.item<float>(), 32);
  EXPECT_EQ(tracker.item<int>(), 0);
}

TEST(GradScaler, ScalesArePythonsInAScriptedRun) {
  fourfold::tests::expect_scripted_run(torch::kCPU);
}
TEST(GradScaler, ScalesArePythonsWhereProductsOverflow) {
  fourfold::tests::expect_overflowing_run(torch::kCPU);
}

/// A power of two changes no bits: training with a scaler is training without.
TEST(GradScaler, TrainingIsUnchangedByAScaleOfAPowerOfTwo) {
  const auto train = [](bool enabled) {
    torch::manual_seed(0);
    torch::nn::Linear model(7, 3);
    const auto input = torch::randn({5, 7});
    torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
    GradScaler scaler({.growth_interval = 3, .enabled = enabled});
    for (int step = 0; step < 10; ++step) {
      optimizer.zero_grad();
      scaler.scale(model(input).square().mean()).backward();
      scaler.unscale_(optimizer);
      torch::nn::utils::clip_grad_norm_(model->parameters(), 0.5);
      scaler.step(optimizer);
      scaler.update();
    }
    EXPECT_EQ(scaler.get_scale(), enabled ? 0x1p19 : 1);
    return model->weight.detach().clone();
  };
  EXPECT_TRUE(train(true).equal(train(false)));
}

TEST(GradScaler, ASkippedStepLeavesParametersAndStatesAsTheyWere) {
  torch::manual_seed(0);
  const auto weight = torch::randn({40, 3}).requires_grad_();
  const auto other = torch::randn({9}).requires_grad_();
  torch::optim::AdamW optimizer({weight, other}, torch::optim::AdamWOptions(1e-2));
  GradScaler scaler;
  const auto iterate = [&](float factor) {
    optimizer.zero_grad();
    scaler.scale(weight.square().sum() + other[4] * factor).backward();
    scaler.step(optimizer);
    scaler.update();
  };
  iterate(1), iterate(2);
  const auto before = weight.detach().clone();
  const std::string states = saved(optimizer);
  for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
    iterate(bad);
    EXPECT_TRUE(weight.equal(before)) << bad;
    EXPECT_EQ(saved(optimizer), states) << bad;
  }
  EXPECT_EQ(scaler.get_scale(), 65536.0 / 8);
  iterate(1);
  EXPECT_FALSE(weight.equal(before));
}

TEST(GradScaler, OutputsKeepTheirTypesAndAListIsScaledAlike) {
  GradScaler scaler({.init_scale = 4});
  const auto scaled = scaler.scale(
      {torch::ones({2}, torch::kHalf), torch::ones({3}), torch::ones({}, torch::kDouble)});
  EXPECT_TRUE(scaled[0].equal(torch::full({2}, 4, torch::kHalf)));
  EXPECT_TRUE(scaled[1].equal(torch::full({3}, 4.0F)));
  EXPECT_TRUE(scaled[2].equal(torch::full({}, 4, torch::kDouble)));
  EXPECT_EQ(scaler.get_scale(), 4);
}

TEST(GradScaler, SparseGradientsAreUnscaledByTheirValues) {
  GradScaler scaler({.init_scale = 4});
  const auto table = torch::ones({5, 2}).requires_grad_();
  torch::optim::SGD optimizer({table}, torch::optim::SGDOptions(1));
  const auto rows = torch::tensor({1, 3, 1});
  scaler.scale(torch::embedding(table, rows, -1, false, true).sum()).backward();
  ASSERT_TRUE(table.grad().is_sparse());
  scaler.unscale_(optimizer);
  const auto counts = torch::tensor({0.0F, 2.0F, 0.0F, 1.0F, 0.0F}).unsqueeze(1).expand({5, 2});
  EXPECT_TRUE(table.grad().to_dense().equal(counts));
  scaler.step(optimizer);
  EXPECT_TRUE(table.equal(1 - counts));
}

TEST(GradScaler, EachCallHasItsPlaceInTheIteration) {
  GradScaler scaler;
  ScaledParameter a(torch::kCPU);
  EXPECT_THAT(message([&] { scaler.unscale_(a.optimizer); }),
              HasSubstr("GradScaler::unscale_ was called before scale(): there is no scale yet; "
                        "call backward on scale(loss) first"));
  EXPECT_THAT(message([&] { scaler.step(a.optimizer); }), HasSubstr("step was called before"));
  EXPECT_THAT(message([&] { scaler.update(); }), HasSubstr("update was called before scale()"));
  EXPECT_THAT(message([&] { (void)scaler.scale(torch::Tensor()); }),
              HasSubstr("scale got an undefined tensor; give it the loss"));

  (void)scaler.scale(torch::ones({}));
  EXPECT_THAT(message([&] { scaler.update(); }),
              HasSubstr("no gradients were checked for infinities since the last update(); call "
                        "step() or unscale_() for each optimizer first"));
  EXPECT_THAT(message([&] { scaler.step(a.optimizer); }),
              HasSubstr("no parameter of this optimizer has a gradient to check for infinities; "
                        "call backward on scale(loss) first"));
  scaler.update(65536.0);

  a.backward(scaler, 1);
  scaler.unscale_(a.optimizer);
  const torch::Tensor unscaled = a.weight.grad().clone();
  EXPECT_THAT(message([&] { scaler.unscale_(a.optimizer); }),
              HasSubstr("unscale_ has been called for this optimizer since the last update()"));
  EXPECT_TRUE(a.weight.grad().equal(unscaled));
  EXPECT_THAT(message([&] { scaler.step(a.optimizer, [] { return torch::Tensor(); }); }),
              HasSubstr("step was given a closure, and gradients that a closure makes cannot be "
                        "checked before the step; call the closure yourself"));
  scaler.step(a.optimizer);
  const torch::Tensor stepped = a.weight.detach().clone();
  EXPECT_THAT(message([&] { scaler.step(a.optimizer); }),
              HasSubstr("step has been called for this optimizer since the last update(); call "
                        "update() at the end of the iteration"));
  EXPECT_TRUE(a.weight.equal(stepped));
  EXPECT_THAT(message([&] { scaler.unscale_(a.optimizer); }),
              HasSubstr("unscale_ was called after step() of this optimizer; call it before"));
  scaler.update();
  EXPECT_EQ(scaler.state_dict()->growth_tracker, 1);
}

TEST(GradScaler, AStepWithoutGradientsLeavesTheIterationOpen) {
  const auto p = torch::ones({2}).requires_grad_();
  torch::optim::SGD optimizer({p}, torch::optim::SGDOptions(0.5));
  GradScaler scaler(GradScalerOptions{.init_scale = 4});
  const auto loss = scaler.scale(p.sum());
  EXPECT_THAT(message([&] { scaler.step(optimizer); }), HasSubstr("call backward on scale(loss)"));
  loss.backward();
  scaler.step(optimizer);
  scaler.update();
  EXPECT_TRUE(p.equal(torch::full({2}, 0.5)));
}

TEST(GradScaler, Fp16GradientsAreRefusedUntouched) {
  GradScaler scaler({.init_scale = 4});
  const auto whole = torch::ones({3}).requires_grad_();
  const auto half = torch::ones({2}, torch::kHalf).requires_grad_();
  torch::optim::SGD optimizer({whole, half}, torch::optim::SGDOptions(1));
  scaler.scale(whole.sum() + half.sum()).backward();
  EXPECT_THAT(message([&] { scaler.step(optimizer); }),
              HasSubstr("a gradient of sizes [2] is fp16, and unscaled in fp16 it would lose what "
                        "the scale kept; hold the parameters in fp32"));
  EXPECT_TRUE(whole.grad().equal(torch::full({3}, 4.0F)));
  EXPECT_TRUE(half.grad().equal(torch::full({2}, 4, torch::kHalf)));
  EXPECT_TRUE(whole.equal(torch::ones({3})));
  half.mutable_grad().reset();
  scaler.step(optimizer);  // the refusal has left no trace
  EXPECT_TRUE(whole.equal(torch::zeros({3})));

  const auto wave = torch::ones({2}, torch::kComplexFloat).requires_grad_();
  torch::optim::SGD complex({wave}, torch::optim::SGDOptions(1));
  scaler.scale(torch::real(wave).sum()).backward();
  EXPECT_THAT(message([&] { scaler.unscale_(complex); }),
              HasSubstr("is ComplexFloat; gradients of real floating types can be unscaled"));
}

TEST(GradScaler, ANewScaleIsADoubleOrATensorThatIsCopied) {
  GradScaler scaler;
  ScaledParameter a(torch::kCPU);
  a.backward(scaler, 1);
  scaler.step(a.optimizer);
  scaler.update(8.0);
  EXPECT_EQ(scaler.get_scale(), 8);
  EXPECT_EQ(scaler.state_dict()->growth_tracker, 0);
  const auto given = torch::tensor({16.0});
  scaler.update(given);
  given.fill_(3);
  EXPECT_EQ(scaler.get_scale(), 16);
  EXPECT_THAT(message([&] { scaler.update(torch::zeros({})); }),
              HasSubstr("new_scale is 0; give a scale above 0"));
  EXPECT_THAT(message([&] { scaler.update(torch::ones({2})); }),
              HasSubstr("new_scale is Float of sizes [2]; give a double, or one floating value "
                        "with requires_grad off"));
  EXPECT_THAT(message([&] { scaler.update(torch::ones({}).requires_grad_()); }),
              HasSubstr("new_scale is Float of sizes [] with requires_grad; give"));
  EXPECT_THAT(message([&] { scaler.update(torch::Tensor()); }),
              HasSubstr("new_scale is undefined"));
  EXPECT_THAT(message([&] { scaler.update(-1.0); }),
              HasSubstr("new_scale is -1; give a scale above 0 that fp32 can hold"));
  EXPECT_EQ(scaler.get_scale(), 16);
}

TEST(GradScaler, DisabledItIsTheOptimizerAlone) {
  GradScaler scaler({.init_scale = -1, .enabled = false});
  ScaledParameter a(torch::kCPU);
  const auto loss = torch::ones({});
  EXPECT_TRUE(scaler.scale(loss).is_same(loss));
  a.backward(scaler, kInf);
  scaler.unscale_(a.optimizer);
  EXPECT_EQ(scaler.step(a.optimizer, [] { return torch::tensor(5); }).item<int>(), 5);
  EXPECT_FALSE(a.weight.isfinite().all().item<bool>());
  scaler.update();
  EXPECT_EQ(scaler.get_scale(), 1);
  EXPECT_FALSE(scaler.state_dict().has_value());
  GradScaler enabled;
  EXPECT_THAT(message([&] { enabled.load_state_dict(scaler.state_dict()); }),
              HasSubstr("got an empty state, which a disabled GradScaler gives; load what an "
                        "enabled one has saved"));
  EXPECT_THAT(message([&] { load(enabled, saved(scaler)); }), HasSubstr("got an empty state"));
  scaler.load_state_dict(enabled.state_dict());
  EXPECT_EQ(scaler.get_scale(), 1);
}

TEST(GradScaler, BadOptionsAreNamed) {
  const auto words = [](const GradScalerOptions& options) {
    return message([&] { const GradScaler scaler(options); });
  };
  EXPECT_THAT(words({.init_scale = 0}), HasSubstr("init_scale is 0; give a scale above 0"));
  EXPECT_THAT(words({.init_scale = 1e39}), HasSubstr("that fp32 can hold"));
  EXPECT_THAT(words({.growth_factor = 1}), HasSubstr("growth_factor is 1; give what the scale"));
  EXPECT_THAT(words({.growth_factor = NAN}), HasSubstr("growth_factor is nan"));
  EXPECT_THAT(words({.backoff_factor = 1}), HasSubstr("backoff_factor is 1; give what the scale"));
  EXPECT_THAT(words({.backoff_factor = 0}), HasSubstr("backoff_factor is 0; give what the scale"));
  EXPECT_THAT(words({.growth_interval = 0}), HasSubstr("growth_interval is 0; give a number of"));

  GradScaler scaler;
  EXPECT_THAT(message([&] { scaler.set_growth_factor(0.5); }), HasSubstr("growth_factor is 0.5"));
  EXPECT_THAT(message([&] { scaler.set_backoff_factor(2); }), HasSubstr("backoff_factor is 2"));
  EXPECT_THAT(message([&] { scaler.set_growth_interval(-1); }), HasSubstr("interval is -1"));
  scaler.set_growth_factor(1), scaler.set_backoff_factor(1), scaler.set_growth_interval(7);
  EXPECT_EQ(scaler.get_growth_factor(), 1);
  EXPECT_EQ(scaler.get_backoff_factor(), 1);
  EXPECT_EQ(scaler.get_growth_interval(), 7);
}

TEST(GradScaler, AFileBringsTheStateBack) {
  GradScaler scaler({.init_scale = 32, .growth_factor = 3, .growth_interval = 10});
  ScaledParameter a(torch::kCPU);
  for (int step = 0; step < 3; ++step) {
    a.backward(scaler, step == 0 ? kInf : 1);
    a.step(scaler);
    scaler.update();
  }
  GradScaler before_its_first_scale;
  load(before_its_first_scale, saved(scaler));
  EXPECT_EQ(before_its_first_scale.state_dict(), scaler.state_dict());
  EXPECT_EQ(before_its_first_scale.state_dict()->growth_tracker, 2);
  EXPECT_EQ(before_its_first_scale.scale(torch::ones({})).item<float>(), 16);

  GradScaler running;
  (void)running.scale(torch::ones({}));
  load(running, saved(scaler));
  EXPECT_EQ(running.state_dict(), scaler.state_dict());

  const auto held = scaler.state_dict();
  const auto refused = [&](const std::string& bytes) {
    const std::string words = message([&] { load(scaler, bytes); });
    EXPECT_EQ(scaler.state_dict(), held);
    return words;
  };
  const auto file = [](std::int64_t version, const c10::IValue& interval, double scale) {
    torch::serialize::OutputArchive archive;
    archive.write("fourfold_grad_scaler", version);
    archive.write("enabled", true);
    archive.write("scale", scale);
    archive.write("growth_factor", 2.0);
    archive.write("backoff_factor", 0.5);
    if (!interval.isNone()) archive.write("growth_interval", interval);
    archive.write("growth_tracker", std::int64_t{0});
    std::ostringstream out;
    archive.save_to(out);
    return out.str();
  };
  EXPECT_THAT(refused(saved(a.optimizer)),
              HasSubstr("the archive does not hold the state of a GradScaler; give it"));
  EXPECT_THAT(refused(file(2, 5, 8)), HasSubstr("has format version 2, and this fourfold reads"));
  EXPECT_THAT(refused(file(1, c10::IValue(), 8)),
              HasSubstr("the file of a GradScaler has no 'growth_interval': it is damaged"));
  EXPECT_THAT(refused(file(1, 0.5, 8)),
              HasSubstr("'growth_interval' in the file of a GradScaler is Double and not a whole"));
  EXPECT_THAT(refused(file(1, 0, 8)), HasSubstr("growth_interval is 0"));
  EXPECT_THAT(refused(file(1, 5, NAN)), HasSubstr("the scale to load is nan"));
  EXPECT_NE(refused("garbage"), "no error");
}

}  // namespace

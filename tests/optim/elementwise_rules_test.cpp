// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adam.hpp>
#include <fourfold/optim/lion.hpp>
#include <fourfold/optim/sgd.hpp>
#include <tests/optim/oracle.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

namespace {

using fourfold::Int8, fourfold::Isa;
using namespace fourfold::optim;
namespace reference = fourfold::reference;
using testing::HasSubstr;
using torch::optim::AdamOptions;
using torch::optim::AdamWOptions;
using torch::optim::SGDOptions;

template <class Optimizer>
auto make(typename Optimizer::Options options, StateOptions states = {}) {
  return [=](const std::vector<at::Tensor>& p) {
    return std::make_unique<Optimizer>(p, options, states);
  };
}

TEST(ElementwiseRules, ArePythons) {
  const auto adamw = AdamWOptions(1e-2).betas({0.8, 0.99}).eps(1e-7).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kAdamW, make<AdamWOf<Fp32>>(adamw)), 1e-6);
  const auto adam = AdamOptions(1e-2).weight_decay(0.05);
  EXPECT_LE(oracle::error_of(reference::kAdam, make<AdamOf<Fp32>>(adam)), 1e-6);
  EXPECT_LE(oracle::error_of(reference::kAdamMaximize,
                             make<AdamOf<Fp32>>(AdamOptions(1e-2), {.maximize = true})),
            1e-6);
  EXPECT_LE(oracle::error_of(reference::kSGD, make<SGDOf<Fp32>>(SGDOptions(1e-2))), 1e-6);
  const auto momentum = SGDOptions(1e-2).momentum(0.9).dampening(0.3).weight_decay(0.05);
  EXPECT_LE(oracle::error_of(reference::kSGDMomentum, make<SGDOf<Fp32>>(momentum)), 1e-6);
  const auto nesterov = SGDOptions(1e-2).momentum(0.9).nesterov(true).weight_decay(0.05);
  EXPECT_LE(oracle::error_of(reference::kSGDNesterov, make<SGDOf<Fp32>>(nesterov)), 1e-6);
  EXPECT_LE(oracle::error_of(reference::kSGDMaximize,
                             make<SGDOf<Fp32>>(SGDOptions(1e-2).momentum(0.5), {.maximize = true})),
            1e-6);
  const auto lion = LionOptions(1e-3).betas({0.9, 0.99}).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kLion, make<LionOf<Fp32>>(lion)), 1e-6);
}
/// fp64 parameters, fp32 moments: what is left is the moments' rounding.
TEST(ElementwiseRules, DoubleParametersAreSteppedInDouble) {
  const auto error = [](auto expected, auto make) {
    return oracle::error_of(expected, make, {{12, 10}, {7}}, at::kDouble);
  };
  EXPECT_LE(error(std::span(reference::kSGDDouble), make<SGDOf<Fp32>>(SGDOptions(1e-2))), 1e-13);
  EXPECT_LE(error(std::span(reference::kAdamDouble),
                  make<AdamOf<Fp32>>(AdamOptions(1e-2).weight_decay(0.05))),
            1e-6);
  EXPECT_LE(error(std::span(reference::kSGDMaximizeDouble),
                  make<SGDOf<Fp32>>(SGDOptions(1e-2).momentum(0.5), {.maximize = true})),
            1e-6);
  EXPECT_LE(error(std::span(reference::kLionDouble),
                  make<LionOf<Fp32>>(LionOptions(1e-3).betas({0.9, 0.99}).weight_decay(0.1))),
            1e-6);
}

template <class Optimizer>
void expect_equal_bits_on_every_path(typename Optimizer::Options options) {
  using Rule = typename Optimizer::RuleType;
  using State = typename Optimizer::State;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf, torch::kDouble})
    for (const std::int64_t n : {1, 63, 64, 200, 2000}) {
      const auto after = [&](Isa isa) {
        auto p = oracle::start({n}, dtype).requires_grad_();
        State state(p, false);
        for (int step = 1; step <= 4; ++step) {
          const bool fresh = state.template make<Rule>(p, options, 0);
          fourfold::optim::detail::step_values<Rule>(
              p, oracle::gradient(p, step), state, Rule::factors(options, {step, fresh}),
              fourfold::optim::detail::StepKeys(1, step, 2, true), step == 3, isa);
        }
        return p.detach().clone();
      };
      const auto expected = after(Isa::kScalar);
      for (const Isa isa : fourfold::available_isas())
        EXPECT_TRUE(after(isa).equal(expected)) << name(isa) << ", " << n << " of " << dtype;
    }
}
TEST(ElementwiseRules, EveryPathGivesTheSameBits) {
  expect_equal_bits_on_every_path<SGDOf<Int8>>(SGDOptions(1e-2));
  expect_equal_bits_on_every_path<SGDOf<Int8>>(
      SGDOptions(1e-2).momentum(0.9).dampening(0.3).weight_decay(0.1));
  expect_equal_bits_on_every_path<SGDOf<Int8>>(
      SGDOptions(1e-2).momentum(0.9).nesterov(true).weight_decay(0.1));
  expect_equal_bits_on_every_path<LionOf<Int8>>(LionOptions(1e-2).weight_decay(0.1));
  expect_equal_bits_on_every_path<AdamOf<Int8>>(AdamOptions(1e-2).weight_decay(0.1));
}

TEST(ElementwiseRules, StatesTakeOneMomentOrNone) {
  auto p = torch::randn({128, 64}).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  const auto bytes = [&](auto&& optimizer) {
    optimizer.step();
    return optimizer.state_bytes();
  };
  EXPECT_EQ(bytes(SGDOf<Int8>({p}, SGDOptions(1e-2))), 0);
  EXPECT_EQ(bytes(SGDOf<Int8>({p}, SGDOptions(1e-2).momentum(0.9))), 8192 + 4 * 64);
  EXPECT_EQ(bytes(LionOf<Int8>({p})), 8192 + 4 * 64);
  EXPECT_EQ(bytes(AdamOf<Int8>({p})), 2 * (8192 + 4 * 64));
}

/// LibTorch makes the buffer from the first gradient that meets a momentum, undampened.
TEST(ElementwiseRules, MomentumMayBeginLater) {
  auto a = oracle::start({40}, at::kFloat).requires_grad_();
  auto b = oracle::start({40}, at::kFloat).requires_grad_();
  SGDOf<Fp32> ours({a}, SGDOptions(1e-2));
  torch::optim::SGD theirs({b}, SGDOptions(1e-2));
  for (int step = 1; step <= 6; ++step) {
    if (step == 3)
      for (torch::optim::Optimizer* one :
           std::initializer_list<torch::optim::Optimizer*>{&ours, &theirs})
        static_cast<SGDOptions&>(one->param_groups()[0].options()).momentum(0.9).dampening(0.5);
    a.mutable_grad() = oracle::gradient(a, step), b.mutable_grad() = oracle::gradient(b, step);
    ours.step(), theirs.step();
  }
  EXPECT_TRUE(torch::allclose(a, b, 1e-6, 1e-7));
}

template <class Optimizer>
void expect_resumed_training_to_be_bit_equal(typename Optimizer::Options options) {
  const auto train = [](Optimizer& optimizer, at::Tensor& p, int from, int to) {
    for (int step = from; step < to; ++step) {
      p.mutable_grad() = oracle::gradient(p, step);
      optimizer.step();
    }
  };
  auto whole = oracle::start({90, 70}, at::kFloat).requires_grad_();
  auto parted = oracle::start({90, 70}, at::kFloat).requires_grad_();
  Optimizer one({whole}, options), first({parted}, options), second({parted}, options);
  train(one, whole, 1, 9);
  train(first, parted, 1, 5);
  std::stringstream file;
  torch::save(first, file);
  torch::load(second, file);
  train(second, parted, 5, 9);
  EXPECT_TRUE(parted.equal(whole));
}
TEST(ElementwiseRules, SavedStatesGoOnBitForBit) {
  expect_resumed_training_to_be_bit_equal<SGDOf<Int8>>(SGDOptions(1e-2));
  expect_resumed_training_to_be_bit_equal<SGDOf<Int8>>(
      SGDOptions(1e-2).momentum(0.9).dampening(0.5));
  expect_resumed_training_to_be_bit_equal<LionOf<Int8>>(
      LionOptions(1e-2).betas({0.8, 0.9}).weight_decay(0.1));
  expect_resumed_training_to_be_bit_equal<AdamOf<Fp32>>(AdamOptions(1e-2).weight_decay(0.1));
}
TEST(ElementwiseRules, OptionsComeBackFromFiles) {
  auto p = torch::randn({3}).requires_grad_();
  LionOf<Int8> saved({p}, LionOptions(0.25).betas({0.5, 0.75}).weight_decay(0.125)), loaded({p});
  std::stringstream file;
  torch::save(saved, file);
  torch::load(loaded, file);
  const auto& options = static_cast<LionOptions&>(loaded.param_groups()[0].options());
  EXPECT_EQ(options.lr(), 0.25);
  EXPECT_EQ(options.betas(), std::make_tuple(0.5, 0.75));
  EXPECT_EQ(options.weight_decay(), 0.125);
  torch::optim::StepLR schedule(loaded, 1, 0.5);               // finds a rate that is ours
  for (int i = 0; i < 2; ++i) loaded.step(), schedule.step();  // the first is that of the start
  EXPECT_EQ(options.lr(), 0.125);
}
TEST(ElementwiseRules, StatesOfAnotherRuleAreRefused) {
  auto p = torch::randn({3}).requires_grad_();
  std::stringstream file;
  torch::save(LionOf<Int8>({p}), file);
  SGDOf<Int8> other({p}, SGDOptions(1));
  EXPECT_THAT(
      message_of([&] { torch::load(other, file); }),
      HasSubstr("this file holds states of Lion, and this optimizer is SGD; load it into an "
                "optimizer of its own rule"));
}

TEST(ElementwiseRules, OptionsOutOfRangeAreNamed) {
  const auto p = torch::zeros({2}).requires_grad_();
  const auto sgd = [&](const SGDOptions& options) {
    return message_of([&] { SGDOf<Int8>({p}, options); });
  };
  EXPECT_THAT(sgd(SGDOptions(-1)), HasSubstr("Invalid learning rate: -1 in the defaults"));
  EXPECT_THAT(sgd(SGDOptions(1).momentum(-1)), HasSubstr("Invalid momentum value: -1"));
  EXPECT_THAT(sgd(SGDOptions(1).weight_decay(-1)), HasSubstr("Invalid weight_decay value: -1"));
  EXPECT_THAT(sgd(SGDOptions(1).nesterov(true)),
              HasSubstr("Nesterov momentum requires a momentum and zero dampening"));
  EXPECT_THAT(message_of([&] {
                LionOf<Int8>({p}, LionOptions(1).betas({0.9, 1.0}));
              }),
              HasSubstr("Invalid beta parameter at index 1: 1"));
  EXPECT_THAT(message_of([&] { LionOf<Int8>({p}, LionOptions(NAN)); }),
              HasSubstr("Invalid learning rate: nan"));
  EXPECT_THAT(message_of([&] { AdamOf<Int8>({p}, AdamOptions(1).amsgrad(true)); }),
              HasSubstr("use torch::optim::Adam, or amsgrad(false)"));
  SGDOf<Int8> optimizer({p}, SGDOptions(1));
  optimizer.add_param_group(
      torch::optim::OptimizerParamGroup({}, std::make_unique<AdamOptions>(AdamOptions(1))));
  EXPECT_THAT(message_of([&] { optimizer.step(); }),
              HasSubstr("group 1 has the options of another optimizer; give it SGD's"));
}

TEST(ElementwiseRules, AnEmptyListStepsNothing) {
  SGDOf<Int8> optimizer(std::vector<at::Tensor>{}, SGDOptions(1));
  optimizer.step();
  EXPECT_EQ(optimizer.state_bytes(), 0);
  auto p = torch::zeros({2}).requires_grad_();
  p.mutable_grad() = torch::ones({2});
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({p}));
  optimizer.step();
  EXPECT_TRUE(p.equal(torch::full({2}, -1.0F)));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/nf4.hpp>
#include <fourfold/optim/optim.hpp>
#include <fourfold/weights/compress_weights.hpp>
#include <tests/optim/rule_checks.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <thread>

namespace {

using fourfold::Int4, fourfold::Int8, fourfold::Isa;
using namespace fourfold::optim;
using testing::HasSubstr;
using torch::optim::AdamWOptions;
using torch::optim::SGDOptions;
class OptimizerTest : public OneThread {};

/// As optim/rule.hpp describes it: written outside the library.
struct SignRule {
  using Options = SGDOptions;
  struct Factors {
    float lr = 0;
  };
  static std::string name() { return "Sign"; }
  static void check(const Options& options, const std::string& whose) {
    TORCH_CHECK(options.lr() >= 0, "Sign's lr is negative in ", whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) { return {p.numel(), 0}; }
  static Factors factors(const Options& options, const StepCount& count) {
    return {static_cast<float>(options.lr() / static_cast<double>(count.step))};
  }
  template <class T>
  static void update(T* p, const T* g, float* m, float*, std::int64_t n, const Factors& k, Isa) {
    for (std::int64_t i = 0; i < n; ++i) {
      m[i] += static_cast<float>(g[i]);
      p[i] -= (g[i] > 0 ? 1 : -1) * static_cast<T>(k.lr);
    }
  }
};
TEST_F(OptimizerTest, ARuleOfOnesOwnComposes) {
  static_assert(ElementwiseRule<SignRule>);
  auto p = torch::zeros({5000}).requires_grad_();
  Optimizer<SignRule, Normal4, Fp32> optimizer({p}, SGDOptions(1));
  p.mutable_grad() = torch::full({5000}, 2.0);
  optimizer.step(), optimizer.step();
  EXPECT_TRUE(p.equal(torch::full({5000}, -1.5F)));
  EXPECT_EQ(optimizer.state_bytes(), 79 * 34);
  EXPECT_THAT(message_of([&] { Optimizer<SignRule, Fp32, Fp32>({p}, SGDOptions(-1)); }),
              HasSubstr("Sign's lr is negative in the defaults"));
}

TEST_F(OptimizerTest, PackedWeightsAreSkippedAndCounted) {
  torch::nn::Sequential net(torch::nn::Linear(64, 64), torch::nn::Linear(64, 64));
  const auto all = net->parameters();
  fourfold::compress_weights<fourfold::Nf4>(*net);
  std::int64_t frozen = 0;
  for (const auto& p : all) frozen += p.requires_grad() ? 0 : 1;
  ASSERT_GE(frozen, 2);
  const auto packed = net->parameters()[0].detach().to(torch::kFloat).clone();
  AdamWOf<Int8> adamw(all);
  ScaleOf<Int8> scale(all);
  EXPECT_EQ(adamw.skipped(), frozen);
  EXPECT_EQ(scale.skipped(), frozen);
  net->forward(torch::randn({3, 64})).sum().backward();
  adamw.step(), scale.step();
  for (const auto& p : all) adamw.step_parameter(p);
  EXPECT_TRUE(net->parameters()[0].detach().to(torch::kFloat).equal(packed));
}

/// Options that a schedule or a hand moved out of range are found before anything is changed.
TEST_F(OptimizerTest, OptionsAreCheckedAtEveryStep) {
  auto a = torch::zeros({3}).requires_grad_(), b = torch::zeros({3}).requires_grad_();
  a.mutable_grad() = torch::ones({3}), b.mutable_grad() = torch::ones({3});
  LionOf<Int8> optimizer({a});
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({b}));
  static_cast<LionOptions&>(optimizer.param_groups()[1].options()).lr(-1);
  EXPECT_THAT(message_of([&] { optimizer.step(); }),
              HasSubstr("Invalid learning rate: -1 in group 1; it is 0 or more"));
  EXPECT_TRUE(a.equal(torch::zeros({3})));
  static_cast<LionOptions&>(optimizer.param_groups()[1].options()).lr(1).betas({0.9, 2});
  EXPECT_THAT(message_of([&] { optimizer.step_parameter(b); }),
              HasSubstr("Invalid beta parameter at index 1: 2 in group 1"));
  optimizer.step_parameter(a);  // whose group is right
  EXPECT_FALSE(a.equal(torch::zeros({3})));
}

TEST_F(OptimizerTest, ParametersAddedLaterBeginAtTheirFirstStep) {
  auto a = torch::zeros({3}).requires_grad_(), b = torch::zeros({3}).requires_grad_();
  auto c = torch::zeros({3}).requires_grad_();
  a.mutable_grad() = torch::ones({3});
  AdamWOf<Fp32> optimizer({a}, AdamWOptions(1)), fresh({c}, AdamWOptions(1));
  for (int step = 0; step < 3; ++step) optimizer.step();
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({b}));
  b.mutable_grad() = torch::ones({3}), c.mutable_grad() = torch::ones({3});
  optimizer.step(), fresh.step();
  EXPECT_TRUE(b.equal(c));
}

TEST_F(OptimizerTest, ParametersMayBeSteppedFromTwoThreads) {
  const auto after = [](bool threads) {
    std::vector<at::Tensor> all;
    for (int i = 0; i < 16; ++i)
      all.push_back(oracle::start({100, 60}, at::kFloat).requires_grad_());
    AdamWOf<Int8> optimizer(all);
    for (int step = 1; step <= 3; ++step) {
      for (at::Tensor& p : all) p.mutable_grad() = oracle::gradient(p, step);
      if (!threads) {
        optimizer.step();
        continue;
      }
      const auto half = [&](std::size_t first) {
        for (std::size_t i = first; i < all.size(); i += 2) optimizer.step_parameter(all[i]);
      };
      std::thread other([&] { half(1); });
      half(0);
      other.join();
    }
    return all;
  };
  const auto one = after(false), two = after(true);
  for (std::size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(one[i].equal(two[i])) << i;
}

/// What a NaN reaches: its value, and moments that share a scale with it.
TEST_F(OptimizerTest, NaNReachesWhatSharesItsScale) {
  auto p = torch::zeros({8192}).requires_grad_();
  AdamWOf<Int8> optimizer({p});
  const auto step = [&](float at_seven) {
    p.mutable_grad() = torch::ones({8192});
    p.mutable_grad()[7] = at_seven;
    optimizer.step();
  };
  step(1), step(NAN);
  EXPECT_EQ(p.isnan().sum().item<std::int64_t>(), 1);
  step(1);
  EXPECT_EQ(p.isnan().sum().item<std::int64_t>(), 128);
  EXPECT_TRUE(p.slice(0, 128).isfinite().all().item<bool>());
}

/// Codecs compose with rules and masters; a matrix rule's moments too.
TEST_F(OptimizerTest, EveryCellOfTheAlgebraSteps) {
  const auto check = [](auto&& make) {
    auto p = oracle::start({96, 80}, at::kBFloat16).requires_grad_();
    const auto before = p.detach().clone();
    auto optimizer = make(std::vector<at::Tensor>{p});
    for (int step = 1; step <= 3; ++step) {
      p.mutable_grad() = oracle::gradient(p, step);
      optimizer->step();
    }
    EXPECT_TRUE(p.isfinite().all().template item<bool>());
    EXPECT_FALSE(p.equal(before));
  };
  check(make<LionOf<Int4, RoundStochastic>>(LionOptions(1e-2)));
  check(make<SGDOf<BFloat16, Kahan>>(SGDOptions(1e-2).momentum(0.9)));
  check(make<AdamOf<Int4, ErrorCorrection<16>>>(torch::optim::AdamOptions(1e-2)));
  check(make<AdamMiniOf<Int4, ErrorCorrection<8>>>(AdamMiniOptions(1e-2)));
  check(make<MuonOf<Int4, ErrorCorrection<8>>>(MuonOptions(1e-2)));
  check(make<ApolloOf<Int8, RoundStochastic>>(ApolloOptions(1e-2).rank(60)));
  check(make<GaLoreOf<Int4, Fp32>>(GaLoreOptions(1e-2).rank(60).scale(1)));
  check(make<Adafactor<Fp32, Kahan>>(AdafactorOptions(1e-1)));
  check(make<ScaleOf<Int8, RoundStochastic>>(ScaleOptions(1e-1).momentum(0.9)));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adamw.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

namespace {

using fourfold::Companded, fourfold::Softsign, fourfold::Sqrt, fourfold::Int8, fourfold::Isa;
using fourfold::optim::AdamWOf, fourfold::optim::Fp32, fourfold::optim::StateOptions;
using testing::HasSubstr;
using torch::optim::AdamWOptions;
using Packed8 = AdamWOf<Int8>;
using Plain = AdamWOf<Fp32>;

torch::Tensor parameter(at::IntArrayRef sizes, torch::ScalarType dtype = torch::kFloat) {
  return torch::randn(sizes).to(dtype).requires_grad_();
}
torch::Tensor twin(const torch::Tensor& p) {
  return torch::empty_strided(p.sizes(), p.strides(), p.options())
      .copy_(p.detach())
      .requires_grad_();
}
/// The gradient of step `step`: noise about a drift, of a size that differs by coordinate.
torch::Tensor gradient(const torch::Tensor& p, int step) {
  const auto generator =
      at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(100 + step));
  const auto noise = torch::randn(p.sizes(), generator);
  const auto size = torch::exp(torch::linspace(-8, 0, p.numel())).view(p.sizes());
  return ((noise + 0.3) * size).to(p.scalar_type());
}
template <class Optimizer>
void run(Optimizer& optimizer, std::vector<torch::Tensor> parameters, int from, int to) {
  for (int step = from; step < to; ++step) {
    for (torch::Tensor& p : parameters) p.mutable_grad() = gradient(p, step);
    optimizer.step();
  }
}
std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

/// Tensors are small here: one thread, so that a loaded machine does not wait for the others.
class AdamW : public testing::Test {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  void TearDown() override { at::set_num_threads(before_); }

 private:
  int before_ = at::get_num_threads();
};

/// Fp32 moments against LibTorch: the two denominators differ by two roundings (2^-23 together),
/// which moves a step of at most lr / sqrt(1 - beta2) by that share; each of 100 steps rounds the
/// parameter.
TEST_F(AdamW, Fp32IsLibTorchsAdamW) {
  for (const std::int64_t n : {1, 17, 5000}) {
    torch::manual_seed(0);
    auto a = parameter({n}), b = twin(a), c = parameter({3, n}), d = twin(c);
    const auto options = AdamWOptions(1e-2).weight_decay(0.1).betas({0.8, 0.99}).eps(1e-7);
    torch::optim::AdamW theirs({a, c}, options);
    Plain ours({b, d}, options);
    torch::optim::StepLR their_schedule(theirs, 30, 0.5), our_schedule(ours, 30, 0.5);
    for (int step = 0; step < 100; ++step) {
      run(theirs, {a, c}, step, step + 1);
      run(ours, {b, d}, step, step + 1);
      their_schedule.step(), our_schedule.step();
    }
    const double bound = 100 * (1e-2 * 10 * 0x1p-22 + 0x1p-24 * a.abs().max().item<double>());
    EXPECT_LE((a - b).abs().max().item<double>(), bound);
    EXPECT_TRUE(torch::allclose(a, b, 1e-6, 1e-7)) << n;
    EXPECT_TRUE(torch::allclose(c, d, 1e-6, 1e-7)) << n;
    EXPECT_EQ(ours.state_bytes(), 4 * n * 8);
  }
}

/// The same with packed moments, step by step: an update's error is its direction's, and a study
/// gave its share as sqrt(1.4e-4) = 1.2 % for one rounding; stochastic rounding doubles the squared
/// error, and errors of the first moment decay by beta1, so that 1 / (1 - beta1^2) of them add up:
/// 4 %.
TEST_F(AdamW, PackedFollowsLibTorchsAdamW) {
  torch::manual_seed(0);
  auto a = parameter({64, 128}), b = twin(a);
  const auto start = a.detach().clone();
  torch::optim::AdamW theirs({a}, AdamWOptions(1e-3));
  Packed8 ours({b}, AdamWOptions(1e-3));
  for (int step = 0; step < 60; ++step) {
    run(theirs, {a}, step, step + 1);
    run(ours, {b}, step, step + 1);
    const auto moved = (a - start).norm().item<double>();
    EXPECT_LE((a - b).norm().item<double>(), 0.04 * moved) << "after step " << step;
  }
}

TEST_F(AdamW, StatesTakeAByteAMomentAndValue) {
  auto large = parameter({1000, 131}), small = parameter({63, 65});
  Packed8 optimizer({large, small}, AdamWOptions(1e-3));
  EXPECT_EQ(optimizer.state_bytes(), 0);
  run(optimizer, {large, small}, 0, 1);
  const std::int64_t groups = (131'000 + 127) / 128;
  EXPECT_EQ(optimizer.state_bytes(), 2 * (131'000 + 4 * groups) + 2 * 4 * 63 * 65);
  Packed8 all({small}, AdamWOptions(1e-3), StateOptions{.min_packed_elements = 0});
  run(all, {small}, 0, 1);
  EXPECT_EQ(all.state_bytes(), 2 * (63 * 65 + 4 * 32));
}

TEST_F(AdamW, ASmallTaskConverges) {
  const auto final_loss = [](auto make) {
    torch::manual_seed(5);
    torch::nn::Sequential net(torch::nn::Linear(16, 64), torch::nn::Tanh(),
                              torch::nn::Linear(64, 64), torch::nn::Tanh(),
                              torch::nn::Linear(64, 1));
    const auto x = torch::randn({128, 16});
    const auto y = (x.select(1, 0) * x.select(1, 1) + x.select(1, 2).sin()).unsqueeze(1);
    auto optimizer = make(net->parameters());
    double loss = 0;
    for (int step = 0; step < 300; ++step) {
      loss = optimizer
                 ->step([&] {
                   optimizer->zero_grad();
                   auto value = torch::mse_loss(net->forward(x), y);
                   value.backward();
                   return value;
                 })
                 .template item<double>();
    }
    return loss;
  };
  const auto options = AdamWOptions(3e-3);
  const double exact =
      final_loss([&](auto p) { return std::make_unique<torch::optim::AdamW>(p, options); });
  const double packed = final_loss([&](auto p) {
    return std::make_unique<Packed8>(p, options, StateOptions{.min_packed_elements = 0});
  });
  EXPECT_LE(exact, 0.02);  // from 1.5 at the start
  EXPECT_LE(packed, 0.02);
}

TEST_F(AdamW, ThreadsDoNotChangeABit) {
  const auto after = [](int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    torch::manual_seed(0);
    auto p = parameter({401, 333});
    Packed8 optimizer({p}, AdamWOptions(1e-2));
    run(optimizer, {p}, 0, 5);
    at::set_num_threads(before);
    return p.detach().clone();
  };
  EXPECT_TRUE(after(1).equal(after(2)));
}

TEST_F(AdamW, EveryPathGivesTheSameBits) {
  namespace detail = fourfold::optim::detail;
  using fourfold::optim::AdamWRule;
  using State = detail::ParameterState<Companded<8, Softsign>, Companded<8, Sqrt>,
                                       fourfold::optim::RoundNearest>;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf, torch::kDouble})
    for (const std::int64_t n : {1, 15, 129, 5003}) {
      const auto after = [&](Isa isa) {
        torch::manual_seed(n);
        auto p = parameter({n}, dtype);
        State state(p, /*by_rows=*/false);
        const auto options = AdamWOptions(1e-2);
        state.make<AdamWRule>(p, options, /*min_packed_elements=*/0);
        for (int step = 1; step <= 4; ++step)
          detail::step_values<AdamWRule>(p, gradient(p, step), state,
                                         AdamWRule::factors(options, {step, step == 1}),
                                         detail::StepKeys(1, step, 2, true), false, isa);
        return std::pair(p.detach().clone(), state.second.buffers()[0].clone());
      };
      const auto expected = after(Isa::kScalar);
      for (const Isa isa : fourfold::available_isas()) {
        const auto seen = after(isa);
        EXPECT_TRUE(seen.first.equal(expected.first)) << name(isa) << ", " << n << " of " << dtype;
        EXPECT_TRUE(seen.second.equal(expected.second))
            << name(isa) << ", " << n << " of " << dtype;
      }
    }
}

TEST_F(AdamW, ResultsRepeatAndDependOnTheSeed) {
  const auto after = [](std::uint64_t seed) {
    torch::manual_seed(3);
    auto p = parameter({5000});
    torch::manual_seed(seed);
    const auto state_before = at::detail::getDefaultCPUGenerator().get_state();
    Packed8 optimizer({p}, AdamWOptions(1e-2));
    run(optimizer, {p}, 0, 3);
    EXPECT_TRUE(at::detail::getDefaultCPUGenerator().get_state().equal(state_before));
    return p.detach().clone();
  };
  EXPECT_TRUE(after(1).equal(after(1)));
  EXPECT_FALSE(after(1).equal(after(2)));
}

TEST_F(AdamW, MemoryOrderDoesNotMatterToTheMath) {
  torch::manual_seed(0);
  auto plain = parameter({4, 8, 5, 3});
  auto last = plain.detach().clone(torch::MemoryFormat::ChannelsLast).requires_grad_();
  auto strided =
      torch::zeros({4, 8, 5, 6}).slice(3, 0, 6, 2).copy_(plain.detach()).requires_grad_();
  ASSERT_FALSE(strided.is_non_overlapping_and_dense());
  Plain a({plain}, AdamWOptions(1e-2)), b({last}, AdamWOptions(1e-2)),
      c({strided}, AdamWOptions(1e-2));
  for (int step = 0; step < 3; ++step) {
    const auto g = gradient(plain, step);
    plain.mutable_grad() = g.clone(), strided.mutable_grad() = g.clone();
    last.mutable_grad() = step == 1 ? g.clone(torch::MemoryFormat::ChannelsLast) : g.clone();
    a.step(), b.step(), c.step();
  }
  EXPECT_TRUE(last.equal(plain));
  EXPECT_TRUE(strided.equal(plain));
}

TEST_F(AdamW, AParameterInAnotherMemoryFormatIsRefused) {
  at::Tensor p = torch::randn({4, 8, 8, 8}).requires_grad_();
  fourfold::optim::AdamWOf<fourfold::Int8> optimizer({p}, 1e-3);
  p.mutable_grad() = torch::ones_like(p);
  optimizer.step();
  p.mutable_grad().reset();
  p.set_data(p.contiguous(at::MemoryFormat::ChannelsLast));
  p.mutable_grad() = torch::ones_like(p);
  const at::Tensor before = p.detach().clone();
  try {
    optimizer.step();
    ADD_FAILURE() << "stepped";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("memory format"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(torch::equal(p, before));
}

TEST_F(AdamW, HalfParametersAreSteppedInFp32) {
  torch::manual_seed(0);
  auto p = parameter({6000}, torch::kBFloat16);
  auto wide = p.detach().to(torch::kFloat).requires_grad_();
  Packed8 ours({p}, AdamWOptions(1e-2)), exact({wide}, AdamWOptions(1e-2));
  const auto g = gradient(p, 0);
  p.mutable_grad() = g, wide.mutable_grad() = g.to(torch::kFloat);
  ours.step(), exact.step();
  EXPECT_TRUE(p.equal(wide.to(torch::kBFloat16)));  // rounded once, at the end
}

TEST_F(AdamW, WritingIsSeenByAutograd) {
  auto p = parameter({5000});
  Packed8 optimizer({p}, AdamWOptions(1e-2));
  p.mutable_grad() = gradient(p, 0);
  const auto loss = (p * p).sum();
  optimizer.step();
  EXPECT_THAT(message([&] { loss.backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST_F(AdamW, LeavesAloneWhatItCannotStep) {
  auto used = parameter({10}), unused = parameter({10});
  const auto frozen = torch::ones({5000});
  const auto before = unused.detach().clone();
  Packed8 optimizer({used, unused, frozen}, AdamWOptions(1e-2));
  run(optimizer, {used}, 0, 2);
  EXPECT_TRUE(unused.equal(before));
  EXPECT_TRUE(frozen.equal(torch::ones({5000})));
  EXPECT_EQ(optimizer.skipped(), 1);
  EXPECT_EQ(optimizer.state_bytes(), 2 * 4 * 10);
  auto nothing = parameter({0});
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({nothing}));
  nothing.mutable_grad() = torch::zeros({0});
  optimizer.step();
}

TEST_F(AdamW, GroupsHaveTheirOwnOptions) {
  auto a = parameter({5000}), b = twin(a), c = parameter({10});
  Packed8 optimizer(std::vector<torch::optim::OptimizerParamGroup>{
      torch::optim::OptimizerParamGroup({a}, std::make_unique<AdamWOptions>(AdamWOptions(1e-2))),
      torch::optim::OptimizerParamGroup(
          {b}, std::make_unique<AdamWOptions>(AdamWOptions(0.0).weight_decay(0)))});
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({c}));
  const auto before = b.detach().clone(), c_before = c.detach().clone();
  run(optimizer, {a, b, c}, 0, 2);
  EXPECT_TRUE(b.equal(before));
  EXPECT_FALSE(a.equal(before));
  EXPECT_FALSE(c.equal(c_before));
}

/// Backwards, as gradients come, and a group added on the way.
TEST_F(AdamW, ParametersSteppedAloneAreSteppedTheSame) {
  const auto after = [](bool alone) {
    torch::manual_seed(0);
    std::vector<torch::Tensor> all{parameter({5000}), parameter({3, 7}), parameter({5000})};
    const auto frozen = torch::ones({5000});
    Packed8 optimizer({all[0], frozen, all[1]}, AdamWOptions(1e-2));
    fourfold::ParameterStepper& stepper = optimizer;
    optimizer.add_param_group(torch::optim::OptimizerParamGroup(
        {all[2]}, std::make_unique<AdamWOptions>(AdamWOptions(1e-3))));
    for (int step = 0; step < 4; ++step) {
      if (step == 2) {
        all.push_back(parameter({4100}));
        optimizer.add_parameters({all.back()});  // to the first group: later numbers move
      }
      for (torch::Tensor& p : all) p.mutable_grad() = gradient(p, step);
      if (step == 1) all[0].mutable_grad().reset();
      if (alone) {
        for (std::size_t i = all.size(); i-- > 0;) {
          stepper.step_parameter(all[i]);
          all[i].mutable_grad().reset();
        }
        stepper.step_parameter(frozen);
      } else {
        optimizer.step();
      }
    }
    EXPECT_TRUE(frozen.equal(torch::ones({5000})));
    return all;
  };
  const auto together = after(false), alone = after(true);
  for (std::size_t i = 0; i < together.size(); ++i) EXPECT_TRUE(alone[i].equal(together[i])) << i;

  auto mine = parameter({3}), foreign = parameter({4, 5});
  Packed8 optimizer({mine}, AdamWOptions(1e-2));
  foreign.mutable_grad() = torch::ones({4, 5});
  EXPECT_THAT(message([&] { optimizer.step_parameter(foreign); }),
              HasSubstr("a parameter of [4, 5] that is in none of its groups"));
  EXPECT_THAT(message([&] { optimizer.step_parameter({}); }), HasSubstr("in none of its groups"));
  mine.mutable_grad() = torch::ones({2});
  EXPECT_THAT(message([&] { optimizer.step_parameter(mine); }),
              HasSubstr("set a gradient like the parameter"));
}

TEST_F(AdamW, BadInputIsNamedAndChangesNothing) {
  torch::manual_seed(0);
  auto good = parameter({6}), bad = parameter({4, 5});
  Packed8 optimizer({good, bad}, AdamWOptions(1e-2));
  const auto before = good.detach().clone();
  good.mutable_grad() = torch::ones({6});
  const auto step_with = [&](const torch::Tensor& grad) {
    bad.unsafeGetTensorImpl()->set_autograd_meta(nullptr);  // a fresh leaf takes any first gradient
    bad.requires_grad_();
    bad.mutable_grad() = grad;
    return message([&] { optimizer.step(); });
  };
  EXPECT_THAT(step_with(torch::ones({4, 5}).to_sparse_csr()),
              HasSubstr("AdamW takes dense gradients and those of layout Sparse"));
  EXPECT_THAT(step_with(torch::ones({5, 4})),
              HasSubstr("the gradient of parameter 1 is Float [5, 4]"));
  EXPECT_THAT(step_with(torch::ones({4, 5}, torch::kDouble)),
              HasSubstr("set a gradient like the parameter"));
  EXPECT_TRUE(good.equal(before));
  EXPECT_EQ(optimizer.state_bytes(), 0);
}

TEST_F(AdamW, OptionsOutOfRangeAreNamed) {
  const auto built_with = [](const AdamWOptions& options) {
    return message([&] { Packed8({parameter({2})}, options); });
  };
  EXPECT_THAT(built_with(AdamWOptions(-1)), HasSubstr("Invalid learning rate: -1"));
  EXPECT_THAT(built_with(AdamWOptions(1).eps(-1)), HasSubstr("Invalid epsilon value: -1"));
  EXPECT_THAT(built_with(AdamWOptions(1).betas({1.0, 0.9})),
              HasSubstr("Invalid beta parameter at index 0: 1"));
  EXPECT_THAT(built_with(AdamWOptions(1).betas({0.9, -0.5})),
              HasSubstr("Invalid beta parameter at index 1: -0.5"));
  EXPECT_THAT(built_with(AdamWOptions(1).weight_decay(-1)),
              HasSubstr("Invalid weight_decay value: -1"));
  EXPECT_THAT(built_with(AdamWOptions(1).amsgrad(true)),
              HasSubstr("use torch::optim::AdamW, or amsgrad(false)"));
  Packed8 optimizer({parameter({2})}, AdamWOptions(1));
  static_cast<AdamWOptions&>(optimizer.param_groups()[0].options()).amsgrad(true);
  EXPECT_THAT(message([&] { optimizer.step(); }), HasSubstr("amsgrad is set in group 0"));
}

TEST_F(AdamW, GradientsThatAreNotFiniteShowInTheParameter) {
  auto p = parameter({5000});
  Packed8 optimizer({p}, AdamWOptions(1e-2));
  p.mutable_grad() = torch::ones({5000});
  p.mutable_grad()[7] = std::numeric_limits<float>::quiet_NaN();
  optimizer.step();
  EXPECT_TRUE(p[7].isnan().item<bool>());
  EXPECT_FALSE(p.slice(0, 8).isnan().any().item<bool>());
}

}  // namespace

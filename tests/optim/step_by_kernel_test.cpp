// SPDX-License-Identifier: Apache-2.0
/// The step of kernels/optimizer_step.cuh, run on the CPU by the emulator, against the step that a CPU
/// makes: weights, codes, scales and errors bit for bit, step after step.
#include <fourfold/optim/adam.hpp>
#include <fourfold/optim/lion.hpp>
#include <fourfold/optim/sgd.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <kernels/optimizer_step.cuh>  // last: it has macros in CUDA's names

#include <cmath>
#include <cstring>

namespace {

using namespace fourfold::optim;
using fourfold::Companded, fourfold::Softsign, fourfold::Sqrt;
using fourfold::optim::detail::kernel_step, fourfold::optim::detail::ParameterState;
using fourfold::optim::detail::step_values, fourfold::optim::detail::StepKeys;
namespace cuda = fourfold::cuda;

/// Bit for bit; one NaN is as good as another.
testing::AssertionResult same(const at::Tensor& a, const at::Tensor& b) {
  const auto plain = [](const at::Tensor& x) {
    return (x.is_floating_point() ? x.masked_fill(x.isnan(), 0) : x.clone()).contiguous();
  };
  if (a.is_floating_point() && !a.isnan().equal(b.isnan()))
    return testing::AssertionFailure() << "NaN at other places";
  const at::Tensor x = plain(a), y = plain(b);
  if (x.nbytes() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0)
    return testing::AssertionSuccess();
  const auto differ = x.ne(y).nonzero();
  return testing::AssertionFailure()
         << differ.size(0) << " of " << x.numel() << " differ, the first at "
         << (differ.numel() > 0 ? differ[0].item<std::int64_t>() : -1);
}
testing::AssertionResult same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  if (a.size() != b.size()) return testing::AssertionFailure() << "not as many buffers";
  for (std::size_t i = 0; i < a.size(); ++i)
    if (auto result = same(a[i], b[i]); !result) return result << ", buffer " << i;
  return testing::AssertionSuccess();
}

struct How {
  at::ScalarType dtype = at::kFloat;
  bool stochastic = true, maximize = false, packed = true;
  std::int64_t offset =
      0;              ///< of the parameter in its storage: where eight values move at once, or not
  float spoiled = 1;  ///< a value of the third gradient
};

template <class Rule, class State>
void expect_same_steps(const typename Rule::Options& options, std::int64_t n, const How& how) {
  SCOPED_TRACE(testing::Message() << Rule::name() << " " << State::First::name() << " "
                                  << State::Second::name() << " " << State::MasterCodec::name()
                                  << " " << how.dtype << " " << n << " values"
                                  << (how.stochastic ? ", stochastic" : "")
                                  << (how.maximize ? ", maximize" : ""));
  torch::manual_seed(n);
  const auto fresh = torch::randn({n + how.offset}).to(how.dtype);
  const auto here = fresh.clone().slice(0, how.offset), there = fresh.clone().slice(0, how.offset);
  State cpu(here, false), gpu(there, false);
  for (std::int64_t step = 1; step <= 3; ++step) {
    auto grad = torch::randn({n}) * torch::exp(2 * torch::randn({n}));
    grad.masked_fill_(torch::rand({n}) < 0.1, 0);
    if (step == 3) grad[n / 2] = how.spoiled;
    grad = grad.to(how.dtype);
    const bool first = cpu.template make<Rule>(here, options, how.packed ? 0 : n + 1);
    ASSERT_EQ(gpu.template make<Rule>(there, options, how.packed ? 0 : n + 1), first);
    cpu.step = gpu.step = step;
    const auto factors = Rule::factors(options, {step, first});
    const StepKeys keys(5, step, 6, how.stochastic);
    step_values<Rule>(here, grad, cpu, factors, keys, how.maximize);
    ASSERT_EQ(cuda::step_by_rule(kernel_step<Rule>(there, grad, gpu, factors, keys, how.maximize),
                                 nullptr),
              cudaSuccess);
    ASSERT_TRUE(same(here, there)) << "weights, step " << step;
    ASSERT_TRUE(same(cpu.first.buffers(), gpu.first.buffers())) << "first moment, step " << step;
    ASSERT_TRUE(same(cpu.second.buffers(), gpu.second.buffers())) << "second, step " << step;
    ASSERT_TRUE(same(cpu.master.buffers(), gpu.master.buffers())) << "master, step " << step;
  }
}

const std::vector<std::int64_t> kSizes{1, 8, 63, 129, 2049, 4103};
const auto adamw = torch::optim::AdamWOptions(1e-2).weight_decay(0.1);

template <class First, class Second, class Master = RoundNearest>
using States = ParameterState<First, Second, Master>;

template <class Pair>
class StepByKernel : public testing::Test {};
using Pairs =
    testing::Types<States<Fp32, Fp32>, States<BFloat16, BFloat16>,
                   States<Companded<8, Softsign>, Companded<8, Sqrt>>, States<Normal4, Log4>,
                   States<BFloat16, Companded<8, Sqrt>>, States<Companded<8, Softsign>, Log4>>;
TYPED_TEST_SUITE(StepByKernel, Pairs);

TYPED_TEST(StepByKernel, AdamWHasTheBitsOfTheCpu) {
  for (const std::int64_t n : kSizes)
    for (const bool stochastic : {false, true})
      expect_same_steps<AdamWRule, TypeParam>(adamw, n, {.stochastic = stochastic});
  expect_same_steps<AdamWRule, TypeParam>(adamw, 3000, {.maximize = true});
  expect_same_steps<AdamWRule, TypeParam>(adamw, 3000, {.packed = false});
  expect_same_steps<AdamWRule, TypeParam>(adamw, 3000, {.offset = 1});
  for (const float bad : {NAN, INFINITY})
    expect_same_steps<AdamWRule, TypeParam>(adamw, 3000, {.spoiled = bad});
}
TYPED_TEST(StepByKernel, AdamAddsWeightDecayToTheGradient) {
  for (const double weight_decay : {0.0, 0.1})
    expect_same_steps<AdamRule, TypeParam>(
        torch::optim::AdamOptions(1e-2).weight_decay(weight_decay), 1001, {});
}

template <class First>
class StepOfOneMoment : public testing::Test {};
using Firsts = testing::Types<Fp32, BFloat16, Companded<8, Softsign>, Normal4>;
TYPED_TEST_SUITE(StepOfOneMoment, Firsts);

TYPED_TEST(StepOfOneMoment, SGDHasTheBitsOfTheCpu) {
  using torch::optim::SGDOptions;
  for (const bool stochastic : {false, true})
    for (const auto& options : {SGDOptions(0.1), SGDOptions(0.1).weight_decay(0.01),
                                SGDOptions(0.1).momentum(0.9).dampening(0.3),
                                SGDOptions(0.1).momentum(0.9).nesterov(true).weight_decay(0.01)})
      expect_same_steps<SGDRule, States<TypeParam, Fp32>>(options, 2049,
                                                          {.stochastic = stochastic});
}
TYPED_TEST(StepOfOneMoment, LionHasTheBitsOfTheCpu) {
  for (const std::int64_t n : kSizes)
    expect_same_steps<LionRule, States<TypeParam, Fp32>>(LionOptions(1e-2).weight_decay(0.1), n,
                                                         {});
}

template <class Master>
class StepOfRoundedWeights : public testing::Test {};
using Masters = testing::Types<RoundNearest, RoundStochastic, ErrorCorrection<8>,
                               ErrorCorrection<16>, Kahan, Fp32>;
TYPED_TEST_SUITE(StepOfRoundedWeights, Masters);

TYPED_TEST(StepOfRoundedWeights, HasTheBitsOfTheCpu) {
  using EightBits = States<Companded<8, Softsign>, Companded<8, Sqrt>, TypeParam>;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
    if (kIsErrorCorrection<TypeParam> && dtype == at::kHalf) continue;  // refused
    for (const std::int64_t n : kSizes)
      expect_same_steps<AdamWRule, EightBits>(adamw, n, {.dtype = dtype});
    expect_same_steps<AdamWRule, EightBits>(adamw, 3000, {.dtype = dtype, .offset = 3});
    expect_same_steps<AdamWRule, EightBits>(adamw, 3000, {.dtype = dtype, .spoiled = NAN});
    expect_same_steps<LionRule, States<Normal4, Fp32, TypeParam>>(
        LionOptions(1e-2), 1001, {.dtype = dtype, .maximize = true});
  }
}

/// Of fp16, whose neighbours are found bit by bit: all finite weights, both signs, the subnormal too.
TEST(StepOfHalfWeights, RoundsEveryWeightAsTheCpu) {
  const auto bits = torch::arange(0, 0x7C00, torch::kInt).to(torch::kShort);
  const auto weights = torch::cat({bits, bits + std::int64_t{-0x8000}}).view(torch::kHalf);
  const auto here = weights.clone(), there = weights.clone();
  const auto grad = weights * torch::rand({weights.numel()}).to(torch::kHalf);
  using State = States<Fp32, Fp32, RoundStochastic>;
  State cpu(here, false), gpu(there, false);
  const auto factors = SGDRule::factors(torch::optim::SGDOptions(0.01), {1, true});
  const StepKeys keys(1, 1, 2, true);
  step_values<SGDRule>(here, grad, cpu, factors, keys);
  ASSERT_EQ(
      cuda::step_by_rule(kernel_step<SGDRule>(there, grad, gpu, factors, keys, false), nullptr),
      cudaSuccess);
  EXPECT_TRUE(same(here, there));
  EXPECT_FALSE(here.equal(weights));
}

TEST(StepByKernelTable, RefusesWhatItDoesNotKnow) {
  FourfoldStep step{};
  step.n = 1, step.rule = 5;
  EXPECT_EQ(cuda::step_by_rule(step, nullptr), cudaErrorInvalidValue);
  step.rule = 0, step.first.code = 4;  // no code for a first moment
  EXPECT_EQ(cuda::step_by_rule(step, nullptr), cudaErrorInvalidValue);
  step.n = 0, step.first.code = step.second.code = 1;
  EXPECT_EQ(cuda::step_by_rule(step, nullptr), cudaSuccess);
}

/// Without a GPU states are on the CPU, whatever rule.
TEST(StepByKernelState, StaysOnTheCpuWithoutAGpu) {
  using State = States<Fp32, Fp32>;
  EXPECT_EQ((fourfold::optim::detail::state_device<AdamWRule, State>(torch::zeros({3}))), at::kCPU);
  static_assert(fourfold::optim::detail::kHasKernel<AdamWRule, State>);
  static_assert(!fourfold::optim::detail::kHasKernel<AdamWRule, States<Fp32, Normal4>>);
}

}  // namespace

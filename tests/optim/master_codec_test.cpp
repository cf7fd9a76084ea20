// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/sgd.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <bit>
#include <cmath>
#include <sstream>

namespace {

using fourfold::Int4, fourfold::Int8, fourfold::Isa, fourfold::Key;
using namespace fourfold::optim;
using testing::HasSubstr;
using torch::optim::AdamWOptions;
using torch::optim::SGDOptions;

/// What a step sees of weights of dtype T that were given `values`.
template <class C, class T = c10::BFloat16>
at::Tensor kept(const at::Tensor& values, Isa isa = fourfold::isa(), std::uint64_t draw = 0) {
  const auto w = values.to(c10::CppTypeToScalarType<T>::value);
  fourfold::optim::detail::Master<C> master(w, {1});
  const std::int64_t n = values.numel();
  const auto out = torch::empty({n});
  master.store(0, n, values.const_data_ptr<float>(), w.template mutable_data_ptr<T>(),
               Key{3, draw, 0, 1}, isa);
  master.load(0, n, w.template const_data_ptr<T>(), out.template mutable_data_ptr<float>(), isa);
  return out;
}
/// All mantissas of 12 leading bits, for each exponent, and specials.
at::Tensor every_size() {
  const auto bits = torch::arange(0, 1 << 23, 1 << 11, torch::kInt) + 0x5A3;
  const auto exponents = torch::arange(0, 255, torch::kInt) * (1 << 23);
  return (exponents.unsqueeze(1) + bits.unsqueeze(0)).view(torch::kFloat).flatten();
}

TEST(MasterCodec, SixteenBitsOfErrorAreFp32) {
  const auto x = torch::cat({every_size(), -every_size()});
  EXPECT_TRUE(kept<ErrorCorrection<16>>(x).equal(x));
  EXPECT_TRUE(kept<Fp32>(x).equal(x));
  const auto ties = torch::tensor({1.00390625F, 1.01171875F, -1.00390625F, 3.4e38F});
  EXPECT_TRUE(kept<ErrorCorrection<16>>(ties).equal(ties));
}
/// 16 significant bits: half a unit of the last is 2^-16 of the value's power of two, and 2^-142
/// where numbers are denormal.
TEST(MasterCodec, EightBitsOfErrorAreTwentyFour) {
  const auto x = torch::cat({every_size(), -every_size()});
  const auto error = (kept<ErrorCorrection<8>>(x).to(torch::kDouble) - x.to(torch::kDouble)).abs();
  const auto power = torch::exp2(torch::floor(torch::log2(x.to(torch::kDouble).abs())));
  const auto bound = torch::maximum(power * 0x1p-16, torch::full_like(power, 0x1p-142));
  const auto fine = x.abs() < 3.3e38;  // what rounds to infinity in 24 bits aside
  EXPECT_TRUE((error <= bound).logical_or(fine.logical_not()).all().item<bool>());
  const auto exact = x.to(torch::kBFloat16).to(torch::kFloat);
  EXPECT_TRUE(kept<ErrorCorrection<8>>(exact).equal(exact));
}
/// What rounding to bf16 lost, again in 8 bits: 2^-9 of 2^-8.
TEST(MasterCodec, KahanKeepsWhatWasLost) {
  const auto x =
      every_size().masked_select((every_size() > 1e-30).logical_and(every_size() < 3e38));
  const auto error = (kept<Kahan>(x).to(torch::kDouble) / x.to(torch::kDouble) - 1).abs();
  EXPECT_LE(error.max().item<double>(), 0x1p-17);
  const auto half = x.masked_select((x > 1e-3).logical_and(x < 6e4));
  const auto lost = (kept<Kahan, c10::Half>(half).to(torch::kDouble) / half.to(torch::kDouble) - 1);
  EXPECT_LE(lost.abs().max().item<double>(), 0x1p-20);
}
TEST(MasterCodec, NaNAndInfinityStay) {
  const auto x = torch::tensor({NAN, INFINITY, -INFINITY, std::bit_cast<float>(0x7F800001u), 1.0F});
  const auto check = [&](const at::Tensor& y) {
    EXPECT_TRUE(y.isnan().equal(x.isnan())) << y;
    EXPECT_TRUE(y.slice(0, 1, 3).equal(x.slice(0, 1, 3))) << y;
    EXPECT_EQ(y[4].item<float>(), 1);
  };
  check(kept<RoundNearest>(x)), check(kept<RoundStochastic>(x)), check(kept<Kahan>(x));
  check(kept<ErrorCorrection<8>>(x)), check(kept<ErrorCorrection<16>>(x)), check(kept<Fp32>(x));
  check(kept<RoundStochastic, c10::Half>(x)), check(kept<Kahan, c10::Half>(x));
}

/// The mean of 1e5 draws: a weight of 1 + a third of a unit, whose two neighbours lie 2^-7 (bf16) or
/// 2^-10 (fp16) apart; five standard errors of a draw's sqrt(2 / 9) units.
template <class T>
void expect_stochastic_rounding_to_be_unbiased(double unit) {
  constexpr int kDraws = 100'000;
  for (const double sign : {1.0, -1.0}) {
    const double wanted = sign * (1 + unit / 3);
    const auto y = kept<RoundStochastic, T>(torch::full({kDraws}, wanted));
    EXPECT_EQ(std::get<0>(at::_unique(y)).numel(), 2);
    EXPECT_NEAR(y.to(torch::kDouble).mean().template item<double>(), static_cast<float>(wanted),
                5 * std::sqrt(2.0 / 9) * unit / std::sqrt(kDraws));
  }
}
TEST(MasterCodec, StochasticRoundingIsUnbiased) {
  expect_stochastic_rounding_to_be_unbiased<c10::BFloat16>(0x1p-7);
  expect_stochastic_rounding_to_be_unbiased<c10::Half>(0x1p-10);
  const auto tiny = kept<RoundStochastic, c10::Half>(torch::full({100'000}, 0x1p-26));
  EXPECT_NEAR(tiny.mean().item<double>(), 0x1p-26, 5 * 0.44 * 0x1p-24 / std::sqrt(1e5));
  const auto exact = torch::tensor({0.0F, -0.0F, 1.5F, 65504.0F});
  EXPECT_TRUE((kept<RoundStochastic, c10::Half>(exact).equal(exact)));
}

TEST(MasterCodec, EveryPathGivesTheSameBits) {
  const auto x = torch::cat({every_size().slice(0, 0, 5000), torch::randn({77})});
  for (const Isa isa : fourfold::available_isas()) {
    EXPECT_TRUE((kept<RoundStochastic>(x, isa).equal(kept<RoundStochastic>(x, Isa::kScalar))));
    EXPECT_TRUE(
        (kept<ErrorCorrection<8>>(x, isa).equal(kept<ErrorCorrection<8>>(x, Isa::kScalar))));
    EXPECT_TRUE((kept<Kahan>(x, isa).equal(kept<Kahan>(x, Isa::kScalar))));
  }
}

/// A thousand steps of a hundredth of a unit each: nearest rounding goes nowhere, all others arrive.
template <class MasterCodec>
double way(at::ScalarType dtype = at::kBFloat16) {
  auto p = torch::ones({4096}, dtype).requires_grad_();
  SGD<Fp32, MasterCodec> optimizer({p}, SGDOptions(0x1p-14));
  for (int step = 0; step < 1000; ++step) {
    p.mutable_grad() = -torch::ones_like(p);
    optimizer.step();
  }
  return p.detach().to(torch::kDouble).mean().item<double>() - 1;
}
TEST(MasterCodec, SmallUpdatesArrive) {
  const double wanted = 1000 * 0x1p-14;
  EXPECT_EQ(way<RoundNearest>(), 0);
  EXPECT_NEAR(way<RoundStochastic>(), wanted, 5 * std::sqrt(1000 * 0x1p-21 / 4096));
  EXPECT_NEAR(way<ErrorCorrection<8>>(), wanted, 0x1p-8);
  EXPECT_NEAR(way<ErrorCorrection<16>>(), wanted, 0x1p-8);
  EXPECT_NEAR(way<Kahan>(), wanted, 0x1p-8);
  EXPECT_NEAR(way<Fp32>(), wanted, 0x1p-8);
  EXPECT_NEAR(way<Kahan>(at::kHalf), wanted, 0x1p-11);
}

template <class Optimizer>
std::pair<at::Tensor, std::int64_t> trained(at::ScalarType dtype, int steps = 20) {
  torch::manual_seed(2);
  auto p = torch::randn({64, 128}).to(dtype).requires_grad_();
  Optimizer optimizer({p}, AdamWOptions(1e-3));
  for (int step = 0; step < steps; ++step) {
    const auto generator =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(step));
    p.mutable_grad() = torch::randn({64, 128}, generator).to(torch::kBFloat16).to(dtype);
    optimizer.step();
  }
  return {p.detach().to(torch::kFloat), optimizer.state_bytes()};
}
/// From the same bf16 start, 16 bits of error are fp32 training, whose weights are rounded.
TEST(MasterCodec, ErrorCorrectionTrainsAsFp32) {
  torch::manual_seed(2);
  auto exact = torch::randn({64, 128}).to(torch::kBFloat16).to(torch::kFloat).requires_grad_();
  AdamWOf<Int8> fp32({exact}, AdamWOptions(1e-3));
  for (int step = 0; step < 20; ++step) {
    const auto generator =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(step));
    exact.mutable_grad() =
        torch::randn({64, 128}, generator).to(torch::kBFloat16).to(torch::kFloat);
    fp32.step();
  }
  const auto master = trained<AdamWOf<Int8, Fp32>>(at::kBFloat16).first;
  EXPECT_TRUE(master.equal(exact.to(torch::kBFloat16).to(torch::kFloat)));
  const auto sixteen = trained<AdamWOf<Int8, ErrorCorrection<16>>>(at::kBFloat16).first;
  EXPECT_LE((sixteen - exact).abs().div(exact.abs()).max().item<double>(), 0x1p-8);
  // 20 steps in 24 bits err by up to 2^-17 of a weight each.
  const auto eight = trained<AdamWOf<Int8, ErrorCorrection<8>>>(at::kBFloat16).first;
  EXPECT_LE((eight - exact).abs().div(exact.abs()).max().item<double>(), 0x1p-8 + 20 * 0x1p-16);
}

/// Weights, gradient while it lives, and states: the formulas are 2 + 2 + 2 * (1 + 4 / 128);
/// 2 + 1 + 2 * (1 / 2 + 2 / 64); 2 + 2 * (1 / 2 + 2 / 64).
TEST(MasterCodec, BytesAParameter) {
  const auto states = [](std::int64_t bytes) { return static_cast<double>(bytes) / (64 * 128); };
  EXPECT_EQ(4 + 4 + states(trained<AdamWOf<Fp32>>(at::kFloat, 1).second), 16);
  EXPECT_EQ(2 + 2 + states(trained<AdamWOf<Int8>>(at::kBFloat16, 1).second), 6.0625);
  EXPECT_NEAR(6.0625, 6.03, 0.02 * 6.03);
  EXPECT_EQ(2 + states(trained<AdamWOf<Int4, ErrorCorrection<8>>>(at::kBFloat16, 1).second),
            4.0625);
  EXPECT_EQ(2 + states(trained<AdamWOf<Int4, RoundStochastic>>(at::kBFloat16, 1).second), 3.0625);
  EXPECT_EQ(2 + states(trained<AdamWOf<Int4, Kahan>>(at::kBFloat16, 1).second), 5.0625);
  EXPECT_EQ(4 + states(trained<AdamWOf<Int8, ErrorCorrection<8>>>(at::kFloat, 1).second), 6.0625);
}

template <class MasterCodec>
void expect_resumed_training_to_be_bit_equal() {
  using Optimizer = AdamWOf<Int4, MasterCodec>;
  const auto train = [](Optimizer& optimizer, at::Tensor& p, int from, int to) {
    for (int step = from; step < to; ++step) {
      const auto generator =
          at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(step));
      p.mutable_grad() = torch::randn(p.sizes(), generator).to(p.scalar_type());
      optimizer.step();
    }
  };
  const auto begin = torch::randn({90, 71}).to(torch::kBFloat16);
  auto whole = begin.clone().requires_grad_(), parted = begin.clone().requires_grad_();
  Optimizer one({whole}), first({parted}), second({parted});
  train(one, whole, 0, 8), train(first, parted, 0, 4);
  std::stringstream file;
  torch::save(first, file);
  torch::load(second, file);
  train(second, parted, 4, 8);
  EXPECT_TRUE(parted.equal(whole)) << MasterCodec::name();
}
TEST(MasterCodec, SavedWeightsGoOnBitForBit) {
  expect_resumed_training_to_be_bit_equal<RoundNearest>();
  expect_resumed_training_to_be_bit_equal<RoundStochastic>();
  expect_resumed_training_to_be_bit_equal<ErrorCorrection<8>>();
  expect_resumed_training_to_be_bit_equal<ErrorCorrection<16>>();
  expect_resumed_training_to_be_bit_equal<Kahan>();
  expect_resumed_training_to_be_bit_equal<Fp32>();
}
TEST(MasterCodec, FilesOfOtherMasters) {
  auto p = torch::randn({90, 71}).to(torch::kBFloat16).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  AdamWOf<Int8, ErrorCorrection<8>> saved({p});
  saved.step();
  std::stringstream file, again;
  torch::save(saved, file), torch::save(saved, again);
  AdamWOf<Int8, Kahan> other({p});
  EXPECT_THAT(
      message_of([&] { torch::load(other, file); }),
      HasSubstr("this file keeps weights by ErrorCorrection8, and this optimizer by Kahan"));
  AdamWOf<Int8> none({p});
  torch::load(none, again);
  EXPECT_EQ(none.state_bytes(), saved.state_bytes() - p.numel());
}

TEST(MasterCodec, AMasterCopyFollowsWeightsSetByOthers) {
  auto p = torch::ones({10}, torch::kBFloat16).requires_grad_();
  SGD<Fp32, Fp32> optimizer({p}, SGDOptions(1));
  p.mutable_grad() = torch::zeros_like(p);
  optimizer.step();
  {
    const torch::NoGradGuard no_grad;
    p.fill_(3);
  }
  optimizer.step();
  EXPECT_TRUE(p.equal(torch::full({10}, 3, torch::kBFloat16)));
}
/// One step that takes 0.75 of each weight, which shows more bits than the weight has.
template <class MasterCodec>
at::Tensor three_quarters(const at::Tensor& weight, const at::Tensor& rest,
                          bool set_since = false) {
  at::Tensor p = weight.clone();
  p.set_requires_grad(true);
  AdamWOf<Int8, MasterCodec> optimizer(std::vector<at::Tensor>{p},
                                       AdamWOptions(0.25).weight_decay(1));
  const fourfold::RoundedWeight one{p, rest, p.detach(), p._version() - (set_since ? 1 : 0)};
  optimizer.start_from({one, {torch::ones({2}), torch::ones({2}), torch::ones({2}), 0}});
  p.mutable_grad() = torch::zeros_like(p);
  optimizer.step();
  return p.detach();
}
TEST(MasterCodec, StartsFromWhatAWeightWas) {
  torch::manual_seed(4);
  const auto x = torch::randn({70, 81}).t();  // not in row-major order
  const auto upper = x.to(torch::kBFloat16);
  const auto bits = [](const at::Tensor& t) { return t.contiguous().view(torch::kInt); };
  const auto rest =
      (bits(x) - bits(upper.to(torch::kFloat))).to(torch::kShort).view(torch::kBFloat16);
  const auto expected = (x * 0.75F).to(torch::kBFloat16);
  const auto rounded_first = (upper.to(torch::kFloat) * 0.75F).to(torch::kBFloat16);
  ASSERT_FALSE(rounded_first.equal(expected));
  EXPECT_TRUE(three_quarters<Fp32>(upper, rest).equal(expected));
  EXPECT_TRUE(three_quarters<Fp32>(upper, rest, /*set_since=*/true).equal(rounded_first));
  EXPECT_TRUE(three_quarters<RoundNearest>(upper, rest).equal(rounded_first));
  // 16 significant bits, rounded again to 8: another bf16 where a tie is near, one in 128 at most.
  for (const auto& kept :
       {three_quarters<ErrorCorrection<8>>(upper, rest), three_quarters<Kahan>(upper, rest)}) {
    EXPECT_LE(kept.ne(expected).sum().item<std::int64_t>(), x.numel() / 64);
    EXPECT_LT(kept.ne(expected).sum().item<std::int64_t>(),
              rounded_first.ne(expected).sum().item<std::int64_t>() / 4);
  }
  const auto half = x.to(torch::kHalf);
  EXPECT_TRUE(three_quarters<Fp32>(half, (x - half.to(torch::kFloat)).to(torch::kHalf))
                  .equal((x * 0.75F).to(torch::kHalf)));
}
TEST(MasterCodec, WeightsOfAnotherDtypeAreRefused) {
  auto p = torch::ones({10}).requires_grad_();
  AdamWOf<Int8, ErrorCorrection<8>> optimizer({p});
  p.mutable_grad() = torch::ones_like(p);
  optimizer.step();
  p.mutable_grad().reset();
  p.set_data(p.detach().to(torch::kBFloat16));
  p.mutable_grad() = torch::ones_like(p);
  EXPECT_THAT(message_of([&] { optimizer.step(); }),
              HasSubstr("parameter 0 is BFloat16 now, and was not when its states were made"));
}
TEST(MasterCodec, HalfWeightsHaveNoLowerBits) {
  auto p = torch::ones({10}, torch::kHalf).requires_grad_();
  AdamWOf<Int8, ErrorCorrection<8>> optimizer({p});
  p.mutable_grad() = torch::ones_like(p);
  EXPECT_THAT(
      message_of([&] { optimizer.step(); }),
      HasSubstr("parameter 0 is Half, and ErrorCorrection8 keeps the lower bits of BFloat16"));
  EXPECT_TRUE(p.equal(torch::ones({10}, torch::kHalf)));
}

}  // namespace

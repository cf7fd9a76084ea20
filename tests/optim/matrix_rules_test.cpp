// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adafactor.hpp>
#include <fourfold/optim/adam_mini.hpp>
#include <fourfold/optim/scale.hpp>
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

template <class Optimizer>
auto make(typename Optimizer::Options options, StateOptions states = {}) {
  return [=](const std::vector<at::Tensor>& p) {
    return std::make_unique<Optimizer>(p, options, states);
  };
}
using Mini = AdamMiniOf<Fp32>;

TEST(MatrixRules, AdafactorIsPythons) {
  EXPECT_LE(oracle::error_of(reference::kAdafactor, make<Adafactor<>>(AdafactorOptions(1e-2))),
            1e-6);
  const auto options =
      AdafactorOptions(5e-2).beta2_decay(-0.5).eps({1e-4, 1e-2}).d(2).weight_decay(0.1);
  EXPECT_LE(
      oracle::error_of(reference::kAdafactorDecay, make<Adafactor<>>(options, {.maximize = true})),
      1e-6);
}
TEST(MatrixRules, ScaleIsThePapers) {
  const auto options = ScaleOptions(1e-2).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kScale, make<ScaleOf<Fp32>>(options)), 1e-6);
  const auto last = ScaleOptions(1e-2).weight_decay(0.1).momentum(0.9);
  EXPECT_LE(oracle::error_of(reference::kScaleMomentum, make<ScaleOf<Fp32>>(last)), 1e-6);
}
TEST(MatrixRules, AdamMiniIsThePapers) {
  const auto options = AdamMiniOptions(1e-2).betas({0.9, 0.99}).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kAdamMini, make<Mini>(options)), 1e-6);
  auto heads = options;
  heads.rows_per_block(5);
  EXPECT_LE(oracle::error_of(reference::kAdamMiniHeads, make<Mini>(heads)), 1e-6);
}

/// Vectors' moments too would be packed if they were long.
TEST(MatrixRules, BytesAParameter) {
  auto p = torch::randn({64, 3, 5, 5}).to(torch::kBFloat16).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  const auto bytes = [&](auto&& optimizer) {
    optimizer.step();
    return optimizer.state_bytes();
  };
  EXPECT_EQ(bytes(ScaleOf<Int8>({p})), 0);  // weights are all: 2 bytes
  EXPECT_EQ(bytes(ScaleOf<Int8>({p}, ScaleOptions(1e-3).momentum(0.9))), 4800 + 4 * 38);
  EXPECT_EQ(bytes(Adafactor<>({p})), 4 * (64 + 75));
  EXPECT_EQ(bytes(AdamMiniOf<Int8>({p})), 4800 + 4 * 38 + 4 * 64);
  EXPECT_EQ((bytes(AdamMiniOf<Int8, ErrorCorrection<8>>({p}))), 2 * 4800 + 4 * 38 + 4 * 64);
}

/// One optimizer on a whole tensor in any order of memory, dtype and number of threads.
template <class Optimizer>
void expect_the_same_from_any_memory(typename Optimizer::Options options) {
  const auto after = [&](const std::function<at::Tensor(at::Tensor)>& lay, int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    auto p = lay(oracle::start({40, 12, 10, 15}, at::kFloat)).requires_grad_();
    Optimizer optimizer({p}, options);
    for (int step = 1; step <= 3; ++step) {
      p.mutable_grad() = oracle::gradient(p, step);
      optimizer.step();
    }
    at::set_num_threads(before);
    return p.detach().clone(torch::MemoryFormat::Contiguous);
  };
  const auto as_is = [](at::Tensor p) { return p; };
  const auto expected = after(as_is, 1);
  EXPECT_TRUE(after(as_is, 2).equal(expected));
  // rows lie elsewhere: a step copies
  const auto transposed = [](at::Tensor p) {
    return p.permute({3, 2, 1, 0}).contiguous().permute({3, 2, 1, 0});
  };
  EXPECT_TRUE(after(transposed, 1).equal(expected));
  // columns are permuted within a row: sums of squares are added in another order
  const auto last = [](at::Tensor p) { return p.contiguous(torch::MemoryFormat::ChannelsLast); };
  EXPECT_TRUE(torch::allclose(after(last, 1), expected, 1e-6, 1e-7));
}
TEST(MatrixRules, MemoryAndThreadsDoNotMatter) {
  expect_the_same_from_any_memory<ScaleOf<Fp32>>(ScaleOptions(1e-2).momentum(0.9));
  expect_the_same_from_any_memory<Adafactor<>>(AdafactorOptions(1e-2));
  expect_the_same_from_any_memory<Mini>(AdamMiniOptions(1e-2));
}

template <class Optimizer>
void expect_equal_bits_on_every_path(typename Optimizer::Options options) {
  using Rule = typename Optimizer::RuleType;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf})
    for (const auto& sizes :
         std::vector<std::vector<std::int64_t>>{{1, 1}, {3, 500}, {130, 33}, {70}}) {
      const auto after = [&](Isa isa) {
        auto p = oracle::start(sizes, dtype).requires_grad_();
        typename Optimizer::State state(p, true);
        for (int step = 1; step <= 4; ++step) {
          const bool fresh = state.template make<Rule>(p, options, 0);
          Rule::step(p, oracle::gradient(p, step), state, options, {step, fresh},
                     fourfold::optim::detail::StepKeys(1, step, 2, true), step == 3, isa);
        }
        return p.detach().clone();
      };
      const auto expected = after(Isa::kScalar);
      for (const Isa isa : fourfold::available_isas())
        EXPECT_TRUE(after(isa).equal(expected)) << name(isa) << ", " << sizes.size() << dtype;
    }
}
TEST(MatrixRules, EveryPathGivesTheSameBits) {
  expect_equal_bits_on_every_path<ScaleOf<Int8>>(ScaleOptions(1e-2).weight_decay(0.1));
  expect_equal_bits_on_every_path<ScaleOf<Int8>>(ScaleOptions(1e-2).momentum(0.9));
  expect_equal_bits_on_every_path<Adafactor<>>(AdafactorOptions(1e-2).weight_decay(0.1));
  expect_equal_bits_on_every_path<AdamMiniOf<Int8>>(AdamMiniOptions(1e-2).rows_per_block(7));
}

template <class Optimizer>
void expect_resumed_training_to_be_bit_equal(typename Optimizer::Options options) {
  const auto train = [](Optimizer& optimizer, std::vector<at::Tensor>& all, int from, int to) {
    for (int step = from; step < to; ++step) {
      for (at::Tensor& p : all) p.mutable_grad() = oracle::gradient(p, step);
      optimizer.step();
    }
  };
  const auto begin = [] {
    return std::vector<at::Tensor>{oracle::start({90, 70}, at::kFloat).requires_grad_(),
                                   oracle::start({5000}, at::kFloat).requires_grad_()};
  };
  auto whole = begin(), parted = begin();
  Optimizer one(whole, options), first(parted, options), second(parted, options);
  train(one, whole, 1, 9);
  train(first, parted, 1, 5);
  std::stringstream file;
  torch::save(first, file);
  torch::load(second, file);
  EXPECT_EQ(second.state_bytes(), first.state_bytes());
  train(second, parted, 5, 9);
  for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(parted[i].equal(whole[i])) << i;
}
TEST(MatrixRules, SavedStatesGoOnBitForBit) {
  expect_resumed_training_to_be_bit_equal<ScaleOf<Int8>>(ScaleOptions(1e-2).momentum(0.9));
  expect_resumed_training_to_be_bit_equal<Adafactor<>>(AdafactorOptions(1e-2));
  expect_resumed_training_to_be_bit_equal<AdamMiniOf<Int8>>(
      AdamMiniOptions(1e-2).rows_per_block(7));
}

TEST(MatrixRules, ASmallTaskConverges) {
  const auto final_loss = [](auto make) {
    torch::manual_seed(5);
    torch::nn::Sequential net(torch::nn::Linear(16, 64), torch::nn::Tanh(),
                              torch::nn::Linear(64, 64), torch::nn::Tanh(),
                              torch::nn::Linear(64, 1));
    const auto x = torch::randn({128, 16});
    const auto y = (x.select(1, 0) * x.select(1, 1) + x.select(1, 2).sin()).unsqueeze(1);
    auto optimizer = make(net->parameters());
    double loss = 0;
    for (int step = 0; step < 400; ++step) {
      optimizer->zero_grad();
      auto value = torch::mse_loss(net->forward(x), y);
      value.backward();
      optimizer->step();
      loss = value.template item<double>();
    }
    return loss;
  };
  const StateOptions all{.min_packed_elements = 0};
  EXPECT_LE(final_loss(make<AdamMiniOf<Int8>>(AdamMiniOptions(3e-3), all)), 0.1);  // from 1.5
  EXPECT_LE(final_loss(make<Adafactor<>>(AdafactorOptions(5e-2), all)), 0.1);
  EXPECT_LE(final_loss(make<ScaleOf<Int8>>(ScaleOptions(1e-2), all)), 0.1);
}

TEST(MatrixRules, ZerosAndEmptyTensorsStayFinite) {
  const auto check = [](auto&& make) {
    auto p = torch::zeros({4, 6}).requires_grad_(), empty = torch::zeros({0, 3}).requires_grad_();
    auto optimizer = make(std::vector<at::Tensor>{p, empty});
    p.mutable_grad() = torch::zeros({4, 6}), empty.mutable_grad() = torch::zeros({0, 3});
    for (int step = 0; step < 2; ++step) optimizer->step();
    EXPECT_TRUE(p.equal(torch::zeros({4, 6}))) << p;
  };
  check(make<ScaleOf<Int8>>({})), check(make<Adafactor<>>({})), check(make<AdamMiniOf<Int8>>({}));
}

TEST(MatrixRules, WhatTheyCannotStepIsNamed) {
  auto p = torch::zeros({4, 6}, torch::kDouble).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  ScaleOf<Int8> optimizer({p});
  EXPECT_THAT(
      message_of([&] { optimizer.step(); }),
      HasSubstr("Scale steps Float, BFloat16 and Half parameters, and parameter 0 is Double"));
  EXPECT_THAT(message_of([&] { ScaleOf<Int8>({p}, ScaleOptions(1).momentum(1)); }),
              HasSubstr("Invalid momentum value: 1 in the defaults; it lies in [0, 1)"));
  EXPECT_THAT(message_of([&] { Adafactor<>({p}, AdafactorOptions(1).d(0.5)); }),
              HasSubstr("Invalid clipping threshold d: 0.5"));
  EXPECT_THAT(message_of([&] { Adafactor<>({p}, AdafactorOptions(1).beta2_decay(0.5)); }),
              HasSubstr("Invalid beta2_decay: 0.5"));
  EXPECT_THAT(message_of([&] { Mini({p}, AdamMiniOptions(1).rows_per_block(0)); }),
              HasSubstr("Invalid rows_per_block: 0"));
}

}  // namespace

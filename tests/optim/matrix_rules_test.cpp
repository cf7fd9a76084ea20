// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adafactor.hpp>
#include <fourfold/optim/adam_mini.hpp>
#include <fourfold/optim/factored.hpp>
#include <fourfold/optim/scale.hpp>
#include <tests/optim/rule_checks.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace {

using fourfold::Int8, fourfold::Isa;
using namespace fourfold::optim;
namespace reference = fourfold::reference;
using testing::HasSubstr;
class MatrixRules : public OneThread {};

using Mini = AdamMiniOf<Fp32>;

TEST_F(MatrixRules, AdafactorIsPythons) {
  EXPECT_LE(oracle::error_of(reference::kAdafactor, make<Adafactor<>>(AdafactorOptions(1e-2))),
            1e-6);
  const auto options =
      AdafactorOptions(5e-2).beta2_decay(-0.5).eps({1e-4, 1e-2}).d(2).weight_decay(0.1);
  EXPECT_LE(
      oracle::error_of(reference::kAdafactorDecay, make<Adafactor<>>(options, {.maximize = true})),
      1e-6);
}
TEST_F(MatrixRules, ScaleIsThePapers) {
  const auto options = ScaleOptions(1e-2).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kScale, make<ScaleOf<Fp32>>(options)), 1e-6);
  const auto last = ScaleOptions(1e-2).weight_decay(0.1).momentum(0.9);
  EXPECT_LE(oracle::error_of(reference::kScaleMomentum, make<ScaleOf<Fp32>>(last)), 1e-6);
}
TEST_F(MatrixRules, AdamMiniIsThePapers) {
  const auto options = AdamMiniOptions(1e-2).betas({0.9, 0.99}).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kAdamMini, make<Mini>(options)), 1e-6);
  auto heads = options;
  heads.rows_per_block(5);
  EXPECT_LE(oracle::error_of(reference::kAdamMiniHeads, make<Mini>(heads)), 1e-6);
}

TEST_F(MatrixRules, FactoredAdamWIsThePapers) {
  const auto options =
      torch::optim::AdamWOptions(1e-2).betas({0.8, 0.99}).eps(1e-7).weight_decay(0.1);
  EXPECT_LE(oracle::error_of(reference::kAdamWFactored, make<AdamW<Fp32, Factored>>(options)),
            1e-6);
}

/// Vectors' moments too would be packed if they were long.
TEST_F(MatrixRules, BytesAParameter) {
  auto p = torch::randn({64, 3, 5, 5}).to(torch::kBFloat16).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  const auto bytes = [&](auto&& optimizer) {
    optimizer.step();
    return optimizer.state_bytes();
  };
  EXPECT_EQ(bytes(ScaleOf<Int8>({p})), 0);  // weights are all: 2 bytes
  EXPECT_EQ(bytes(ScaleOf<Int8>({p}, ScaleOptions(1e-3).momentum(0.9))), 4800 + 4 * 38);
  EXPECT_EQ(bytes(Adafactor<>({p})), 4 * (64 + 75));
  EXPECT_EQ(bytes(AdamW<Normal4, Factored>({p})), 75 * 34 + 4 * (64 + 75));
  EXPECT_EQ(bytes(AdamMiniOf<Int8>({p})), 4800 + 4 * 38 + 4 * 64);
  EXPECT_EQ((bytes(AdamMiniOf<Int8, ErrorCorrection<8>>({p}))), 2 * 4800 + 4 * 38 + 4 * 64);
}

TEST_F(MatrixRules, MemoryAndThreadsDoNotMatter) {
  expect_the_same_from_any_memory<ScaleOf<Fp32>>(ScaleOptions(1e-2).momentum(0.9));
  expect_the_same_from_any_memory<Adafactor<>>(AdafactorOptions(1e-2));
  expect_the_same_from_any_memory<Mini>(AdamMiniOptions(1e-2));
}

TEST_F(MatrixRules, EveryPathGivesTheSameBits) {
  expect_equal_bits_on_every_path<ScaleOf<Int8>>(ScaleOptions(1e-2).weight_decay(0.1));
  expect_equal_bits_on_every_path<ScaleOf<Int8>>(ScaleOptions(1e-2).momentum(0.9));
  expect_equal_bits_on_every_path<Adafactor<>>(AdafactorOptions(1e-2).weight_decay(0.1));
  expect_equal_bits_on_every_path<AdamW<Normal4, Factored>>(1e-2);
  expect_equal_bits_on_every_path<AdamMiniOf<Int8>>(AdamMiniOptions(1e-2).rows_per_block(7));
}

TEST_F(MatrixRules, SavedStatesGoOnBitForBit) {
  expect_resumed_training_to_be_bit_equal<ScaleOf<Int8>>(ScaleOptions(1e-2).momentum(0.9));
  expect_resumed_training_to_be_bit_equal<Adafactor<>>(AdafactorOptions(1e-2));
  expect_resumed_training_to_be_bit_equal<AdamW<Normal4, Factored>>(1e-2);
  expect_resumed_training_to_be_bit_equal<AdamMiniOf<Int8>>(
      AdamMiniOptions(1e-2).rows_per_block(7));
}

TEST_F(MatrixRules, ASmallTaskConverges) {
  const StateOptions all{.min_packed_elements = 0};
  EXPECT_LE(final_loss(make<AdamW<Normal4, Factored>>(3e-3, all)), 0.1);
  EXPECT_LE(final_loss(make<AdamMiniOf<Int8>>(AdamMiniOptions(3e-3), all)), 0.1);  // from 1.5
  EXPECT_LE(final_loss(make<Adafactor<>>(AdafactorOptions(5e-2), all)), 0.1);
  EXPECT_LE(final_loss(make<ScaleOf<Int8>>(ScaleOptions(1e-2), all)), 0.1);
}

TEST_F(MatrixRules, ZerosAndEmptyTensorsStayFinite) {
  const auto check = [](auto&& make) {
    auto p = torch::zeros({4, 6}).requires_grad_(), empty = torch::zeros({0, 3}).requires_grad_();
    auto optimizer = make(std::vector<at::Tensor>{p, empty});
    p.mutable_grad() = torch::zeros({4, 6}), empty.mutable_grad() = torch::zeros({0, 3});
    for (int step = 0; step < 2; ++step) optimizer->step();
    EXPECT_TRUE(p.equal(torch::zeros({4, 6}))) << p;
  };
  check(make<ScaleOf<Int8>>({})), check(make<Adafactor<>>({})),
      check(make<AdamW<Fp32, Factored>>({})), check(make<AdamMiniOf<Int8>>({}));
}

TEST_F(MatrixRules, WhatTheyCannotStepIsNamed) {
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

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/apollo.hpp>
#include <fourfold/optim/galore.hpp>
#include <fourfold/optim/muon.hpp>
#include <tests/optim/rule_checks.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace {

using fourfold::Int8, fourfold::Isa, fourfold::Key;
using namespace fourfold::optim;
namespace ours = fourfold::optim::detail;
namespace reference = fourfold::reference;
using testing::HasSubstr;
class LowRankRules : public OneThread {};

TEST_F(LowRankRules, MuonIsPythons) {
  EXPECT_LE(
      oracle::error_of(reference::kMuonWide, make<MuonOf<Fp32>>(MuonOptions(1e-2)), {{6, 20}}),
      1e-5);
  const auto options =
      MuonOptions(1e-2).momentum(0.8).nesterov(false).weight_decay(0.3).match_rms_adamw(true);
  EXPECT_LE(oracle::error_of(reference::kMuonTall, make<MuonOf<Fp32>>(options), {{20, 6}}), 1e-5);
}

/// A gradient whose singular values differ, so that directions are told apart.
at::Tensor matrix(std::int64_t rows, std::int64_t columns, std::int64_t rank, int step) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(17);
  const auto u = std::get<0>(torch::linalg_qr(torch::randn({rows, rank}, generator)));
  const auto v = std::get<0>(torch::linalg_qr(torch::randn({columns, rank}, generator)));
  const auto s = torch::exp2(-torch::arange(rank, torch::kFloat)) * (1 + 0.1 * step);
  return torch::mm(u * s, v.t()).contiguous();
}

/// Adam, plainly.
struct PlainAdam {
  at::Tensor m, v;
  at::Tensor direction(const at::Tensor& g, int step, double eps) {
    if (!m.defined()) m = torch::zeros_like(g), v = torch::zeros_like(g);
    m = 0.9 * m + 0.1 * g;
    v = 0.999 * v + 0.001 * g * g;
    return m / (1 - std::pow(0.9, step)) / ((v / (1 - std::pow(0.999, step))).sqrt() + eps);
  }
};

/// Algorithm 2 of arXiv 2403.03507 with a whole SVD, on gradients of the rank that is kept.
TEST_F(LowRankRules, GaLoreIsThePapers) {
  for (const auto& [rows, columns] : {std::pair(12, 30), std::pair(30, 12)}) {
    auto p = oracle::start({rows, columns}, at::kFloat).requires_grad_();
    auto w = p.detach().to(torch::kDouble);
    GaLoreOf<Fp32> optimizer({p}, GaLoreOptions(1e-2).rank(4).weight_decay(0.1));
    at::Tensor q;
    PlainAdam adam;
    for (int step = 1; step <= 20; ++step) {
      p.mutable_grad() = matrix(rows, columns, 4, step);
      const auto g = p.grad().to(torch::kDouble);
      optimizer.step();
      if (step == 1) {
        const auto [u, s, vh] = torch::linalg_svd(g, false);
        q = rows <= columns ? u.slice(1, 0, 4) : vh.slice(0, 0, 4);
      }
      const auto r = rows <= columns ? torch::mm(q.t(), g) : torch::mm(g, q.t());
      const auto way = adam.direction(r, step, 1e-8);
      const auto back = rows <= columns ? torch::mm(q, way) : torch::mm(way, q);
      w = w * (1 - 1e-2 * 0.1) - 1e-2 * 0.25 * back;
    }
    EXPECT_LE((p.to(torch::kDouble) - w).abs().max().item<double>(), 1e-5) << rows;
    EXPECT_EQ(optimizer.state_bytes(), 4 * (4 * 12 + 2 * 4 * 30));
  }
}
/// On noise with a falling spectrum three iterations hold nearly what the best directions would.
TEST_F(LowRankRules, GaLoresDirectionsLead) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  auto p = torch::zeros({64, 96}).requires_grad_();
  p.mutable_grad() = torch::randn({64, 96}, generator) * torch::exp2(-torch::arange(96) / 12.0);
  GaLoreOf<Fp32> optimizer({p}, GaLoreOptions(1).rank(16));
  optimizer.step();
  const auto& state = static_cast<const GaLoreOf<Fp32>::State&>(*optimizer.state().begin()->second);
  const at::Tensor q = state.extra[0];
  EXPECT_TRUE(torch::allclose(torch::mm(q, q.t()), torch::eye(16), 0, 1e-5));
  const auto best = torch::linalg_svdvals(p.grad()).slice(0, 0, 16).norm().item<double>();
  EXPECT_GE(torch::mm(q, p.grad()).norm().item<double>(), 0.99 * best);
}

/// Algorithm 1 of arXiv 2412.05270, with the projection that ours draws.
template <class Optimizer>
void expect_apollo(bool mini) {
  for (const auto& [rows, columns] : {std::pair(12, 30), std::pair(30, 12)}) {
    auto p = oracle::start({rows, columns}, at::kFloat).requires_grad_();
    auto w = p.detach().to(torch::kDouble);
    torch::manual_seed(23);
    typename Optimizer::Options options(1e-2);
    options.rank(mini ? 1 : 3).update_proj_gap(5).scale(mini ? 16 : 1).weight_decay(0.1);
    Optimizer optimizer({p}, options);
    const std::uint64_t seed = ours::noise_seed(optimizer.param_groups());
    PlainAdam adam;
    double last = 0;
    for (int step = 1; step <= 12; ++step) {
      p.mutable_grad() = oracle::gradient(p, step) * (step == 7 ? 40 : 1);
      const auto g = p.grad().to(torch::kDouble);
      optimizer.step();
      Key key = ours::StepKeys(seed, step, 0, true).matrix;
      key.step = static_cast<std::uint64_t>((step - 1) / 5);
      auto drawn = ours::random_projection(key, mini ? 1 : 3, 12);
      const auto projection = ours::tensor_of(drawn).to(torch::kDouble);
      const bool wide = rows <= columns;
      const auto r = wide ? torch::mm(projection, g) : torch::mm(g, projection.t());
      const auto way = adam.direction(r, step, 1e-6);
      const std::int64_t along = wide ? 0 : 1;
      auto scale = way.norm(2, {along}, true) / (r.norm(2, {along}, true) + 1e-8);
      if (mini) scale = way.norm() / (r.norm() + 1e-8);
      auto scaled = g * scale;
      const double length = scaled.norm().template item<double>();
      const double limit = last > 0 ? std::max(length / (last + 1e-8), 1.01) / 1.01 : 1;
      last = length / limit;
      w = w * (1 - 1e-2 * 0.1) - 1e-2 * (mini ? 4 : 1) / limit * scaled;
    }
    EXPECT_LE((p.to(torch::kDouble) - w).abs().max().template item<double>(),
              1e-5 * w.abs().max().template item<double>())
        << rows;
    EXPECT_EQ(optimizer.state_bytes(), 4 * (2 * (mini ? 1 : 3) * 30 + 1));
  }
}
TEST_F(LowRankRules, ApolloIsThePapers) {
  expect_apollo<ApolloOf<Fp32>>(false);
  expect_apollo<ApolloMiniOf<Fp32>>(true);
}
/// Mean 0, variance 1 / rank, fourth moment 3 / rank^2: within five standard errors of 2^18 draws.
TEST_F(LowRankRules, ProjectionsAreNormal) {
  auto drawn = ours::random_projection(Key{5, 1, 0, 2}, 64, 4096);
  const auto x = ours::tensor_of(drawn).to(torch::kDouble) * 8;
  const double error = 5 / std::sqrt(x.numel());
  EXPECT_NEAR(x.mean().item<double>(), 0, error);
  EXPECT_NEAR(x.square().mean().item<double>(), 1, error * std::sqrt(2));
  EXPECT_NEAR(x.pow(4).mean().item<double>(), 3, error * std::sqrt(96));
  EXPECT_NEAR((x.slice(1, 0, 4095) * x.slice(1, 1)).mean().item<double>(), 0, error);
  auto other = ours::random_projection(Key{5, 2, 0, 2}, 64, 4096);
  EXPECT_NEAR((x * ours::tensor_of(other)).mean().item<double>(), 0, error / 8);
}

TEST_F(LowRankRules, MemoryAndThreadsDoNotMatter) {
  expect_the_same_from_any_memory<ApolloOf<Fp32>>(ApolloOptions(1e-2).rank(4));
  expect_the_same_from_any_memory<ApolloMiniOf<Fp32>>({});
}
TEST_F(LowRankRules, EveryPathGivesTheSameBits) {
  expect_equal_bits_on_every_path<ApolloOf<Int8>>(ApolloOptions(1e-2).rank(4).update_proj_gap(2));
  expect_equal_bits_on_every_path<ApolloMiniOf<Int8>>(ApolloMiniOptions(1e-2).weight_decay(0.1));
  expect_equal_bits_on_every_path<MuonOf<Int8>>(MuonOptions(1e-2));
}
TEST_F(LowRankRules, SavedStatesGoOnBitForBit) {
  expect_resumed_training_to_be_bit_equal<ApolloOf<Int8>>(
      ApolloOptions(1e-2).rank(4).update_proj_gap(3));
  expect_resumed_training_to_be_bit_equal<ApolloMiniOf<Fp32>>(ApolloMiniOptions(1e-2));
  expect_resumed_training_to_be_bit_equal<GaLoreOf<Int8>>(GaLoreOptions(1e-2).rank(4));
}
TEST_F(LowRankRules, ASmallTaskConverges) {
  const StateOptions all{.min_packed_elements = 0};
  EXPECT_LE(final_loss(make<ApolloOf<Int8>>(ApolloOptions(1e-2).rank(8), all)), 0.1);
  EXPECT_LE(final_loss(make<GaLoreOf<Int8>>(
                GaLoreOptions(1e-2).rank(16).update_proj_gap(50).scale(1), all)),
            0.1);
}

/// 2 bytes: bf16 weights alone, rounded stochastically, but for a row or two of moments.
TEST_F(LowRankRules, BytesAParameter) {
  auto p = torch::randn({512, 512}).to(torch::kBFloat16).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  ApolloMiniOf<Fp32, RoundStochastic> optimizer({p});
  optimizer.step();
  EXPECT_EQ(optimizer.state_bytes(), 4 * (2 * 512 + 1));
  EXPECT_NEAR(2 + static_cast<double>(optimizer.state_bytes()) / static_cast<double>(p.numel()), 2,
              0.02 * 2);
}

TEST_F(LowRankRules, WhatTheyCannotStepIsNamed) {
  auto p = torch::zeros({4}).requires_grad_();
  p.mutable_grad() = torch::ones_like(p);
  MuonOf<Int8> muon({p});
  EXPECT_THAT(message_of([&] { muon.step(); }),
              HasSubstr("Muon steps matrices, and parameter 0 is [4]; give vectors to an AdamW"));
  EXPECT_THAT(message_of([&] { ApolloOf<Int8>({p}, ApolloOptions(1).rank(0)); }),
              HasSubstr("Invalid rank: 0 in the defaults; it is 1 or more"));
  EXPECT_THAT(message_of([&] { GaLoreOf<Int8>({p}, GaLoreOptions(1).update_proj_gap(0)); }),
              HasSubstr("Invalid update_proj_gap: 0"));
  EXPECT_THAT(message_of([&] { MuonOf<Int8>({p}, MuonOptions(1).ns_steps(100)); }),
              HasSubstr("Invalid ns_steps: 100 in the defaults; it lies in [1, 100)"));
}
TEST_F(LowRankRules, GradientsThatAreNotFiniteShow) {
  const auto check = [](auto&& make) {
    auto p = torch::zeros({8, 6}).requires_grad_();
    auto optimizer = make(std::vector<at::Tensor>{p});
    p.mutable_grad() = torch::full({8, 6}, NAN);
    optimizer->step();
    EXPECT_TRUE(p.isnan().all().template item<bool>());
  };
  check(make<MuonOf<Fp32>>({})), check(make<ApolloOf<Fp32>>({})),
      check(make<ApolloMiniOf<Fp32>>({}));
  check(make<GaLoreOf<Fp32>>({}));
}

}  // namespace

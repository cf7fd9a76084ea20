// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/clip_grad_norm.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/weights/compress_weights.hpp>
#include "tests/support/message_of.hpp"

#include <limits>
#include <numeric>

namespace {

using fourfold::clip_grad_norm_;
using testing::HasSubstr;

constexpr double kInf = std::numeric_limits<double>::infinity();

torch::Tensor with_grad(const torch::Tensor& gradient) {
  auto parameter = torch::zeros_like(gradient.is_sparse() ? gradient.to_dense() : gradient);
  parameter.requires_grad_();
  parameter.mutable_grad() = gradient;
  return parameter;
}
std::vector<torch::Tensor> parameters(torch::Dtype dtype, double size = 1) {
  torch::manual_seed(1);
  std::vector<torch::Tensor> all;
  for (const std::vector<std::int64_t>& sizes :
       std::vector<std::vector<std::int64_t>>{{300, 257}, {1}, {}, {17, 3, 5}, {70000}, {0, 4}})
    all.push_back(with_grad((torch::randn(sizes) * size).to(dtype)));
  return all;
}
/// In plain loops.
double norm_of(const std::vector<torch::Tensor>& all, double p) {
  double sum = 0;
  for (const auto& parameter : all) {
    const auto values = parameter.grad().to(torch::kDouble).contiguous();
    for (std::int64_t i = 0; i < values.numel(); ++i) {
      const double one = std::abs(values.const_data_ptr<double>()[i]);
      sum = std::isinf(p) ? std::max(sum, one) : sum + std::pow(one, p);
    }
  }
  return std::isinf(p) ? sum : std::pow(sum, 1 / p);
}

/// Ours is exact but for double's roundings: 2^-53 for each of n / 16 + 32 additions of a sum of
/// positive terms, and for p other than 2 also what ATen's own sum over all n terms rounds.
TEST(ClipGradNorm, IsTheNormOfAllGradientsTogether) {
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf})
    for (const double p : {2.0, 1.0, 3.0, kInf}) {
      const auto all = parameters(dtype);
      const double exact = norm_of(all, p);
      EXPECT_NEAR(clip_grad_norm_(all, kInf, p), exact, exact * 160000 * 0x1p-53)
          << dtype << " " << p;
    }
}

/// LibTorch adds n squares in fp32, in vectors and a cascade; its error is at most that of adding
/// one by one: n 2^-24 of the sum of n = 70000 terms, half of it in the root, and an fp32 rounding
/// each in the norm of norms and the coefficient. The gradients, scaled by it, are as near.
TEST(ClipGradNorm, ClipsAsLibTorchDoes) {
  constexpr double kBound = 77100 * 0x1p-25 + 8 * 0x1p-24;
  for (const double max_norm : {0.5, 1e9}) {
    const auto ours = parameters(torch::kFloat), theirs = parameters(torch::kFloat);
    const double mine = clip_grad_norm_(ours, max_norm);
    const double reference = torch::nn::utils::clip_grad_norm_(
        std::vector<torch::Tensor>(theirs.begin(), theirs.end() - 1), max_norm);
    EXPECT_NEAR(mine, reference, reference * kBound);
    for (std::size_t i = 0; i < ours.size(); ++i) {
      const auto expected = theirs[i].grad();
      EXPECT_TRUE(
          ((ours[i].grad() - expected).abs() <= expected.abs() * kBound).all().item<bool>());
    }
    EXPECT_NEAR(norm_of(ours, 2), std::min(max_norm, mine), mine * 0x1p-23 + 1e-6);
  }
}

TEST(ClipGradNorm, OfSmallIntegersItIsExact) {
  const auto a = with_grad(torch::full({9}, 4.0F)), b = with_grad(torch::full({16}, -4.0F));
  EXPECT_EQ(clip_grad_norm_({a, b}, 1000), 20);
  EXPECT_TRUE(a.grad().equal(torch::full({9}, 4.0F))) << "not touched below max_norm";
  EXPECT_EQ(clip_grad_norm_({a, b, a}, 1000), 20) << "a tied parameter counts once";
  EXPECT_EQ(clip_grad_norm_({a, b}, kInf, 1), 100);
  EXPECT_EQ(clip_grad_norm_({a, b}, kInf, kInf), 4);
  EXPECT_EQ(clip_grad_norm_({}, 1), 0);
}

TEST(ClipGradNorm, EveryPathAndThreadCountGivesTheSameSum) {
  torch::manual_seed(2);
  for (const std::int64_t n : {0, 1, 15, 16, 33, 32768, 32769, 300001}) {
    const auto x = torch::randn({n}) * torch::exp(8 * torch::randn({n}));
    const float* values = x.const_data_ptr<float>();
    const double expected = fourfold::detail::sum_of_squares(values, n, fourfold::Isa::kScalar);
    for (const auto isa : fourfold::available_isas())
      EXPECT_EQ(fourfold::detail::sum_of_squares(values, n, isa), expected) << name(isa) << n;
    const int threads = torch::get_num_threads();
    torch::set_num_threads(threads == 1 ? 2 : 1);
    EXPECT_EQ(fourfold::detail::sum_of_squares(values, n), expected) << n;
    torch::set_num_threads(threads);
  }
  const auto tiny = torch::full({100}, 1e-30F);  // squares below fp32's numbers
  EXPECT_NEAR(std::sqrt(fourfold::detail::sum_of_squares(tiny.const_data_ptr<float>(), 100)), 1e-29,
              1e-29 * 0x1p-23);
}

TEST(ClipGradNorm, DtypesAndLayoutsMayBeMixed) {
  const auto indices = torch::tensor({{0, 2, 0}});
  const auto sparse = with_grad(torch::sparse_coo_tensor(
      indices, torch::tensor({{1.0F, 2.0F}, {2.0F, 0.0F}, {2.0F, 2.0F}}), {4, 2}));  // row 0: 3, 4
  const auto wave = with_grad(torch::complex(torch::full({2}, 3.0F), torch::full({2}, 4.0F)));
  const auto turned = with_grad(torch::full({4, 2}, 2.0F).t());
  const auto strided = with_grad(torch::full({4, 4}, 2.0F).slice(1, 0, 4, 2));
  const auto half = with_grad(torch::full({4}, 5.0F).to(torch::kBFloat16));
  const auto wide = with_grad(torch::full({3}, 1.0).to(torch::kDouble));
  // 29 + 50 + 32 + 32 + 100 + 3 = 246
  const double norm = std::sqrt(246.0);
  const std::vector<torch::Tensor> all{sparse, wave, turned, strided, half, wide};
  EXPECT_DOUBLE_EQ(clip_grad_norm_(all, norm / 2), norm);
  EXPECT_NEAR(clip_grad_norm_(all, kInf), norm / 2, norm * (0x1p-9 + 1e-6)) << "one bf16 rounding";
  EXPECT_TRUE(sparse.grad().is_sparse());
  EXPECT_TRUE(torch::allclose(sparse.grad().to_dense()[0], torch::tensor({1.5F, 2.0F})));
}

TEST(ClipGradNorm, ParametersWithoutAGradientArePassedOver) {
  torch::nn::Linear frozen(64, 64);
  fourfold::compress_weights<fourfold::Int8>(frozen);
  const auto a = with_grad(torch::full({4}, 1.0F));
  const auto none = torch::ones({3}).requires_grad_();
  EXPECT_EQ(clip_grad_norm_({frozen->weight, a, none, torch::Tensor()}, 1000), 2);
  EXPECT_FALSE(none.grad().defined());
}

TEST(ClipGradNorm, WhatIsNotFiniteIsAsInLibTorch) {
  for (const float bad : {std::numeric_limits<float>::infinity(), NAN}) {
    auto gradient = torch::ones({40});
    gradient[17] = bad;
    const auto a = with_grad(gradient.clone()), b = with_grad(gradient.clone());
    EXPECT_THAT(message_of([&] { clip_grad_norm_({a}, 1, 2, /*error_if_nonfinite=*/true); }),
                HasSubstr("The total norm of order 2 for gradients from `parameters` is "
                          "non-finite, so it cannot be clipped. To disable this error"));
    EXPECT_TRUE(a.grad().slice(0, 0, 17).equal(torch::ones({17}))) << "as it was";
    const double mine = clip_grad_norm_({a}, 1), theirs = torch::nn::utils::clip_grad_norm_(b, 1);
    EXPECT_EQ(std::isnan(mine), std::isnan(theirs));
    EXPECT_TRUE(torch::allclose(a.grad(), b.grad(), 0, 0, /*equal_nan=*/true));
  }
}

TEST(ClipGradNorm, BadArgumentsAreNamed) {
  const auto a = with_grad(torch::ones({2}));
  EXPECT_THAT(message_of([&] { clip_grad_norm_({a}, -1); }),
              HasSubstr("max_norm is -1; give the largest norm that gradients may have, 0 or"));
  EXPECT_THAT(message_of([&] { clip_grad_norm_({a}, NAN); }), HasSubstr("max_norm is nan"));
  EXPECT_THAT(message_of([&] { clip_grad_norm_({a}, 1, 0); }),
              HasSubstr("norm_type is 0; give the p of a p-norm above 0, or infinity"));
}

}  // namespace

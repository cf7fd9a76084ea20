// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/chunked.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/support/message_of.hpp"

namespace {
using fourfold::chunked;
using ::testing::HasSubstr;
namespace F = torch::nn::functional;

struct Problem {
  explicit Problem(std::int64_t rows = 13) {
    torch::manual_seed(1);
    hidden = torch::randn({rows, 6}, torch::kDouble).requires_grad_();
    target = torch::randint(9, {rows}, torch::kLong);
    head = torch::nn::Linear(6, 9);
    head->to(torch::kDouble);
  }
  at::Tensor hidden, target;
  torch::nn::Linear head{nullptr};
};

std::vector<at::Tensor> gradients(Problem& p, const at::Tensor& value) {
  return torch::autograd::grad({value.sum()}, {p.hidden, p.head->weight, p.head->bias});
}

/// Sums of 13 terms in another order, in double.
void expect_same(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_TRUE(torch::allclose(a, b, 1e-13, 1e-14)) << (a - b).abs().max();
}

TEST(Chunked, GivesTheLossAndItsGradientsForEveryNumberOfPieces) {
  Problem p;
  for (std::int64_t pieces : {1, 2, 5, 13, 40})
    for (auto reduction : {at::Reduction::Mean, at::Reduction::Sum, at::Reduction::None}) {
      const auto loss = [&](const at::Tensor& x, const at::Tensor& y) {
        return at::cross_entropy_loss(p.head(x), y, {}, reduction);
      };
      const at::Tensor plain = loss(p.hidden, p.target);
      const at::Tensor ours = chunked(loss, pieces, reduction)(p.hidden, p.target);
      expect_same(ours, plain);
      const auto expected = gradients(p, plain), got = gradients(p, ours);
      for (std::size_t i = 0; i < expected.size(); ++i) expect_same(got[i], expected[i]);
    }
}

TEST(Chunked, RunsEachPieceInForwardAndOnceMoreInBackward) {
  Problem p;
  std::vector<std::int64_t> rows;
  const auto loss = chunked(
      [&](const at::Tensor& x, const at::Tensor& y) {
        rows.push_back(x.size(0));
        return F::cross_entropy(p.head(x), y);
      },
      3);
  const at::Tensor value = loss(p.hidden, p.target);
  EXPECT_EQ(rows, (std::vector<std::int64_t>{5, 5, 3}));
  value.backward();
  EXPECT_EQ(rows, (std::vector<std::int64_t>{5, 5, 3, 3, 5, 5}));  // last first
}

TEST(Chunked, TakesOneTensorOrThree) {
  const at::Tensor x = torch::arange(10, torch::kDouble), one = torch::ones(10, torch::kDouble);
  EXPECT_EQ(
      chunked([](const at::Tensor& a) { return a.sum(); }, 4, at::Reduction::Sum)(x).item<double>(),
      45);
  EXPECT_EQ(chunked([](const at::Tensor& a, const at::Tensor& b,
                       const at::Tensor& c) { return (a + b + c).sum(); },
                    3, at::Reduction::Sum)(x, one, one)
                .item<double>(),
            65);
}

TEST(Chunked, SaysWhatItWants) {
  Problem p;
  const auto rows = [](const at::Tensor& x) { return x.square().sum(1); };
  EXPECT_THAT(message_of([&] { (void)chunked(rows, 0); }), HasSubstr("n is 0"));
  EXPECT_THAT(message_of([&] { (void)chunked(rows, 2)(p.hidden); }),
              HasSubstr("Mean and Sum want one value, None one a row"));
  EXPECT_THAT(message_of([&] { (void)chunked(rows, 2)(torch::ones({})); }),
              HasSubstr("without dimensions"));
  const auto two = [](const at::Tensor& x, const at::Tensor&) { return x.sum(); };
  EXPECT_THAT(message_of([&] { (void)chunked(two, 2)(p.hidden, torch::ones(3)); }),
              HasSubstr("13 rows and another 3"));
}

}  // namespace

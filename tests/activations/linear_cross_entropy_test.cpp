// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/linear_cross_entropy.hpp>

#include <ATen/autocast_mode.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/torch/allocator.hpp>
#include <fourfold/weights/compress_weights.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/support/message_of.hpp"

namespace {
using fourfold::linear_cross_entropy, fourfold::LinearCrossEntropyOptions;
using ::testing::HasSubstr;
using Loss = torch::nn::CrossEntropyLossOptions;
namespace F = torch::nn::functional;

struct Problem {
  explicit Problem(at::ScalarType dtype = torch::kDouble, std::int64_t classes = 37) {
    torch::manual_seed(2);
    hidden = torch::randn({3, 11, 16}, dtype).requires_grad_();
    weight = torch::randn({classes, 16}, dtype).requires_grad_();
    bias = torch::randn({classes}, dtype).requires_grad_();
    target = torch::randint(classes, {3, 11}, torch::kLong);
    class_weight = torch::rand({classes}, dtype) + 0.1;
  }
  at::Tensor plain(const Loss& options) const {
    const at::Tensor logits = F::linear(hidden, weight, bias);
    const at::Tensor loss =
        F::cross_entropy(logits.reshape({-1, weight.size(0)}), target.reshape({-1}), options);
    return loss.dim() == 0 ? loss : loss.view(target.sizes());
  }
  std::vector<at::Tensor> gradients(const at::Tensor& value) const {
    return torch::autograd::grad({value}, {hidden, weight, bias}, {torch::full_like(value, 1.5)});
  }
  at::Tensor hidden, weight, bias, target, class_weight;
};

/// Sums of at most 37 * 33 terms in another order, in double.
void expect_same(const at::Tensor& got, const at::Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  EXPECT_EQ(got.scalar_type(), expected.scalar_type());
  EXPECT_TRUE(torch::allclose(got, expected, 1e-12, 1e-13)) << (got - expected).abs().max();
}

TEST(LinearCrossEntropy, EqualsThePlainLossWithEveryOption) {
  Problem p;
  p.target[1][3] = p.target[2][10] = 7;
  for (bool weighed : {false, true})
    for (double smoothing : {0.0, 0.1, 1.0})
      for (std::int64_t ignored : {-100, 7})
        for (const Loss::reduction_t& reduction :
             {Loss::reduction_t(torch::kMean), Loss::reduction_t(torch::kSum),
              Loss::reduction_t(torch::kNone)})
          for (std::int64_t rows : {0, 1, 5, 33, 100}) {
            Loss loss = Loss().ignore_index(ignored).label_smoothing(smoothing);
            loss.reduction(reduction);
            if (weighed) loss.weight(p.class_weight);
            const at::Tensor expected = p.plain(loss);
            const at::Tensor got = linear_cross_entropy(
                p.hidden, p.weight, p.target, {.bias = p.bias, .loss = loss, .rows = rows});
            expect_same(got, expected);
            const auto wanted = p.gradients(expected), came = p.gradients(got);
            for (std::size_t i = 0; i < wanted.size(); ++i) expect_same(came[i], wanted[i]);
          }
}

TEST(LinearCrossEntropy, RowsThatAreAllIgnoredAreAsLibTorchHasThem) {
  Problem p;
  p.target.fill_(-100);
  const at::Tensor got = linear_cross_entropy(p.hidden, p.weight, p.target, {.bias = p.bias});
  EXPECT_TRUE(std::isnan(p.plain({}).item<double>()));
  EXPECT_TRUE(std::isnan(got.item<double>()));
  const auto wanted = p.gradients(p.plain({})), came = p.gradients(got);
  for (std::size_t i = 0; i < wanted.size(); ++i) expect_same(came[i], wanted[i]);
}

// In fp32 a logit, a sum of 16 products and a bias, is off by dz = 18 eps (|h||w| + |b|). Its
// softmax is off by a factor of exp(2 dz) and of the 37 + 8 roundings of the sum and the rest; the
// gradient sums such differences times |w| with 37 roundings more.
TEST(LinearCrossEntropy, IsWithinRoundingInFp32) {
  const Problem exact, p(torch::kFloat);
  const auto copy = [](const at::Tensor& to, const at::Tensor& from) {
    const torch::NoGradGuard no_grad;
    to.copy_(from);
  };
  copy(p.hidden, exact.hidden), copy(p.weight, exact.weight), copy(p.bias, exact.bias);
  Problem q = exact;  // what was rounded to fp32
  copy(q.hidden, p.hidden), copy(q.weight, p.weight), copy(q.bias, p.bias);
  q.target = p.target;
  const auto wanted = q.gradients(q.plain({}));
  const auto came =
      p.gradients(linear_cross_entropy(p.hidden, p.weight, p.target, {.bias = p.bias, .rows = 4}));
  constexpr double eps = 0x1p-24;
  const torch::NoGradGuard no_grad;
  const at::Tensor h = q.hidden.view({-1, 16});
  const at::Tensor size = h.abs().mm(q.weight.abs().t()) + q.bias.abs();
  const at::Tensor softmax = F::linear(h, q.weight, q.bias).softmax(1);
  const at::Tensor relative = 2 * 18 * eps * size.amax(1, true) + (37 + 8) * eps;
  const at::Tensor share = 1.5 / 33 * (softmax + F::one_hot(q.target.view({-1}), 37));
  const at::Tensor bound = (relative + 37 * eps) * share * 1.01;  // 1.01: second order
  EXPECT_TRUE(
      ((came[0].view({-1, 16}) - wanted[0].view({-1, 16})).abs() <= bound.mm(q.weight.abs()))
          .all()
          .item<bool>());
  EXPECT_TRUE(((came[1] - wanted[1]).abs() <= bound.t().mm(h.abs())).all().item<bool>());
  EXPECT_TRUE(((came[2] - wanted[2]).abs() <= bound.sum(0)).all().item<bool>());
}

TEST(LinearCrossEntropy, ComputesInAutocastsTypeAndReducesInFp32) {
  const Problem p(torch::kFloat);
  at::autocast::set_autocast_enabled(torch::kCPU, true);
  at::autocast::set_autocast_dtype(torch::kCPU, torch::kBFloat16);
  const at::Tensor plain = p.plain({});
  const at::Tensor got =
      linear_cross_entropy(p.hidden, p.weight, p.target, {.bias = p.bias, .rows = 5});
  // The weight's cast was not left in autocast's cache without a gradient.
  const at::Tensor later = F::linear(p.hidden, p.weight).sum();
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(torch::kCPU, false);
  EXPECT_EQ(got.scalar_type(), torch::kFloat);
  EXPECT_TRUE(torch::autograd::grad({later}, {p.weight})[0].defined());
  const auto wanted = p.gradients(plain), came = p.gradients(got);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    EXPECT_EQ(came[i].scalar_type(), torch::kFloat);
    // Both round logits and their gradient to bf16: 2^-8 of each on either side.
    EXPECT_LE((came[i] - wanted[i]).norm().item<double>(),
              0x1p-6 * wanted[i].norm().item<double>());
  }
}

TEST(LinearCrossEntropy, HoldsLogitsOfAFewRowsAtATime) {
  fourfold::door::install_allocator();
  const at::Tensor hidden = torch::randn({1024, 16}).requires_grad_();
  const at::Tensor weight = torch::randn({4096, 16}).requires_grad_();
  const at::Tensor target = torch::randint(4096, {1024}, torch::kLong);
  const auto peak_of = [&](const auto& loss) {
    auto& counters = fourfold::door::counters();
    const std::int64_t before = counters.read().all.current;
    counters.restart_peak();
    loss().backward();
    return counters.read().all.peak - before;
  };
  const std::int64_t logits = 1024 * 4096 * 4;
  EXPECT_GE(peak_of([&] { return F::cross_entropy(F::linear(hidden, weight), target); }),
            2 * logits);
  hidden.mutable_grad().reset(), weight.mutable_grad().reset();
  // One piece's logits, both gradients, rows of 8 bytes: target, where it is ignored, shares ...
  const std::int64_t gradients = static_cast<std::int64_t>(hidden.nbytes() + weight.nbytes());
  const auto ours = [&](std::int64_t rows) {
    return peak_of([&] { return linear_cross_entropy(hidden, weight, target, {.rows = rows}); });
  };
  EXPECT_LE(ours(64), logits / 16 + gradients + 64 * 1024);
}

TEST(LinearCrossEntropy, TrainsWhatRequiresGradientsAlone) {
  Problem p;
  p.weight.requires_grad_(false), p.bias.requires_grad_(false);
  linear_cross_entropy(p.hidden, p.weight, p.target, {.bias = p.bias}).backward();
  EXPECT_TRUE(p.hidden.grad().defined());
  EXPECT_FALSE(p.weight.grad().defined());
  const at::Tensor frozen = p.hidden.detach();
  EXPECT_FALSE(linear_cross_entropy(frozen, p.weight, p.target).requires_grad());
  p.weight.requires_grad_(true);
  const at::Tensor loss = linear_cross_entropy(frozen, p.weight, p.target);
  EXPECT_TRUE(torch::autograd::grad({loss}, {p.weight})[0].defined());
  const torch::NoGradGuard no_grad;
  EXPECT_FALSE(linear_cross_entropy(p.hidden, p.weight, p.target).requires_grad());
}

TEST(LinearCrossEntropy, GradientsAddUpWhereTheWeightIsTied) {
  Problem p;
  const at::Tensor tokens = torch::randint(37, {33}, torch::kLong);
  const auto gradient = [&](bool ours) {
    const at::Tensor hidden = at::embedding(p.weight, tokens);
    const at::Tensor target = p.target.view({-1});
    const at::Tensor loss = ours ? linear_cross_entropy(hidden, p.weight, target)
                                 : F::cross_entropy(F::linear(hidden, p.weight), target);
    return torch::autograd::grad({loss}, {p.weight})[0];
  };
  expect_same(gradient(true), gradient(false));
}

TEST(LinearCrossEntropy, GoesBackwardTwiceWhereTheGraphIsRetained) {
  Problem p;
  const at::Tensor loss = linear_cross_entropy(p.hidden, p.weight, p.target);
  loss.backward({}, /*retain_graph=*/true);
  const at::Tensor once = p.hidden.grad().clone();
  loss.backward();
  expect_same(p.hidden.grad(), 2 * once);
  EXPECT_THAT(message_of([&] { loss.backward(); }),
              HasSubstr("backward through the graph a second time"));
}

TEST(LinearCrossEntropy, ScalesOnceWhateverWentWrongBefore) {
  Problem p;
  const at::Tensor loss = linear_cross_entropy(p.hidden, p.weight, p.target) * 3;
  EXPECT_THAT(message_of([&] {
                (void)torch::autograd::grad({loss}, {p.hidden}, {}, false, /*create_graph=*/true);
              }),
              HasSubstr("no second derivative"));
  p.bias = torch::Tensor();
  const at::Tensor expected = torch::autograd::grad({p.plain({}) * 3}, {p.hidden})[0];
  for (int i = 0; i < 3; ++i)
    expect_same(torch::autograd::grad({loss}, {p.hidden}, {}, /*retain_graph=*/true)[0], expected);
}

// fp16 holds 2^-24 and 65504 at the least and the most: the factor 1 / rows and a loss scale of 2^16
// are beyond it, the gradients are not.
TEST(LinearCrossEntropy, TakesALossScaleInFp16) {
  torch::manual_seed(7);
  const at::Tensor hidden = torch::randn({2048, 32}), weight = torch::randn({500, 32}) * 0.2;
  const at::Tensor target = torch::randint(500, {2048}, torch::kLong);
  const auto gradients = [&](at::ScalarType dtype, double scale) {
    const auto h = hidden.to(torch::kHalf).to(dtype).requires_grad_();
    const auto w = weight.to(torch::kHalf).to(dtype).requires_grad_();
    at::autocast::set_autocast_enabled(torch::kCPU, dtype == torch::kHalf);
    at::autocast::set_autocast_dtype(torch::kCPU, torch::kHalf);
    const auto loss = linear_cross_entropy(h, w, target, {.rows = 300}) * scale;
    at::autocast::set_autocast_enabled(torch::kCPU, false);
    auto all = torch::autograd::grad({loss}, {h, w});
    for (at::Tensor& one : all) one = one.to(torch::kDouble) / scale;
    return all;
  };
  const auto exact = gradients(torch::kDouble, 1), half = gradients(torch::kHalf, 65536);
  // Logits (of size 6 at most), their gradient and the result are rounded to 11 bits each.
  for (std::size_t i = 0; i < exact.size(); ++i) {
    EXPECT_TRUE(half[i].isfinite().all().item<bool>());
    EXPECT_LE((half[i] - exact[i]).norm().item<double>(),
              (2 * 6 + 2) * 0x1p-11 * exact[i].norm().item<double>());
  }
}

TEST(LinearCrossEntropy, AutocastLeavesDoubleAlone) {
  Problem p;
  at::autocast::set_autocast_enabled(torch::kCPU, true);
  at::autocast::set_autocast_dtype(torch::kCPU, torch::kBFloat16);
  const at::Tensor got = linear_cross_entropy(p.hidden, p.weight, p.target, {.bias = p.bias});
  at::autocast::set_autocast_enabled(torch::kCPU, false);
  expect_same(got, p.plain({}));
}

TEST(LinearCrossEntropy, AnIgnoredRowMayHoldAnything) {
  Problem p;
  const torch::NoGradGuard no_grad;
  p.hidden[1][2].fill_(std::numeric_limits<double>::quiet_NaN());
  p.target[1][2] = -100;
  for (double smoothing : {0.0, 0.1}) {
    const Loss loss = Loss().label_smoothing(smoothing);
    expect_same(linear_cross_entropy(p.hidden, p.weight, p.target, {.bias = p.bias, .loss = loss}),
                p.plain(loss));
  }
}

TEST(LinearCrossEntropy, NoRowsAreAsLibTorchHasThem) {
  Problem p;
  const at::Tensor hidden = p.hidden.view({-1, 16}).slice(0, 0, 0);
  const at::Tensor target = p.target.view({-1}).slice(0, 0, 0);
  for (const Loss::reduction_t& reduction :
       {Loss::reduction_t(torch::kMean), Loss::reduction_t(torch::kSum),
        Loss::reduction_t(torch::kNone)}) {
    Loss loss;
    loss.reduction(reduction);
    const at::Tensor got = linear_cross_entropy(hidden, p.weight, target, {.loss = loss});
    const at::Tensor expected = F::cross_entropy(F::linear(hidden, p.weight), target, loss);
    EXPECT_EQ(got.sizes(), expected.sizes());
    EXPECT_TRUE(torch::allclose(got, expected, 0, 0, /*equal_nan=*/true));
  }
}

TEST(LinearCrossEntropy, HasASecondDerivativeByPiecesOnly) {
  Problem p;
  const at::Tensor loss = linear_cross_entropy(p.hidden, p.weight, p.target);
  EXPECT_THAT(message_of([&] {
                (void)torch::autograd::grad({loss}, {p.hidden}, {}, true, /*create_graph=*/true);
              }),
              HasSubstr("linear_cross_entropy has no second derivative"));
  const at::Tensor each = linear_cross_entropy(p.hidden, p.weight, p.target,
                                               {.loss = Loss().reduction(torch::kNone), .rows = 7});
  const auto second = [&](const at::Tensor& value) {
    const auto first = torch::autograd::grad({value}, {p.hidden}, {}, true, /*create_graph=*/true);
    return torch::autograd::grad({first[0].square().sum()}, {p.weight})[0];
  };
  p.bias = torch::Tensor();
  expect_same(second(each.sum()), second(p.plain(Loss().reduction(torch::kSum))));
}

TEST(LinearCrossEntropy, ReadsPackedWeightsAndTrainsFactors) {
  torch::manual_seed(5);
  torch::nn::Linear head(torch::nn::LinearOptions(64, 96).bias(false));
  const at::Tensor hidden = torch::randn({20, 64}).requires_grad_();
  const at::Tensor target = torch::randint(96, {20}, torch::kLong);
  const auto every = [](const std::string&, const at::Tensor&) { return true; };
  const auto check = [&](const std::vector<at::Tensor>& inputs) {
    const auto plain = torch::autograd::grad({F::cross_entropy(head(hidden), target)}, inputs);
    const auto ours = torch::autograd::grad(
        {linear_cross_entropy(hidden, head->weight, target, {.rows = 6})}, inputs);
    for (std::size_t i = 0; i < plain.size(); ++i)  // 96 terms and 64 within, in another order
      EXPECT_LE((ours[i] - plain[i]).abs().max().item<double>(),
                (96 + 64) * 0x1p-23 * plain[i].abs().max().item<double>());
  };
  fourfold::compress_weights<fourfold::Int8>(head, every);
  check({hidden});
  fourfold::decompress(head);
  fourfold::compress_weights<fourfold::LowRank<16>>(head, every);
  auto inputs = fourfold::factors(head);
  ASSERT_EQ(inputs.size(), 2U);
  inputs.push_back(hidden);
  check(inputs);
}

TEST(LinearCrossEntropy, SaysWhatItWants) {
  Problem p;
  const auto words = [&](const at::Tensor& hidden, const at::Tensor& weight,
                         const at::Tensor& target, const LinearCrossEntropyOptions& options = {}) {
    return message_of([&] { (void)linear_cross_entropy(hidden, weight, target, options); });
  };
  EXPECT_THAT(words({}, p.weight, p.target), HasSubstr("an undefined tensor"));
  EXPECT_THAT(words(p.hidden, p.weight.t(), p.target), HasSubstr("as nn::Linear has them"));
  EXPECT_THAT(words(p.hidden, p.weight, p.target.view({-1})),
              HasSubstr("target has sizes [33] and hidden [3, 11, 16]; give one class for each of "
                        "hidden's rows, [3, 11]"));
  EXPECT_THAT(
      words(p.hidden, p.weight, torch::rand({3, 11, 37})),
      HasSubstr("target is Float, and classes are Long: convert it by to(torch::kLong), or, "
                "where it holds probabilities of classes, use fourfold::chunked"));
  EXPECT_THAT(words(p.hidden, p.weight, p.target, {.bias = torch::ones(3)}),
              HasSubstr("bias has sizes [3], and there are 37 classes"));
  EXPECT_THAT(words(p.hidden, p.weight, p.target, {.loss = Loss().weight(torch::ones(3))}),
              HasSubstr("the class weight has sizes [3]"));
  EXPECT_THAT(words(p.hidden, p.weight, p.target, {.loss = Loss().label_smoothing(2)}),
              HasSubstr("label_smoothing is 2"));
  EXPECT_THAT(words(p.hidden, p.weight, p.target, {.rows = -3}), HasSubstr("rows is -3"));
  EXPECT_THAT(words(p.hidden.to(torch::kLong), p.weight, p.target), HasSubstr("hidden is Long"));
  p.target[0][0] = 37;
  EXPECT_THAT(words(p.hidden, p.weight, p.target),
              HasSubstr("target 37 is out of bounds of 37 classes"));
}

}  // namespace

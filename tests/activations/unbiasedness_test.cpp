// SPDX-License-Identifier: Apache-2.0
// The mean of a gradient over 4,096 seeds, against the gradient of plain LibTorch.
//
// Rounding is unbiased, so a backward that is linear in each payload has the exact mean: within 4
// standard errors on eight projections. A backward that is not linear has not, and cannot have by
// any rounding: between two neighbouring codes the mean over stochastic rounding of f(x) is the
// chord of f, and a chord of a step h lies at most h^2 / 8 * max|f''| from its arc. That is the
// bound here, with the 4 standard errors on top.
#include <fourfold/activations/activations.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace {

using fourfold::ActivationOptions;
using fourfold::Activations;
using fourfold::ActivationStore;
using fourfold::Int2;
using fourfold::Int4;
using fourfold::Int8;
namespace door = fourfold::door;
namespace F = torch::nn::functional;

constexpr int kSeeds = 4096;
constexpr double kStandardErrors = 4;

using Tensors = std::vector<torch::Tensor>;
using Function = std::function<torch::Tensor(const Tensors& inputs)>;

/// d sum(fn(inputs) * weights) / d inputs, flat, in double. Activations are made within the
/// forward, so that autograd's copies of them are packed as a layer's are; parameters are leaves.
struct Case {
  Function fn;  ///< of activations, then parameters
  Tensors activations, parameters{};
};

torch::Tensor gradient(const Case& c, const torch::Tensor& weights) {
  Tensors inputs, leaves = c.activations;
  for (const torch::Tensor& x : c.activations) inputs.push_back(x * 1);
  inputs.insert(inputs.end(), c.parameters.begin(), c.parameters.end());
  leaves.insert(leaves.end(), c.parameters.begin(), c.parameters.end());
  for (const torch::Tensor& leaf : leaves) leaf.mutable_grad().reset();
  (c.fn(inputs) * weights).sum().backward();
  Tensors flat;
  for (const torch::Tensor& leaf : leaves) flat.push_back(leaf.grad().flatten());
  return torch::cat(flat).to(torch::kDouble);
}

/// What the loss weighs the results by.
torch::Tensor weights_of(const Case& c) {
  Tensors inputs = c.activations;
  inputs.insert(inputs.end(), c.parameters.begin(), c.parameters.end());
  torch::manual_seed(1);
  return torch::randn_like(c.fn(inputs).detach());
}

struct Sample {
  torch::Tensor exact;  ///< (n), plain LibTorch's gradient
  torch::Tensor each;   ///< (seeds, n)
  std::int64_t packed = 0;
};

Sample sample(void (*configure)(ActivationOptions&), const Case& c) {
  const torch::Tensor weights = weights_of(c);
  Sample result{gradient(c, weights), {}};
  result.each = torch::empty({kSeeds, result.exact.numel()}, torch::kDouble);
  ActivationOptions options{.min_numel = 1, .min_bytes = 1};
  configure(options);
  const auto store = ActivationStore::make(std::move(options));
  for (int seed = 0; seed < kSeeds; ++seed) {
    torch::manual_seed(static_cast<std::uint64_t>(seed));
    const door::SavedTensorsScope scope(store);
    const std::shared_ptr<void> active = store->activate();
    result.each[seed].copy_(gradient(c, weights));
  }
  result.packed = store->counts().packed;
  return result;
}

/// How far the mean gradient lies from the exact one, 1 being what is allowed: 4 standard errors,
/// and `bias` (elementwise, (n) or none). The largest of eight directions: along the gradient,
/// along the ones, and along six of random signs.
double distance(const Sample& sample, const torch::Tensor& bias = {}) {
  const std::int64_t n = sample.exact.numel();
  torch::manual_seed(2);
  Tensors directions{sample.exact / sample.exact.norm(), torch::ones({n}, torch::kDouble)};
  while (directions.size() < 8)
    directions.push_back(torch::randint(2, {n}, torch::kDouble) * 2 - 1);
  double largest = 0;
  for (const torch::Tensor& direction : directions) {
    const torch::Tensor errors = torch::mv(sample.each - sample.exact, direction);
    const double error = std::sqrt(errors.var().item<double>() / kSeeds);
    EXPECT_GT(error, 0) << "nothing was rounded";
    // fp32 rounds each gradient by a few units in the last place of its largest terms.
    const double rounding = 0x1p-20 * (direction * sample.exact).abs().sum().item<double>();
    const double allowed = bias.defined() ? (bias * direction.abs()).sum().item<double>() : 0.0;
    largest = std::max(largest, std::abs(errors.mean().item<double>()) /
                                    (kStandardErrors * error + rounding + allowed));
  }
  EXPECT_GE(sample.packed, kSeeds);
  return largest;
}

void expect_mean(const Sample& sample, const torch::Tensor& bias = {}) {
  EXPECT_LE(distance(sample, bias), 1);
}

torch::Tensor leaf(at::IntArrayRef sizes, double scale = 1) {
  return (torch::randn(sizes) * scale).requires_grad_();
}

constexpr void (*kInt4)(ActivationOptions&) = Activations<Int4>::configure;

class Unbiasedness : public ::testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }
};

// --- Linear in each payload, and so exact --------------------------------------------------------

TEST_F(Unbiasedness, Linear) {
  const Case c{[](const Tensors& x) { return F::linear(x[0], x[1], x[2]); },
               {leaf({8, 16})},
               {leaf({8, 16}), leaf({8})}};
  for (const auto configure :
       {Activations<Int8>::configure, Activations<Int4>::configure, Activations<Int2>::configure})
    expect_mean(sample(configure, c));
}

TEST_F(Unbiasedness, Conv2d) {
  expect_mean(sample(kInt4, {[](const Tensors& x) { return torch::conv2d(x[0], x[1], x[2]); },
                             {leaf({2, 2, 6, 6})},
                             {leaf({3, 2, 3, 3}), leaf({3})}}));
}

TEST_F(Unbiasedness, ProductsOfTwoActivations) {
  for (const auto configure : {kInt4, Activations<Int2, Int2>::configure}) {
    expect_mean(sample(configure, {[](const Tensors& x) { return torch::bmm(x[0], x[1]); },
                                   {leaf({2, 6, 8}), leaf({2, 8, 6})}}));
    expect_mean(sample(configure, {[](const Tensors& x) { return torch::matmul(x[0], x[1].t()); },
                                   {leaf({8, 8}), leaf({8, 8})}}));
    expect_mean(sample(
        configure, {[](const Tensors& x) { return x[0] * x[1]; }, {leaf({8, 8}), leaf({8, 8})}}));
  }
}

// Gradients that multiply two payloads: exact in the mean because no two share their noise.
TEST_F(Unbiasedness, PayloadsThatMeetAreIndependent) {
  const torch::Tensor same = torch::randn({8, 8});  // the same values would draw the same errors
  const auto again = [&] { return same.clone().requires_grad_(); };
  expect_mean(sample(
      kInt4, {[](const Tensors& x) { return x[0] * x[1] * x[2]; }, {again(), again(), again()}}));
  expect_mean(sample(kInt4, {[](const Tensors& x) { return torch::bilinear(x[0], x[1], x[2]); },
                             {again(), again()},
                             {leaf({2, 8, 8})}}));
}

// The test of these tests: where two payloads of the same values draw the same noise, the product
// of their errors has the mean of a square.
TEST_F(Unbiasedness, SharedNoiseIsSeen) {
  const auto share = [](ActivationOptions& options) {
    options.pack = [](const at::Tensor& values, fourfold::Key key) {
      key.storage = 0;
      return fourfold::make_payload<Int4>(values, key);
    };
    options.pack_sensitive = options.pack;
  };
  const torch::Tensor same = torch::randn({8, 8});
  const auto again = [&] { return same.clone().requires_grad_(); };
  EXPECT_GT(distance(sample(share, {[](const Tensors& x) { return x[0] * x[1] * x[2]; },
                                    {again(), again(), again()}})),
            1);
}

// One payload, which is read twice: 2 x is linear in it.
TEST_F(Unbiasedness, OneStorageSavedTwice) {
  expect_mean(sample(kInt4, {[](const Tensors& x) { return x[0] * x[0]; }, {leaf({8, 8})}}));
}

TEST_F(Unbiasedness, LossesAndExponentials) {
  const torch::Tensor target = torch::randn({8, 8});
  expect_mean(sample(
      kInt4, {[&](const Tensors& x) { return torch::mse_loss(x[0], target); }, {leaf({8, 8})}}));
  expect_mean(sample(kInt4, {[](const Tensors& x) { return x[0].exp(); }, {leaf({8, 8})}}));
}

// --- Not linear: within the chord's bound --------------------------------------------------------

/// A step of C's codes, elementwise: error_bound is half of one, and a little.
template <class C>
torch::Tensor step(const torch::Tensor& values) {
  return 2 * C{}.error_bound(values.detach()).to(torch::kDouble);
}

/// The largest third derivative of an activation function whose backward reads its argument.
double largest_third_derivative(const std::function<torch::Tensor(torch::Tensor)>& f) {
  const auto x = torch::linspace(-12, 12, 200001, torch::kDouble).requires_grad_();
  torch::Tensor y = f(x);
  for (int i = 0; i < 3; ++i)
    y = torch::autograd::grad({y.sum()}, {x}, {}, true, /*create_graph=*/true)[0];
  return y.abs().max().item<double>();
}

TEST_F(Unbiasedness, ActivationFunctionsThatReadTheirArgument) {
  const std::vector<std::function<torch::Tensor(torch::Tensor)>> functions{
      [](torch::Tensor x) { return torch::gelu(x); },
      [](torch::Tensor x) { return torch::gelu(x, "tanh"); },
      [](torch::Tensor x) { return torch::silu(x); }};
  for (const auto& f : functions) {
    const Case c{[&](const Tensors& x) { return f(x[0]); }, {leaf({8, 16})}};
    const auto x = c.activations[0];
    const auto bias = (step<Int4>(x).square() / 8 * largest_third_derivative(f) *
                       weights_of(c).abs().to(torch::kDouble))
                          .flatten();
    expect_mean(sample(kInt4, c), bias);
  }
}

// r (1 - r) and 1 - r^2: their second derivative is -2.
TEST_F(Unbiasedness, ActivationFunctionsThatReadTheirResult) {
  const std::vector<std::function<torch::Tensor(torch::Tensor)>> functions{
      [](torch::Tensor x) { return torch::sigmoid(x); },
      [](torch::Tensor x) { return torch::tanh(x); }};
  for (const auto& f : functions) {
    const Case c{[&](const Tensors& x) { return f(x[0]); }, {leaf({8, 16})}};
    const auto bias =
        step<Int4>(f(c.activations[0])).square() / 8 * 2 * weights_of(c).abs().to(torch::kDouble);
    expect_mean(sample(kInt4, c), bias.flatten());
  }
}

// dx = s (d - mean(d) - x^ mean(d x^)) with d = g w and x^ = (x - m) s, m and s exact: of the mean
// of x^_i x^_j only i = j is off, by x^_i's variance, s^2 h^2 / 4 at most. dw is linear in x^.
TEST_F(Unbiasedness, LayerNormAndBatchNorm) {
  const Case c{[](const Tensors& x) { return torch::layer_norm(x[0], {16}, x[1], x[2]); },
               {leaf({8, 16})},
               {leaf({16}), leaf({16})}};
  const auto bias_of = [&](const Case& c, const torch::Tensor& variance, double count,
                           const torch::Tensor& w) {
    const auto d = (weights_of(c) * w).abs().to(torch::kDouble);
    const auto s3 = (variance + 1e-5).to(torch::kDouble).pow(-1.5);
    const auto dx = s3 / count * d * step<Int4>(c.activations[0]).square() / 4;
    return torch::cat({dx.flatten(), torch::zeros({2 * w.numel()}, torch::kDouble)}).detach();
  };
  const auto rows = c.activations[0].var(1, /*unbiased=*/false, /*keepdim=*/true);
  expect_mean(sample(kInt4, c), bias_of(c, rows, 16, c.parameters[0]));

  const Case b{[](const Tensors& x) {
                 return torch::batch_norm(x[0], x[1], x[2], {}, {}, true, 0.1, 1e-5, false);
               },
               {leaf({16, 8})},
               {leaf({8}), leaf({8})}};
  const auto columns = b.activations[0].var(0, /*unbiased=*/false, /*keepdim=*/true);
  expect_mean(sample(kInt4, b), bias_of(b, columns, 16, b.parameters[0]));
}

// dx = p (g - sum(g p)): p_i^2 is off by p_i's variance.
TEST_F(Unbiasedness, Softmax) {
  const Case c{[](const Tensors& x) { return x[0].softmax(1); }, {leaf({8, 16})}};
  const auto p = c.activations[0].softmax(1);
  const auto bias = weights_of(c).abs().to(torch::kDouble) * step<Int8>(p).square() / 4;
  expect_mean(sample(kInt4, c), bias.flatten());
}

// dx = g - exp(r) sum(g), whose second derivative on the way to the next code is exp(r + h).
TEST_F(Unbiasedness, LogSoftmaxAndCrossEntropy) {
  const auto bias_of = [](const torch::Tensor& x, const torch::Tensor& sums) {
    const auto r = x.detach().log_softmax(1);
    const auto h = step<Int8>(r);
    return (sums.abs() * h.square() / 8 * (r + h).exp()).flatten().to(torch::kDouble);
  };
  const Case c{[](const Tensors& x) { return x[0].log_softmax(1); }, {leaf({8, 16})}};
  expect_mean(sample(kInt4, c), bias_of(c.activations[0], weights_of(c).sum(1, true)));

  const auto target = torch::randint(16, {8});
  const Case e{[&](const Tensors& x) { return F::cross_entropy(x[0], target); }, {leaf({8, 16})}};
  expect_mean(sample(kInt4, e), bias_of(e.activations[0], weights_of(e) / 8));
}

TEST_F(Unbiasedness, LogSumExp) {
  const Case c{[](const Tensors& x) { return x[0].logsumexp(1); }, {leaf({8, 16})}};
  const auto x = c.activations[0].detach();
  const auto h = step<Int8>(x);
  const auto p = (x + h - x.logsumexp(1, true)).exp();
  const auto lse = step<Int8>(x.logsumexp(1, true));  // it is packed too, if it is large enough
  const auto bias = weights_of(c).unsqueeze(1).abs() * (h + lse).square() / 8 * p * lse.exp();
  expect_mean(sample(kInt4, c), bias.flatten().to(torch::kDouble));
}

// P = exp(s - lse) with s = q k / sqrt(d), of rounded q and k. By Hoeffding's lemma the mean of
// exp(e) is at most exp(h^2 / 8) for an error e of mean 0 on an interval of length h, so that P's is
// P (1 + b) at most, b = exp(h^2 (|q|^2 + (|k| + h sqrt(d))^2) / 8 d) - 1, and P at least. dv = P^T
// do and dS = P (do v^T - delta) read it beside independent payloads of v and o. dq = dS k / sqrt(d)
// reads k again: |mean of e exp(c e)| <= h / 2 (exp(|c| h) - 1), c = q / sqrt(d); dk likewise.
TEST_F(Unbiasedness, Attention) {
  constexpr std::int64_t kTokens = 8, kWidth = 8;
  const Case c{[](const Tensors& x) {
                 const auto heads = x[0].view({1, 1, kTokens, 3, kWidth});
                 return torch::scaled_dot_product_attention(heads.select(3, 0), heads.select(3, 1),
                                                            heads.select(3, 2));
               },
               {leaf({kTokens, 3 * kWidth})}};
  const auto x = c.activations[0].detach().to(torch::kDouble);
  const auto parts = x.chunk(3, 1);
  const auto q = parts[0], k = parts[1], v = parts[2];
  const auto g = weights_of(c).view({kTokens, kWidth}).to(torch::kDouble);
  const double root = std::sqrt(double{kWidth});
  const double h = step<Int8>(c.activations[0]).max().item<double>();
  const auto p = (q.mm(k.t()) / root).softmax(1);
  const auto norm = [](const torch::Tensor& t) { return t.norm(2, 1, true); };
  const auto b =
      (h * h / (8 * kWidth) * (norm(q).square() + (norm(k) + h * root).square().t())).exp() -
      1;  // (queries, keys)
  const auto ds = p * (g.mm(v.t()) - (g * p.mm(v)).sum(1, true)).abs();
  const auto again = [&](const torch::Tensor& other) {  // (tokens, width): of the other's c
    return h / 2 * ((other.abs() + h) * (h / root)).expm1();
  };
  const auto dq = ((b * ds).mm(k.abs()) + ((1 + b) * ds).sum(1, true) * again(q)) / root;
  const auto dk = ((b * ds).t().mm(q.abs()) + ((1 + b) * ds).sum(0).unsqueeze(1) * again(k)) / root;
  const auto dv = (b * p).t().mm(g.abs());
  expect_mean(sample(kInt4, c), torch::cat({dq, dk, dv}, 1).flatten());
}

}  // namespace

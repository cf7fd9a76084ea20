// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/recompute.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <utility>
#include <vector>

namespace {

using fourfold::ActivationOptions;
using fourfold::Activations;
using fourfold::ActivationStore;
using fourfold::CheapOps;
using fourfold::Int4;
namespace door = fourfold::door;

constexpr double kFew = 4.5, kEight = 8.25, kAll = 32;  // bits a value

torch::Tensor made(at::IntArrayRef sizes) {  // positive: roots and logarithms are taken
  return (torch::rand(sizes) + 0.5).requires_grad_() * 1;
}

/// Bits that are held in all, within one pipeline's scope.
double bits_held(const std::function<torch::Tensor()>& run,
                 const std::vector<torch::Tensor>& parameters = {}, bool recompute = false) {
  ActivationOptions options;
  Activations<Int4>::configure(options);
  if (recompute) options.recompute = fourfold::operator_names<CheapOps>();
  const auto store = ActivationStore::make(std::move(options));
  store->keep_storages(parameters);
  const door::SavedTensorsScope scope(store);
  const std::shared_ptr<void> active = store->activate();
  const torch::Tensor result = run();
  return 8.0 * static_cast<double>(store->held_bytes().current);
}

class Tolerance : public ::testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }
};

TEST_F(Tolerance, InputsOfLinearsAndConvolutionsHaveFewBits) {
  torch::nn::Linear linear(64, 32), bare(torch::nn::LinearOptions(64, 32).bias(false));
  torch::nn::Conv2d conv(torch::nn::Conv2dOptions(4, 8, 3));
  const double n = 128 * 64;
  EXPECT_EQ(bits_held([&] { return linear->forward(made({128, 64})); }), kFew * n);
  EXPECT_EQ(bits_held([&] { return linear->forward(made({2, 64, 64})); }), kFew * n);
  EXPECT_EQ(bits_held([&] { return bare->forward(made({128, 64})); }), kFew * n);
  EXPECT_EQ(bits_held([&] { return conv->forward(made({2, 4, 32, 32})); }), kFew * n);
  // A weight that is made of the model's own is no activation.
  const auto scale = torch::rand({32, 1}).requires_grad_();
  EXPECT_LE(bits_held(
                [&] {
                  return torch::linear(made({128, 64}), linear->weight * scale);
                },
                {linear->weight, scale}),
            kFew * n + kAll * 32);
  // What is added to a product is not multiplied.
  EXPECT_EQ(bits_held([&] {
              return torch::addmm(made({128, 32}), made({128, 64}), bare->weight.t());
            }),
            kFew * n);
}

TEST_F(Tolerance, ProductsOfTwoActivationsHaveEight) {
  const auto a = [] { return made({4, 64, 32}); };
  const double n = 4 * 64 * 32;
  EXPECT_EQ(bits_held([&] { return torch::bmm(a(), a().transpose(1, 2)); }), 2 * kEight * n);
  EXPECT_EQ(bits_held([&] {
              return torch::baddbmm(made({4, 64, 64}), a(), a().transpose(1, 2));
            }),
            2 * kEight * n);
  EXPECT_EQ(bits_held([&] { return torch::matmul(a(), a().transpose(1, 2)); }), 2 * kEight * n);
  EXPECT_EQ(bits_held([&] { return torch::einsum("bik,bjk->bij", {a(), a()}); }), 2 * kEight * n);
  EXPECT_EQ(bits_held([&] { return torch::mm(made({128, 64}), made({64, 128})); }), 2 * kEight * n);
  const auto x = made({128, 64});
  EXPECT_EQ(bits_held([&] { return torch::mm(x, x.t()); }), kEight * n);  // one storage
}

TEST_F(Tolerance, WhatAttentionSavesHasEight) {
  const auto qkv = made({3, 2, 4, 64, 16});
  const double n = 2 * 4 * 64 * 16;
  const double statistics = kAll * 2 * 4 * 64;  // logsumexp of each row
  EXPECT_EQ(bits_held([&] { return torch::scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]); }),
            4 * kEight * n + statistics);
}

TEST_F(Tolerance, ArgumentsOfExponentialsHaveEight) {
  const auto x = made({64, 64});
  EXPECT_EQ(bits_held([&] { return torch::logsumexp(x, 1); }), kEight * 64 * 64 + kAll * 64);
}

TEST_F(Tolerance, DivisorsRootsAndLogarithmsAreExact) {
  const double n = 64 * 64;
  const auto x = made({64, 64}), y = made({64, 64});
  EXPECT_EQ(bits_held([&] { return x / y; }), (kFew + kAll) * n);
  EXPECT_EQ(bits_held([&] { return x / x.norm(2, 1, true); }), kFew * n + kAll * 64);
  for (const auto& [name, op] :
       std::vector<std::pair<const char*, std::function<torch::Tensor(torch::Tensor)>>>{
           {"log", [](torch::Tensor x) { return x.log(); }},
           {"log1p", [](torch::Tensor x) { return x.log1p(); }},
           {"sqrt", [](torch::Tensor x) { return x.sqrt(); }},
           {"rsqrt", [](torch::Tensor x) { return x.rsqrt(); }},
           {"log2_", [](torch::Tensor x) { return (x + 0).log2_(); }},
           {"pow(x, 0.5)", [](torch::Tensor x) { return x.pow(0.5); }},
           {"pow(x, -1)", [](torch::Tensor x) { return x.pow(-1); }},
           {"reciprocal", [](torch::Tensor x) { return x.reciprocal(); }}})
    EXPECT_EQ(bits_held([&] { return op(x); }), kAll * n) << name;
  EXPECT_EQ(bits_held([&] { return x.pow(3); }), kFew * n);
  EXPECT_EQ(bits_held([&] { return torch::addcdiv(x, x, y); }), (kFew + kAll) * n);
  const auto target = torch::rand({64, 64});
  EXPECT_EQ(bits_held([&] { return torch::binary_cross_entropy(x / 2, target); }, {target}),
            kAll * n);
}

// A payload that another backward is content with is not for them, nor what is computed from one.
TEST_F(Tolerance, ExactEvenWhereARoundedCopyIsHeld) {
  torch::nn::Linear linear(64, 64);
  const auto leaf = (torch::rand({64, 64}) + 0.5).requires_grad_();
  const auto both = [&] {
    const auto x = leaf * 1;
    const auto first = linear->forward(x).sum();  // whose payload of x is there already
    return first * 0 + x.log().sum();
  };
  both().backward();
  const auto expected = leaf.grad().clone();
  leaf.mutable_grad().reset();

  ActivationOptions options;
  Activations<Int4>::configure(options);
  const auto store = ActivationStore::make(std::move(options));
  torch::Tensor loss;
  {
    const door::SavedTensorsScope scope(store);
    const std::shared_ptr<void> active = store->activate();
    loss = both();
  }
  EXPECT_EQ(store->counts().packed, 1);
  loss.backward();
  EXPECT_TRUE(torch::equal(leaf.grad(), expected));

  const auto u = made({64, 64});
  EXPECT_EQ(bits_held([&] { return torch::gelu(u) + 2; }, {}, /*recompute=*/true), kFew * 64 * 64);
  EXPECT_EQ(bits_held([&] { return (torch::gelu(u) + 2).log(); }, {}, /*recompute=*/true),
            (kFew + kAll) * 64 * 64);
}

}  // namespace

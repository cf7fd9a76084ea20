// SPDX-License-Identifier: Apache-2.0
#include <fourfold/presets_release.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace {

using namespace fourfold;
using testing::HasSubstr;
namespace F = torch::nn::functional;

constexpr std::int64_t kWords = 50, kWidth = 96;

/// Tokens to logits, by a head or by the embedding's own weight.
struct NetImpl : torch::nn::Module {
  explicit NetImpl(bool tied = false) {
    words = register_module("words", torch::nn::Embedding(kWords, kWidth));
    layers = register_module(
        "layers", torch::nn::Sequential(torch::nn::Linear(kWidth, 4 * kWidth), torch::nn::GELU(),
                                        torch::nn::Linear(4 * kWidth, kWidth)));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    head = register_module("head", torch::nn::Linear(kWidth, kWords));
    if (tied) tied_weight = register_parameter("tied_weight", words->weight);
  }
  torch::Tensor forward(const torch::Tensor& tokens) {
    const auto x = words(tokens);
    const auto y = norm(x + layers->forward(x));
    return tied_weight.defined() ? torch::matmul(y, tied_weight.t()) : head(y);
  }
  torch::nn::Embedding words{nullptr};
  torch::nn::Sequential layers{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};
  torch::Tensor tied_weight;
};
TORCH_MODULE(Net);

Net net(bool tied = false) {
  torch::manual_seed(1);
  return Net(tied);
}
/// The next word is a function of this one.
torch::Tensor loss_of(Net& model, const torch::Tensor& tokens) {
  return F::cross_entropy(model(tokens).to(torch::kFloat), (tokens * 7 + 3) % kWords);
}
torch::Tensor tokens() {
  return torch::randint(kWords, {64}, torch::make_generator<torch::CPUGeneratorImpl>(3UL),
                        torch::kLong);
}
std::vector<double> trained(Net& model, auto& pipeline, int steps) {
  const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(3e-3));
  std::vector<double> losses;
  for (int i = 0; i < steps; ++i) {
    optimizer->zero_grad();
    auto loss = pipeline.forward([&] { return loss_of(model, tokens()); });
    loss.backward();
    if constexpr (!std::remove_reference_t<decltype(pipeline)>::kReleases) optimizer->step();
    losses.push_back(loss.template item<double>());
  }
  return losses;
}

TEST(HeldWeights, ThoseOfProductsAreConverted) {
  auto model = net();
  const CompressionPipeline<Precision<BFloat16, ProductWeights>> pipeline(model);
  for (const auto& one : model->named_parameters()) {
    const bool stays = one.key().starts_with("words") || one.key().starts_with("norm");
    EXPECT_EQ(one.value().scalar_type(), stays ? torch::kFloat : torch::kBFloat16) << one.key();
  }
  EXPECT_EQ(pipeline.report()[Place::kWeights].now, [&] {
    std::int64_t bytes = 0;
    for (const auto& p : model->parameters()) bytes += p.nbytes();
    return bytes;
  }());
}
/// With masters in fp32, bf16 weights train as fp32 ones do under autocast, from the first step on.
TEST(HeldWeights, GoOnFromWhatTheyWere) {
  auto whole = net(), halves = net();
  CompressionPipeline<Precision<BFloat16>, OptimizerStates<optim::Fp32>> plain(whole);
  CompressionPipeline<Precision<BFloat16, ProductWeights>,
                      OptimizerStates<optim::Fp32, optim::Fp32>>
      held(halves);
  EXPECT_EQ(trained(halves, held, 20), trained(whole, plain, 20));
}
TEST(HeldWeights, AnotherValueSetSinceCounts) {
  auto model = net();
  CompressionPipeline<Precision<BFloat16, ProductWeights>,
                      OptimizerStates<optim::Fp32, optim::ErrorCorrection<16>>>
      pipeline(model);
  {
    const torch::NoGradGuard no_grad;
    model->head->weight.fill_(1);
  }
  auto& layer = *model->layers->ptr(0)->as<torch::nn::Linear>();
  layer.weight.set_data(torch::ones_like(layer.weight));
  layer.bias.set_data(torch::ones_like(layer.bias).to(torch::kFloat));
  const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(0.5).weight_decay(1));
  for (torch::Tensor p : {model->head->weight, layer.weight, layer.bias})
    p.mutable_grad() = torch::zeros_like(p);
  optimizer->step();
  for (const torch::Tensor& p : {model->head->weight, layer.weight, layer.bias})
    EXPECT_TRUE(p.eq(0.5).all().item<bool>());
}
TEST(HeldWeights, EmbeddingsToo) {
  auto model = net();
  const CompressionPipeline<Precision<BFloat16, AllWeights>> pipeline(model);
  for (const auto& one : model->named_parameters())
    EXPECT_EQ(one.value().scalar_type(),
              one.key().starts_with("norm") ? torch::kFloat : torch::kBFloat16)
        << one.key();
}
TEST(HeldWeights, AWeightTiedToAnEmbeddingsIsTheEmbeddings) {
  auto model = net(/*tied=*/true);
  CompressionPipeline<Precision<BFloat16, ProductWeights>> pipeline(model);
  EXPECT_EQ(model->words->weight.scalar_type(), torch::kFloat);
  EXPECT_TRUE(model->words->weight.is_same(model->tied_weight));
  EXPECT_EQ(model->head->bias.scalar_type(), torch::kBFloat16);
  const auto losses = trained(model, pipeline, 3);
  EXPECT_LT(losses.back(), losses.front());
}
TEST(HeldWeights, ANormOfMatricesIsNoProduct) {
  torch::nn::Sequential model{torch::nn::Linear(8, 64),
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({8, 64}))};
  CompressionPipeline<Precision<BFloat16, ProductWeights>> pipeline(model);
  EXPECT_EQ(model->parameters()[0].scalar_type(), torch::kBFloat16);
  EXPECT_EQ(model->parameters()[2].scalar_type(), torch::kFloat);
  pipeline.forward([&] { return model->forward(torch::ones({3, 8, 8})).sum(); }).backward();
  EXPECT_EQ(model->parameters()[2].grad().scalar_type(), torch::kFloat);
}
TEST(HeldWeights, AGradientThatIsThereIsNamedAndNothingChanges) {
  auto model = net();
  model->head->weight.mutable_grad() = torch::zeros_like(model->head->weight);
  EXPECT_THAT(
      message_of([&] { SmallestRelease pipeline(model); }),
      HasSubstr("Precision<> holds weights in BFloat16, but 'head.weight' has a gradient of "
                "Float already; make the pipeline before the first backward, or call "
                "zero_grad()"));
  for (const auto& p : model->parameters()) EXPECT_EQ(p.scalar_type(), torch::kFloat);
}
TEST(HeldWeights, ConvolutionsAndLstmsRunToo) {
  struct Both : torch::nn::Module {
    Both() {
      register_module("conv", conv), register_module("norm", norm), register_module("lstm", lstm);
    }
    torch::nn::Conv2d conv{torch::nn::Conv2dOptions(3, 8, 3).padding(1)};
    torch::nn::BatchNorm2d norm{8};
    torch::nn::LSTM lstm{torch::nn::LSTMOptions(8, 16).batch_first(true)};
  };
  torch::manual_seed(2);
  auto model = std::make_shared<Both>();
  BalancedRelease pipeline(model);
  const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
  EXPECT_EQ(model->conv->bias.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(model->norm->weight.scalar_type(), torch::kFloat);
  const auto images = torch::randn({8, 3, 6, 6});
  std::vector<double> losses;
  for (int i = 0; i < 10; ++i) {
    auto loss = pipeline.forward([&] {
      const auto x = torch::relu(model->norm(model->conv(images))).flatten(2).transpose(1, 2);
      const auto y = std::get<0>(model->lstm->forward(x));
      return (y.to(torch::kFloat) - 0.25).square().mean();
    });
    loss.backward();
    losses.push_back(loss.item<double>());
  }
  EXPECT_LT(losses.back(), 0.5 * losses.front());
}

/// fp32 in two halves is fp32, as autocast reads it, but where a weight lies between two of bf16 (one
/// in 2^16) and is rounded the other way. From weights that bf16 holds, and without biases, which
/// F::linear adds after autocast's product.
TEST(HeldWeights, WithSixteenBitsOfErrorTheyTrainAsFp32) {
  const auto losses = [](auto&& pipeline_of) {
    auto model = net();
    const torch::NoGradGuard no_grad;
    for (auto& p : model->parameters()) p.copy_(p.to(torch::kBFloat16).to(torch::kFloat));
    for (auto& linear : {model->layers->ptr<torch::nn::LinearImpl>(0),
                         model->layers->ptr<torch::nn::LinearImpl>(2), model->head.ptr()})
      linear->bias.zero_().requires_grad_(false);
    auto pipeline = pipeline_of(model);
    const torch::AutoGradMode grad(true);
    return trained(model, pipeline, 8);
  };
  const auto fp32 = losses([](Net& model) {
    return CompressionPipeline<Precision<BFloat16>, OptimizerStates<optim::Fp32>>(model);
  });
  const auto farthest = [&]<class Master>(std::type_identity<Master>) {
    const auto held = losses([](Net& model) {
      return CompressionPipeline<Precision<BFloat16, ProductWeights>,
                                 OptimizerStates<optim::Fp32, Master>>(model);
    });
    double most = 0;
    for (std::size_t i = 0; i < held.size(); ++i)
      most = std::max(most, std::abs(held[i] - fp32[i]));
    return most;
  };
  EXPECT_LT(farthest(std::type_identity<optim::ErrorCorrection<16>>{}),
            0.05 * farthest(std::type_identity<optim::RoundNearest>{}));
}

template <class Preset>
class ReleasePresets : public testing::Test {};
using All = testing::Types<BalancedRelease, SmallestRelease, SmallestRelease24>;
TYPED_TEST_SUITE(ReleasePresets, All);

TYPED_TEST(ReleasePresets, LearnAsPlainDoes) {
  auto model = net(), plain_model = net();
  TypeParam pipeline(model);
  CompressionPipeline<> plain(plain_model);
  const auto losses = trained(model, pipeline, 60), expected = trained(plain_model, plain, 60);
  EXPECT_GT(losses.front() - losses.back(), 0.9 * (expected.front() - expected.back()));
  EXPECT_EQ(pipeline.explain(), "");
}
TYPED_TEST(ReleasePresets, HoldNoGradientAndRefuseStep) {
  auto model = net();
  TypeParam pipeline(model);
  const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
  pipeline.forward([&] { return loss_of(model, tokens()); }).backward();
  for (const auto& p : model->parameters()) EXPECT_FALSE(p.grad().defined());
  EXPECT_THAT(message_of([&] { optimizer->step(); }),
              HasSubstr("step() was called on an optimizer whose gradients are released"));
}
/// Of a matrix: weight and states, by their formulas (codes, and a 16-bit scale a group).
TEST(ReleasePresetsBytes, AreThoseOfTheirFormulas) {
  const auto bytes = []<class Preset>(std::type_identity<Preset>) {
    torch::nn::Linear model(torch::nn::LinearOptions(1024, 1024).bias(false));
    Preset pipeline(model);
    const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
    pipeline.forward([&] { return model(torch::ones({4, 1024})).sum(); }).backward();
    const auto ledger = pipeline.report();
    return static_cast<double>(ledger[Place::kWeights].now + ledger[Place::kOptimizer].now) /
           (1024 * 1024);
  };
  EXPECT_NEAR(bytes(std::type_identity<BalancedRelease>{}), 6.06, 0.02 * 6.06);
  EXPECT_NEAR(bytes(std::type_identity<SmallestRelease>{}), 3.06, 0.02 * 3.06);
  EXPECT_NEAR(bytes(std::type_identity<SmallestRelease24>{}), 4.06, 0.02 * 4.06);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
/// Pipelines of models on a GPU: exact ones have the bits of plain training there, the others train,
/// in less memory.
#include <fourfold/activations/offload.hpp>
#include <fourfold/fourfold.hpp>
#include <fourfold/gradients/grad_scaler.hpp>
#include <fourfold/plan/budget.hpp>
#include <fourfold/precision.hpp>
#include <fourfold/presets_release.hpp>
#include "tests/gpu/on_gpu.hpp"
#include "tests/support/message_of.hpp"

#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace fourfold;
using fourfold::tests::same_bits;
using torch::optim::AdamWOptions;

/// A transformer's.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(std::int64_t width) {
    qkv = register_module("qkv", torch::nn::Linear(width, 3 * width));
    out = register_module("out", torch::nn::Linear(width, width));
    up = register_module("up", torch::nn::Linear(width, 4 * width));
    down = register_module("down", torch::nn::Linear(4 * width, width));
    first = register_module("first", torch::nn::LayerNorm(std::vector<std::int64_t>{width}));
    second = register_module("second", torch::nn::LayerNorm(std::vector<std::int64_t>{width}));
  }
  at::Tensor forward(const at::Tensor& x) {
    const auto parts = qkv(first(x)).chunk(3, -1);
    const auto scores = torch::matmul(parts[0], parts[1].transpose(-1, -2)) /
                        std::sqrt(static_cast<double>(x.size(-1)));
    const auto mixed = torch::matmul(torch::softmax(scores, -1), parts[2]);
    const auto y = x + torch::dropout(out(mixed), 0.1, is_training());
    return y + torch::dropout(down(torch::gelu(up(second(y)))), 0.1, is_training());
  }
  torch::nn::Linear qkv{nullptr}, out{nullptr}, up{nullptr}, down{nullptr};
  torch::nn::LayerNorm first{nullptr}, second{nullptr};
};
TORCH_MODULE(Block);

struct Case {
  std::string name;
  torch::nn::Sequential model;
  at::Tensor x, target;
};
Case transformer() {
  torch::manual_seed(0);
  torch::nn::Sequential model(Block(64), Block(64), Block(64), Block(64));
  model->to(at::kCUDA);
  const auto x = torch::randn({8, 128, 64}, at::kCUDA);
  return {"transformer", model, x, torch::tanh(x.flip({-1}))};
}
Case convolutions() {
  torch::manual_seed(0);
  using torch::nn::Conv2dOptions;
  torch::nn::Sequential model(
      torch::nn::Conv2d(Conv2dOptions(3, 16, 3).padding(1)), torch::nn::BatchNorm2d(16),
      torch::nn::ReLU(torch::nn::ReLUOptions(true)), torch::nn::MaxPool2d(2),
      torch::nn::Conv2d(Conv2dOptions(16, 32, 3).padding(1)), torch::nn::BatchNorm2d(32),
      torch::nn::SiLU(), torch::nn::Flatten(), torch::nn::Linear(32 * 8 * 8, 10));
  model->to(at::kCUDA);
  const auto x = torch::randn({32, 3, 16, 16}, at::kCUDA);
  return {"convolutions", model, x, torch::randn({32, 10}, at::kCUDA)};
}

struct Little {
  static OffloadOptions options() { return {.bytes_in_flight = 1 << 18, .min_bytes = 1 << 12}; }
};

class GpuPipeline : public tests::OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    at::globalContext().setBenchmarkCuDNN(false);
    at::globalContext().setDeterministicCuDNN(true);
  }
  void TearDown() override { at::globalContext().setDeterministicCuDNN(false); }

  struct Trained {
    std::vector<double> losses;
    std::vector<at::Tensor> parameters;
    std::int64_t saved = 0;
  };
  template <class Pipeline>
  static Trained train(const std::function<Case()>& make, int steps, double lr = 1e-2) {
    Case one = make();
    auto pipeline = Pipeline(*one.model);
    auto optimizer = pipeline.optimizer(AdamWOptions(lr));
    Trained out;
    torch::manual_seed(42);
    for (int step = 0; step < steps; ++step) {
      if constexpr (!Pipeline::kReleases) optimizer->zero_grad();
      auto loss = pipeline.forward(
          [&] { return torch::mse_loss(one.model->forward(one.x).to(at::kFloat), one.target); });
      loss.backward();
      if constexpr (!Pipeline::kReleases) optimizer->step();
      out.losses.push_back(loss.template item<double>());
    }
    out.saved = pipeline.report().saved_bytes;
    for (const at::Tensor& p : one.model->parameters()) {
      EXPECT_TRUE(p.is_cuda());
      out.parameters.push_back(p.detach().clone());
    }
    return out;
  }
  static const std::vector<std::function<Case()>>& cases() {
    static const std::vector<std::function<Case()>> all{transformer, convolutions};
    return all;
  }
};

TEST_F(GpuPipeline, ExactHasTheBitsOfPlainTraining) {
  for (const auto& make : cases()) {
    SCOPED_TRACE(make().name);
    const auto plain = train<CompressionPipeline<>>(make, 5), ours = train<Exact>(make, 5);
    EXPECT_EQ(plain.losses, ours.losses);
    for (std::size_t i = 0; i < plain.parameters.size(); ++i)
      EXPECT_TRUE(same_bits(plain.parameters[i], ours.parameters[i])) << "parameter " << i;
    EXPECT_LT(ours.saved, plain.saved);
  }
}

TEST_F(GpuPipeline, BlocksComputedAgainHaveTheBitsOfPlainTraining) {
  const auto plain = train<CompressionPipeline<>>(transformer, 5);
  const auto ours = train<CompressionPipeline<Blocks<>>>(transformer, 5);
  EXPECT_EQ(plain.losses, ours.losses);
  for (std::size_t i = 0; i < plain.parameters.size(); ++i)
    EXPECT_TRUE(same_bits(plain.parameters[i], ours.parameters[i])) << "parameter " << i;
  EXPECT_LT(3 * ours.saved, plain.saved);  // one block of four, and the four inputs
}

TEST_F(GpuPipeline, OffloadHasTheBitsOfPlainTraining) {
  for (const auto& make : cases()) {
    SCOPED_TRACE(make().name);
    const auto plain = train<CompressionPipeline<>>(make, 5);
    const auto ours = train<CompressionPipeline<Recompute<CheapOps>, Offload<Little>>>(make, 5);
    EXPECT_EQ(plain.losses, ours.losses);
    EXPECT_LT(2 * ours.saved, plain.saved);
    const auto codes = train<CompressionPipeline<Activations<Int4>>>(make, 5);
    const auto gone = train<CompressionPipeline<Activations<Int4>, Offload<Little>>>(make, 5);
    EXPECT_EQ(codes.losses, gone.losses);
  }
}

/// The same training on noisier gradients: it must get as far as 0.7 of the way that plain training
/// goes in the same steps.
template <class Pipeline>
class GpuPreset : public GpuPipeline {};
using Presets =
    testing::Types<Balanced, Smallest, BalancedRelease, SmallestRelease, SmallestRelease24>;
TYPED_TEST_SUITE(GpuPreset, Presets);

TYPED_TEST(GpuPreset, Trains) {
  for (const auto& make : this->cases()) {
    SCOPED_TRACE(make().name);
    const auto plain = this->template train<CompressionPipeline<>>(make, 30);
    const auto ours = this->template train<TypeParam>(make, 30);
    for (const double loss : ours.losses) EXPECT_TRUE(std::isfinite(loss));
    EXPECT_LT(ours.losses.back(),
              ours.losses.front() - 0.7 * (plain.losses.front() - plain.losses.back()));
    EXPECT_LT(2 * ours.saved, plain.saved);
    const auto again = this->template train<TypeParam>(make, 30);
    EXPECT_EQ(ours.losses, again.losses) << "a run repeats bit for bit";
  }
}

/// fp16 under autocast, with a scale that the first steps overflow at.
TEST_F(GpuPipeline, HalfTrainsWithAGradScaler) {
  Case one = transformer();
  auto pipeline = CompressionPipeline<Precision<Half>, Activations<Int4>, Recompute<CheapOps>,
                                      OptimizerStates<Int8>>(*one.model);
  auto optimizer = pipeline.optimizer(AdamWOptions(1e-2));
  GradScaler scaler({.init_scale = 0x1p40});
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer->zero_grad();
    const auto loss = pipeline.forward(
        [&] { return torch::mse_loss(one.model->forward(one.x).to(at::kFloat), one.target); });
    scaler.scale(loss).backward();
    scaler.step(*optimizer);
    scaler.update();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(scaler.get_scale(), 0x1p40);
  EXPECT_LT(last, first);
  for (const at::Tensor& p : one.model->parameters()) EXPECT_TRUE(p.isfinite().all().item<bool>());
}

TEST_F(GpuPipeline, ABudgetIsRefusedThere) {
  Case one = transformer();
  using Planned = CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, Budget<>>;
  EXPECT_NE(message_of([&] {
              Planned(*one.model, {.budget = std::int64_t{1} << 30});
            }).find("use the policies without a budget there"),
            std::string::npos);
}

/// Bytes on the GPU at the peak, by the caching allocator's own count.
TEST_F(GpuPipeline, ThePeakShrinks) {
  const auto peak = [](auto pipeline_of) {
    Case one = transformer();
    auto pipeline = pipeline_of(*one.model);
    const auto step = [&] {
      pipeline.forward([&] { return torch::mse_loss(one.model->forward(one.x), one.target); })
          .backward();
    };
    step();
    const Meter meter;
    meter.restart_peak();
    step();
    return meter.bytes(at::kCUDA).peak;
  };
  const auto plain = peak([](auto& model) { return CompressionPipeline<>(model); });
  EXPECT_LT(peak([](auto& model) { return Balanced(model); }), plain);
  EXPECT_LT(peak([](auto& model) { return Smallest(model); }), plain);
}

}  // namespace

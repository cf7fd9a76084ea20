// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What bench/quality trains: a byte-level language model on text, and a small convolutional
/// network on images made here. A task's batches depend on the seed alone, so that all settings of
/// one seed start from the same weights and see the same data in the same order.
#include "../../examples/models/corpus.hpp"
#include "../../examples/models/transformer.hpp"

#include <torch/nn.h>
#include <torch/nn/functional/loss.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace quality {

class Task {
 public:
  virtual ~Task() = default;
  /// A model of this task, with weights from the default generator.
  [[nodiscard]] virtual std::shared_ptr<torch::nn::Module> model() const = 0;
  /// The loss on the next training batch of `seed`, as a function that may be called again.
  [[nodiscard]] virtual std::function<torch::Tensor()> next(torch::nn::Module& model) = 0;
  virtual void restart(std::uint64_t seed) = 0;
  /// Mean loss on what is held out: the same examples whatever the seed.
  [[nodiscard]] virtual double validation(torch::nn::Module& model) const = 0;
  /// The loss of knowing only how often each answer comes.
  [[nodiscard]] virtual double loss_of_frequencies() const = 0;

 protected:
  template <class F>
  static double evaluated(torch::nn::Module& model, int batches, F&& loss) {
    const torch::NoGradGuard no_grad;
    model.eval();
    double sum = 0;
    for (int i = 0; i < batches; ++i) sum += loss(i).template item<double>();
    model.train();
    return sum / batches;
  }
};

/// Width 96, 3 layers, context 128, batch 8: 398,000 parameters.
class Text final : public Task {
 public:
  explicit Text(const std::string& data) : corpus_(data, kBatch, kOptions.context) {}

  std::shared_ptr<torch::nn::Module> model() const override {
    return std::make_shared<models::TransformerImpl>(kOptions);
  }
  void restart(std::uint64_t seed) override { draws_.seed(seed); }
  std::function<torch::Tensor()> next(torch::nn::Module& model) override {
    const auto batch = corpus_.train_batch(draws_);
    return [batch, &model] { return loss_of(model, batch); };
  }
  double validation(torch::nn::Module& model) const override {
    std::mt19937_64 held_out(1);
    return evaluated(model, kValidationBatches,
                     [&](int) { return loss_of(model, corpus_.validation_batch(held_out)); });
  }
  double loss_of_frequencies() const override {
    std::mt19937_64 some(2);
    torch::Tensor counts = torch::zeros({kOptions.vocabulary}, torch::kDouble);
    for (int i = 0; i < 256; ++i)
      counts += torch::bincount(corpus_.train_batch(some).first.flatten(), {}, counts.size(0));
    const auto share = counts / counts.sum();
    return -torch::xlogy(share, share).sum().item<double>();
  }

 private:
  using Batch = std::pair<torch::Tensor, torch::Tensor>;
  static constexpr std::int64_t kBatch = 8;
  static constexpr int kValidationBatches = 64;
  static constexpr models::TransformerOptions kOptions{
      .width = 96, .layers = 3, .heads = 4, .context = 128};

  static torch::Tensor loss_of(torch::nn::Module& model, const Batch& batch) {
    const auto logits = static_cast<models::TransformerImpl&>(model).forward(batch.first);
    return torch::nn::functional::cross_entropy(logits.flatten(0, 1).to(torch::kFloat),
                                                batch.second.flatten());
  }

  models::Corpus corpus_;
  std::mt19937_64 draws_;
};

/// (n, 3, 16, 16) -> (n, 10).
class ConvolutionsImpl final : public torch::nn::Module {
 public:
  ConvolutionsImpl() {
    using namespace torch::nn;
    const auto conv = [](int in, int out) {
      return Conv2d(Conv2dOptions(in, out, 3).padding(1).bias(false));
    };
    layers_ = register_module(
        "layers", Sequential(conv(3, 32), BatchNorm2d(32), ReLU(), MaxPool2d(2), conv(32, 64),
                             BatchNorm2d(64), ReLU(), MaxPool2d(2), conv(64, 64), BatchNorm2d(64),
                             ReLU(), AdaptiveAvgPool2d(1), Flatten(), Linear(64, 10)));
  }
  torch::Tensor forward(const torch::Tensor& images) { return layers_->forward(images); }

 private:
  torch::nn::Sequential layers_{nullptr};
};

/// Ten kinds of gratings, told apart by their direction alone: wavelength, phase, colour and
/// contrast are drawn, and noise of the contrast's size is added.
class Images final : public Task {
 public:
  std::shared_ptr<torch::nn::Module> model() const override {
    return std::make_shared<ConvolutionsImpl>();
  }
  void restart(std::uint64_t seed) override {
    draws_ = torch::make_generator<torch::CPUGeneratorImpl>(mixed(seed));
  }
  std::function<torch::Tensor()> next(torch::nn::Module& model) override {
    const auto batch = images(draws_);
    return [batch, &model] { return loss_of(model, batch); };
  }
  double validation(torch::nn::Module& model) const override {
    auto held_out = torch::make_generator<torch::CPUGeneratorImpl>(std::uint64_t{77777});
    return evaluated(model, kValidationBatches,
                     [&](int) { return loss_of(model, images(held_out)); });
  }
  double loss_of_frequencies() const override { return std::log(double{kKinds}); }

 private:
  using Batch = std::pair<torch::Tensor, torch::Tensor>;
  static constexpr std::int64_t kBatch = 64, kSide = 16, kKinds = 10;
  static constexpr int kValidationBatches = 64;

  static std::uint64_t mixed(std::uint64_t seed) { return fourfold::mix(seed); }
  static Batch images(at::Generator& draws) {
    const auto uniform = [&](double from, double to) {
      return torch::rand({kBatch, 1, 1, 1}, draws) * (to - from) + from;
    };
    const auto kind = torch::randint(kKinds, {kBatch}, draws, torch::kLong);
    const auto angle = kind.view({-1, 1, 1, 1}) * (M_PI / kKinds) + uniform(-0.1, 0.1);
    const auto turns = 2 * M_PI / uniform(4, 9), phase = uniform(0, 2 * M_PI);
    const auto x = torch::arange(kSide).view({1, 1, 1, kSide});
    const auto y = torch::arange(kSide).view({1, 1, kSide, 1});
    const auto wave = ((x * angle.cos() + y * angle.sin()) * turns + phase).sin();
    const auto colour = torch::rand({kBatch, 3, 1, 1}, draws) * uniform(0.3, 1.5);
    return {wave * colour + torch::randn({kBatch, 3, kSide, kSide}, draws), kind};
  }
  static torch::Tensor loss_of(torch::nn::Module& model, const Batch& batch) {
    auto& network = static_cast<ConvolutionsImpl&>(model);
    const auto images = batch.first.to(network.parameters().front().scalar_type());
    return torch::nn::functional::cross_entropy(network.forward(images).to(torch::kFloat),
                                                batch.second);
  }

  at::Generator draws_ = torch::make_generator<torch::CPUGeneratorImpl>(std::uint64_t{0});
};

}  // namespace quality

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// ResNet (He et al., arXiv 1512.03385) of bottleneck blocks, as a Sequential of LibTorch's modules.
#include <torch/nn.h>

#include <array>
#include <cstdint>

namespace models {

struct ResNetOptions {
  std::array<int, 4> blocks{3, 4, 6, 3};  ///< of each stage; these are ResNet-50's
  std::int64_t width = 64;                ///< channels of the first stage's middle
  std::int64_t classes = 1000;
};

/// 1x1, 3x3, 1x1, and a shortcut, with a convolution of its own where sizes change.
struct BottleneckImpl : torch::nn::Module {
  BottleneckImpl(std::int64_t in, std::int64_t middle, std::int64_t stride) {
    using torch::nn::BatchNorm2d, torch::nn::Conv2d, torch::nn::Conv2dOptions;
    const auto relu = [] { return torch::nn::ReLU(torch::nn::ReLUOptions(/*inplace=*/true)); };
    body = register_module(
        "body",
        torch::nn::Sequential(
            Conv2d(Conv2dOptions(in, middle, 1).bias(false)), BatchNorm2d(middle), relu(),
            Conv2d(Conv2dOptions(middle, middle, 3).stride(stride).padding(1).bias(false)),
            BatchNorm2d(middle), relu(), Conv2d(Conv2dOptions(middle, 4 * middle, 1).bias(false)),
            BatchNorm2d(4 * middle)));
    shortcut = register_module("shortcut", torch::nn::Sequential());
    if (stride == 1 && in == 4 * middle) return;
    shortcut->push_back(Conv2d(Conv2dOptions(in, 4 * middle, 1).stride(stride).bias(false)));
    shortcut->push_back(BatchNorm2d(4 * middle));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return torch::relu_(body->forward(x).add_(shortcut->is_empty() ? x : shortcut->forward(x)));
  }
  torch::nn::Sequential body{nullptr}, shortcut{nullptr};
};
TORCH_MODULE(Bottleneck);

/// What comes before the blocks, as one module, so that a pipeline's Blocks<> has its input alone to
/// hold: the images.
struct StemImpl : torch::nn::Module {
  explicit StemImpl(std::int64_t width) {
    namespace nn = torch::nn;
    layers = register_module(
        "layers",
        nn::Sequential(nn::Conv2d(nn::Conv2dOptions(3, width, 7).stride(2).padding(3).bias(false)),
                       nn::BatchNorm2d(width), nn::ReLU(nn::ReLUOptions(/*inplace=*/true)),
                       nn::MaxPool2d(nn::MaxPool2dOptions(3).stride(2).padding(1))));
  }
  torch::Tensor forward(const torch::Tensor& x) { return layers->forward(x); }
  torch::nn::Sequential layers{nullptr};
};
TORCH_MODULE(Stem);

/// (batch, 3, height, width) -> logits (batch, classes).
inline torch::nn::Sequential resnet(const ResNetOptions& options = {}) {
  namespace nn = torch::nn;
  nn::Sequential model((Stem(options.width)));
  std::int64_t in = options.width;
  for (std::size_t stage = 0; stage < options.blocks.size(); ++stage)
    for (int block = 0; block < options.blocks[stage]; ++block) {
      const std::int64_t middle = options.width << stage;
      model->push_back(Bottleneck(in, middle, stage > 0 && block == 0 ? 2 : 1));
      in = 4 * middle;
    }
  model->push_back(nn::AdaptiveAvgPool2d(1));
  model->push_back(nn::Flatten());
  model->push_back(nn::Linear(in, options.classes));
  return model;
}

}  // namespace models

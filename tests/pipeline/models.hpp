// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Five unmodified modules with a batch and a loss each: what pipelines are tested on.
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace pipeline_models {

struct Case {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<torch::Tensor()> loss;
};

/// A module by hand: raw parameters, a residual, in-place operators.
struct ByHand : torch::nn::Module {
  ByHand() {
    up = register_parameter("up", torch::randn({96, 64}) * 0.1);
    down = register_parameter("down", torch::randn({64, 96}) * 0.1);
    gain = register_parameter("gain", torch::ones({64}));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    auto h = torch::silu(torch::matmul(torch::layer_norm(x, {64}, gain), up.t()));
    auto y = torch::matmul(h, down.t());
    y.add_(x);
    auto doubled = y * 2;
    return torch::relu_(doubled);
  }
  torch::Tensor up, down, gain;
};

inline Case linear() {
  auto net = torch::nn::Sequential(torch::nn::Linear(64, 128), torch::nn::GELU(),
                                   torch::nn::LayerNorm(torch::nn::LayerNormOptions({128})),
                                   torch::nn::Dropout(0.25), torch::nn::Linear(128, 32));
  auto x = torch::randn({128, 64}), target = torch::randn({128, 32});
  return {"Linear", net.ptr(), [=]() mutable { return torch::mse_loss(net->forward(x), target); }};
}
inline Case convolution() {
  auto net = torch::nn::Sequential(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 16, 3).padding(1)),
                                   torch::nn::BatchNorm2d(16),
                                   torch::nn::ReLU(torch::nn::ReLUOptions(true)),
                                   torch::nn::Conv2d(torch::nn::Conv2dOptions(16, 8, 3).stride(2)),
                                   torch::nn::Flatten(), torch::nn::Linear(8 * 7 * 7, 10));
  auto x = torch::randn({16, 3, 16, 16});
  auto target = torch::randint(10, {16}, torch::kLong);
  return {"Conv2d", net.ptr(),
          [=]() mutable { return torch::cross_entropy_loss(net->forward(x), target); }};
}
inline Case recurrent() {
  auto lstm = torch::nn::LSTM(torch::nn::LSTMOptions(32, 48).num_layers(2));
  auto x = torch::randn({20, 16, 32});
  return {"LSTM", lstm.ptr(),
          [=]() mutable { return std::get<0>(lstm->forward(x)).square().mean(); }};
}
inline Case attention() {
  auto mha =
      torch::nn::MultiheadAttention(torch::nn::MultiheadAttentionOptions(64, 4).dropout(0.1));
  auto x = torch::randn({32, 8, 64});
  return {"MultiheadAttention", mha.ptr(),
          [=]() mutable { return std::get<0>(mha->forward(x, x, x)).square().mean(); }};
}
inline Case by_hand() {
  auto net = std::make_shared<ByHand>();
  auto x = torch::randn({128, 64});
  return {"ByHand", net, [=] { return net->forward(x).square().mean(); }};
}

/// All five; the same values for the same seed.
inline std::vector<std::function<Case()>> all() {
  return {linear, convolution, recurrent, attention, by_hand};
}

}  // namespace pipeline_models

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/recompute.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <thread>

namespace {

using fourfold::ActivationOptions;
using fourfold::ActivationStore;
namespace door = fourfold::door;
namespace nn = torch::nn;
namespace F = torch::nn::functional;

ActivationOptions recompute() {
  ActivationOptions options;
  options.recompute = fourfold::operator_names<fourfold::CheapOps>();
  return options;
}

template <class Fn>
auto within(const std::shared_ptr<ActivationStore>& store, Fn&& fn) {
  const door::SavedTensorsScope scope(store);
  const std::shared_ptr<void> active = store->activate();
  return fn();
}

/// A pre-norm block with everything that is written in place: dropout, relu_, residual add_.
struct BlockImpl : nn::Module {
  explicit BlockImpl(int width, double p)
      : norm1(nn::LayerNormOptions({width})),
        norm2(nn::LayerNormOptions({width})),
        qkv(width, 3 * width),
        out(width, width),
        up(width, 4 * width),
        down(4 * width, width),
        drop(p) {
    register_module("norm1", norm1), register_module("norm2", norm2);
    register_module("qkv", qkv), register_module("out", out);
    register_module("up", up), register_module("down", down), register_module("drop", drop);
  }
  torch::Tensor forward(const torch::Tensor& input) {
    torch::Tensor x = input;
    const auto B = x.size(0), T = x.size(1), C = x.size(2);
    auto parts = qkv(norm1(x)).chunk(3, -1);
    for (auto& part : parts) part = part.view({B, T, 4, C / 4}).transpose(1, 2);
    auto a = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0, true);
    x = x + drop(out(a.transpose(1, 2).reshape({B, T, C})));
    auto h = drop(torch::gelu(up(norm2(x))));
    auto y = down(h);
    y.add_(x);  // residual in place
    return y;
  }
  nn::LayerNorm norm1, norm2;
  nn::Linear qkv, out, up, down;
  nn::Dropout drop;
};
TORCH_MODULE(Block);

struct NetImpl : nn::Module {
  explicit NetImpl(int width = 64, int layers = 2, double p = 0.1) : head(width, 8) {
    for (int i = 0; i < layers; ++i)
      blocks.push_back(register_module("block" + std::to_string(i), Block(width, p)));
    register_module("head", head);
  }
  torch::Tensor forward(torch::Tensor x) {
    for (auto& block : blocks) x = block(x);
    x = x * 1.5;
    return head(torch::relu_(x)).square().mean();
  }
  std::vector<Block> blocks;
  nn::Linear head;
};
TORCH_MODULE(Net);

struct Trained {
  std::vector<torch::Tensor> losses, gradients;
};

Trained train(const std::shared_ptr<ActivationStore>& store, int steps, double p = 0.1) {
  torch::manual_seed(1);
  Net net(64, 2, p);
  const auto x = torch::randn({4, 32, 64});
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  Trained result;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const auto forward = [&] { return net->forward(x); };
    const auto loss = store ? within(store, forward) : forward();
    loss.backward();
    optimizer.step();
    result.losses.push_back(loss.detach().clone());
  }
  for (const auto& parameter : net->parameters())
    result.gradients.push_back(parameter.grad().clone());
  return result;
}

void expect_equal(const Trained& a, const Trained& b) {
  ASSERT_EQ(a.losses.size(), b.losses.size());
  for (std::size_t i = 0; i < a.losses.size(); ++i)
    EXPECT_TRUE(torch::equal(a.losses[i], b.losses[i])) << "step " << i;
  for (std::size_t i = 0; i < a.gradients.size(); ++i)
    EXPECT_TRUE(torch::equal(a.gradients[i], b.gradients[i])) << "parameter " << i;
}

TEST(Recompute, TwentyStepsWithDropoutAndInPlaceAreEqualToTheBit) {
  const auto store = ActivationStore::make(recompute());
  expect_equal(train(store, 20), train(nullptr, 20));
  const auto counts = store->counts();
  EXPECT_GT(counts.recomputed, 0);
  EXPECT_LT(store->held_bytes().peak, store->plain_bytes().peak * 3 / 4);
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_EQ(store->plain_bytes().current, 0);
  std::cout << store->explain() << '\n';
}

TEST(Recompute, FourBitsTrain) {
  auto options = recompute();
  fourfold::Activations<fourfold::Int4>::configure(options);
  const auto store = ActivationStore::make(options);
  auto a = train(store, 20);
  std::cout << store->explain() << '\n' << a.losses.back() << train(nullptr, 20).losses.back();
}

}  // namespace

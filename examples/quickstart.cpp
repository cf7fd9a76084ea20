// SPDX-License-Identifier: Apache-2.0
/// A user's own module and loop; two lines are ours.
#include <torch/torch.h>
#include <fourfold/fourfold.hpp>

#include <iostream>

struct Net : torch::nn::Module {
  Net() {
    in = register_module("in", torch::nn::Linear(64, 1024));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({1024})));
    out = register_module("out", torch::nn::Linear(1024, 10));
  }
  torch::Tensor forward(const torch::Tensor& x) { return out(torch::gelu(norm(in(x)))); }
  torch::nn::Linear in{nullptr}, out{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};

int main() {
  torch::manual_seed(0);
  auto model = std::make_shared<Net>();
  auto pipeline = fourfold::Balanced(*model);                             // ours
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));  // ours
  auto x = torch::randn({2048, 64});
  auto target = x.slice(1, 0, 10).argmax(1);
  for (int step = 0; step < 30; ++step) {
    optimizer->zero_grad();
    auto loss =
        pipeline.forward([&] { return torch::cross_entropy_loss(model->forward(x), target); });
    loss.backward();
    optimizer->step();
    if (step % 10 == 9) std::cout << "step " << step + 1 << "  loss " << loss.item<float>() << '\n';
  }
  std::cout << pipeline.report();
}

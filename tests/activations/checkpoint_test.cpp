// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/checkpoint.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace {
using fourfold::checkpoint;

TEST(Checkpoint, GivesTheSameGradients) {
  torch::manual_seed(0);
  torch::nn::Sequential net(torch::nn::Linear(4, 8), torch::nn::ReLU(), torch::nn::Dropout(0.5),
                            torch::nn::Linear(8, 3));
  at::Tensor x = torch::randn({5, 4}).requires_grad_();
  int runs = 0;
  auto run = [&](bool checkpointed) {
    torch::manual_seed(1);
    net->zero_grad();
    x.mutable_grad() = at::Tensor();
    auto fn = [&](const at::Tensor& in) {
      ++runs;
      return net->forward(in);
    };
    at::Tensor loss = (checkpointed ? checkpoint(fn, x) : fn(x)).square().sum();
    loss.backward();
    std::vector<at::Tensor> all{loss.detach(), x.grad().clone()};
    for (auto& p : net->parameters()) all.push_back(p.grad().clone());
    return all;
  };
  auto plain = run(false), again = run(true);
  EXPECT_EQ(runs, 3);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(torch::equal(plain[i], again[i])) << i;
}
}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/checkpoint_sequential.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/support/message_of.hpp"

namespace {
namespace door = fourfold::door;
using ::testing::HasSubstr;

struct Held : door::Saved {
  at::Tensor tensor;
  at::Tensor unpack() override { return tensor; }
};
struct Holding : door::SavedTensors {
  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    auto held = std::make_shared<Held>();
    held->tensor = tensor.clone();
    live.push_back(held);
    return held;
  }
  std::int64_t alive() const {
    return std::count_if(live.begin(), live.end(), [](auto& held) { return !held.expired(); });
  }
  std::vector<std::weak_ptr<Held>> live;
};

struct CountingBlockImpl : torch::nn::Module {
  explicit CountingBlockImpl(int width) : linear(width, width) {
    register_module("linear", linear);
  }
  at::Tensor forward(at::Tensor x) {
    ++calls;
    return x + at::dropout(torch::gelu(linear(x)), 0.25, is_training());
  }
  torch::nn::Linear linear;
  int calls = 0;
};
TORCH_MODULE(CountingBlock);

template <class Container, class Run>
std::vector<at::Tensor> train(Container& net, Run&& run) {
  torch::manual_seed(3);
  net->zero_grad();
  at::Tensor x = torch::randn({5, 8}).requires_grad_();
  at::Tensor loss = run(x).square().sum();
  loss.backward();
  std::vector<at::Tensor> all{loss.detach(), x.grad()};
  for (const auto& p : net->parameters()) all.push_back(p.grad().clone());
  return all;
}
void expect_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(torch::equal(a[i], b[i])) << i;
}

TEST(CheckpointSequential, IsBitEqualForEveryNumberOfSegments) {
  torch::nn::Sequential net(CountingBlock(8),
                            torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})),
                            CountingBlock(8), torch::nn::Dropout(0.5), CountingBlock(8));
  const auto plain = train(net, [&](at::Tensor x) { return net->forward(x); });
  for (int segments = 1; segments <= 5; ++segments)
    expect_equal(plain, train(net, [&](at::Tensor x) {
                   return fourfold::checkpoint_sequential(net, segments, x);
                 }));
}

TEST(CheckpointSequential, HoldsOneInputASegment) {
  torch::nn::Sequential net;
  for (int i = 0; i < 7; ++i) net->push_back(CountingBlock(8));
  auto packer = std::make_shared<Holding>();
  at::Tensor x = torch::randn({5, 8}).requires_grad_();
  at::Tensor y;
  {
    const door::SavedTensorsScope scope(packer);
    y = fourfold::checkpoint_sequential(net, 3, x);
    EXPECT_EQ(packer->alive(), 3);
  }
  y.sum().backward();
  EXPECT_EQ(packer->alive(), 0);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(net->ptr<CountingBlockImpl>(i)->calls, 2);
}

TEST(CheckpointSequential, OfAModuleList) {
  torch::nn::ModuleList list;
  for (int i = 0; i < 4; ++i) list->push_back(CountingBlock(8));
  const auto plain = train(list, [&](at::Tensor x) {
    for (const auto& child : *list) x = child->as<CountingBlockImpl>()->forward(x);
    return x;
  });
  const auto holder = train(list, [&](at::Tensor x) {
    return fourfold::checkpoint_sequential<CountingBlock>(list, 2, x);
  });
  expect_equal(plain, holder);
  expect_equal(plain, train(list, [&](at::Tensor x) {
                 return fourfold::checkpoint_sequential<CountingBlockImpl>(list, 3, x,
                                                                           {.early_stop = false});
               }));
}

TEST(CheckpointSequential, SaysWhatIsWrong) {
  at::Tensor x = torch::randn({5, 8});
  torch::nn::Sequential net(CountingBlock(8), CountingBlock(8));
  EXPECT_THAT(message_of([&] { fourfold::checkpoint_sequential(net, 3, x); }),
              HasSubstr("got 3 segments for 2 children; give a number from 1 to 2"));
  EXPECT_THAT(message_of([&] { fourfold::checkpoint_sequential(net, 0, x); }),
              HasSubstr("got 0 segments"));
  EXPECT_THAT(message_of([&] { fourfold::checkpoint_sequential(torch::nn::Sequential(), 1, x); }),
              HasSubstr("got a container without children"));
  torch::nn::ModuleList list(CountingBlock(8), torch::nn::Linear(8, 8));
  EXPECT_THAT(
      message_of([&] { fourfold::checkpoint_sequential<CountingBlock>(list, 1, x); }),
      HasSubstr(
          "child 1 of the list is a torch::nn::LinearImpl; name the type that all children have"));
}
}  // namespace

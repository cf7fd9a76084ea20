// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/blocks.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/support/message_of.hpp"

#include <memory>
#include <thread>

namespace {
namespace door = fourfold::door;
using fourfold::BlocksScope;
using ::testing::HasSubstr;

struct LayerImpl : torch::nn::Cloneable<LayerImpl> {
  LayerImpl() { reset(); }
  void reset() override { linear = register_module("linear", torch::nn::Linear(8, 8)); }
  at::Tensor forward(at::Tensor x) {
    ++calls;
    return x + at::dropout(linear(x).tanh(), 0.25, is_training());
  }
  torch::nn::Linear linear{nullptr};
  int calls = 0;
};
TORCH_MODULE(Layer);

struct TwoInTwoOutImpl : torch::nn::Module {
  std::tuple<at::Tensor, at::Tensor> forward(at::Tensor x, at::Tensor y) {
    ++calls;
    return {x.exp() * y, y.sin()};
  }
  int calls = 0;
};
TORCH_MODULE(TwoInTwoOut);
struct TupleInImpl : torch::nn::Module {
  at::Tensor forward(std::tuple<at::Tensor, at::Tensor> pair) {
    return std::get<0>(pair).tanh() * std::get<1>(pair);
  }
};
TORCH_MODULE(TupleIn);

struct NetImpl : torch::nn::Module {
  NetImpl() : layers(Layer(), Layer(), torch::nn::BatchNorm1d(8), Layer()), head(8, 2) {
    register_module("layers", layers), register_module("head", head);
  }
  at::Tensor forward(at::Tensor x) { return head(layers->forward(x)); }
  torch::nn::Sequential layers;
  torch::nn::Linear head;
};
TORCH_MODULE(Net);

std::vector<at::Tensor> train(NetImpl& net) {
  torch::manual_seed(7);
  net.zero_grad();
  at::Tensor x = torch::randn({5, 8});
  at::Tensor loss = net.forward(x).square().sum();
  loss.backward();
  std::vector<at::Tensor> all{loss.detach()};
  for (const auto& p : net.parameters()) all.push_back(p.grad().clone());
  for (const auto& b : net.buffers()) all.push_back(b.clone());
  return all;
}
Net make_net() {
  torch::manual_seed(0);
  return Net();
}
void expect_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(torch::equal(a[i], b[i])) << i;
}

TEST(Blocks, ArePlainCallsOutsideAScope) {
  int runs = 0;
  at::Tensor x = torch::randn({3}).requires_grad_();
  const auto fn = [&](const at::Tensor& t) { return ++runs, t.exp(); };
  fourfold::block(fn, x).sum().backward();
  EXPECT_EQ(runs, 1);
  {
    BlocksScope scope;
    fourfold::block(fn, x).sum().backward();
    EXPECT_EQ(scope.met(), 1);
    EXPECT_EQ(scope.recomputed(), 1);
    const at::NoGradGuard no_grad;
    fourfold::block(fn, x);
    EXPECT_EQ(scope.met(), 1);
  }
  EXPECT_EQ(runs, 4);
  fourfold::block(fn, x).sum().backward();
  EXPECT_EQ(runs, 5);
}

TEST(Blocks, EveryNth) {
  int runs = 0;
  at::Tensor x = torch::randn({3}).requires_grad_();
  BlocksScope scope(3);
  for (int i = 0; i < 7; ++i)
    fourfold::block([&](const at::Tensor& t) { return ++runs, t.exp(); }, x).sum().backward();
  EXPECT_EQ(scope.met(), 7);
  EXPECT_EQ(scope.recomputed(), 3);
  EXPECT_EQ(runs, 7 + 3);
  EXPECT_THAT(message_of([] { BlocksScope none(0); }), HasSubstr("got every = 0; give 1"));
}

TEST(Blocks, AScopeLeftOnAnotherThreadOrOutOfOrderIsOver) {
  int runs = 0;
  at::Tensor x = torch::randn({3}).requires_grad_();
  const auto runs_of_a_block = [&] {
    runs = 0;
    fourfold::block([&](const at::Tensor& t) { return ++runs, t.exp(); }, x).sum().backward();
    return runs;
  };
  auto scope = std::make_unique<BlocksScope>();
  EXPECT_EQ(runs_of_a_block(), 2);
  std::thread([&] { scope.reset(); }).join();
  EXPECT_EQ(runs_of_a_block(), 1);

  auto outer = std::make_unique<BlocksScope>();
  auto inner = std::make_unique<BlocksScope>(2);
  outer.reset();
  EXPECT_EQ(runs_of_a_block(), 2);
  EXPECT_EQ(inner->recomputed(), 1);
  inner.reset();
  EXPECT_EQ(runs_of_a_block(), 1);
}

TEST(Blocks, AHandleReleasesItsOwnChildrenAlone) {
  torch::nn::Sequential model(torch::nn::Linear(8, 8));
  auto first = fourfold::wrap_sequential_blocks(*model);
  model->push_back(torch::nn::Linear(8, 8));
  {
    auto second = fourfold::wrap_sequential_blocks(*model);
    EXPECT_EQ(second.blocks(), 1);
  }
  BlocksScope scope;
  model->forward(torch::randn({2, 8})).sum().backward();
  EXPECT_EQ(scope.met(), 1);
}

TEST(Blocks, BlocksWithinABlockBelongToIt) {
  int inner = 0;
  at::Tensor x = torch::randn({3}).requires_grad_();
  BlocksScope scope;
  fourfold::block(
      [&](const at::Tensor& t) {
        return fourfold::block([&](const at::Tensor& u) { return ++inner, u.exp(); }, t.sin())
            .cos();
      },
      x)
      .sum()
      .backward();
  EXPECT_EQ(scope.met(), 1);
  EXPECT_EQ(inner, 2);
}

TEST(Blocks, AThrowingBlockLeavesTheScopeUsable) {
  at::Tensor x = torch::randn({3}).requires_grad_();
  BlocksScope scope;
  EXPECT_THROW(
      fourfold::block([](const at::Tensor&) -> at::Tensor { throw std::runtime_error("x"); }, x),
      std::runtime_error);
  fourfold::block([](const at::Tensor& t) { return t.exp(); }, x);
  EXPECT_EQ(scope.recomputed(), 2);
}

TEST(SequentialBlocks, AnUnchangedModelIsBitEqualAndRecomputed) {
  Net plain = make_net(), wrapped = make_net();
  const auto handle = fourfold::wrap_sequential_blocks(*wrapped);
  EXPECT_EQ(handle.blocks(), 4);
  for (int step = 0; step < 2; ++step) {
    const auto expected = train(*plain);
    BlocksScope scope;
    expect_equal(expected, train(*wrapped));
    EXPECT_EQ(scope.recomputed(), 4);
  }
  EXPECT_EQ(wrapped->layers->ptr(0)->as<LayerImpl>()->calls, 4);
  EXPECT_EQ(plain->layers->ptr(0)->as<LayerImpl>()->calls, 2);
}

TEST(SequentialBlocks, NamesAndTypesAreAsBefore) {
  Net net = make_net();
  const auto names = [&] {
    std::vector<std::string> all;
    for (const auto& p : net->named_parameters()) all.push_back(p.key());
    for (const auto& m : net->named_modules()) all.push_back(m.key() + ":" + m.value()->name());
    return all;
  };
  const auto before = names();
  const auto child = net->layers->ptr(2);
  auto handle = fourfold::wrap_sequential_blocks(*net);
  EXPECT_EQ(names(), before);
  EXPECT_EQ(net->layers->ptr(2), child);
  EXPECT_THAT(message_of([&] { net->layers->at<torch::nn::LinearImpl>(0); }),
              HasSubstr("Attempted to cast module"));
  // A copy of the handle is a block too; a clone of the module is not.
  torch::nn::AnyModule copy = *net->layers->begin();
  BlocksScope scope;
  at::Tensor x = torch::randn({2, 8});
  copy.forward(x);
  EXPECT_EQ(scope.met(), 1);
  auto clone = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->layers->clone());
  clone->forward(x);
  EXPECT_EQ(scope.met(), 1);
}

#if !defined(__SANITIZE_ADDRESS__)  // the cast inside AnyModule::get<T>() is what UBSan's vptr
                                    // check is about
TEST(SequentialBlocks, TypedAccessWorks) {
  Net net = make_net();
  const auto handle = fourfold::wrap_sequential_blocks(*net);
  EXPECT_EQ(&net->layers->at<LayerImpl>(1), net->layers->ptr(1)->as<LayerImpl>());
  EXPECT_EQ(net->layers->ptr<LayerImpl>(1), net->layers->ptr(1));
}
#endif

TEST(SequentialBlocks, AreUndoneByTheirHandle) {
  Net net = make_net();
  at::Tensor x = torch::randn({4, 8});
  BlocksScope scope;
  {
    auto handle = fourfold::wrap_sequential_blocks(*net);
    auto again = fourfold::wrap_sequential_blocks(*net);  // wrapped already
    EXPECT_EQ(again.blocks(), 0);
    again.undo();
    net->forward(x);
    EXPECT_EQ(scope.met(), 4);
    fourfold::SequentialBlocks moved;
    moved = std::move(handle);
    EXPECT_EQ(moved.blocks(), 4);
  }
  net->forward(x);
  EXPECT_EQ(scope.met(), 4);
  EXPECT_EQ(net->layers->at<LayerImpl>(0).calls, 2);
  auto longer = fourfold::wrap_sequential_blocks(*net);
  net = nullptr;  // the model may go first
}

TEST(SequentialBlocks, OfAnySignature) {
  torch::nn::Sequential net{TwoInTwoOut(), TupleIn()};
  const auto run = [&] {
    torch::manual_seed(1);
    at::Tensor x = torch::randn({3}).requires_grad_(), y = torch::randn({3}).requires_grad_();
    net->forward(x, y).sum().backward();
    return std::vector<at::Tensor>{x.grad(), y.grad()};
  };
  const auto plain = run();
  const auto handle = fourfold::wrap_sequential_blocks(*net);
  BlocksScope scope;
  expect_equal(plain, run());
  EXPECT_EQ(scope.recomputed(), 2);
  EXPECT_EQ(net->ptr(0)->as<TwoInTwoOutImpl>()->calls, 3);
}

TEST(SequentialBlocks, OnlyTheOutermostAndOnlyOwned) {
  struct NestedImpl : torch::nn::SequentialImpl {
    using SequentialImpl::SequentialImpl;
    at::Tensor forward(at::Tensor x) { return SequentialImpl::forward(x); }
  };
  auto inner = std::make_shared<NestedImpl>(Layer(), Layer());
  torch::nn::Sequential net;
  net->push_back(Layer());
  net->push_back(inner);
  const auto handle = fourfold::wrap_sequential_blocks(*net);
  EXPECT_EQ(handle.blocks(), 2);
  torch::nn::SequentialImpl unowned;
  EXPECT_THAT(
      message_of([&] { auto none = fourfold::wrap_sequential_blocks(unowned); }),
      HasSubstr("got a SequentialImpl that no shared_ptr owns; make it a torch::nn::Sequential"));
}
}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/checkpoint.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <thread>

namespace {
namespace door = fourfold::door;
using fourfold::checkpoint;
using Tensors = std::vector<at::Tensor>;

/// Loss and all gradients of `model(run, x)`, where run(fn, inputs...) is a plain call or a
/// checkpoint.
template <class Model>
Tensors train(bool checkpointed, torch::nn::Module& module, Model&& model, at::Tensor x) {
  torch::manual_seed(1);
  module.zero_grad();
  x = x.detach().clone().requires_grad_(x.is_floating_point());
  const auto run = [&](auto&& fn, auto&&... inputs) {
    return checkpointed ? checkpoint(fn, inputs...) : fourfold::detail::call_block(fn, inputs...);
  };
  at::Tensor loss = model(run, x).square().mean();
  loss.backward();
  Tensors all{loss.detach()};
  if (x.requires_grad()) all.push_back(x.grad());
  for (const auto& p : module.parameters()) all.push_back(p.grad().clone());
  for (const auto& b : module.buffers()) all.push_back(b.clone());
  all.push_back(torch::rand({2}));  // the generator stands where it stood
  return all;
}
void expect_equal(const Tensors& plain, const Tensors& again) {
  ASSERT_EQ(plain.size(), again.size());
  for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(torch::equal(plain[i], again[i])) << i;
}
template <class Module, class Model>
void expect_bit_equal(Module make, Model&& model, const at::Tensor& x) {
  torch::manual_seed(0);
  auto plain = make();
  torch::manual_seed(0);
  auto again = make();
  for (int step = 0; step < 2; ++step)
    expect_equal(
        train(
            false, *plain, [&](auto& run, at::Tensor t) { return model(run, plain, t); }, x),
        train(
            true, *again, [&](auto& run, at::Tensor t) { return model(run, again, t); }, x));
}

TEST(Checkpoint, MlpWithDropoutIsBitEqual) {
  using namespace torch::nn;
  expect_bit_equal([] { return Sequential(Linear(4, 8), GELU(), Dropout(0.5), Linear(8, 3)); },
                   [](auto& run, Sequential& net, at::Tensor x) {
                     return run([&](const at::Tensor& t) { return net->forward(t); }, x);
                   },
                   torch::randn({5, 4}));
}

struct Attention : torch::nn::Module {
  Attention()
      : mha(torch::nn::MultiheadAttentionOptions(8, 2).dropout(0.3)),
        norm(torch::nn::LayerNormOptions({8})) {
    register_module("mha", mha), register_module("norm", norm);
  }
  at::Tensor forward(at::Tensor x, const at::Tensor& mask, double scale) {
    x = norm(x);
    return std::get<0>(mha(x, x, x, at::Tensor(), true, mask)) * scale;
  }
  torch::nn::MultiheadAttention mha;
  torch::nn::LayerNorm norm;
};

TEST(Checkpoint, AttentionWithAMaskAndANumberIsBitEqual) {
  const at::Tensor mask = torch::ones({6, 6}, at::kBool).triu(1);
  expect_bit_equal([] { return std::make_shared<Attention>(); },
                   [&](auto& run, std::shared_ptr<Attention>& net, at::Tensor x) {
                     x = x + run(net, x, mask, 0.5);
                     return x + run(net, x, mask, 0.25);  // a shared module
                   },
                   torch::randn({6, 2, 8}));
}

// Running statistics and num_batches_tracked are updated once; momentum by count reads the counter.
TEST(Checkpoint, BatchNormIsBitEqualAndCountsOnce) {
  using namespace torch::nn;
  for (bool by_count : {false, true}) {
    auto options = BatchNorm2dOptions(3);
    if (by_count) options.momentum(std::nullopt);
    expect_bit_equal(
        [&] {
          return Sequential(Conv2d(3, 3, 3), BatchNorm2d(options), ReLU(), Conv2d(3, 3, 3),
                            BatchNorm2d(options));
        },
        [](auto& run, Sequential& net, at::Tensor x) {
          return run([&](at::Tensor t) { return net->forward(t); }, x);
        },
        torch::randn({4, 3, 8, 8}));
  }
}

TEST(Checkpoint, NestedIsBitEqual) {
  using namespace torch::nn;
  expect_bit_equal(
      [] {
        return Sequential(Linear(4, 4), Dropout(0.3), BatchNorm1d(4), Linear(4, 4), Linear(4, 2));
      },
      [](auto& run, Sequential& net, at::Tensor x) {
        const auto child = [&](int i) {
          return [&net, i](const at::Tensor& t) {
            auto it = net->begin() + i;
            return it->template forward<at::Tensor>(t);
          };
        };
        return run(
            [&run, child](at::Tensor t) {  // backward runs it again when this scope is gone
              t = run(child(0), t).tanh();
              t = run(
                  [&run, child](at::Tensor u) {
                    return run(child(2), run(child(1), u).sin()).cos();
                  },
                  t);
              return run(child(4), child(3)(t));
            },
            x);
      },
      torch::randn({6, 4}));
}

TEST(Checkpoint, AnyMixtureOfInputsAndAnyResult) {
  const auto fn = [](const std::vector<at::Tensor>& list, std::optional<at::Tensor> maybe,
                     std::tuple<at::Tensor, int> pair, const std::string& name, const char* word,
                     at::Tensor undefined, at::Tensor index, at::Tensor& reference) {
    EXPECT_EQ(name, "name");
    EXPECT_STREQ(word, "word");
    EXPECT_FALSE(undefined.defined());
    at::Tensor first = (list[0] * list[1]).exp() * *maybe;
    at::Tensor second = std::get<0>(pair).sin() * std::get<1>(pair) + reference.cos();
    return std::make_tuple(first.index_select(0, index), std::vector<at::Tensor>{second, first}, 7);
  };
  const auto run = [&](bool checkpointed) {
    torch::manual_seed(0);
    Tensors leaves;
    for (int i = 0; i < 5; ++i) leaves.push_back(torch::randn({3}).requires_grad_());
    const std::vector<at::Tensor> list{leaves[0], leaves[1]};
    const at::Tensor index = torch::tensor({2, 0});
    auto out = checkpointed
                   ? checkpoint(fn, list, std::optional(leaves[2]), std::make_tuple(leaves[3], 3),
                                std::string("name"), "word", at::Tensor(), index, leaves[4])
                   : fn(list, leaves[2], {leaves[3], 3}, "name", "word", {}, index, leaves[4]);
    static_assert(
        std::is_same_v<decltype(out), std::tuple<at::Tensor, std::vector<at::Tensor>, int>>);
    EXPECT_EQ(std::get<2>(out), 7);
    (std::get<0>(out).sum() + std::get<1>(out)[0].sum() * std::get<1>(out)[1].sum()).backward();
    Tensors grads;
    for (auto& leaf : leaves) grads.push_back(leaf.grad());
    return grads;
  };
  expect_equal(run(false), run(true));
}

TEST(Checkpoint, TakesHoldersSharedPointersAndReferences) {
  torch::nn::Linear linear(3, 2);
  at::Tensor x = torch::randn({4, 3});
  const at::Tensor plain = linear(x);
  EXPECT_TRUE(torch::equal(checkpoint(linear, x), plain));
  EXPECT_TRUE(torch::equal(checkpoint(linear.ptr(), x), plain));
  EXPECT_TRUE(torch::equal(checkpoint(std::ref(*linear), x), plain));
  checkpoint({.early_stop = false}, linear, x).sum().backward();
  const fourfold::CheckpointOptions options{.check_determinism = true};
  checkpoint(options, linear, x).sum().backward();
  EXPECT_TRUE(torch::equal(linear->bias.grad(), torch::full({2}, 8.0)));
  int calls = 0;
  checkpoint([&](const at::Tensor&) { ++calls; }, x);  // no result, nothing saved
  EXPECT_EQ(calls, 1);
}

/// Clones what it is given; knows what lives.
struct Clones : door::SavedTensors {
  struct Held : door::Saved {
    at::Tensor copy;
    at::Tensor unpack() override { return copy; }
  };
  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    auto held = std::make_shared<Held>();
    held->copy = tensor.clone();
    held_.push_back(held);
    most = std::max(most, alive());
    return held;
  }
  std::shared_ptr<void> activate() override {
    ++active;
    return std::shared_ptr<void>(this, [](void* self) { --static_cast<Clones*>(self)->active; });
  }
  int alive() const {
    return static_cast<int>(
        std::count_if(held_.begin(), held_.end(), [](auto& h) { return !h.expired(); }));
  }
  std::vector<std::weak_ptr<Held>> held_;
  int most = 0, active = 0;
};

struct Counted {
  torch::nn::Linear a{8, 8}, b{8, 8};
  std::shared_ptr<int> forwards = std::make_shared<int>(0), tails = std::make_shared<int>(0);
  at::Tensor operator()(const at::Tensor& x) const {
    ++*forwards;
    auto self = *this;
    at::Tensor h = self.b(torch::gelu(self.a(x).tanh()));
    ++*tails;
    return h;
  }
};

TEST(Checkpoint, HoldsItsInputsAloneThroughThePackerAround) {
  auto packer = std::make_shared<Clones>();
  Counted block;
  at::Tensor x = torch::randn({4, 8}).requires_grad_();
  at::Tensor loss;
  {
    const door::SavedTensorsScope scope(packer);
    at::Tensor h = x;
    for (int layer = 0; layer < 3; ++layer) h = checkpoint(block, h);
    loss = h.sum();
    EXPECT_EQ(packer->alive(), 3);  // one input a block
  }
  packer->most = 0;
  loss.backward();
  EXPECT_EQ(packer->alive(), 0);
  // A block's second run saves tanh's output, gelu's input, two inputs of linears and two weights.
  EXPECT_LE(packer->most, 3 + 6);
  EXPECT_EQ(packer->active, 0);
  EXPECT_EQ(*block.forwards, 6);
}

TEST(Checkpoint, HoldsNothingOutsideScopesButReferences) {
  std::weak_ptr<int> captured;
  c10::weak_intrusive_ptr<c10::StorageImpl> inner = at::empty({1}).storage().getWeakStorageImpl();
  at::Tensor x = torch::randn({4}).requires_grad_(), y;
  {
    auto token = std::make_shared<int>(1);
    captured = token;
    y = checkpoint(
        [token, &inner](const at::Tensor& t) {
          at::Tensor h = t.exp();
          inner = h.storage().getWeakStorageImpl();
          return h.sin();
        },
        x);
  }
  EXPECT_TRUE(inner.expired());
  EXPECT_FALSE(captured.expired());  // the graph keeps the function
  y.sum().backward();
  EXPECT_TRUE(inner.expired());
  EXPECT_TRUE(captured.expired());  // backward released it
  y = checkpoint([](const at::Tensor& t) { return t.exp().sin(); }, x);
  y = at::Tensor();  // a graph that is never run leaves nothing either
}

TEST(Checkpoint, StopsEarly) {
  at::Tensor x = torch::randn({2, 8}).requires_grad_();
  for (bool early : {true, false}) {
    Counted block;
    checkpoint({.early_stop = early}, block, x).sum().backward();
    EXPECT_EQ(*block.forwards, 2);
    EXPECT_EQ(*block.tails, early ? 1 : 2);  // the last product is not computed again
  }
}

TEST(Checkpoint, StopsEarlyEvenWhereExceptionsAreCaught) {
  int caught = 0;
  at::Tensor x = torch::randn({3}).requires_grad_();
  checkpoint(
      [&](const at::Tensor& t) {
        at::Tensor h = t.exp();
        try {
          h = h.sin();
        } catch (const std::exception&) {
          ++caught;
        }
        return h;
      },
      x)
      .sum()
      .backward();
  EXPECT_EQ(caught, 0);
  EXPECT_TRUE(torch::allclose(x.grad(), x.detach().exp().cos() * x.detach().exp()));
}

// rrelu saves its noise before it draws it: stopping there would give garbage.
TEST(Checkpoint, DoesNotStopBeforeASavedBufferIsFilled) {
  const auto run = [](bool checkpointed) {
    torch::manual_seed(5);
    at::Tensor x = torch::randn({64}).requires_grad_();
    const auto fn = [](const at::Tensor& t) {
      return at::rrelu(t * 2, 0.1, 0.4, /*training=*/true);
    };
    (checkpointed ? checkpoint(fn, x) : fn(x)).sum().backward();
    return Tensors{x.grad()};
  };
  expect_equal(run(false), run(true));
}

TEST(Checkpoint, RandomStateIsRestoredOnRequest) {
  const auto run = [](const fourfold::CheckpointOptions& options) {
    torch::manual_seed(5);
    at::Tensor x = torch::ones({1000}).requires_grad_();
    at::Tensor y = checkpoint(
        options, [](const at::Tensor& t) { return at::dropout(t.exp(), 0.5, true) * t; }, x);
    torch::rand({3});
    y.sum().backward();
    return std::make_pair(torch::equal(y.detach().ne(0), x.grad().ne(0)),
                          torch::rand({1}).item<float>());
  };
  const auto [same, after] = run({});
  EXPECT_TRUE(same);
  torch::manual_seed(5);
  at::dropout(torch::ones({1000}), 0.5, true), torch::rand({3});
  EXPECT_EQ(after,
            torch::rand({1}).item<float>());  // the second run drew nothing from the generator
  EXPECT_FALSE(run({.preserve_random_state = false}).first);
}

TEST(Checkpoint, AutocastIsRestored) {
  torch::nn::Linear linear(8, 8);
  const auto run = [&](bool checkpointed, bool inside) {
    linear->zero_grad();
    at::Tensor x = torch::ones({4, 8}).mul(0.37).requires_grad_();
    const auto fn = [&](const at::Tensor& t) {
      at::Tensor h = linear(t);
      EXPECT_EQ(h.scalar_type(), at::kBFloat16);
      return linear(h.tanh());
    };
    auto on = door::AutocastState::current();
    on.devices[0] = {true, at::kBFloat16};
    on.cache = false;
    at::Tensor loss;
    {
      std::optional<door::AutocastGuard> autocast(std::in_place, on);
      loss = (checkpointed ? checkpoint({.early_stop = false}, fn, x) : fn(x)).to(at::kFloat).sum();
      if (!inside) autocast.reset();
      loss.backward();
    }
    EXPECT_FALSE(door::AutocastState::current().any());
    return Tensors{loss.detach(), x.grad(), linear->weight.grad().clone(),
                   linear->bias.grad().clone()};
  };
  for (bool inside : {false, true}) expect_equal(run(false, inside), run(true, inside));
}

TEST(Checkpoint, WithoutGradientsTheBlockJustRuns) {
  int runs = 0;
  at::Tensor x = torch::randn({3}).requires_grad_();
  const auto fn = [&](const at::Tensor& t) {
    ++runs;
    EXPECT_FALSE(fourfold::is_recomputing());
    return t.exp();
  };
  {
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(checkpoint(fn, x).requires_grad());
  }
  {
    const c10::InferenceMode inference;
    EXPECT_TRUE(checkpoint(fn, x).is_inference());
  }
  EXPECT_EQ(runs, 2);
  at::Tensor constant = torch::randn({3});
  EXPECT_FALSE(checkpoint(fn, constant).requires_grad());  // gradients on, none needed
}

TEST(Checkpoint, TellsThatItRecomputes) {
  std::vector<bool> told;
  at::Tensor x = torch::randn({3}).requires_grad_();
  checkpoint(
      [&](const at::Tensor& t) {
        told.push_back(fourfold::is_recomputing());
        return t.exp();
      },
      x)
      .sum()
      .backward();
  EXPECT_EQ(told, (std::vector<bool>{false, true}));
  EXPECT_FALSE(fourfold::is_recomputing());
}

TEST(Checkpoint, BackwardOnAnotherThread) {
  const auto run = [](bool checkpointed) {
    torch::manual_seed(2);
    at::Tensor x = torch::randn({100}).requires_grad_();
    const auto fn = [](const at::Tensor& t) { return at::dropout(t.exp(), 0.5, true).sin(); };
    at::Tensor y;
    std::thread([&] { y = (checkpointed ? checkpoint(fn, x) : fn(x)).sum(); }).join();
    std::thread([&] { y.backward(); }).join();
    return Tensors{x.grad(), torch::rand({1})};
  };
  expect_equal(run(false), run(true));
}

TEST(Checkpoint, ThreadsMayShareAGraph) {
  at::Tensor x = torch::randn({64, 64}).requires_grad_();
  const auto fn = [](const at::Tensor& t) { return t.matmul(t).tanh().matmul(t).sin(); };
  at::Tensor y = checkpoint({.preserve_random_state = false}, fn, x).sum();
  const at::Tensor expected = torch::autograd::grad({fn(x).sum()}, {x})[0];
  std::vector<std::thread> threads;
  std::atomic<int> equal{0};
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int j = 0; j < 5; ++j)
        equal +=
            torch::equal(torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true)[0], expected);
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(equal.load(), 20);
}
}  // namespace

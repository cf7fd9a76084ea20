// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/recompute.hpp>

#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace {

using fourfold::ActivationOptions;
using fourfold::ActivationStore;
namespace door = fourfold::door;
namespace nn = torch::nn;

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
  EXPECT_GT(store->counts().recomputed, 0);
  EXPECT_LT(store->held_bytes().peak, store->plain_bytes().peak * 3 / 4);
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_EQ(store->plain_bytes().current, 0);
}

TEST(Recompute, WithoutDropoutToo) {
  const auto store = ActivationStore::make(recompute());
  expect_equal(train(store, 5, 0.0), train(nullptr, 5, 0.0));
}

TEST(Recompute, UnderACodecWhatIsComputedAgainIsNotPacked) {
  auto options = recompute();
  fourfold::Activations<fourfold::Int4>::configure(options);
  const auto both = ActivationStore::make(options);
  options.recompute.clear();
  const auto packed = ActivationStore::make(options);
  const auto a = train(both, 3, 0.0), b = train(packed, 3, 0.0), plain = train(nullptr, 3, 0.0);
  EXPECT_TRUE(torch::equal(a.losses[0], plain.losses[0]));  // the forward is exact
  EXPECT_GT(both->counts().recomputed, 0);
  EXPECT_LT(both->held_bytes().peak, packed->held_bytes().peak);
  EXPECT_LT(packed->held_bytes().peak, packed->plain_bytes().peak / 4);
}

TEST(Recompute, ABatchNormUpdatesItsStatisticsOnce) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(0);
    nn::Conv2d first(nn::Conv2dOptions(3, 16, 3)), second(nn::Conv2dOptions(16, 4, 3));
    nn::BatchNorm2d norm(16);
    const auto x = torch::randn({8, 3, 16, 16});
    for (const bool training : {true, true, false}) {
      norm->train(training);
      const auto forward = [&] { return second(torch::silu(norm(first(x)))).square().sum(); };
      (store ? within(store, forward) : forward()).backward();
    }
    return std::vector<torch::Tensor>{norm->running_mean,        norm->running_var,
                                      norm->num_batches_tracked, first->weight.grad(),
                                      norm->weight.grad(),       second->weight.grad()};
  };
  const auto store = ActivationStore::make(recompute());
  const auto ours = run(store), plain = run(nullptr);
  for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_TRUE(torch::equal(ours[i], plain[i])) << i;
  EXPECT_GT(store->counts().recomputed, 0);
}

// relu asks one bit a value of its result, which the next convolution gets from what norm saved.
TEST(Recompute, ConvolutionNormAndReluSaveWhatTheConvolutionMade) {
  const auto store = ActivationStore::make(recompute());
  torch::manual_seed(0);
  nn::Conv2d first(nn::Conv2dOptions(8, 16, 3)), second(nn::Conv2dOptions(16, 4, 3));
  nn::BatchNorm2d norm(16);
  const auto x = torch::randn({8, 8, 32, 32});
  const auto run = [&] { return second(torch::relu(norm(first(x)))).square().sum(); };
  run().backward();
  std::vector<torch::Tensor> plain;
  for (const auto& p : {first->weight, norm->weight, second->weight}) {
    plain.push_back(p.grad().clone());
    p.mutable_grad().reset();
  }
  within(store, run).backward();
  EXPECT_TRUE(torch::equal(first->weight.grad(), plain[0]));
  EXPECT_TRUE(torch::equal(norm->weight.grad(), plain[1]));
  EXPECT_TRUE(torch::equal(second->weight.grad(), plain[2]));
  EXPECT_LT(store->held_bytes().peak, 0.7 * static_cast<double>(store->plain_bytes().peak));
}

// A list of the user's that names an operator of random numbers does not make it run again.
TEST(Recompute, WhatDrawsRandomNumbersIsNotRunAgain) {
  auto options = recompute();
  options.recompute = {"rrelu_with_noise", "bernoulli", "native_dropout", "gelu"};
  const auto store = ActivationStore::make(options);
  torch::manual_seed(0);
  const auto x = torch::randn({64, 64}, torch::requires_grad());
  const auto w = torch::randn({64, 64}, torch::requires_grad());
  at::Tensor drawn;
  const auto loss = within(store, [&] {
    drawn = at::bernoulli(torch::sigmoid(x * 1));
    return drawn.mm(w).sum();
  });
  loss.backward();
  EXPECT_EQ(store->counts().recomputed, 0) << store->explain();
  EXPECT_TRUE(torch::equal(w.grad(), drawn.detach().t().mm(torch::ones({64, 64}))));
}

/// loss = sum((op(x * 1).mm(w)).square()), and what became of op's result.
struct Case {
  const char* name;
  std::function<torch::Tensor(const torch::Tensor&)> op;
  bool recomputed;
};

TEST(Recompute, EachOperatorIsExact) {
  torch::manual_seed(0);
  const auto values = torch::randn({64, 96}), w = torch::randn({96, 32}), row = torch::randn({96});
  const auto scale = torch::rand({96}).requires_grad_(), shift = torch::rand({96}).requires_grad_();
  const auto other = torch::randn({64, 96}).requires_grad_();
  const std::vector<Case> cases{
      {"gelu", [](auto& x) { return torch::gelu(x); }, true},
      {"gelu tanh", [](auto& x) { return at::gelu(x, "tanh"); }, true},
      {"silu", [](auto& x) { return torch::silu(x); }, true},
      {"leaky_relu", [](auto& x) { return torch::leaky_relu(x, 0.1); }, true},
      {"softplus", [](auto& x) { return torch::softplus(x); }, true},
      {"hardswish", [](auto& x) { return torch::hardswish(x); }, true},
      {"mish", [](auto& x) { return torch::mish(x); }, true},
      {"layer_norm", [&](auto& x) { return at::layer_norm(x, {96}, scale, shift); }, true},
      {"rms_norm", [&](auto& x) { return at::rms_norm(x, {96}, scale); }, true},
      {"group_norm", [&](auto& x) { return at::group_norm(x, 4, scale, shift); }, true},
      {"batch_norm",
       [&](auto& x) { return at::batch_norm(x, scale, shift, {}, {}, true, 0.1, 1e-5, false); },
       true},
      {"gelu of gelu", [](auto& x) { return torch::gelu(torch::gelu(x)); }, true},
      {"four deep",
       [](auto& x) { return torch::gelu(torch::silu(torch::mish(torch::softplus(x)))); }, true},
      {"gate", [&](auto& x) { return torch::silu(x) * (x * row); }, true},
      {"dropout", [](auto& x) { return torch::dropout(torch::gelu(x), 0.3, true); }, true},
      {"own result", [](auto& x) { return torch::sigmoid(x); }, false},
      {"sum", [&](auto& x) { return x + other; }, false},
      {"relu_",
       [](auto& x) {
         auto y = x + 1;
         return torch::relu_(y);
       },
       false},
      {"relu_ of a norm",
       [&](auto& x) {
         auto y = at::layer_norm(x, {96}, scale, shift);
         return torch::relu_(y);
       },
       true},
      {"relu_ of add_ of a norm",
       [&](auto& x) {
         auto y = at::batch_norm(x, scale, shift, {}, {}, true, 0.1, 1e-5, false);
         y.add_(x, 0.5);  // which neither add_ nor who made it saved
         return torch::relu_(y);
       },
       false},
      {"in place on a piece alone",
       [&](auto& x) {
         auto y = at::layer_norm(x, {96}, scale, shift);
         y.narrow(0, 0, 8).mul_(2);
         return y;
       },
       false},
      {"in place twice over itself",
       [&](auto& x) {
         auto y = at::layer_norm(x, {96}, scale, shift);
         y.add_(y).clamp_(-1, 1);
         return y;
       },
       false},
      {"random", [](auto& x) { return torch::rrelu(x, 0.1, 0.3, true); }, false},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    const auto run = [&](const std::shared_ptr<ActivationStore>& store) {
      torch::manual_seed(1);
      const auto x = values.clone().requires_grad_();
      const auto weight = w.clone().requires_grad_();
      const auto forward = [&] { return one.op(x * 1).mm(weight).square().sum(); };
      auto loss = store ? within(store, forward) : forward();
      loss.backward({}, /*retain_graph=*/true);
      loss.backward();
      return std::pair(x.grad(), weight.grad());
    };
    const auto store = ActivationStore::make(recompute());
    const auto ours = run(store), plain = run(nullptr);
    EXPECT_TRUE(torch::equal(ours.first, plain.first));
    EXPECT_TRUE(torch::equal(ours.second, plain.second));
    EXPECT_EQ(store->counts().recomputed > 0, one.recomputed) << store->explain();
    EXPECT_LE(store->held_bytes().peak, store->plain_bytes().peak);
    EXPECT_EQ(store->held_bytes().current, 0);
  }
}

/// Packs without a loss, so that gradients tell whether the right values came back.
struct Copies {
  using Packed = fourfold::PackedAs<Copies>;
  static std::string name() { return "Copies"; }
  Packed compress(const torch::Tensor& x) const {
    return {{x.contiguous().clone()}, x.sizes().vec(), x.scalar_type()};
  }
  Packed compress(const torch::Tensor& x, fourfold::Key) const { return compress(x); }
  torch::Tensor decompress(const Packed& packed) const { return packed.buffers[0].clone(); }
  torch::Tensor error_bound(const torch::Tensor& x) const { return torch::zeros_like(x); }
};

TEST(Recompute, NoMoreOperatorsRunOneAfterTheOtherThanAreAllowed) {
  // A residual stream: each of these could be computed from the one before, and so from the first.
  const auto run = [](const std::shared_ptr<ActivationStore>& store, int writes) {
    torch::manual_seed(4);
    auto x = torch::randn({64, 64}).requires_grad_();
    const auto w = torch::randn({64, 64}).requires_grad_();
    const auto forward = [&] {
      torch::Tensor h = x * 1, sum = torch::zeros({});
      for (int block = 0; block < 6; ++block) {
        auto y = at::layer_norm(h.mm(w), {64});
        y.add_(h);
        for (int i = 0; i < writes; ++i) y.mul_(0.99);
        h = torch::relu_(y);
        sum = sum + h.sum();
      }
      return sum;
    };
    const auto loss = store ? within(store, forward) : forward();
    loss.backward();
    return w.grad();
  };
  for (const int depth : {1, 3, 4, 5, 99}) {
    ActivationOptions options = recompute();
    options.pack = fourfold::pack_with<Copies>;
    options.recompute_depth = depth;
    const auto store = ActivationStore::make(options);
    EXPECT_TRUE(torch::equal(run(store, 0), run(nullptr, 0))) << depth;
    // Norm, add_ and relu_ are three; two more for each block of which the first is not held.
    const std::int64_t in_a_row = depth < 3 ? 0 : 1 + (depth - 3) / 2;
    const std::int64_t expected = depth == 99 ? 5 : in_a_row == 0 ? 0 : 5 - 5 / (in_a_row + 1);
    EXPECT_EQ(store->counts().recomputed, expected) << depth << store->explain();
    EXPECT_EQ(store->held_bytes().current, 0);
  }
  ActivationOptions options = recompute();
  options.recompute_depth = 99;
  options.pack = fourfold::pack_with<Copies>;
  const auto store = ActivationStore::make(options);  // too many writes in place to remember
  EXPECT_TRUE(torch::equal(run(store, 100), run(nullptr, 100)));
  EXPECT_EQ(store->counts().recomputed, 0) << store->explain();
}

struct OnlySilu {
  static constexpr std::array<std::string_view, 1> kOperators{"aten::silu"};
};

TEST(Recompute, AUsersListIsTakenAsItIs) {
  ActivationOptions options;
  options.recompute = fourfold::operator_names<OnlySilu>();
  const auto store = ActivationStore::make(options);
  const auto w = torch::randn({64, 64}).requires_grad_();
  const auto x = torch::randn({64, 64}).requires_grad_();
  within(store, [&] { return torch::gelu(x * 1).mm(w).sum(); }).backward();
  EXPECT_EQ(store->counts().recomputed, 0);
  within(store, [&] { return torch::silu(x * 1).mm(w).sum(); }).backward();
  EXPECT_EQ(store->counts().recomputed, 1);
}

TEST(Recompute, AnInputWrittenInPlaceIsComputedFromBefore) {
  // gelu's result, saved by the product, is to be computed from gelu's input h, then written to.
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(2);
    const auto x = torch::randn({64, 64}).requires_grad_();
    const auto v = torch::randn({64, 64}).requires_grad_();
    const auto forward = [&] {
      torch::Tensor h = x * 2;
      const torch::Tensor product = torch::gelu(h) * v;
      h.add_(100);  // an error for gelu's own backward, not for v's gradient
      return product.sum();
    };
    const auto loss = store ? within(store, forward) : forward();
    return torch::autograd::grad({loss}, {v})[0];
  };
  const auto store = ActivationStore::make(recompute());
  EXPECT_TRUE(torch::equal(run(store), run(nullptr)));
  EXPECT_EQ(store->counts().materialised, 1) << store->explain();
}

TEST(Recompute, AWriteOutsideOfTheScopeIsAnErrorAndNotAWrongGradient) {
  const auto store = ActivationStore::make(recompute());
  const auto x = torch::randn({64, 64}).requires_grad_();
  const auto w = torch::randn({64, 64}).requires_grad_();
  torch::Tensor h;
  const auto loss = within(store, [&] {
    h = x * 2;
    return torch::gelu(h).mm(w).sum();
  });
  {
    const torch::NoGradGuard no_grad;
    h.add_(1);
  }
  std::string error;
  try {
    loss.backward();
  } catch (const c10::Error& thrown) {
    error = thrown.what_without_backtrace();
  }
  EXPECT_THAT(error, ::testing::HasSubstr("modified by an inplace operation"));
}

TEST(Recompute, AResultWrittenInPlaceIsAnotherValue) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(2);
    const auto x = torch::randn({64, 64}).requires_grad_();
    const auto w = torch::randn({64, 64}).requires_grad_();
    const auto forward = [&] {
      auto y = torch::gelu(x * 2);
      y.mul_(3).add_(x);  // legal: gelu saved its input
      auto z = torch::silu(x * 1);
      z.variable_data().add_(1);  // behind the version counter's back
      return (y.mm(w) + z.mm(w)).sum();
    };
    const auto loss = store ? within(store, forward) : forward();
    loss.backward();
    return std::pair(x.grad(), w.grad());
  };
  const auto store = ActivationStore::make(recompute());
  const auto ours = run(store), plain = run(nullptr);
  EXPECT_TRUE(torch::equal(ours.first, plain.first));
  EXPECT_TRUE(torch::equal(ours.second, plain.second));
}

// A large parameter may be written to by an optimizer before backward, and plain LibTorch would not
// mind where an addition read it. So nothing is computed from one.
TEST(Recompute, ParametersAreNotComputedFrom) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    const auto bias = torch::ones({256, 256}).requires_grad_();
    const auto w = torch::ones({256, 256}).requires_grad_();
    const auto forward = [&] { return (bias + 1).mm(w).sum(); };
    const auto loss = store ? within(store, forward) : forward();
    {
      const torch::NoGradGuard no_grad;
      bias.mul_(5);
    }
    loss.backward();
    return w.grad();
  };
  EXPECT_TRUE(torch::equal(run(ActivationStore::make(recompute())), run(nullptr)));
}

// The same for small ones, as layer_norm's: they are copied. (A large input of layer_norm is held
// by its own backward.)
TEST(Recompute, SmallParametersAreCopied) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(3);
    const auto scale = torch::rand({64}).requires_grad_(),
               w = torch::rand({64, 8}).requires_grad_();
    const auto x = torch::randn({256, 64}).requires_grad_();
    const auto forward = [&] { return torch::gelu(x * 1).add(scale).mm(w).sum(); };
    const auto loss = store ? within(store, forward) : forward();
    {
      const torch::NoGradGuard no_grad;
      scale.mul_(5);
    }
    loss.backward();
    return w.grad();
  };
  const auto store = ActivationStore::make(recompute());
  EXPECT_TRUE(torch::equal(run(store), run(nullptr)));
  EXPECT_EQ(store->counts().recomputed, 1);
}

TEST(Recompute, DoubleBackwardIsExact) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(4);
    const auto x = torch::randn({64, 64}).requires_grad_();
    const auto w = torch::randn({64, 64}).requires_grad_();
    const auto forward = [&] {
      const auto y = at::layer_norm(torch::gelu(x * 1).mm(w), {64});
      const auto gradient =
          torch::autograd::grad({y.square().sum()}, {x}, {}, /*retain_graph=*/true,
                                /*create_graph=*/true)[0];
      return gradient.square().sum() + y.sum();  // a backward in the middle of a forward
    };
    const auto loss = store ? within(store, forward) : forward();
    loss.backward();
    return std::pair(x.grad(), w.grad());
  };
  const auto ours = run(ActivationStore::make(recompute())), plain = run(nullptr);
  EXPECT_TRUE(torch::equal(ours.first, plain.first));
  EXPECT_TRUE(torch::equal(ours.second, plain.second));
}

TEST(Recompute, GradientsAreThoseOfDifferences) {
  torch::manual_seed(0);
  const auto store = ActivationStore::make(recompute());
  const auto w = torch::randn({32, 4}, torch::kDouble).requires_grad_();
  const auto values = torch::randn({40, 32}, torch::kDouble);
  const auto f = [&](const torch::Tensor& x) { return torch::gelu(x * 2).mm(w).square().sum(); };
  const auto x = values.clone().requires_grad_();
  within(store, [&] { return f(x); }).backward();
  EXPECT_GT(store->counts().recomputed, 0);
  const double h = 1e-5;  // truncation h^2, cancellation 2^-53 f / h: both far below 1e-5
  for (const auto& [i, j] : {std::pair{0, 0}, std::pair{17, 5}, std::pair{39, 31}}) {
    auto up = values.clone(), down = values.clone();
    up[i][j] += h, down[i][j] -= h;
    const double difference = (f(up) - f(down)).item<double>() / (2 * h);
    EXPECT_NEAR(x.grad()[i][j].item<double>(), difference, 1e-5 * (1 + std::abs(difference)));
  }
}

TEST(Recompute, AutocastCastsAsItDid) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(6);
    nn::LayerNorm norm(nn::LayerNormOptions({128}));
    nn::Linear up(128, 256), down(256, 128);
    const auto x = torch::randn({64, 128}).requires_grad_();
    const auto forward = [&] {
      const auto h = down(torch::gelu(up(norm(x * 1))));
      return torch::softplus(h).to(torch::kFloat).sum();  // autocast: softplus in fp32
    };
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    const auto loss = store ? within(store, forward) : forward();
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    loss.backward();
    return std::vector<torch::Tensor>{x.grad(), up->weight.grad(), down->weight.grad(),
                                      norm->weight.grad()};
  };
  const auto store = ActivationStore::make(recompute());
  const auto ours = run(store), plain = run(nullptr);
  for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_TRUE(torch::equal(ours[i], plain[i])) << i;
  EXPECT_GT(store->counts().recomputed, 1);
}

TEST(Recompute, SharedModulesAndTwoBackwards) {
  const auto run = [](const std::shared_ptr<ActivationStore>& store) {
    torch::manual_seed(7);
    nn::LayerNorm norm(nn::LayerNormOptions({64}));
    nn::Linear shared(64, 64);
    const auto x = torch::randn({64, 64}).requires_grad_();
    const auto forward = [&] {
      auto h = x * 1;
      for (int i = 0; i < 3; ++i) h = h + torch::gelu(shared(norm(h)));
      return h.sum();
    };
    const auto once = [&] { return store ? within(store, forward) : forward(); };
    const auto a = once(), b = once();
    b.backward();
    a.backward();
    return std::pair(x.grad(), shared->weight.grad());
  };
  const auto ours = run(ActivationStore::make(recompute())), plain = run(nullptr);
  EXPECT_TRUE(torch::equal(ours.first, plain.first));
  EXPECT_TRUE(torch::equal(ours.second, plain.second));
}

TEST(Recompute, TheTapeHoldsNothing) {
  const auto store = ActivationStore::make(recompute());
  const door::SavedTensorsScope scope(store);
  const auto active = store->activate();
  const c10::weak_intrusive_ptr<c10::StorageImpl> gone = [&] {
    const auto x = torch::randn({64, 64}).requires_grad_();
    const auto y = torch::gelu(x * 1) * 3;
    return y.storage().getWeakStorageImpl();
  }();
  EXPECT_TRUE(gone.expired());
  EXPECT_EQ(store->held_bytes().current, 0);
}

TEST(Recompute, BackwardElsewhereAfterEverythingIsGone) {
  const auto gradient = [](bool elsewhere) {
    torch::manual_seed(8);
    Net net(64, 1, 0.1);
    const auto x = torch::randn({4, 32, 64});
    torch::Tensor loss;
    {
      const auto store = ActivationStore::make(recompute());
      loss = within(store, [&] { return net->forward(x); });
    }
    if (elsewhere) {
      std::thread([&] { loss.backward(); }).join();
    } else {
      loss.backward();
    }
    return net->head->weight.grad().clone();
  };
  EXPECT_TRUE(torch::equal(gradient(false), gradient(true)));
}

}  // namespace

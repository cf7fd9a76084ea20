// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/checkpoint.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/support/message_of.hpp"

namespace {
namespace door = fourfold::door;
using fourfold::checkpoint;
using ::testing::HasSubstr;

at::Tensor leaf(at::IntArrayRef sizes = {4}) {
  return torch::randn(sizes, at::kDouble).requires_grad_();
}

struct Clones : door::SavedTensors {
  struct Held : door::Saved {
    at::Tensor copy;
    at::Tensor unpack() override { return copy; }
  };
  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    auto held = std::make_shared<Held>();
    held->copy = tensor.clone();
    live.push_back(held);
    return held;
  }
  int alive() const {
    return static_cast<int>(
        std::count_if(live.begin(), live.end(), [](auto& h) { return !h.expired(); }));
  }
  std::vector<std::weak_ptr<Held>> live;
};

// Rule 2: an inner block's input is saved by the outer block, so nothing is held between.
TEST(CheckpointRules, NestedBlocksHoldTheOuterInputAlone) {
  auto packer = std::make_shared<Clones>();
  at::Tensor x = leaf(), y;
  int inner_runs = 0, outer_runs = 0;
  {
    const door::SavedTensorsScope scope(packer);
    y = checkpoint(
        [&](const at::Tensor& t) {
          ++outer_runs;
          return checkpoint([&](const at::Tensor& u) { return ++inner_runs, u.exp().sin(); },
                            t.tanh());
        },
        x);
    EXPECT_EQ(packer->alive(), 1);
  }
  y.sum().backward();
  EXPECT_EQ(packer->alive(), 0);
  const at::Tensor h = x.detach().tanh();
  EXPECT_TRUE(torch::allclose(x.grad(), h.exp().cos() * h.exp() * (1 - h * h)));
  EXPECT_EQ(outer_runs, 2);
  // The outer block stops at the inner one's input, or runs it again on its way to tanh's output.
  EXPECT_LE(inner_runs, 3);
}

// Rule 4: recomputed tensors go as they are unpacked, also under retain_graph.
TEST(CheckpointRules, ASecondBackwardComputesAgain) {
  auto packer = std::make_shared<Clones>();
  at::Tensor x = leaf(), y;
  int runs = 0;
  {
    const door::SavedTensorsScope scope(packer);
    y = checkpoint([&](const at::Tensor& t) { return ++runs, t.exp().sin(); }, x).sum();
  }
  for (int pass = 1; pass <= 3; ++pass) {
    x.mutable_grad() = at::Tensor();
    y.backward({}, /*retain_graph=*/true);
    EXPECT_EQ(runs, 1 + pass);
    EXPECT_EQ(packer->alive(), 1);  // the input
    EXPECT_TRUE(torch::equal(
        x.grad(), x.detach().exp().sin().mul(0) + x.detach().exp().cos() * x.detach().exp()));
  }
  y = at::Tensor();
  EXPECT_EQ(packer->alive(), 0);
}

TEST(CheckpointRules, APartialBackwardLeavesNothingBehind) {
  auto packer = std::make_shared<Clones>();
  at::Tensor x = leaf(), a, b;
  {
    const door::SavedTensorsScope scope(packer);
    std::tie(a, b) =
        checkpoint([](const at::Tensor& t) { return std::make_tuple(t.exp(), t.sin()); }, x);
  }
  a.sum().backward({}, /*retain_graph=*/true);
  EXPECT_EQ(packer->alive(), 1);
  b.sum().backward();
  a = at::Tensor(), b = at::Tensor();
  EXPECT_EQ(packer->alive(), 0);
  EXPECT_TRUE(torch::allclose(x.grad(), x.detach().exp() + x.detach().cos()));
}

// Reading twice in one pass, as a custom function may, computes again rather than fail.
TEST(CheckpointRules, UnpackingTwiceInOnePass) {
  struct Twice : torch::autograd::Function<Twice> {
    static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
      ctx->save_for_backward({x});
      return x.exp();
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   torch::autograd::variable_list grads) {
      const at::Tensor a = ctx->get_saved_variables()[0], b = ctx->get_saved_variables()[0];
      EXPECT_TRUE(torch::equal(a, b));
      return {grads[0] * (a + b).div(2).exp()};
    }
  };
  at::Tensor x = leaf();
  checkpoint([](const at::Tensor& t) { return Twice::apply(t.sin()).cos(); }, x).sum().backward();
  const at::Tensor s = x.detach().sin().exp();
  EXPECT_TRUE(torch::allclose(x.grad(), -s.sin() * s * x.detach().cos()));
}

TEST(CheckpointRules, SavedTensorsReadOutsideOfBackward) {
  static torch::autograd::AutogradContext* context = nullptr;
  struct Open : torch::autograd::Function<Open> {
    static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
      ctx->save_for_backward({x});
      if (!fourfold::is_recomputing()) context = ctx;
      return x.clone();
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                   torch::autograd::variable_list grads) {
      return grads;
    }
  };
  at::Tensor x = leaf();
  at::Tensor y = checkpoint([](const at::Tensor& t) { return Open::apply(t.sin()).exp(); }, x);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(torch::equal(context->get_saved_variables()[0], x.sin()));
  y.sum().backward();
  EXPECT_TRUE(torch::allclose(x.grad(), x.detach().sin().exp() * x.detach().cos()));
}

// Rule 6, the first example of torch/utils/checkpoint.py.
TEST(CheckpointRules, BackwardInsideTheBlockRetaining) {
  for (bool early : {true, false}) {
    at::Tensor x = leaf();
    at::Tensor out = checkpoint(
        {.early_stop = early},
        [](const at::Tensor& t) {
          at::Tensor y = t.sin(), z = y.cos();
          at::Tensor g = torch::autograd::grad({z.sum()}, {t}, {}, /*retain_graph=*/true)[0];
          return g.detach() * z;
        },
        x);
    out.sum().backward();
    const at::Tensor s = x.detach().sin();
    const at::Tensor g = -s.sin() * x.detach().cos();
    EXPECT_TRUE(torch::allclose(out, g * s.cos()));
    EXPECT_TRUE(torch::allclose(x.grad(), g * g)) << early;
  }
}

// Rule 6, the second: what the inner backward freed is skipped.
TEST(CheckpointRules, BackwardInsideTheBlockFreeing) {
  for (bool early : {true, false}) {
    at::Tensor x = leaf();
    checkpoint(
        {.early_stop = early},
        [](const at::Tensor& t) {
          at::Tensor z = t.sin().cos();
          at::Tensor g = torch::autograd::grad({z.sum()}, {t})[0];
          return t.cos() * g;
        },
        x)
        .sum()
        .backward();
    const at::Tensor v = x.detach(), g = -v.sin().sin() * v.cos();
    EXPECT_TRUE(torch::allclose(x.grad(), -v.sin() * g)) << early;
  }
}

TEST(CheckpointRules, DoubleBackward) {
  at::Tensor x = leaf({3});
  const auto fn = [](const torch::autograd::variable_list& in) {
    return checkpoint([](const at::Tensor& t) { return (t.sin() * t).exp().tanh(); }, in[0]);
  };
  at::Tensor y = fn({x}).sum();
  at::Tensor g = torch::autograd::grad({y}, {x}, {}, true, /*create_graph=*/true)[0];
  at::Tensor gg = torch::autograd::grad({g.sum()}, {x})[0];
  const auto plain = [](const at::Tensor& t) { return (t.sin() * t).exp().tanh(); };
  at::Tensor pg = torch::autograd::grad({plain(x).sum()}, {x}, {}, true, true)[0];
  EXPECT_TRUE(torch::equal(g.detach(), pg.detach()));
  EXPECT_TRUE(torch::equal(gg, torch::autograd::grad({pg.sum()}, {x})[0]));
}

TEST(CheckpointRules, ABlockThatThrowsInItsForwardLeavesNothing) {
  auto packer = std::make_shared<Clones>();
  at::Tensor x = leaf();
  {
    const door::SavedTensorsScope scope(packer);
    EXPECT_THROW(checkpoint(
                     [](const at::Tensor& t) -> at::Tensor {
                       t.exp();
                       throw std::runtime_error("broken");
                     },
                     x),
                 std::runtime_error);
    EXPECT_EQ(door::current_saved_tensors(), packer);
  }
  EXPECT_EQ(packer->alive(), 0);
  checkpoint([](const at::Tensor& t) { return t.exp(); }, x).sum().backward();
  EXPECT_TRUE(torch::equal(x.grad(), x.detach().exp()));
}

TEST(CheckpointRules, ABlockThatThrowsWhenRunAgainLeavesNothing) {
  auto packer = std::make_shared<Clones>();
  at::Tensor x = leaf(), y;
  bool broken = true;
  {
    const door::SavedTensorsScope scope(packer);
    y = checkpoint(
            [&](const at::Tensor& t) {
              at::Tensor h = t.exp();
              if (broken && fourfold::is_recomputing()) throw std::runtime_error("broken");
              return h.sin();
            },
            x)
            .sum();
  }
  const at::Tensor drawn = torch::rand({1});
  EXPECT_THROW(y.backward({}, true), std::runtime_error);
  EXPECT_EQ(packer->alive(), 1);
  EXPECT_FALSE(fourfold::is_recomputing());
  EXPECT_EQ(door::current_saved_tensors(), nullptr);
  broken = false;
  y.backward();
  EXPECT_EQ(packer->alive(), 0);
  EXPECT_TRUE(torch::allclose(x.grad(), x.detach().exp().cos() * x.detach().exp()));
}

TEST(CheckpointRules, AnotherNumberOfTensorsIsNamed) {
  at::Tensor x = leaf();
  const auto run = [&](const fourfold::CheckpointOptions& options, bool more) {
    return message_of([&] {
      checkpoint(
          options,
          [&](const at::Tensor& t) {
            at::Tensor h = t.exp();
            if (more == fourfold::is_recomputing()) h = h.sin();
            return h.mul(2);
          },
          x)
          .sum()
          .backward();
    });
  };
  EXPECT_THAT(
      run({}, false),
      HasSubstr("saved fewer tensors when it was computed again (1) than in its forward (2)"));
  EXPECT_THAT(run({}, false), HasSubstr("must do the same each time it runs"));
  EXPECT_THAT(run({.early_stop = false}, true),
              HasSubstr("saved more tensors when it was computed again than in its forward, which "
                        "saved 1; the next "
                        "one is Double[4] on cpu"));
  EXPECT_EQ(run({}, true), "no error");  // stopped before
}

TEST(CheckpointRules, AnotherShapeOrTypeIsNamed) {
  at::Tensor x = leaf({2, 3});
  const auto run = [&](auto&& change) {
    return message_of([&] {
      checkpoint(
          [&](const at::Tensor& t) {
            at::Tensor h = t.exp();
            return fourfold::is_recomputing() ? change(h).sin() : h.sin();
          },
          x)
          .sum()
          .backward();
    });
  };
  EXPECT_THAT(
      run([](const at::Tensor& h) { return h.narrow(1, 0, 2); }),
      HasSubstr(
          "saved tensor 1 of a block came back different when the block was computed again: it is "
          "Double[2, 2] on cpu, its forward saved Double[2, 3] on cpu"));
  EXPECT_THAT(run([](const at::Tensor& h) { return h.to(at::kFloat); }),
              HasSubstr("it is Float[2, 3] on cpu"));
}

TEST(CheckpointRules, OtherValuesAreNoticedOnRequest) {
  at::Tensor x = leaf();
  const auto run = [&](const fourfold::CheckpointOptions& options, double change) {
    return message_of([&] {
      checkpoint(
          options,
          [&](const at::Tensor& t) {
            return (fourfold::is_recomputing() ? t + change : t + 0.0).exp().sin();
          },
          x)
          .sum()
          .backward();
    });
  };
  EXPECT_EQ(run({}, 0.1), "no error");
  EXPECT_EQ(run({.check_determinism = true}, 0.0), "no error");
  EXPECT_THAT(run({.check_determinism = true}, 0.1), HasSubstr("on cpu (values hash to "));
}

TEST(CheckpointRules, WritingToAReferencedInputIsLibTorchsError) {
  at::Tensor x = leaf();
  at::Tensor h = x * 1;
  at::Tensor y = checkpoint([](const at::Tensor& t) { return (t + 1).exp(); }, h);
  h.add_(1);
  const std::string message = message_of([&] { y.sum().backward(); });
  EXPECT_THAT(message, HasSubstr("modified by an inplace operation: [CPUDoubleType [4]]"));
  EXPECT_THAT(message, HasSubstr("It is input 0 of a fourfold::checkpoint"));
  EXPECT_THAT(message, HasSubstr("hand a clone of it"));
}

TEST(CheckpointRules, CopiedInputsMayBeWrittenToAlsoByTheBlock) {
  auto packer = std::make_shared<Clones>();
  const auto run = [&](bool checkpointed) {
    std::optional<door::SavedTensorsScope> scope;
    if (checkpointed) scope.emplace(packer);
    torch::manual_seed(0);
    at::Tensor x = leaf();
    at::Tensor h = x * 1;
    const auto fn = [](at::Tensor t) { return t.mul_(3).exp().sin(); };
    at::Tensor y = (checkpointed ? checkpoint(fn, h) : fn(h)).sum();
    y.backward({}, true), y.backward();
    return x.grad();
  };
  EXPECT_TRUE(torch::equal(run(false), run(true)));
}

TEST(CheckpointRules, WritingInPlaceWithinTheBlock) {
  const auto run = [&](bool checkpointed) {
    torch::manual_seed(0);
    at::Tensor x = leaf();
    const auto fn = [](const at::Tensor& t) {
      at::Tensor h = t * 2;
      h.relu_();
      h.mul_(t);
      return h.sigmoid_();
    };
    (checkpointed ? checkpoint(fn, x) : fn(x)).sum().backward();
    return x.grad();
  };
  const std::string plain = message_of([&] { run(false); });
  EXPECT_THAT(plain, HasSubstr("modified by an inplace operation"));  // mul_ needs what relu_ saved
  EXPECT_THAT(message_of([&] { run(true); }), HasSubstr("modified by an inplace operation"));
}

// Buffers beside the result: written once, and the second run reads what the first one read.
TEST(CheckpointRules, StateWrittenInPlaceIsWrittenOnce) {
  const auto run = [](bool checkpointed) {
    torch::manual_seed(0);
    at::Tensor x = leaf();
    at::Tensor mean = torch::zeros({4}, at::kDouble), count = torch::zeros({}, at::kLong);
    at::Tensor out = torch::zeros({4}, at::kDouble);
    const auto fn = [&](const at::Tensor& t) {
      at::Tensor h = (t - mean).exp();
      {
        const at::NoGradGuard no_grad;
        count += 1;
        mean.mul_(0.9).add_(t, 0.1);
        mean.narrow(0, 0, 2).mul_(2);
        at::add_out(out, mean, mean);
      }
      return h.sin() * count.clone();
    };
    at::Tensor h = x;
    for (int i = 0; i < 3; ++i) h = checkpointed ? checkpoint({.early_stop = false}, fn, h) : fn(h);
    h.sum().backward();
    return std::vector<at::Tensor>{x.grad(), mean, count, out};
  };
  const auto plain = run(false), again = run(true);
  for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(torch::equal(plain[i], again[i])) << i;
}

TEST(CheckpointRules, StateOfTheFunctionItselfStartsAgain) {
  struct Counter {
    int calls = 0;
    at::Tensor operator()(const at::Tensor& t) {
      ++calls;
      return (t * calls).exp() * calls;
    }
  };
  at::Tensor x = leaf();
  checkpoint(Counter{}, x).sum().backward();
  EXPECT_TRUE(torch::equal(x.grad(), x.detach().exp()));
}
}  // namespace

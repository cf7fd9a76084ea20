// SPDX-License-Identifier: Apache-2.0
/// A block's second run ends before an operator whose result is computed again anyway: the same
/// gradients, to the bit, as of one that runs it, in less memory.
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/activations/recompute.hpp>
#include <fourfold/activations/store.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/pipeline.hpp>
#include <fourfold/report/meter.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../support/message_of.hpp"
#include "../support/within.hpp"

namespace {

using fourfold::ActivationOptions, fourfold::ActivationStore, fourfold::CheckpointOptions;
using fourfold::Int4, fourfold::Int8;
namespace door = fourfold::door;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

ActivationOptions options(bool rounds) {
  ActivationOptions made;
  if (rounds)
    made.pack = fourfold::pack_with<Int4>, made.pack_sensitive = fourfold::pack_with<Int8>;
  made.recompute = fourfold::operator_names<fourfold::CheapOps>();
  return made;
}

/// A store that foresees nothing: second runs make what their blocks saved last.
struct Blind final : door::SavedTensors {
  explicit Blind(std::shared_ptr<ActivationStore> of) : store(std::move(of)) {}
  std::shared_ptr<door::Saved> pack(const Tensor& tensor) override { return store->pack(tensor); }
  std::shared_ptr<door::Saved> pack_attached(const Tensor& tensor,
                                             const Tensor& attached) override {
    return store->pack_attached(tensor, attached);
  }
  std::shared_ptr<door::Saved> pack_block_input(const Tensor& tensor,
                                                const Tensor& attached) override {
    return store->pack_block_input(tensor, attached);
  }
  std::shared_ptr<void> activate() override { return store->activate(); }
  const std::shared_ptr<ActivationStore> store;
};

template <class Fn>
auto within_blind(const std::shared_ptr<ActivationStore>& store, Fn&& fn) {
  const door::SavedTensorsScope scope(std::make_shared<Blind>(store));
  const std::shared_ptr<void> active = store->activate();
  return fn();
}

struct Leaves {
  Tensor x, up, gate, down, scale;
  explicit Leaves(std::int64_t tokens = 128, std::int64_t width = 32) {
    torch::manual_seed(1);
    x = torch::randn({tokens, width}).requires_grad_();
    const auto weight = [](at::IntArrayRef sizes) {
      return torch::randn(sizes).div_(8).requires_grad_();
    };
    up = weight({width, 4 * width}), gate = weight({width, 4 * width});
    down = weight({4 * width, width}), scale = weight({4 * width});
  }
  Tensors gradients() const {
    Tensors all;
    for (const Tensor& leaf : {x, up, gate, down, scale})
      all.push_back(leaf.grad().defined() ? leaf.grad().clone() : Tensor());
    return all;
  }
};
void expect_equal(const Tensors& a, const Tensors& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].defined(), b[i].defined()) << i;
    EXPECT_TRUE(!a[i].defined() || a[i].equal(b[i])) << i;
  }
}

/// `made()` is called when what the block saves last has been made.
using Made = std::function<void()>;
struct Block {
  const char* name;
  bool stops;  ///< before that
  std::function<Tensor(const Tensor& x, const Leaves&, const Made& made)> forward;
};
const std::vector<Block>& blocks() {
  static const std::vector<Block> all{
      {"gelu", true,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::gelu(x.mm(w.up));
         return made(), y.mm(w.down);
       }},
      {"three_dimensions", true,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::silu(torch::linear(x.view({4, -1, x.size(1)}), w.up.t()));
         return made(), torch::linear(y, w.down.t(), x.detach()[0]);
       }},
      {"gated", true,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::silu(x.mm(w.gate)) * x.mm(w.up);
         return made(), y.mm(w.down);
       }},
      {"dropout_before", true,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::gelu(torch::dropout(x.mm(w.up), 0.25, true));
         return made(), y.mm(w.down);
       }},
      {"dropout", true,  // a product with the noise, which it saves
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::dropout(torch::gelu(x.mm(w.up)), 0.25, true);
         return made(), y.mm(w.down);
       }},
      {"scaled", true,  // by a parameter, which is saved between what is scaled and the product
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::gelu(x.mm(w.up)) * w.scale;
         return made(), torch::addmm(w.scale.narrow(0, 0, x.size(1)), y, w.down);
       }},
      {"saved_twice", false,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::gelu(x.mm(w.up));
         return made(), y.mm(w.up.t()) + y.mm(w.down);
       }},
      {"dropout_behind", false,  // whose noise is saved last
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::gelu(x.mm(w.up));
         return made(), torch::dropout(y.mm(w.down), 0.25, true);
       }},
      {"written_to", false,
       [](auto& x, auto& w, auto& made) {
         Tensor y = torch::gelu(x.mm(w.up));
         y.mul_(2);
         return made(), y.mm(w.down);
       }},
      {"input_written_to", false,  // of the product; what the product was computed from is held
       [](auto& x, auto& w, auto& made) {
         Tensor z = torch::gelu(x.mm(w.up));
         const Tensor y = z * w.x.detach().repeat({1, 4});
         z.add_(1);
         return made(), y.mm(w.down);
       }},
      {"another_gelu", false,  // of a parameter, which is not saved last before it
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::gelu(w.gate), z = torch::gelu(x.mm(w.up));
         return made(), z.sum() + y.sin().sum();
       }},
      {"not_cheap", false,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = x.mm(w.up).sin();
         return made(), y.mm(w.down);
       }},
      {"statistics_behind", false,
       [](auto& x, auto& w, auto& made) {
         const Tensor y = torch::layer_norm(torch::gelu(x.mm(w.up)).mm(w.down), {x.size(1)});
         return made(), y * 2;
       }},
  };
  return all;
}

struct Outcome {
  Tensors values;  ///< loss and gradients
  int made = 0;
};
/// Twice in one model, so that gradients run through a block.
Outcome train(
    const Block& block, bool rounds, bool blind, const CheckpointOptions& how = {},
    const std::function<void(const Tensor&)>& backward = [](auto& l) { l.backward(); }) {
  Leaves leaves;
  Outcome outcome;
  const auto store = ActivationStore::make(options(rounds));
  const auto again = [&](const Tensor& x) {
    return block.forward(x, leaves, [&] { ++outcome.made; });
  };
  const auto forward = [&] {
    torch::manual_seed(2);
    const Tensor x = leaves.x * 1;
    const Tensor y = fourfold::checkpoint(how, again, x);
    return fourfold::checkpoint(how, again, y.dim() == 0 ? x * y : y.reshape_as(x)).square().mean();
  };
  const Tensor loss = blind ? within_blind(store, forward) : within(store, forward);
  backward(loss);
  outcome.values = leaves.gradients();
  outcome.values.push_back(loss.detach());
  return outcome;
}

TEST(Foreseen, ABlockStopsBeforeAResultThatIsComputedAgain) {
  for (const Block& block : blocks())
    for (const bool rounds : {false, true}) {
      SCOPED_TRACE(std::string(block.name) + (rounds ? " rounded" : " exact"));
      const Outcome stopped = train(block, rounds, /*blind=*/false);
      const Outcome ran = train(block, rounds, /*blind=*/true);
      EXPECT_EQ(ran.made, 4);
      EXPECT_EQ(stopped.made, block.stops ? 2 : 4);
      expect_equal(stopped.values, ran.values);  // the same codes, too
    }
}

TEST(Foreseen, ExactModesAreThePlainRunToTheBit) {
  for (const Block& block : blocks()) {
    SCOPED_TRACE(block.name);
    const Outcome stopped = train(block, /*rounds=*/false, /*blind=*/false);
    Leaves leaves;
    torch::manual_seed(2);
    const Tensor x = leaves.x * 1, y = block.forward(x, leaves, [] {});
    const Tensor loss =
        block.forward(y.dim() == 0 ? x * y : y.reshape_as(x), leaves, [] {}).square().mean();
    loss.backward();
    Tensors plain = leaves.gradients();
    plain.push_back(loss.detach());
    expect_equal(stopped.values, plain);
  }
}

TEST(Foreseen, AnyKindOfBackward) {
  const auto twice = [](const Tensor& loss) {
    loss.backward({}, /*retain_graph=*/true);
    loss.backward();
  };
  const auto on_a_thread = [](const Tensor& loss) { std::thread([&] { loss.backward(); }).join(); };
  for (const Block& block : blocks())
    for (const bool rounds : {false, true}) {
      SCOPED_TRACE(std::string(block.name) + (rounds ? " rounded" : " exact"));
      const Outcome again = train(block, rounds, /*blind=*/false, {}, twice);
      expect_equal(again.values, train(block, rounds, /*blind=*/true, {}, twice).values);
      EXPECT_EQ(again.made, block.stops ? 2 : 6);
      const Outcome there = train(block, rounds, /*blind=*/false, {}, on_a_thread);
      expect_equal(there.values, train(block, rounds, /*blind=*/true, {}, on_a_thread).values);
      EXPECT_EQ(there.made, block.stops ? 2 : 4);
    }
}

TEST(Foreseen, SecondGradients) {
  for (const bool rounds : {false, true}) {
    const auto second = [&](bool blind) {
      Leaves leaves;
      const auto store = ActivationStore::make(options(rounds));
      const auto forward = [&] {
        const auto block = [&](const Tensor& x) {
          return torch::gelu(x.mm(leaves.up)).mm(leaves.down);
        };
        return fourfold::checkpoint(block, leaves.x * 1).square().mean();
      };
      const Tensor loss = blind ? within_blind(store, forward) : within(store, forward);
      const Tensor g = torch::autograd::grad({loss}, {leaves.x}, {}, {}, /*create_graph=*/true)[0];
      return torch::autograd::grad({g.square().sum()}, {leaves.x, leaves.up, leaves.down});
    };
    expect_equal(second(false), second(true));
  }
}

TEST(Foreseen, NotWhereSomebodyAsksForTheWholeRun) {
  const Block& gelu = blocks().front();
  for (const CheckpointOptions& how :
       {CheckpointOptions{.early_stop = false}, CheckpointOptions{.check_determinism = true},
        CheckpointOptions{.reference_recomputed = true}}) {
    const Outcome outcome = train(gelu, /*rounds=*/false, /*blind=*/false, how);
    EXPECT_EQ(outcome.made, 4);
    expect_equal(outcome.values, train(gelu, false, false).values);
  }
}

/// A logarithm's argument bears no rounding: it is not computed again from what was rounded.
TEST(Foreseen, NotFromRoundedValuesWhereTheSaverBearsNone) {
  const Block log{"log", true, [](auto& x, auto& w, auto& made) {
                    const Tensor y = torch::softplus(x.mm(w.up));
                    return made(), (y.log() + 1).mean();
                  }};
  EXPECT_EQ(train(log, /*rounds=*/false, /*blind=*/false).made, 2);
  const Outcome rounded = train(log, /*rounds=*/true, /*blind=*/false);
  EXPECT_EQ(rounded.made, 4);
  expect_equal(rounded.values, train(log, true, true).values);
}

TEST(Foreseen, NotWhatIsKeptOnDemandNorWhatIsSmall) {
  for (const bool small : {false, true}) {
    Leaves leaves;
    ActivationOptions kept = options(true);
    if (small) kept.min_numel = 1 << 20;
    if (!small) kept.keep = [](const Tensor& tensor) { return tensor.size(-1) == 128; };
    const auto store = ActivationStore::make(std::move(kept));
    int made = 0;
    const auto block = [&](const Tensor& x) {
      return blocks().front().forward(x, leaves, [&] { ++made; });
    };
    within(store, [&] { return fourfold::checkpoint(block, leaves.x * 1).sum(); }).backward();
    EXPECT_EQ(made, 2);
  }
}

TEST(Foreseen, NestedBlocks) {
  const auto train = [](bool blind) {
    Leaves leaves;
    const auto store = ActivationStore::make(options(true));
    const auto feed_forward = [&](const Tensor& x) {
      return torch::gelu(x.mm(leaves.up)).mm(leaves.down);
    };
    const auto outer = [&](const Tensor& x) {
      const Tensor y = x + fourfold::checkpoint(feed_forward, x.tanh());
      return y + fourfold::checkpoint(feed_forward, torch::gelu(y));
    };
    const auto forward = [&] {
      return fourfold::checkpoint(outer, fourfold::checkpoint(outer, leaves.x * 1)).square().sum();
    };
    (blind ? within_blind(store, forward) : within(store, forward)).backward();
    EXPECT_EQ(store->held_bytes().current, 0);
    return leaves.gradients();
  };
  expect_equal(train(false), train(true));
}

TEST(Foreseen, ABlockThatDoesAnotherThingIsNamedAndLeavesNothing) {
  enum class Other { kShape, kOperator, kThrows, kNone };
  Leaves leaves;
  const auto store = ActivationStore::make(options(true));
  const auto step = [&](Other other) {
    const Tensor loss = within(store, [&] {
      const auto block = [&, other](const Tensor& x) {
        const bool second = fourfold::is_recomputing();
        const Tensor z = x.mm(leaves.up);
        if (second && other == Other::kThrows) throw std::runtime_error("stop");
        if (second && other == Other::kOperator) return torch::silu(z).mm(leaves.down);
        if (second && other == Other::kShape)
          return (torch::gelu(z.narrow(0, 0, 64))).mm(leaves.down);
        return torch::gelu(z).mm(leaves.down);
      };
      return fourfold::checkpoint(block, leaves.x * 1).sum();
    });
    loss.backward();
  };
  EXPECT_THROW(step(Other::kThrows), std::runtime_error);
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_THAT(message_of([&] { step(Other::kShape); }),
              testing::HasSubstr("came back different when the block was computed again"));
  EXPECT_EQ(store->held_bytes().current, 0);
  step(Other::kOperator);  // as without us: values are compared on request alone
  step(Other::kNone);
  EXPECT_EQ(store->held_bytes().current, 0);
}

/// Run to its end it needs what gelu reads and its result; stopped, what gelu reads (and backward then
/// gelu's gradient), beside the block's input, the gradient that came and codes: at most a quarter of
/// such a buffer each.
TEST(Foreseen, ASecondRunNeedsOneBufferOfTheLayersWidthLess) {
  const fourfold::Meter meter;
  constexpr std::int64_t kTokens = 2048, kWidth = 128, kBuffer = kTokens * 4 * kWidth * 4;
  const auto second_run = [&](bool blind) {
    Leaves leaves(kTokens, kWidth);
    const auto store = ActivationStore::make(options(true));
    Tensor y;
    const auto forward = [&] {
      const auto block = [&](const Tensor& x) {
        return blocks().front().forward(x, leaves, [] {});
      };
      y = fourfold::checkpoint(block, leaves.x * 1);
      return 0;
    };
    blind ? within_blind(store, forward) : within(store, forward);
    // The loss stands beside: what is freed when backward has begun covers nothing.
    std::int64_t before = 0;
    y.register_hook([&](const Tensor&) { meter.restart_peak(), before = meter.bytes().current; });
    torch::autograd::grad({y.sum()}, {leaves.x});
    return meter.bytes().peak - before;
  };
  EXPECT_GE(second_run(/*blind=*/true), 2 * kBuffer + kBuffer / 4);
  EXPECT_LE(second_run(/*blind=*/false), kBuffer + 3 * (kBuffer / 4));
}

/// A model of everything: dropout, in-place operators, a shared module, running statistics.
struct FeedForwardImpl : torch::nn::Module {
  FeedForwardImpl() {
    up = register_module("up", torch::nn::Linear(32, 128));
    norm = register_module("norm", torch::nn::BatchNorm1d(32));
    down = register_module("down", torch::nn::Linear(128, 32));
  }
  Tensor forward(const Tensor& x) {
    const Tensor y = torch::gelu(up(torch::dropout(norm(x).relu_(), 0.1, is_training())));
    ++calls;
    return down(y).add_(x);
  }
  torch::nn::Linear up{nullptr}, down{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  int calls = 0;
};
TORCH_MODULE(FeedForward);
struct NetImpl : torch::nn::Module {
  NetImpl() {
    first = register_module("first", FeedForward()),
    shared = register_module("shared", FeedForward());
  }
  Tensor forward(Tensor x) {
    x = fourfold::block(first, x * 1);
    x = fourfold::block(shared, x);
    return fourfold::block(shared, x);
  }
  FeedForward first{nullptr}, shared{nullptr};
};
TORCH_MODULE(Net);

template <class Pipeline>
Tensors twenty_steps(int& calls) {
  torch::manual_seed(3);
  Net net;
  auto pipeline = Pipeline(*net);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
  const Tensor x = torch::randn({64, 32}), target = torch::randn({64, 32});
  Tensors values;
  for (int step = 0; step < 20; ++step) {
    optimizer->zero_grad();
    const Tensor loss = pipeline.forward([&] { return torch::mse_loss(net->forward(x), target); });
    loss.backward({}, /*retain_graph=*/step % 4 == 3);
    if (step % 4 == 3) loss.backward();
    optimizer->step();
    values.push_back(loss.detach());
  }
  for (const auto& parameter : net->parameters())
    values.push_back(parameter.detach()), values.push_back(parameter.grad());
  for (const auto& buffer : net->buffers()) values.push_back(buffer);
  calls = net->first->calls + net->shared->calls;
  return values;
}
TEST(Foreseen, TwentyStepsAreThoseOfPlainLibTorch) {
  using namespace fourfold;
  int plain_calls = 0, calls = 0;
  const Tensors plain = twenty_steps<CompressionPipeline<>>(plain_calls);
  const Tensors blocks = twenty_steps<CompressionPipeline<Recompute<CheapOps>, Blocks<>>>(calls);
  EXPECT_EQ(plain_calls, 60);
  EXPECT_EQ(calls, 60);  // no second run got behind gelu
  expect_equal(plain, blocks);
}

}  // namespace

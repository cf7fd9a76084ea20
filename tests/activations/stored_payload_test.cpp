// SPDX-License-Identifier: Apache-2.0
/// Saved tensors that backward reads in pieces: the same gradients as read whole, in less memory, and
/// plain values for whoever may ask for them.
#include <fourfold/activations/blocks.hpp>
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/activations/recompute.hpp>
#include <fourfold/activations/store.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/report/meter.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <thread>

#include "../support/message_of.hpp"
#include "../support/within.hpp"

namespace {

using fourfold::ActivationOptions, fourfold::ActivationStore, fourfold::Int4, fourfold::Int8;
namespace door = fourfold::door;
using torch::Tensor;

std::shared_ptr<ActivationStore> store(bool recompute = true) {
  ActivationOptions options;
  options.pack = fourfold::pack_with<Int4>;
  options.pack_sensitive = fourfold::pack_with<Int8>;
  if (recompute) options.recompute = fourfold::operator_names<fourfold::CheapOps>();
  return ActivationStore::make(std::move(options));
}

class StoredPayload : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(0);
    before_ = door::parameters_state().piece.exchange(kPiece);
  }
  void TearDown() override { door::parameters_state().piece = before_; }
  static void read_whole() { door::parameters_state().piece = std::int64_t{1} << 60; }
  static void read_in_pieces() { door::parameters_state().piece = kPiece; }
  static constexpr std::int64_t kPiece = 4096;

 private:
  std::int64_t before_ = 0;
};

/// Layers whose nodes read in pieces, alone and in rows.
struct Net {
  const char* name;
  std::function<Tensor(const Tensor& x, const std::vector<Tensor>& weights)> forward;
};
const std::vector<Net>& nets() {
  static const std::vector<Net> all{
      {"gelu",
       [](auto& x, auto& w) { return torch::gelu(x.mm(w[0])).mm(w[0].t()).square().mean(); }},
      {"silu",
       [](auto& x, auto& w) { return torch::silu(x.mm(w[0])).mm(w[0].t()).square().mean(); }},
      {"gated",
       [](auto& x, auto& w) {
         return (torch::silu(x.mm(w[0])) * x.mm(w[1])).mm(w[0].t()).square().mean();
       }},
      {"relu",
       [](auto& x, auto& w) { return torch::relu(x.mm(w[0])).mm(w[0].t()).square().mean(); }},
      {"layer_norm",
       [](auto& x, auto& w) {
         const Tensor y = torch::layer_norm(x + x.mm(w[0]).mm(w[0].t()), {x.size(1)}, w[2], w[3]);
         return torch::addmm(w[5], y, w[0]).square().mean();
       }},
      {"softmax",
       [](auto& x, auto& w) {
         return (torch::softmax(x.mm(w[0]), -1).mm(w[0].t()) * x).square().sum();
       }},
      {"log_softmax",
       [](auto& x, auto& w) { return torch::log_softmax(x.mm(w[0]), -1).square().mean(); }},
      {"tied",
       [](auto& x, auto& w) {
         const Tensor y = torch::gelu(x.mm(w[0]));
         return (y.mm(w[0].t()) + y.mm(w[1].t())).square().mean();
       }},
      {"three_dimensions",
       [](auto& x, auto& w) {
         const Tensor y = x.view({4, -1, x.size(1)});
         return torch::linear(torch::gelu(torch::linear(y, w[0].t(), w[4])), w[0]).square().mean();
       }},
  };
  return all;
}

struct Leaves {
  std::vector<Tensor> weights;
  Tensor x;
  explicit Leaves(at::ScalarType dtype = torch::kFloat) {
    torch::manual_seed(1);
    x = torch::randn({256, 64}).to(dtype).requires_grad_();
    const auto weight = [&](at::IntArrayRef sizes) {
      weights.push_back((torch::randn(sizes) / 8).to(dtype).requires_grad_());
    };
    weight({64, 256}), weight({64, 256}), weight({64}), weight({64}), weight({256}), weight({256});
  }
  std::vector<Tensor> gradients() const {
    std::vector<Tensor> out{x.grad()};
    for (const Tensor& weight : weights) out.push_back(weight.grad());
    return out;
  }
};

std::vector<Tensor> gradients(const Net& net, at::ScalarType dtype,
                              const std::function<void(const Tensor& loss)>& backward) {
  Leaves run(dtype);
  torch::manual_seed(2);  // the same noise
  const auto kept = store();
  // Not a leaf: what a layer reads is in the middle of a model.
  const Tensor loss = within(kept, [&] { return net.forward(run.x * 1, run.weights); });
  backward(loss);
  EXPECT_GT(kept->counts().packed, 0);
  return run.gradients();
}

/// What a weight's gradient, a sum over 256 rows, may differ by where it is taken over pieces, as a
/// share of its largest value. In fp32: two orders of 256 terms and 8 pieces, (2 * 256 + 8) u of the
/// terms' magnitudes, which are sqrt(256) times their sum where signs are random (the largest of
/// many sums is larger). In bf16 each of 8 sums is rounded, and both results: 10 u.
double bound(at::ScalarType dtype) {
  return dtype == torch::kFloat ? 520 * 16 * 0x1p-24 : 10 * 0x1p-8;
}

void expect_alike(const std::vector<Tensor>& a, const std::vector<Tensor>& b, double share) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].defined(), b[i].defined()) << i;
    if (!a[i].defined()) continue;
    EXPECT_EQ(a[i].strides(), b[i].strides()) << i;
    const double largest = b[i].abs().max().item<double>();
    EXPECT_LE((a[i].to(torch::kDouble) - b[i].to(torch::kDouble)).abs().max().item<double>(),
              share * largest)
        << i;
  }
}

TEST_F(StoredPayload, GradientsAreThoseOfReadingWhole) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16})
    for (const Net& net : nets()) {
      SCOPED_TRACE(net.name);
      const auto backward = [](const Tensor& loss) { loss.backward(); };
      read_in_pieces();
      const auto pieces = gradients(net, dtype, backward);
      read_whole();
      const auto whole = gradients(net, dtype, backward);
      expect_alike(pieces, whole, bound(dtype));
      EXPECT_TRUE(pieces[0].equal(whole[0]));  // no such sum on the way to the input
    }
}

TEST_F(StoredPayload, TwoBackwardsOfOneGraphGiveTheSameTwice) {
  for (const Net& net : nets()) {
    SCOPED_TRACE(net.name);
    Leaves run;
    const auto kept = store();
    const Tensor loss = within(kept, [&] { return net.forward(run.x * 1, run.weights); });
    std::vector<Tensor> inputs{run.x};
    const auto first = torch::autograd::grad({loss}, inputs, {}, /*retain_graph=*/true);
    const auto second = torch::autograd::grad({loss}, inputs, {}, /*retain_graph=*/true);
    const auto third = torch::autograd::grad({loss}, inputs);
    EXPECT_TRUE(first[0].equal(second[0]));
    EXPECT_TRUE(first[0].equal(third[0]));
    EXPECT_THAT(message_of([&] { loss.backward(); }), testing::HasSubstr("a second time"));
  }
}

TEST_F(StoredPayload, SecondGradientsAreThoseOfReadingWhole) {
  for (const Net& net : nets()) {
    SCOPED_TRACE(net.name);
    const auto second = [&] {
      Leaves run;
      torch::manual_seed(2);
      const auto kept = store();
      const Tensor loss = within(kept, [&] { return net.forward(run.x * 1, run.weights); });
      const Tensor g = torch::autograd::grad({loss}, {run.weights[0]}, {}, std::nullopt,
                                             /*create_graph=*/true)[0];
      return torch::autograd::grad({g.square().sum()}, {run.x, run.weights[0]});
    };
    read_in_pieces();
    const auto pieces = second();
    read_whole();
    const auto whole = second();
    expect_alike(pieces, whole, 3 * bound(torch::kFloat));  // of such sums, once more
  }
}

TEST_F(StoredPayload, AGradientThatTheUserKeepsIsNotWrittenOver) {
  Leaves run;
  const auto kept = store();
  Tensor middle;
  const Tensor loss = within(kept, [&] {
    middle = torch::gelu((run.x * 1).mm(run.weights[0]));
    middle.retain_grad();
    return middle.mm(run.weights[0].t()).sum();
  });
  Tensor seen;
  middle.register_hook([&](const Tensor& gradient) { seen = gradient; });
  loss.backward();
  EXPECT_TRUE(seen.equal(middle.grad()));
  EXPECT_TRUE(seen.equal(torch::ones_like(run.x).mm(run.weights[0])));
}

/// A custom Function reads what it saved by pointer, as its author may.
struct Doubled : torch::autograd::Function<Doubled> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return x * 2;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const Tensor x = context->get_saved_variables()[0];
    EXPECT_FALSE(door::is_packed(x));
    EXPECT_NE(x.data_ptr<float>()[0], 0);
    return {gradients[0] * 2};
  }
};
TEST_F(StoredPayload, ACustomFunctionGetsPlainValues) {
  Leaves run;
  const auto kept = store();
  within(kept, [&] { return Doubled::apply((run.x * 1).mm(run.weights[0])).sum(); }).backward();
  EXPECT_TRUE(run.x.grad().defined());
}

/// A custom Function whose gradient was there in its forward, as fused losses have it.
struct Weighted : torch::autograd::Function<Weighted> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& weight,
                        const Tensor& x) {
    context->save_for_backward({x});
    return (weight * x).sum();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list) {
    return {context->get_saved_variables()[0], Tensor()};
  }
};
TEST_F(StoredPayload, AGradientThatWasSavedMayBeAddedTo) {
  for (const bool recompute : {false, true}) {
    const Tensor weight = torch::randn({64, 256}).requires_grad_(), x = torch::randn({64, 256});
    const auto kept = store(recompute);
    const Tensor loss = within(kept, [&] { return Weighted::apply(weight, x.tanh()); });
    loss.backward({}, /*retain_graph=*/true);
    const Tensor once = weight.grad().clone();
    for (int times = 2; times < 5; ++times) {
      loss.backward({}, /*retain_graph=*/true);  // .grad is what was decoded, and is added to
      EXPECT_TRUE(weight.grad().allclose(times * once, 1e-6, 1e-6)) << recompute << ' ' << times;
    }
    weight.grad().zero_();
    loss.backward();
    EXPECT_TRUE(weight.grad().equal(once));
  }
}

TEST_F(StoredPayload, BackwardInInferenceMode) {
  for (const bool recompute : {false, true}) {
    Leaves run;
    const auto kept = store(recompute);
    const Tensor loss = within(kept, [&] { return nets()[0].forward(run.x * 1, run.weights); });
    const c10::InferenceMode inference;
    loss.backward();
    EXPECT_TRUE(run.weights[0].grad().defined());
  }
}

TEST_F(StoredPayload, BackwardOnAnotherThreadAndUnderAutocast) {
  for (const bool autocast : {false, true}) {
    const auto backward = [&](const Tensor& loss) {
      std::thread([&] {
        at::autocast::set_autocast_enabled(at::kCPU, autocast);
        loss.backward();
        at::autocast::set_autocast_enabled(at::kCPU, false);
      }).join();
    };
    read_in_pieces();
    const auto pieces = gradients(nets()[0], torch::kFloat, backward);
    read_whole();
    const auto whole = gradients(nets()[0], torch::kFloat, backward);
    expect_alike(pieces, whole, autocast ? 0 : bound(torch::kFloat));
  }
}

TEST_F(StoredPayload, AnErrorInBackwardFreesAllAndTheNextStepWorks) {
  const auto kept = store();
  Leaves run;
  const auto step = [&](bool fail) {
    const Tensor loss = within(kept, [&] {
      const Tensor y = (run.x * 1).mm(run.weights[0]);
      if (fail) y.register_hook([](const Tensor&) -> Tensor { throw std::runtime_error("stop"); });
      return torch::gelu(y).mm(run.weights[0].t()).square().mean();
    });
    loss.backward();
  };
  EXPECT_THROW(step(true), std::runtime_error);
  EXPECT_EQ(kept->held_bytes().current, 0);
  step(false);
  EXPECT_EQ(kept->held_bytes().current, 0);
}

TEST_F(StoredPayload, AWriteToWhatWasSavedIsLibTorchsError) {
  Leaves run;
  const auto kept = store();
  Tensor middle;
  const Tensor loss = within(kept, [&] {
    middle = (run.x * 1).mm(run.weights[0]);
    return torch::gelu(middle).sum();
  });
  {
    const torch::NoGradGuard no_grad;
    middle.mul_(2);
  }
  EXPECT_THAT(message_of([&] { loss.backward(); }), testing::HasSubstr("inplace operation"));
}

/// Of a feed-forward block, tokens x width -> 4 width -> width: what backward needs beside what is
/// saved and the gradients that it leaves.
std::int64_t transient(const fourfold::Meter& meter, std::int64_t tokens, std::int64_t width,
                       bool pieces) {
  door::parameters_state().piece = pieces ? std::int64_t{1} << 16 : std::int64_t{1} << 60;
  torch::manual_seed(0);
  const Tensor up = torch::randn({4 * width, width}).div_(16).requires_grad_();
  const Tensor down = torch::randn({width, 4 * width}).div_(16).requires_grad_();
  Tensor x = torch::randn({tokens, width}).requires_grad_();
  up.mutable_grad() = torch::zeros_like(up), down.mutable_grad() = torch::zeros_like(down);
  const auto kept = store();
  Tensor loss = within(
      kept, [&] { return torch::linear(torch::gelu(torch::linear(x * 1, up)), down).sum(); });
  meter.restart_peak();
  const std::int64_t before = meter.bytes().current;
  loss.backward();
  return meter.bytes().peak - before;
}
TEST_F(StoredPayload, AFeedForwardBlockNeedsOneBufferOfItsWidthInBackward) {
  const fourfold::Meter meter;
  constexpr std::int64_t kTokens = 1024, kWidth = 256;
  constexpr std::int64_t kBuffer = kTokens * 4 * kWidth * 4, kWeight = 4 * kWidth * kWidth * 4;
  const std::int64_t whole = transient(meter, kTokens, kWidth, false);
  const std::int64_t pieces = transient(meter, kTokens, kWidth, true);
  // Whole: the gradient, what gelu read, its result. In pieces: the gradient, a quarter of it for
  // the layer's own, a weight's gradient, and three pieces of at most 2^17 values.
  EXPECT_GE(whole, 3 * kBuffer - kBuffer / 4);
  EXPECT_LE(pieces, kBuffer + 2 * (kBuffer / 4) + kWeight + 3 * (4 << 17));
}

TEST_F(StoredPayload, ABlockDoesNotStopBeforeAResultThatWasWrittenTo) {
  Leaves run;
  const auto forward = [&](bool checkpointed) {
    run.x.mutable_grad().reset(), run.weights[0].mutable_grad().reset();
    ActivationOptions exact;
    exact.recompute = fourfold::operator_names<fourfold::CheapOps>();
    const auto kept = ActivationStore::make(std::move(exact));
    const auto block = [&](const Tensor& x) {
      Tensor y = torch::gelu(x.mm(run.weights[0]));
      {
        const torch::NoGradGuard no_grad;
        y.mul_(2);
      }
      return y.mm(run.weights[0].t());
    };
    const Tensor loss = within(kept, [&] {
      const Tensor x = run.x * 1;
      return (checkpointed ? fourfold::checkpoint(block, x) : block(x)).square().mean();
    });
    loss.backward();
    return std::vector<Tensor>{run.x.grad().clone(), run.weights[0].grad().clone()};
  };
  const auto again = forward(true), plain = forward(false);
  EXPECT_TRUE(again[0].equal(plain[0]) && again[1].equal(plain[1]));
}

}  // namespace

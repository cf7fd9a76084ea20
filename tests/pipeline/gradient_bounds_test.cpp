// SPDX-License-Identifier: Apache-2.0
/// Gradients of five unmodified modules, trained with each preset, against the uncompressed ones.
///
/// Exact: equal to the bit, in both orders, and equal to differences.
///
/// Balanced and Smallest: a module's forward and backward stand here once more, by hand, in balls
/// (tests/reference/ball.hpp): values with a bound of what they may be off by. Where the preset
/// packs a saved tensor its ball grows by one step of the code, and all that follows carries that
/// on, products of errors included. So these bounds are derived, not tuned, and hold whatever the
/// codes draw:
///   - the uncompressed gradient lies in the ball without codes, whose radius is what fp32 rounds:
///     that proves the hand-written backward;
///   - the preset's gradient lies in the ball with them. Where that is no wider, no packed tensor
///     is read, and the gradient is the uncompressed one to the bit;
///   - it differs elsewhere, and a code of 2 bits in place of 4 leaves the ball: it is not so wide
///     that anything would do.
#include <fourfold/pipeline.hpp>
#include <fourfold/presets.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../reference/ball.hpp"
#include "models.hpp"

namespace {

using namespace fourfold;
using reference::Ball;
using reference::exactly;
using reference::joined;
using reference::matmul;
using reference::moved;
using reference::transposed;

/// On one thread: these tensors are small, and waiting for a second one may take far longer.
class GradientBounds : public testing::Test {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  void TearDown() override { at::set_num_threads(threads_); }

 private:
  const int threads_ = at::get_num_threads();
};

/// What a preset makes of what backward needs.
struct Saving {
  std::optional<IntFormat> values{};     ///< saved tensors
  std::optional<IntFormat> sensitive{};  ///< of softmax, attention and products of activations
  std::optional<IntFormat> input{};      ///< of a block: the rest of it is computed again from that

  [[nodiscard]] Ball of_value(const Ball& x) const { return values ? packed(x, *values) : x; }
  [[nodiscard]] Ball of_sensitive(const Ball& x) const {
    return sensitive ? packed(x, *sensitive) : x;
  }
  [[nodiscard]] Ball of_input(const Ball& x) const { return input ? packed(x, *input) : x; }
  /// What of_input gave, saved: where a block decoded it, its payload serves again.
  [[nodiscard]] Ball of_held(const Ball& x) const { return input ? x : of_value(x); }
};
constexpr Saving kNothing{};
constexpr Saving kBalanced{.values = Int4::kFormat, .sensitive = Int8::kFormat};
constexpr Saving kSmallest{
    .values = Int4::kFormat, .sensitive = Int8::kFormat, .input = Int8::kFormat};

// These say the same. A preset that changes must change here.
static_assert(
    std::is_same_v<Balanced, CompressionPipeline<Activations<Int4, Int8>, Recompute<CheapOps>,
                                                 OptimizerStates<Int8>>>);
static_assert(
    std::is_same_v<Smallest, CompressionPipeline<Activations<Int4, Int8>, Recompute<CheapOps>,
                                                 Blocks<>, OptimizerStates<Int8>>>);
using BalancedWithTwoBits = CompressionPipeline<Activations<Int2, Int8>, Recompute<CheapOps>>;
using SmallestWithTwoBits =
    CompressionPipeline<Activations<Int2, Int2>, Recompute<CheapOps>, Blocks<>>;

/// A module, what it is given, and the gradient of its result.
struct Case {
  std::string name;
  std::shared_ptr<torch::nn::Module> net;  ///< a Sequential of the module: to Smallest a block
  at::Tensor x, dy;
  std::function<at::Tensor(const at::Tensor& x)> forward;
  /// Of the parameters in the module's order, and of x.
  std::function<std::vector<Ball>(const Saving&)> gradients;
  /// dW of dY and X, where it is bilinear.
  std::function<at::Tensor(const at::Tensor& dy, const at::Tensor& x)> weight_gradient{};
  bool onednn = true;
};
using Gradients = std::vector<at::Tensor>;

/// The module gets its input as from another layer: made within the scope, by an operator that is
/// not run again, and with a gradient. (A leaf is the caller's own and held as it is.)
template <class Forward>
Gradients gradients_of(const Case& model, const Forward& run) {
  model.net->zero_grad();
  const at::Tensor leaf = model.x.flip(0).requires_grad_();
  run([&] { return model.forward(leaf.flip(0)); }).backward(model.dy);
  Gradients all;
  for (const at::Tensor& p : model.net->parameters()) all.push_back(p.grad().clone());
  all.push_back(leaf.grad().flip(0));
  return all;
}
Gradients plain(const Case& model) {
  return gradients_of(model, [](const auto& forward) { return forward(); });
}
template <class Pipeline>
Gradients with(Pipeline& pipeline, const Case& model) {
  return gradients_of(model, [&](const auto& forward) { return pipeline.forward(forward); });
}

// Few terms in each sum (rows, pixels, steps), so that the worst case is near what happens; saved
// tensors have 1024 values or more all the same, or they would not be packed.

// dW = dY^T X and dX = dY W: X alone is saved.
Case linear() {
  torch::nn::Linear layer(128, 64);
  torch::nn::Sequential net(layer);
  const auto x = torch::randn({8, 128}), dy = torch::randn({8, 64});
  const auto weight_gradient = [](const at::Tensor& d, const at::Tensor& in) {
    return d.t().matmul(in);
  };
  const auto gradients = [=](const Saving& saving) -> std::vector<Ball> {
    const Ball d = exactly(dy), held = saving.of_held(saving.of_input(exactly(x)));
    return {bilinear(weight_gradient, d, held, 8), sum(d, 0), matmul(d, exactly(layer->weight))};
  };
  const auto forward = [=](const at::Tensor& in) mutable { return net->forward(in); };
  return {"Linear", net.ptr(), x, dy, forward, gradients, weight_gradient};
}

// Both gradients are bilinear: dW in dY and X, which is saved, dX in dY and W.
Case convolution() {
  constexpr std::int64_t kOut = 24, kPixels = 2 * 2 * 2, kTaps = kOut * 3 * 3;
  torch::nn::Conv2d layer(torch::nn::Conv2dOptions(64, kOut, 3).padding(1).stride(2));
  torch::nn::Sequential net(layer);
  const auto x = torch::randn({2, 64, 4, 4}), dy = torch::randn({2, kOut, 2, 2});
  const auto backward = [](const at::Tensor& d, const at::Tensor& in, const at::Tensor& weight) {
    return at::convolution_backward(d, in, weight, at::OptionalIntArrayRef(), {2, 2}, {1, 1},
                                    {1, 1}, false, {0, 0}, 1, {true, true, false});
  };
  const at::Tensor some_x = x.to(at::kDouble), some_w = layer->weight.detach().to(at::kDouble);
  const auto weight_gradient = [=](const at::Tensor& d, const at::Tensor& in) {
    return std::get<1>(backward(d, in, some_w));  // of its sizes alone
  };
  const auto input_gradient = [=](const at::Tensor& d, const at::Tensor& weight) {
    return std::get<0>(backward(d, some_x, weight));
  };
  const auto gradients = [=](const Saving& saving) -> std::vector<Ball> {
    const Ball d = exactly(dy), held = saving.of_held(saving.of_input(exactly(x)));
    const Ball rows = moved(d, [](const auto& values) {
      return values.transpose(0, 1).reshape({kOut, kPixels});
    });
    return {bilinear(weight_gradient, d, held, kPixels), sum(rows, 1),
            bilinear(input_gradient, d, exactly(layer->weight), kTaps)};
  };
  const auto forward = [=](const at::Tensor& in) mutable { return net->forward(in); };
  return {"Conv2d", net.ptr(), x, dy, forward, gradients, weight_gradient};
}

/// Whether LibTorch runs an LSTM on this machine by oneDNN, as one node.
bool fuses_lstm() {
  torch::nn::LSTM lstm(2, 2);
  const auto y = std::get<0>(lstm->forward(torch::ones({1, 1, 2})));
  const auto visit = [](const auto& self, const torch::autograd::Node* node) -> bool {
    if (node == nullptr) return false;
    if (node->name().find("Mkldnn") != std::string::npos) return true;
    for (const auto& edge : node->next_edges())
      if (self(self, edge.function.get())) return true;
    return false;
  };
  return visit(visit, y.grad_fn().get());
}

/// Two steps. As oneDNN's node it holds its gates and cells in a workspace of bytes, as they are,
/// and input and result are packed (of which it may read its workspace's copies). As LibTorch's own
/// operators the input, all gates, the cell and its tanh are packed, and the next step's h is
/// computed again, o tanh(c). A row of a gate is two groups of the code.
Case recurrent(bool onednn) {
  constexpr std::int64_t kSteps = 2, kBatch = 8, kIn = 64, kHidden = 128;
  torch::nn::LSTM lstm(torch::nn::LSTMOptions(kIn, kHidden));
  const auto x = torch::randn({kSteps, kBatch, kIn}), dy = torch::randn({kSteps, kBatch, kHidden});
  torch::nn::Sequential net(lstm);
  const auto gradients = [=](const Saving& saving) -> std::vector<Ball> {
    const bool fused = fuses_lstm();
    const auto gate_of = [&](const Ball& b) { return fused ? b : saving.of_value(b); };
    const auto p = lstm->named_parameters();
    const Ball w_ih = exactly(p["weight_ih_l0"]), w_hh = exactly(p["weight_hh_l0"]);
    const Ball bias = exactly(p["bias_ih_l0"]) + exactly(p["bias_hh_l0"]);
    const Ball input = saving.of_input(exactly(x)), held = saving.of_held(input);
    const auto at_step = [](const Ball& b, std::int64_t t) {
      return moved(b, [&](const auto& values) { return values[t]; });
    };
    struct Step {
      Ball i, f, g, o, tanh_c, c_before, h_before;  // as backward reads them
    };
    std::vector<Step> steps;
    const Ball zero = exactly(torch::zeros({kBatch, kHidden}));
    Ball h = zero, c = zero, h_held = zero;
    std::vector<Ball> results;
    for (std::int64_t t = 0; t < kSteps; ++t) {
      const Ball a =
          matmul(at_step(input, t), transposed(w_ih)) + (matmul(h, transposed(w_hh)) + bias);
      const auto part = [&](std::int64_t k) {
        return moved(a, [&](const auto& values) { return values.chunk(4, 1)[k]; });
      };
      const Ball i = sigmoid(part(0)), f = sigmoid(part(1)), g = tanh(part(2)),
                 o = sigmoid(part(3));
      Step step{gate_of(i), gate_of(f), gate_of(g), gate_of(o), zero, zero, h_held};
      if (t > 0) step.c_before = gate_of(c);
      c = f * c + i * g;
      const Ball tanh_c = tanh(c);
      h = o * tanh_c;
      results.push_back(h);
      step.tanh_c = gate_of(tanh_c);
      h_held = step.o * step.tanh_c;
      steps.push_back(step);
    }
    if (fused) {  // the result is packed whole
      const Ball result = saving.of_value(joined(results, 0));
      for (std::int64_t t = 1; t < kSteps; ++t)
        steps[static_cast<std::size_t>(t)].h_before =
            moved(result, [&](const auto& v) { return v.slice(0, (t - 1) * kBatch, t * kBatch); });
    }
    Ball dh = zero, dc = zero, dw_ih, dw_hh, db;
    std::vector<Ball> dx(static_cast<std::size_t>(kSteps));
    for (std::int64_t t = kSteps - 1; t >= 0; --t) {
      const Step& s = steps[static_cast<std::size_t>(t)];
      dh = at_step(exactly(dy), t) + dh;
      dc = dh * s.o * tanh_slope(s.tanh_c) + dc;
      const Ball da = joined({dc * s.g * sigmoid_slope(s.i), dc * s.c_before * sigmoid_slope(s.f),
                              dc * s.i * tanh_slope(s.g), dh * s.tanh_c * sigmoid_slope(s.o)},
                             1);
      const bool first = t == kSteps - 1;
      const auto add = [&](Ball& total, const Ball& one) { total = first ? one : total + one; };
      add(dw_ih, matmul(transposed(da), at_step(held, t)));
      add(dw_hh, matmul(transposed(da), s.h_before));
      add(db, sum(da, 0));
      dx[static_cast<std::size_t>(t)] =
          moved(matmul(da, w_ih), [](const auto& v) { return v.unsqueeze(0); });
      dh = matmul(da, w_hh);
      dc = dc * s.f;
    }
    return {dw_ih, dw_hh, db, db, joined(dx, 0)};
  };
  const auto forward = [=](const at::Tensor& in) mutable {
    return std::get<0>(
        net->forward<std::tuple<at::Tensor, std::tuple<at::Tensor, at::Tensor>>>(in));
  };
  return {
      onednn ? "LSTM" : "LSTM without oneDNN", net.ptr(), x, dy, forward, gradients, {}, onednn};
}

/// Switches oneDNN off where the case says so.
class OneDnn {
 public:
  explicit OneDnn(bool on) { at::globalContext().setUserEnabledMkldnn(before_ && on); }
  ~OneDnn() { at::globalContext().setUserEnabledMkldnn(before_); }
  OneDnn(const OneDnn&) = delete;
  OneDnn& operator=(const OneDnn&) = delete;

 private:
  const bool before_ = at::globalContext().userEnabledMkldnn();
};

/// y = A Wo^T + bo, A = P V, P = softmax(Q K^T), [Q K V] = X Wi^T + bi, with Q scaled. X and A
/// are packed, Q, K, V and P as sensitive. The projections to Q and K are taken small, or in a block
/// the worst case of exp(Q K^T) would be many times what happens.
Case attention() {
  constexpr std::int64_t kTime = 4, kBatch = 4, kWidth = 64, kHeads = 16;
  constexpr std::int64_t kRows = kTime * kBatch, kHead = kWidth / kHeads;
  torch::nn::MultiheadAttention mha(torch::nn::MultiheadAttentionOptions(kWidth, kHeads));
  const auto x = torch::randn({kTime, kBatch, kWidth}), dy = torch::randn({kTime, kBatch, kWidth});
  torch::nn::Sequential net(mha);
  {
    const torch::NoGradGuard no_grad;
    mha->in_proj_weight.slice(0, 0, 2 * kWidth).mul_(0.25);
  }
  const auto gradients = [=](const Saving& saving) -> std::vector<Ball> {
    const auto rows = [&](const Ball& b) {
      return moved(b, [&](const auto& v) { return v.reshape({kRows, -1}); });
    };
    const auto heads = [&](const Ball& b) {
      return moved(b, [&](const auto& v) {
        return v.reshape({kTime, kBatch * kHeads, kHead}).transpose(0, 1);
      });
    };
    const auto merged = [&](const Ball& b) {
      return moved(b, [&](const auto& v) { return v.transpose(0, 1).reshape({kRows, kWidth}); });
    };
    const double scaling = 1 / std::sqrt(static_cast<double>(kHead));
    const Ball w_in = exactly(mha->in_proj_weight), w_out = exactly(mha->out_proj->weight);
    const Ball input = rows(saving.of_input(exactly(x)));
    const Ball qkv = matmul(input, transposed(w_in)) + exactly(mha->in_proj_bias);
    const auto part = [&](std::int64_t k) {
      return moved(qkv, [&](const auto& v) { return v.chunk(3, 1)[k].contiguous(); });
    };
    const Ball q = part(0) * scaling, k = part(1), v = part(2);
    const Ball p = softmax(matmul(heads(q), transposed(heads(k))));
    const Ball a = merged(matmul(p, heads(v)));
    // as backward reads them
    const Ball x_held = saving.of_held(input), q_held = heads(saving.of_sensitive(q)),
               k_held = heads(saving.of_sensitive(k)), v_held = heads(saving.of_sensitive(v)),
               p_held = saving.of_sensitive(p), a_held = saving.of_value(a);
    const Ball d = rows(exactly(dy)), da = heads(matmul(d, w_out));
    const Ball dp = matmul(da, transposed(v_held));
    const Ball ds = p_held * (dp - sum(dp * p_held, -1, true));
    const Ball dq = merged(matmul(ds, k_held)) * scaling;
    const Ball dk = merged(matmul(transposed(ds), q_held));
    const Ball dv = merged(matmul(transposed(p_held), da));
    const Ball dqkv = joined({dq, dk, dv}, 1);
    return {matmul(transposed(dqkv), x_held), sum(dqkv, 0), matmul(transposed(d), a_held),
            sum(d, 0), moved(matmul(dqkv, w_in), [&](const auto& t) { return t.view_as(x); })};
  };
  const auto forward = [=](const at::Tensor& in) mutable {
    return std::get<0>(net->forward<std::tuple<at::Tensor, at::Tensor>>(in, in, in));
  };
  return {"MultiheadAttention", net.ptr(), x, dy, forward, gradients};
}

/// relu(2 (x + silu(n up^T) down^T)), n = gain (x - mean) / deviation. x and u = n up^T are packed;
/// n and silu(u) are computed again from what they decode to, relu is asked for its sign, exactly.
/// In a block, that sign too is computed again, and where it is not certain its gradient is 0 or
/// dy: `down` is taken small, so that these are few.
Case by_hand() {
  auto module = std::make_shared<pipeline_models::ByHand>();
  {
    const torch::NoGradGuard no_grad;
    module->down.mul_(0.05);
    module->gain.uniform_(0.5, 1.5);
  }
  const auto x = torch::randn({16, 64}), dy = torch::randn({16, 64});
  torch::nn::Sequential net;
  net->push_back(module);
  const auto gradients = [=](const Saving& saving) -> std::vector<Ball> {
    const Ball up = exactly(module->up), down = exactly(module->down), gain = exactly(module->gain);
    const auto normal = [](const Ball& b) { return centred(b) * inverse_deviation(b, 1e-5); };
    const Ball input = saving.of_input(exactly(x));
    const Ball u = matmul(normal(input) * gain, transposed(up));
    const Ball z = matmul(silu(u), transposed(down)) + input;
    const Ball x_held = saving.of_held(input), u_held = saving.of_value(u);

    const Ball d = exactly(dy) * positive(z) * 2;
    const Ball du = matmul(d, down) * silu_slope(u_held);
    const Ball dn = matmul(du, up);
    // layer_norm saved mean and deviation as they are
    const Ball deviation = inverse_deviation(input, 1e-5);
    const Ball n_read = (x_held - mean(input, 1)) * deviation, dm = dn * gain;
    const Ball dx = (dm - mean(dm, 1) - n_read * mean(dm * n_read, 1)) * deviation;
    return {matmul(transposed(du), normal(x_held) * gain), matmul(transposed(d), silu(u_held)),
            sum(dn * n_read, 0), d + dx};
  };
  const auto forward = [=](const at::Tensor& in) mutable { return net->forward(in); };
  return {"ByHand", net.ptr(), x, dy, forward, gradients};
}

/// The five; the LSTM in both of the ways that LibTorch runs it.
template <class Check>
void for_each_case(const Check& check) {
  const std::vector<std::function<Case()>> all{
      linear,    convolution, [] { return recurrent(true); }, [] { return recurrent(false); },
      attention, by_hand};
  std::uint64_t seed = 20;
  for (const auto& make : all) {
    torch::manual_seed(++seed);
    const Case model = make();
    SCOPED_TRACE(model.name);
    const OneDnn onednn(model.onednn);
    check(model);
  }
}

TEST_F(GradientBounds, AStepIsTheCodecsOwnBound) {
  torch::manual_seed(1);
  const at::Tensor x = torch::randn({1000}) * 3 + 1;
  const auto expect_bound = [&](const at::Tensor& radius, const at::Tensor& half) {
    EXPECT_TRUE((radius >= 2 * half).all().item<bool>());
    EXPECT_TRUE((radius <= 1.05 * 2 * half).all().item<bool>());  // bf16's rounding at its worst
  };
  expect_bound(packed(exactly(x), Int4::kFormat).rad, Int4{}.error_bound(x));
  expect_bound(packed(exactly(x), Int8::kFormat).rad, Int8{}.error_bound(x));
}

constexpr int kSteps = 3;

TEST_F(GradientBounds, ExactIsEqualToTheBit) {
  for_each_case([](const Case& model) {
    Exact pipeline(model.net);
    const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
    for (int step = 0; step < kSteps; ++step, optimizer->step()) {
      const Gradients expected = plain(model), ours = with(pipeline, model);
      for (std::size_t i = 0; i < ours.size(); ++i)
        EXPECT_TRUE(torch::equal(ours[i], expected[i])) << "gradient " << i;
    }
  });
}

/// The largest distance from the midpoint, in radii.
double reach_of(const at::Tensor& values, const Ball& ball) {
  return ((values.to(at::kDouble) - ball.mid).abs() / ball.rad).max().item<double>();
}

template <class Preset, class WithTwoBits>
void expect_within_balls(const Saving& saving) {
  for_each_case([&](const Case& model) {
    Preset pipeline(model.net);
    WithTwoBits coarse(model.net);
    const auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
    double left = 0;
    for (int step = 0; step < kSteps; ++step, optimizer->step()) {
      const std::vector<Ball> rounding = model.gradients(kNothing);
      const std::vector<Ball> bounds = model.gradients(saving);
      const Gradients expected = plain(model), two_bits = with(coarse, model);
      const Gradients ours = with(pipeline, model);
      ASSERT_EQ(ours.size(), bounds.size());
      for (std::size_t i = 0; i < ours.size(); ++i) {
        SCOPED_TRACE("step " + std::to_string(step) + ", gradient " + std::to_string(i));
        EXPECT_LE(reach_of(expected[i], rounding[i]), 1) << "the backward by hand is another one";
        EXPECT_LE(reach_of(ours[i], bounds[i]), 1);
        if (torch::equal(bounds[i].rad, rounding[i].rad)) {
          EXPECT_TRUE(torch::equal(ours[i], expected[i]));
        }
        left = std::max(left, reach_of(two_bits[i], bounds[i]));
      }
      EXPECT_FALSE(torch::equal(ours[0], expected[0])) << "nothing was packed";
    }
    EXPECT_GT(left, 1) << "a code with steps five times as large is within the bound too";
  });
}

TEST_F(GradientBounds, BalancedStaysWithinTheCodesBound) {
  expect_within_balls<Balanced, BalancedWithTwoBits>(kBalanced);
}
TEST_F(GradientBounds, SmallestStaysWithinTheCodesBound) {
  expect_within_balls<Smallest, SmallestWithTwoBits>(kSmallest);
}

// Rounding draws for each value on its own and is unbiased, and dW is linear in what is rounded:
// dW' - dW is a sum of c e, where e has mean 0 and lies in an interval of one step. By Hoeffding's
// inequality the mean over K draws is off by t or more with probability 2 exp(-2 K t^2 / s) at
// most, s the sum of (c step)^2; for all N elements together with 1e-9 if t^2 = ln(2 N / 1e-9) s /
// (2 K). To t comes the codes' own bias, 2^-17 of a step and fp32's rounding (int_code.hpp), at most
// 2^-16 of the worst case here.
template <class Preset>
void expect_unbiased(const Saving& saving) {
  constexpr int kDraws = 128;
  for_each_case([&](const Case& model) {
    if (!model.weight_gradient) return;
    Preset pipeline(model.net);
    const at::Tensor expected = plain(model)[0].to(at::kDouble);
    at::Tensor total = torch::zeros_like(expected);
    for (int draw = 0; draw < kDraws; ++draw) total += with(pipeline, model)[0];
    const Ball held = saving.of_held(saving.of_input(exactly(model.x)));
    const at::Tensor s =
        model.weight_gradient(model.dy.to(at::kDouble).square(), held.rad.square());
    const double logarithm = std::log(2e9 * static_cast<double>(expected.numel()));
    const at::Tensor t = (s * logarithm / (2 * kDraws)).sqrt() +
                         0x1p-16 * model.gradients(saving)[0].rad +
                         model.gradients(kNothing)[0].rad;
    EXPECT_TRUE(((total / kDraws - expected).abs() <= t).all().template item<bool>());
    EXPECT_LT(t.norm().template item<double>(), 0.2 * expected.norm().template item<double>());
  });
}
TEST_F(GradientBounds, LinearsAndConvolutionsAreUnbiased) {
  expect_unbiased<Balanced>(kBalanced);
  expect_unbiased<Smallest>(kSmallest);
}

// The gradient of 3/2 x cubed is read from the cubed tensor h as it was decoded, and so is the
// gradient of that: 6 h (3/2)^2, off by 13.5 |h - h'|, where h' is off by one step, twice the bound
// of the nearest, at most. (eps |h|: its own rounding.)
TEST_F(GradientBounds, ADoubleBackwardThroughPackedTensorsStaysWithinTheCodesBound) {
  torch::manual_seed(2);
  torch::nn::Linear unused(1, 1);
  CompressionPipeline<Activations<Int4>> pipeline(unused);
  const auto x = torch::randn({64, 64}, torch::requires_grad());
  const auto h = (x * 1.5).detach();
  const auto y = pipeline.forward([&] { return (x * 1.5).pow(3).sum(); });
  const auto first = torch::autograd::grad({y}, {x}, {}, true, /*create_graph=*/true)[0];
  const auto second = torch::autograd::grad({first.sum()}, {x})[0];
  const auto step = 2 * Int4{}.error_bound(h);
  const auto off = (second - 13.5 * h).abs();
  EXPECT_TRUE((off <= 13.5 * step + 1e-5 * h.abs()).all().item<bool>()) << (off / step).max();
  EXPECT_GT(off.max().item<float>(), 0) << "nothing was packed";
}

/// A net of smooth operators and small tensors, which are held as they are.
pipeline_models::Case smooth() {
  torch::nn::Sequential net(torch::nn::Linear(6, 8), torch::nn::GELU(),
                            torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})),
                            torch::nn::Linear(8, 8), torch::nn::SiLU(), torch::nn::Linear(8, 3));
  const auto x = torch::randn({5, 6}), target = torch::randn({5, 3});
  return {"smooth", net.ptr(),
          [=]() mutable { return torch::mse_loss(net->forward(x).tanh(), target); }};
}

class InDouble {
 public:
  InDouble() { torch::set_default_dtype(caffe2::TypeMeta::Make<double>()); }
  ~InDouble() { torch::set_default_dtype(before_); }
  InDouble(const InDouble&) = delete;
  InDouble& operator=(const InDouble&) = delete;

 private:
  const caffe2::TypeMeta before_ = torch::get_default_dtype();
};

/// The slope and the curvature of the loss along a direction of the parameters, in double: autograd
/// through `Pipeline` is autograd without it, to the bit, and gives the central differences D(h) of
/// loss and slope. Their error is h^2 / 6 times the third derivative, of which D(2h) - D(h) is
/// three times as much to first order, and what 64 roundings of all terms make of the difference
/// over 2 h. (h is that small for relu's sake, not to cross a kink.)
template <class Pipeline>
Ledger expect_gradients_match_differences(const std::function<pipeline_models::Case()>& make) {
  const InDouble in_double;
  torch::manual_seed(5);
  const pipeline_models::Case model = make();
  SCOPED_TRACE(model.name);
  const auto parameters = model.module->parameters();
  std::vector<at::Tensor> along;
  for (const at::Tensor& p : parameters) along.push_back(torch::randn_like(p));
  Pipeline pipeline(model.module);
  const auto loss = [&](bool plain) {
    torch::manual_seed(6);  // dropout's masks
    return plain ? model.loss() : pipeline.forward(model.loss);
  };
  const auto dot = [&](const std::vector<at::Tensor>& gradients, bool of_magnitudes = false) {
    auto sum = torch::zeros({});
    for (std::size_t i = 0; i < along.size(); ++i) {
      const auto terms = gradients[i] * along[i];
      sum = sum + (of_magnitudes ? terms.abs() : terms).sum();
    }
    return sum;
  };
  struct Orders {
    double loss;
    std::vector<at::Tensor> first, second;
  };
  const auto orders = [&](bool plain) {
    const auto value = loss(plain);
    const auto first = torch::autograd::grad({value}, parameters, {}, true, /*create_graph=*/true);
    std::vector<at::Tensor> second =
        torch::autograd::grad({dot(first)}, parameters, {}, false, false, /*allow_unused=*/true);
    for (std::size_t i = 0; i < along.size(); ++i)
      if (!second[i].defined()) second[i] = torch::zeros_like(along[i]);
    return Orders{value.template item<double>(), first, second};
  };
  const Orders ours = orders(false), expected = orders(true);
  EXPECT_EQ(ours.loss, expected.loss);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_TRUE(torch::equal(ours.first[i], expected.first[i])) << "gradient " << i;
    EXPECT_TRUE(torch::equal(ours.second[i], expected.second[i])) << "second gradient " << i;
  }
  const auto expect_difference = [&](double derivative, double scale, const auto& f) {
    constexpr double kStep = 1e-7;
    const auto at_distance = [&](double by) {
      const torch::NoGradGuard no_grad;
      for (std::size_t i = 0; i < along.size(); ++i) parameters[i].add_(along[i], by);
    };
    const auto difference = [&](double by) {
      at_distance(by);
      const double above = f();
      at_distance(-2 * by);
      const double below = f();
      at_distance(by);
      return (above - below) / (2 * by);
    };
    const double one = difference(kStep), two = difference(2 * kStep);
    const double tolerance = std::abs(two - one) + 64 * 0x1p-53 * scale / kStep;
    EXPECT_NEAR(derivative, one, tolerance);
    EXPECT_LT(tolerance, 1e-4 * std::abs(derivative));
  };
  expect_difference(dot(ours.first).template item<double>(), ours.loss,
                    [&] { return loss(false).template item<double>(); });
  expect_difference(
      dot(ours.second).template item<double>(), dot(ours.first, true).template item<double>(), [&] {
        return dot(torch::autograd::grad({loss(false)}, parameters)).template item<double>();
      });
  return pipeline.report();
}

TEST_F(GradientBounds, ExactGradientsOfBothOrdersMatchDifferences) {
  std::int64_t saved = 0, plain_bytes = 0;
  for (const auto& make : pipeline_models::all()) {
    const Ledger ledger = expect_gradients_match_differences<Exact>(make);
    saved += ledger.saved_bytes, plain_bytes += ledger.saved_plain_bytes;
  }
  EXPECT_LT(saved, plain_bytes) << "nothing was computed again";
  using Both = CompressionPipeline<Recompute<CheapOps>, Blocks<2>>;
  expect_gradients_match_differences<CompressionPipeline<>>(smooth);
  expect_gradients_match_differences<Exact>(smooth);
  expect_gradients_match_differences<CompressionPipeline<Blocks<>>>(smooth);
  expect_gradients_match_differences<Both>(smooth);
  expect_gradients_match_differences<Both>(pipeline_models::convolution);
}

}  // namespace

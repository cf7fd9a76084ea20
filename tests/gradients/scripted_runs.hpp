// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The scripts of tests/reference/grad_scales.py on any device, against what Python did.
#include <fourfold/gradients/grad_scaler.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/reference/grad_scales.hpp"

#include <cmath>
#include <limits>
#include <map>

namespace fourfold::tests {

struct ScaledParameter {
  explicit ScaledParameter(torch::Device device)
      : weight(torch::zeros({4}, device).requires_grad_()),
        optimizer({weight}, torch::optim::SGDOptions(1)) {}

  void backward(GradScaler& scaler, float value) {
    weight.mutable_grad().reset();
    const auto factors = torch::tensor({1.0F, 2.0F, value, 3.0F}).to(weight.device());
    scaler.scale((weight * factors).sum()).backward();
  }
  void step(GradScaler& scaler) {
    const torch::Tensor before = weight.detach().clone();
    scaler.step(optimizer);
    steps += before.equal(weight.detach()) ? 0 : 1;
  }
  torch::Tensor weight;
  torch::optim::SGD optimizer;
  int steps = 0;
};

inline void expect_row(const double (&row)[4], const GradScaler& scaler, int iteration, int a,
                       int b) {
  const auto state = scaler.state_dict().value();
  EXPECT_EQ(state.scale, row[0]) << std::hexfloat << "iteration " << iteration;
  EXPECT_EQ(static_cast<double>(state.growth_tracker), row[1]) << "iteration " << iteration;
  EXPECT_EQ(a, row[2]) << "iteration " << iteration;
  EXPECT_EQ(b, row[3]) << "iteration " << iteration;
}

/// Infinities where the script has them; b is left out of each fourth iteration.
inline void expect_scripted_run(torch::Device device) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  GradScaler scaler(
      {.init_scale = 1000, .growth_factor = 1.7, .backoff_factor = 0.3, .growth_interval = 3});
  const std::map<int, float> bad_a{{2, inf}, {7, NAN}, {8, inf}, {30, -inf}};
  const std::map<int, float> bad_b{{8, NAN}, {14, inf}, {16, inf}};
  const auto value = [](const std::map<int, float>& bad, int t) {
    const auto found = bad.find(t);
    return found == bad.end() ? 1.0F : found->second;
  };
  ScaledParameter a(device), b(device);
  for (int t = 0; t < 48; ++t) {
    a.backward(scaler, value(bad_a, t));
    if (t % 5 == 0) scaler.unscale_(a.optimizer);
    a.step(scaler);
    if (t % 4 != 3) {
      b.backward(scaler, value(bad_b, t));
      b.step(scaler);
    }
    if (t == 20)
      scaler.update(12345.678);
    else
      scaler.update();
    if (t == 33) {
      const auto saved = scaler.state_dict();
      scaler = GradScaler();
      scaler.load_state_dict(saved);
    }
    if (t == 40) scaler.set_growth_interval(1);
    expect_row(reference::kScalesScripted[t], scaler, t, a.steps, b.steps);
  }
  EXPECT_TRUE(a.weight.isfinite().all().item<bool>());
}

/// Gradients of 2^30 under a scale that grows until their product leaves fp32.
inline void expect_overflowing_run(torch::Device device) {
  GradScaler scaler({.init_scale = 0x1p100, .growth_interval = 4});
  ScaledParameter a(device);
  for (int t = 0; t < 30; ++t) {
    a.backward(scaler, 0x1p30F);
    a.step(scaler);
    scaler.update();
    expect_row(reference::kScalesOverflowing[t], scaler, t, a.steps, 0);
  }
}

}  // namespace fourfold::tests

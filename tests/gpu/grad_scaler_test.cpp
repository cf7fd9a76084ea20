// SPDX-License-Identifier: Apache-2.0
/// GradScaler on a GPU: Python's scales, as on the CPU.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/gpu/on_gpu.hpp"
#include "tests/gradients/scripted_runs.hpp"

namespace {

class GpuGradScaler : public fourfold::tests::OnGpu {};

TEST_F(GpuGradScaler, ScalesArePythonsInAScriptedRun) {
  fourfold::tests::expect_scripted_run(torch::kCUDA);
}
TEST_F(GpuGradScaler, ScalesArePythonsWhereProductsOverflow) {
  fourfold::tests::expect_overflowing_run(torch::kCUDA);
}
/// The scale lives where the first loss was; gradients on both devices are unscaled and checked.
TEST_F(GpuGradScaler, AnOptimizerOfTwoDevicesIsSteppedOrSkippedAsOne) {
  fourfold::GradScaler scaler({.init_scale = 4});
  const auto here = torch::ones({3}).requires_grad_();
  const auto there = torch::ones({3}, torch::kCUDA).requires_grad_();
  torch::optim::SGD optimizer({here, there}, torch::optim::SGDOptions(1));
  const auto iterate = [&](float factor) {
    optimizer.zero_grad();
    scaler.scale(here.sum() + there.cpu().sum() * factor).backward();
    scaler.step(optimizer);
    scaler.update();
  };
  iterate(std::numeric_limits<float>::infinity());
  EXPECT_TRUE(here.equal(torch::ones({3})));
  EXPECT_TRUE(there.cpu().equal(torch::ones({3})));
  EXPECT_EQ(scaler.get_scale(), 2);
  iterate(1);
  EXPECT_TRUE(here.equal(torch::zeros({3})));
  EXPECT_TRUE(there.cpu().equal(torch::zeros({3})));
}

}  // namespace

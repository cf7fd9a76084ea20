// SPDX-License-Identifier: Apache-2.0
/// States on the host for parameters on a GPU: the bits of parameters and states on the CPU.
#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/cuda/kernels.hpp>
#include <fourfold/optim/offload.hpp>
#include <fourfold/optim/optimizer_states.hpp>
#include "tests/optim/oracle.hpp"

#include <memory>
#include <vector>

namespace {

namespace optim = fourfold::optim;
using Optimizer = optim::AdamWOf<fourfold::Int8>;

/// The condition of tests/gpu/kernels_test.cpp, so that all suites here are skipped, or none.
class GpuOffloadedStates : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || fourfold::cuda::kernels() == nullptr)
      GTEST_SKIP() << "LibTorch finds no GPU, or fourfold::cuda is not linked";
  }
};

TEST_F(GpuOffloadedStates, AreSteppedAsOnTheCpu) {
  for (const auto& holder : {fourfold::on_host(), fourfold::on_file()}) {
    std::vector<at::Tensor> here, there;
    for (const auto& sizes :
         std::vector<std::vector<std::int64_t>>{{500, 301}, {301}, {300, 401}, {10}}) {
      here.push_back(oracle::start(sizes, at::kFloat).requires_grad_());
      there.push_back(oracle::start(sizes, at::kFloat).to(torch::kCUDA).requires_grad_());
    }
    Optimizer one(here, 1e-2), other(there, 1e-2, {.offload = holder});
    for (int step = 1; step < 6; ++step) {
      for (std::size_t i = 0; i < here.size(); ++i) {
        here[i].mutable_grad() = oracle::gradient(here[i], step);
        there[i].mutable_grad() = here[i].grad().to(torch::kCUDA);
      }
      one.step(), other.step();
    }
    EXPECT_EQ(one.state_bytes(), other.state_bytes());
    for (std::size_t i = 0; i < here.size(); ++i) EXPECT_TRUE(there[i].cpu().equal(here[i])) << i;
  }
}

}  // namespace

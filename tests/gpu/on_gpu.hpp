// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What the suites of tests/gpu share. All are named Gpu..., and one condition skips every case of
/// them or none.
#include <ATen/Context.h>
#include <ATen/ops/masked_fill.h>
#include <gtest/gtest.h>
#include <fourfold/cuda/kernels.hpp>

#include <torch/types.h>
#include <torch/utils.h>
#include <cstring>
#include <vector>

namespace fourfold::tests {

class OnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA())
      GTEST_SKIP() << "LibTorch finds no GPU (or its CUDA operators are not linked: configure with "
                      "FOURFOLD_TORCH_CUDA=ON)";
    if (cuda::kernels() == nullptr) GTEST_SKIP() << "fourfold::cuda is not linked";
    torch::manual_seed(7);
  }
};

/// Bit for bit, wherever they are; a NaN equals any other.
inline bool same_bits(const at::Tensor& one, const at::Tensor& other) {
  if (one.sizes() != other.sizes() || one.scalar_type() != other.scalar_type()) return false;
  at::Tensor a = one.detach().cpu().contiguous(), b = other.detach().cpu().contiguous();
  if (a.is_floating_point()) {
    if (!a.isnan().equal(b.isnan())) return false;
    a = a.masked_fill(a.isnan(), 0), b = b.masked_fill(b.isnan(), 0);
  }
  return a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

}  // namespace fourfold::tests

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/torch/saved_tensors.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <thread>

namespace {
namespace door = fourfold::door;
using ::testing::HasSubstr;

/// Clones what it is given and counts.
struct Counting : door::SavedTensors {
  struct Held : door::Saved {
    at::Tensor copy;
    int* unpacked;
    at::Tensor unpack() override {
      ++*unpacked;
      return copy;
    }
  };
  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    EXPECT_FALSE(tensor.requires_grad());
    EXPECT_FALSE(at::GradMode::is_enabled());
    ++packed;
    auto held = std::make_shared<Held>();
    held->copy = tensor.clone(), held->unpacked = &unpacked;
    return held;
  }
  int packed = 0, unpacked = 0;
};

TEST(SavedTensors, GoToThePackerAndComeBack) {
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3, 4}).requires_grad_();
  at::Tensor y;
  {
    const door::SavedTensorsScope scope(packer);
    y = (x * x).sum();
    EXPECT_EQ(scope.packed(), 2);
  }
  EXPECT_EQ(packer->packed, 2);
  y.backward();
  EXPECT_EQ(packer->unpacked, 2);
  EXPECT_TRUE(torch::equal(x.grad(), 2 * x.detach()));
}
}  // namespace

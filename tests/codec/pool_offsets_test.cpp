// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/pool_offsets.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using fourfold::pack_pool_indices;
using fourfold::PoolWindows;
using Three = std::array<std::int64_t, 3>;

struct Case {
  Three input, kernel, stride, padding, dilation;
  bool ceil = false;
};

/// What LibTorch returns for the case, over 2 images of 3 channels, and where its windows lie.
std::pair<torch::Tensor, PoolWindows> pooled(const Case& c, const torch::Tensor& values) {
  const auto x = values.reshape({2, 3, c.input[0], c.input[1], c.input[2]});
  const auto indices = std::get<1>(
      at::max_pool3d_with_indices(x, c.kernel, c.stride, c.padding, c.dilation, c.ceil));
  return {indices,
          {.input = c.input,
           .output = {indices.size(2), indices.size(3), indices.size(4)},
           .kernel = c.kernel,
           .stride = c.stride,
           .padding = c.padding,
           .dilation = c.dilation}};
}

TEST(PoolOffsets, IndicesComeBackFromWindowsOfAnyShape) {
  torch::manual_seed(0);
  const std::vector<Case> cases{
      {{1, 8, 8}, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, {1, 1, 1}},
      {{1, 9, 11}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}},
      {{1, 9, 11}, {1, 3, 2}, {1, 1, 3}, {0, 1, 1}, {1, 2, 2}, true},
      {{1, 3, 3}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
      {{7, 6, 5}, {2, 3, 2}, {2, 1, 2}, {1, 1, 1}, {1, 2, 1}, true},
      {{4, 33, 29}, {3, 5, 7}, {1, 4, 2}, {1, 2, 3}, {1, 1, 2}},
      {{1, 40, 40}, {1, 16, 16}, {1, 3, 5}, {0, 8, 8}, {1, 1, 1}},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    const Case& c = cases[i];
    const std::int64_t n = 6 * c.input[0] * c.input[1] * c.input[2];
    const auto holed = torch::where(torch::rand({n}) < 0.05, torch::tensor(NAN), torch::randn({n}));
    for (const auto& values : {torch::randn({n}), torch::zeros({n}),
                               torch::full({n}, -std::numeric_limits<float>::infinity()), holed}) {
      const auto [indices, windows] = pooled(c, values);
      const auto payload = pack_pool_indices(indices, windows);
      ASSERT_NE(payload, nullptr);
      EXPECT_EQ(payload->nbytes(), indices.numel());
      EXPECT_TRUE(torch::equal(payload->decompress().view(indices.sizes()), indices));
    }
  }
}

TEST(PoolOffsets, ChannelsLast) {
  torch::manual_seed(1);
  const auto x = torch::randn({2, 5, 9, 7}).contiguous(at::MemoryFormat::ChannelsLast);
  const auto indices = std::get<1>(at::max_pool2d_with_indices(x, {3, 3}, {2, 2}, {1, 1}));
  ASSERT_FALSE(indices.is_contiguous());
  const auto payload = pack_pool_indices(indices.as_strided({indices.numel()}, {1}),
                                         {.input = {1, 9, 7},
                                          .output = {1, indices.size(2), indices.size(3)},
                                          .kernel = {1, 3, 3},
                                          .stride = {1, 2, 2},
                                          .padding = {0, 1, 1},
                                          .inner = 5});
  ASSERT_NE(payload, nullptr);
  const auto back = torch::empty_like(indices);
  back.as_strided({indices.numel()}, {1}).copy_(payload->decompress());
  EXPECT_TRUE(torch::equal(back, indices));
}

TEST(PoolOffsets, WhatIsNoWindowsIndexIsNotPacked) {
  const Case c{{1, 8, 8}, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, {1, 1, 1}};
  auto [indices, windows] = pooled(c, torch::randn({6 * 64}));
  ASSERT_NE(pack_pool_indices(indices, windows), nullptr);
  for (const std::int64_t wrong : {std::int64_t{-1}, std::int64_t{63}, std::int64_t{2},
                                   std::numeric_limits<std::int64_t>::max()}) {
    auto other = indices.clone();
    other[0][0][0][0][0] = wrong;
    EXPECT_EQ(pack_pool_indices(other, windows), nullptr) << wrong;
  }
  windows.kernel = {1, 17, 16};  // 272 places
  EXPECT_EQ(pack_pool_indices(indices, windows), nullptr);
  windows.kernel = {0, 0, 0};
  EXPECT_EQ(pack_pool_indices(indices, windows), nullptr);
  EXPECT_EQ(pack_pool_indices(indices.to(torch::kInt), windows), nullptr);
}

TEST(PoolOffsets, SameOnAnyNumberOfThreads) {
  torch::manual_seed(2);
  const Case c{{1, 128, 128}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}};
  const auto [indices, windows] = pooled(c, torch::randn({6 * 128 * 128}));
  const int threads = at::get_num_threads();
  const auto payload = pack_pool_indices(indices, windows);
  at::set_num_threads(threads == 1 ? 3 : 1);
  const auto again = pack_pool_indices(indices, windows);
  EXPECT_TRUE(torch::equal(again->decompress().view(indices.sizes()), indices));
  at::set_num_threads(threads);
  EXPECT_TRUE(torch::equal(payload->buffers()[0], again->buffers()[0]));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/narrow_int.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "../support/message_of.hpp"

namespace {

using fourfold::NarrowInt;
using ::testing::HasSubstr;

constexpr std::int64_t kLow = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t kHigh = std::numeric_limits<std::int64_t>::max();

/// Bytes a value, or 0 where nothing was saved; what came back is what went in.
std::int64_t width_of(const torch::Tensor& values) {
  const auto packed = NarrowInt::try_compress(values);
  if (!packed) return 0;
  const auto back = NarrowInt{}.decompress(*packed);
  EXPECT_TRUE(torch::equal(back, values));
  EXPECT_EQ(back.scalar_type(), values.scalar_type());
  EXPECT_TRUE(back.is_contiguous());
  return values.numel() == 0 ? 0 : packed->buffers[0].numel() / values.numel();
}

TEST(NarrowInt, TakesTheSmallestWidthThatTheRangeFits) {
  const auto between = [](std::int64_t low, std::int64_t high) {
    auto values = torch::full({5000}, low, torch::kLong);
    values[4321] = high;  // no sample sees it
    return width_of(values);
  };
  EXPECT_EQ(between(7, 7), 1);
  for (const std::int64_t low : {std::int64_t{0}, std::int64_t{-100}, std::int64_t{255},
                                 std::int64_t{1} << 40, kLow, -(std::int64_t{1} << 32) - 3}) {
    SCOPED_TRACE(low);
    EXPECT_EQ(between(low, low + 0xFF), 1);
    EXPECT_EQ(between(low, low + 0x100), 2);
    EXPECT_EQ(between(low, low + 0xFFFF), 2);
    EXPECT_EQ(between(low, low + 0x10000), 4);
    EXPECT_EQ(between(low, low + 0xFFFFFFFF), 4);
    EXPECT_EQ(between(low, low + 0x100000000), 0);
  }
  EXPECT_EQ(between(kHigh - 200, kHigh), 1);
  EXPECT_EQ(between(kLow, kHigh), 0);
}

TEST(NarrowInt, IntsNeedFewerBytesThanTheirOwn) {
  const auto ints = torch::arange(70000, torch::kInt);
  EXPECT_EQ(width_of(ints), 0);
  EXPECT_EQ(width_of(ints.slice(0, 0, 65536) - 2147483647 - 1), 2);
  EXPECT_EQ(width_of(ints.slice(0, 0, 256) + 2147483647 - 255), 1);
  EXPECT_EQ(width_of(torch::full({9}, std::numeric_limits<std::int32_t>::max(), torch::kInt)), 1);
}

TEST(NarrowInt, AnySizesAndStrides) {
  torch::manual_seed(0);
  for (const std::int64_t n : {1, 2, 3, 4, 5, 63, 64, 65, 1000, 100003})
    for (const std::int64_t range : {200, 50000, 3000000})
      EXPECT_GT(width_of(torch::randint(-range / 2, range / 2, {n}, torch::kLong)), 0);
  const auto matrix = torch::randint(1000, {70, 90}, torch::kLong);
  for (const auto& view : {matrix.t(), matrix.slice(1, 3, 80, 2), matrix.select(1, 4),
                           matrix.unsqueeze(0).expand({3, 70, 90})})
    EXPECT_EQ(width_of(view), 2);
  const auto none = NarrowInt::try_compress(torch::empty({0, 3}, torch::kLong));
  ASSERT_TRUE(none);
  EXPECT_EQ(NarrowInt{}.decompress(*none).sizes(), (std::vector<std::int64_t>{0, 3}));
}

TEST(NarrowInt, SameCodesOnAnyNumberOfThreads) {
  torch::manual_seed(1);
  const auto values = torch::randint(60000, {1 << 18}, torch::kLong);
  const int threads = at::get_num_threads();
  const auto packed = NarrowInt{}.compress(values);
  at::set_num_threads(threads == 1 ? 3 : 1);
  const auto again = NarrowInt{}.compress(values);
  at::set_num_threads(threads);
  EXPECT_TRUE(torch::equal(packed.buffers[0], again.buffers[0]));
  EXPECT_TRUE(torch::equal(packed.buffers[1], again.buffers[1]));
}

TEST(NarrowInt, SaysWhatItCannotHold) {
  const auto compress = [](const torch::Tensor& values) {
    return message_of([&] { static_cast<void>(NarrowInt{}.compress(values)); });
  };
  EXPECT_THAT(compress(torch::tensor({kLow, kHigh})),
              HasSubstr("the range of these 2 values needs all 8 bytes of Long; ask try_compress() "
                        "first, or keep them as they are"));
  EXPECT_THAT(compress(torch::ones({3})),
              HasSubstr("NarrowInt packs dense Long or Int tensors on a CPU, but was given Float"));
  EXPECT_THAT(compress(torch::Tensor()), HasSubstr("was given an undefined tensor"));
  EXPECT_FALSE(NarrowInt::try_compress(torch::ones({3}, torch::kShort)));
}

}  // namespace

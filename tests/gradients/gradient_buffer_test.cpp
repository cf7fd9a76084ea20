// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/gradient_buffer.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/support/message_of.hpp"

namespace {

using fourfold::GradientBuffer, fourfold::Int2, fourfold::Int4, fourfold::Int8;
using testing::HasSubstr;

template <class B>
struct BufferOf;
template <class Code, class Error>
struct BufferOf<GradientBuffer<Code, Error>> {
  using First = Code;
  using Second = Error;
};

template <class B>
class GradientBufferTest : public testing::Test {};
using Buffers = testing::Types<GradientBuffer<Int8>, GradientBuffer<Int4>,
                               GradientBuffer<Int4, Int8>, GradientBuffer<Int2>>;
TYPED_TEST_SUITE(GradientBufferTest, Buffers);

/// Each addition rounds the sum by half a step of Error, whose range is one step of Code; and
/// bf16 scales of both widen each step by 2^-7 at most, twice where minimum and scale are rounded.
template <class B>
double bound(double range, int additions) {
  const double code = range * (1 + 0x1p-6) / ((1 << BufferOf<B>::First::kFormat.bits) - 1);
  const double error = code * (1 + 0x1p-5) / ((1 << BufferOf<B>::Second::kFormat.bits) - 1);
  return additions * error / 2;
}

TYPED_TEST(GradientBufferTest, HoldsASumWithinItsBound) {
  torch::manual_seed(0);
  for (const std::int64_t n : {0, 1, 63, 1024, 1025, 100000}) {
    TypeParam buffer;
    auto exact = torch::zeros({n}, torch::kDouble);
    double range = 0;
    for (int i = 0; i < 8; ++i) {
      const auto gradient = torch::randn({n});
      buffer.add(gradient);
      exact += gradient;
      if (n > 0) range = std::max(range, 2 * exact.abs().max().template item<double>());
    }
    const auto last = torch::randn({n}), sum = last.clone();
    buffer.add_to(sum);
    const auto error = (sum.to(torch::kDouble) - exact - last).abs();
    if (n > 0) {
      EXPECT_LE(error.max().template item<double>(), bound<TypeParam>(range, 8) + range * 0x1p-20);
    }
    EXPECT_TRUE((last + buffer.value()).equal(sum)) << n;
  }
}

/// Gradients below half a step of the code: without feedback each one would be lost.
TYPED_TEST(GradientBufferTest, SmallGradientsReachTheSum) {
  auto first = torch::zeros({128});
  first[0] = -1, first[1] = 1;
  const double small = 0.2 * 2 / ((1 << BufferOf<TypeParam>::First::kFormat.bits) - 1);
  auto gradient = torch::full({128}, small);
  gradient[0] = 0, gradient[1] = 0;
  TypeParam buffer;
  buffer.add(first);
  constexpr int kTimes = 20;
  for (int i = 0; i < kTimes; ++i) buffer.add(gradient);
  const auto sum = buffer.value().slice(0, 2);
  const double range = std::max(2.0, 1 + small * kTimes);
  EXPECT_TRUE(((sum - small * kTimes).abs() <= bound<TypeParam>(range, kTimes + 1))
                  .all()
                  .template item<bool>())
      << sum.min() << sum.max() << small * kTimes;
}

TYPED_TEST(GradientBufferTest, LayoutsAndTypesAreTheGradients) {
  torch::manual_seed(1);
  const auto image = torch::randn({4, 8, 5, 5});
  TypeParam rows, channels;
  rows.add(image), rows.add(image);
  channels.add(image.contiguous(torch::MemoryFormat::ChannelsLast)), channels.add(image);
  EXPECT_EQ(channels.value().strides(),
            image.contiguous(torch::MemoryFormat::ChannelsLast).strides());
  const double range = 4 * image.abs().max().template item<double>();
  for (const auto& one : {rows.value(), channels.value()})
    EXPECT_LE((one - 2 * image).abs().max().template item<double>(),
              bound<TypeParam>(range, 2) + range * 0x1p-20);
  auto strided = torch::zeros({4, 8, 5, 10}).slice(3, 0, 10, 2);
  rows.add_to(strided);
  EXPECT_TRUE(strided.equal(rows.value()));
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kDouble}) {
    TypeParam buffer;
    buffer.add(image.to(dtype));
    EXPECT_EQ(buffer.value().scalar_type(), dtype);
  }
}

TYPED_TEST(GradientBufferTest, ThreadsDoNotMatter) {
  torch::manual_seed(2);
  const auto a = torch::randn({50000}), b = torch::randn({50000});
  const int threads = torch::get_num_threads();
  std::vector<torch::Tensor> sums;
  for (const int use : {1, 2}) {
    torch::set_num_threads(use);
    TypeParam buffer;
    buffer.add(a), buffer.add(b);
    sums.push_back(buffer.value());
  }
  torch::set_num_threads(threads);
  EXPECT_TRUE(sums[0].equal(sums[1]));
}

TEST(GradientBuffer, BytesAreThoseOfTheCodes) {
  GradientBuffer<Int8> eight;
  GradientBuffer<Int4> four;
  EXPECT_TRUE(eight.empty());
  EXPECT_FALSE(eight.value().defined());
  eight.add(torch::ones({12800})), four.add(torch::ones({12800}));
  EXPECT_EQ(eight.nbytes(), 12800 * 12.75 / 8);
  EXPECT_EQ(four.nbytes(), 12800 * 9 / 8);
  eight.clear();
  EXPECT_TRUE(eight.empty());
  EXPECT_EQ(eight.nbytes(), 0);
}

TEST(GradientBuffer, WhatIsNotFiniteStaysSo) {
  auto gradient = torch::ones({4000});
  gradient[2000] = NAN;
  GradientBuffer<Int8> buffer;
  buffer.add(gradient), buffer.add(torch::ones({4000}));
  const auto sum = buffer.value();
  EXPECT_TRUE(sum[2000].isnan().item<bool>());
  EXPECT_TRUE(sum.slice(0, 0, 1900).isfinite().all().item<bool>()) << "another group";
}

TEST(GradientBuffer, WhatItCannotAddIsNamed) {
  GradientBuffer<Int8> buffer;
  buffer.add(torch::ones({3}));
  EXPECT_THAT(message_of([&] { buffer.add(torch::ones({4})); }),
              HasSubstr("a GradientBuffer of Float [3] was given a Float gradient of sizes [4]; "
                        "clear() it before a parameter changes its shape"));
  EXPECT_THAT(message_of([&] { buffer.add(torch::ones({3}, torch::kHalf)); }),
              HasSubstr("was given a Half gradient"));
  EXPECT_THAT(
      message_of([&] { buffer.add(torch::ones({3}).to_sparse()); }),
      HasSubstr("adds dense floating gradients on a CPU, but was given a Sparse Float one"));
  EXPECT_THAT(message_of([&] { buffer.add({}); }), HasSubstr("was given an undefined one"));
  EXPECT_NEAR(buffer.value().sum().item<double>(), 3, 3 * 2.0 / 255 / 30);
}

}  // namespace

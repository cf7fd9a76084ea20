// SPDX-License-Identifier: Apache-2.0
#include <kernels/bit_mask.cuh>

#include <gtest/gtest.h>
#include <fourfold/codec/detail/bit_mask_loops.hpp>

#include <cmath>
#include <limits>
#include <random>

namespace {

using namespace fourfold;

constexpr std::array<std::int64_t, 9> kSizes{0, 1, 7, 8, 9, 63, 64, 65, 4096 + 3};

/// What both ways make of one tensor; the bits count only where there is no third value.
template <class U>
struct Mask {
  std::vector<std::uint8_t> bits;
  U other = 0;
  std::int64_t third = 0;
  bool operator==(const Mask&) const = default;
};

template <class U>
Mask<U> by_loop(const std::vector<U>& x) {
  const auto n = static_cast<std::int64_t>(x.size());
  Mask<U> mask{std::vector<std::uint8_t>(static_cast<std::size_t>(cuda::ceil_div(n, 8)))};
  mask.third = detail::mask_to_bits(x.data(), n, mask.bits.data(), mask.other, Isa::kScalar,
                                    [](std::int64_t begin, std::int64_t end, std::int64_t,
                                       const auto& piece) { piece(begin, end); });
  if (mask.third < n) return {{}, 0, mask.third};
  return mask;
}

template <class U>
Mask<U> by_kernel(const std::vector<U>& x) {
  const auto n = static_cast<std::int64_t>(x.size());
  constexpr std::uint8_t kUntouched = 0xAA;
  Mask<U> mask{
      std::vector<std::uint8_t>(static_cast<std::size_t>(cuda::ceil_div(n, 8)) + 1, kUntouched)};
  mask.other = static_cast<U>(0x5A);
  cuda::MaskIndex found[2] = {1, 2};
  EXPECT_EQ(cuda::compress_mask(mask.bits.data(), &mask.other, found, x.data(), n, nullptr),
            cudaSuccess);
  EXPECT_EQ(mask.bits.back(), kUntouched);
  mask.bits.pop_back();
  const auto first = std::find_if(x.begin(), x.end(), [](U value) { return value != 0; });
  EXPECT_EQ(found[0], static_cast<cuda::MaskIndex>(first - x.begin()));
  mask.third = static_cast<std::int64_t>(found[1]);
  if (mask.third < n) return {{}, 0, mask.third};
  return mask;
}

template <class U>
void expect_same(const std::vector<U>& x, const std::string& what) {
  SCOPED_TRACE(what + ", " + std::to_string(x.size()) + " values of " + std::to_string(sizeof(U)) +
               " bytes");
  const Mask<U> mask = by_kernel(x);
  ASSERT_EQ(mask, by_loop(x));
  if (mask.bits.empty()) return;
  std::vector<U> again(x.size() + 1, static_cast<U>(0x77));
  ASSERT_EQ(cuda::decompress_mask(again.data(), mask.bits.data(), &mask.other,
                                  static_cast<std::int64_t>(x.size()), nullptr),
            cudaSuccess);
  EXPECT_EQ(again.back(), static_cast<U>(0x77));
  again.pop_back();
  EXPECT_EQ(again, x);
}

/// About half of n values are `other`.
template <class U>
std::vector<U> two_valued(std::int64_t n, U other) {
  std::mt19937 generator(static_cast<unsigned>(n));
  std::vector<U> x(static_cast<std::size_t>(n));
  for (U& value : x) value = (generator() & 1u) != 0 ? other : U{0};
  return x;
}

/// Not zero, and no byte of it is like another.
template <class U>
constexpr U kOther = static_cast<U>(0x3FC0A17B5D9E42F6u);

template <class U>
class EmulatedBitMask : public testing::Test {};
using Patterns = testing::Types<std::uint8_t, std::uint16_t, std::uint32_t, std::uint64_t>;
TYPED_TEST_SUITE(EmulatedBitMask, Patterns);

TYPED_TEST(EmulatedBitMask, EqualsThePlainLoop) {
  for (const std::int64_t n : kSizes) {
    expect_same(two_valued(n, kOther<TypeParam>), "half of them");
    expect_same(std::vector<TypeParam>(static_cast<std::size_t>(n)), "all zeros");
    expect_same(std::vector<TypeParam>(static_cast<std::size_t>(n), kOther<TypeParam>), "no zero");
  }
}

TYPED_TEST(EmulatedBitMask, NamesTheFirstThirdValue) {
  if (sizeof(TypeParam) == 1) return;  // a bool has none
  constexpr auto kThird = static_cast<TypeParam>(kOther<TypeParam> ^ 1);
  for (const std::int64_t n : {1, 8, 65, 4096 + 3}) {
    for (const std::int64_t at :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{7}, std::int64_t{31}, std::int64_t{32},
          std::int64_t{63}, std::int64_t{255}, std::int64_t{256}, std::int64_t{2048}, n - 1}) {
      if (at < 0 || at >= n) continue;
      auto x = two_valued(n, kOther<TypeParam>);
      x[static_cast<std::size_t>(at)] = kThird;
      expect_same(x, "a third at " + std::to_string(at));
      x.back() = static_cast<TypeParam>(kOther<TypeParam> ^ 2);
      expect_same(x, "and a fourth at the end");
    }
    std::vector<TypeParam> late(static_cast<std::size_t>(n));  // the other value itself comes late
    if (n < 2) continue;
    late[static_cast<std::size_t>(n - 2)] = kOther<TypeParam>, late.back() = kThird;
    expect_same(late, "zeros, the other, a third");
  }
}

/// Whatever bits stand for true: a program that waited for the device would learn nothing.
TEST(EmulatedBitMask, ABoolIsTrueOrNot) {
  for (const std::int64_t n : kSizes) {
    auto x = two_valued(n, std::uint8_t{1});
    const auto plain = by_kernel(x);
    for (std::size_t i = 0; i < x.size(); i += 3) x[i] = x[i] != 0 ? 0x80 : 0;
    const auto mask = by_kernel(x);
    EXPECT_EQ(mask.bits, plain.bits);
    EXPECT_EQ(mask.third, n);
  }
}

TEST(EmulatedBitMask, TellsPatternsApartNotNumbers) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const float other : {kNan, kInfinity, -kInfinity, -0.0F, 1e-45F})
    for (const std::int64_t n : kSizes)
      expect_same(two_valued(n, std::bit_cast<std::uint32_t>(other)), std::to_string(other));
  auto x = two_valued(65, std::bit_cast<std::uint32_t>(kNan));
  x[33] = std::bit_cast<std::uint32_t>(-kNan);
  expect_same(x, "two NaNs of different bits");
}

}  // namespace

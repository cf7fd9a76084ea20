// SPDX-License-Identifier: Apache-2.0
#include <kernels/group_int.cuh>

#include <gtest/gtest.h>
#include <fourfold/codec/detail/group_int_scalar.hpp>

#include <limits>
#include <random>

namespace {

using namespace fourfold;
using cuda::Bf16, cuda::Half;

template <IntFormat F>
struct Codes {
  explicit Codes(std::int64_t n)
      : codes(static_cast<std::size_t>(cuda::ceil_div(n * F.bits, 8)), 0xAA),
        words(static_cast<std::size_t>(cuda::ceil_div(n, F.group))) {}
  std::vector<std::uint8_t> codes;
  std::vector<std::uint32_t> words;
  bool operator==(const Codes&) const = default;
};

template <IntFormat F>
Codes<F> plain_loop(const std::vector<float>& x, const Key* key) {
  const auto n = static_cast<std::int64_t>(x.size());
  const detail::PhiloxRounds rounds(key == nullptr ? PhiloxStream{} : philox_stream(*key));
  Codes<F> out(n);
  for (std::int64_t begin = 0; begin < n; begin += F.group) {
    const std::int64_t count = std::min<std::int64_t>(F.group, n - begin);
    std::uint32_t& word = out.words[begin / F.group];
    word = detail::group_word_scalar(F, x.data() + begin, count);
    detail::encode_group_scalar(F, word, x.data() + begin, count,
                                key == nullptr ? nullptr : &rounds, begin,
                                out.codes.data() + begin * F.bits / 8);
  }
  return out;
}

std::vector<float> some_values(std::int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& value : x) value = normal(generator) * 3;
  return x;
}

constexpr std::array<std::int64_t, 12> kSizes{0, 1, 7, 8, 9, 63, 64, 65, 127, 129, 1000, 5003};

template <class T>
class EmulatedGroupInt : public testing::Test {};
template <int Bits, int Group, bool Symmetric>
struct Format {
  static constexpr IntFormat value{.bits = Bits, .group = Group, .symmetric = Symmetric};
};
using Formats = testing::Types<Format<8, 128, false>, Format<4, 64, false>, Format<2, 64, false>,
                               Format<8, 128, true>, Format<4, 64, true>, Format<4, 32, false>,
                               Format<8, 512, false>, Format<4, 8, false>>;
TYPED_TEST_SUITE(EmulatedGroupInt, Formats);

TYPED_TEST(EmulatedGroupInt, CodesEqualThePlainLoops) {
  constexpr IntFormat F = TypeParam::value;
  const Key key{.seed = 1, .step = 2, .forward = 3, .storage = 4};
  for (std::int64_t n : kSizes) {
    auto x = some_values(n, static_cast<unsigned>(n));
    if (n > 1) x[1] = -0.0F;
    Codes<F> nearest(n), stochastic(n);
    ASSERT_EQ(
        cuda::quantize_groups<F>(nearest.codes.data(), nearest.words.data(), x.data(), n, nullptr),
        cudaSuccess);
    ASSERT_EQ(cuda::quantize_groups<F>(stochastic.codes.data(), stochastic.words.data(), x.data(),
                                       n, key, nullptr),
              cudaSuccess);
    EXPECT_TRUE(nearest == plain_loop<F>(x, nullptr)) << n << " values";
    EXPECT_TRUE(stochastic == plain_loop<F>(x, &key)) << n << " values";
  }
}

TYPED_TEST(EmulatedGroupInt, ValuesEqualThePlainLoops) {
  constexpr IntFormat F = TypeParam::value;
  for (std::int64_t n : kSizes) {
    const auto x = some_values(n, 5);
    const Codes<F> packed = plain_loop<F>(x, nullptr);
    std::vector<float> out(x.size());
    ASSERT_EQ(cuda::dequantize_groups<F>(out.data(), packed.codes.data(), packed.words.data(), n,
                                         nullptr),
              cudaSuccess);
    for (std::int64_t i = 0; i < n; ++i) {
      float expected = 0;
      detail::decode_group_scalar(F, packed.words[i / F.group], packed.codes.data(), i, i + 1,
                                  &expected);
      ASSERT_EQ(out[i], expected) << i << " of " << n;
    }
  }
}

TYPED_TEST(EmulatedGroupInt, AGroupWithANaNOrAnInfinityIsNaNAndItsNeighboursAreNot) {
  constexpr IntFormat F = TypeParam::value;
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    auto x = some_values(3 * F.group, 7);
    x[F.group + F.group / 2] = bad;
    Codes<F> packed(3 * F.group);
    cuda::quantize_groups<F>(packed.codes.data(), packed.words.data(), x.data(), 3 * F.group, Key{},
                             nullptr);
    const Key key{};
    EXPECT_TRUE(packed == plain_loop<F>(x, &key));
    std::vector<float> out(x.size());
    cuda::dequantize_groups<F>(out.data(), packed.codes.data(), packed.words.data(), 3 * F.group,
                               nullptr);
    for (int i = 0; i < 3 * F.group; ++i) EXPECT_EQ(std::isnan(out[i]), i / F.group == 1) << i;
  }
}

TEST(EmulatedGroupInt16Bit, ReadsAndWritesHalfAndBf16) {
  constexpr IntFormat F{.bits = 8, .group = 128};
  const auto x = some_values(300, 9);
  std::vector<Bf16> bf16(x.size());
  std::vector<float> rounded(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    bf16[i] = cuda::from_float<Bf16>(x[i]);
    rounded[i] = cuda::to_float(bf16[i]);
  }
  Codes<F> packed(300);
  cuda::quantize_groups<F>(packed.codes.data(), packed.words.data(), bf16.data(), 300, nullptr);
  EXPECT_TRUE(packed == plain_loop<F>(rounded, nullptr));
  std::vector<Half> half(x.size());
  std::vector<float> full(x.size());
  cuda::dequantize_groups<F>(half.data(), packed.codes.data(), packed.words.data(), 300, nullptr);
  cuda::dequantize_groups<F>(full.data(), packed.codes.data(), packed.words.data(), 300, nullptr);
  for (std::size_t i = 0; i < x.size(); ++i)
    EXPECT_EQ(half[i].bits, cuda::from_float<Half>(full[i]).bits);
}

TEST(EmulatedStorage, HalfConversionsAgreeWithTheCompilersOnEveryBit) {
#if defined(__FLT16_MAX__)
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const auto half = std::bit_cast<_Float16>(static_cast<std::uint16_t>(bits));
    const float value = cuda::to_float(Half{static_cast<std::uint16_t>(bits)});
    if (half != half) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    ASSERT_EQ(value, static_cast<float>(half)) << bits;
    ASSERT_EQ(cuda::from_float<Half>(value).bits, bits);
    for (float nudge : {0.999F, 1.0001F, 1.00048828125F}) {  // the last one is a tie
      const float near = value * nudge;
      ASSERT_EQ(cuda::from_float<Half>(near).bits,
                std::bit_cast<std::uint16_t>(static_cast<_Float16>(near)))
          << near;
    }
  }
#else
  GTEST_SKIP() << "this compiler has no _Float16 to compare with";
#endif
}

}  // namespace

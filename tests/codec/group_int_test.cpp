// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/group_int.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../laws/codec_laws.hpp"
#include "../reference/group_int.hpp"

namespace fourfold::laws {
template <IntFormat F>
struct CodecDomain<GroupQuantizer<F>> : AnyValues {
  static constexpr std::int64_t kGroup = F.group;
  static std::optional<std::int64_t> nbytes(std::int64_t n, at::ScalarType) {
    return (n * F.bits + 7) / 8 + 4 * ((n + F.group - 1) / F.group);
  }
};
}  // namespace fourfold::laws

using OddGroups = fourfold::GroupQuantizer<fourfold::IntFormat{.bits = 4, .group = 24}>;
using GroupIntCodecs =
    ::testing::Types<fourfold::Int8, fourfold::Int4, fourfold::Int2, fourfold::Int8Symmetric,
                     fourfold::Int4Symmetric, fourfold::Int2Symmetric, OddGroups>;
INSTANTIATE_TYPED_TEST_SUITE_P(GroupInt, CodecLaws, GroupIntCodecs);

namespace {

using fourfold::Int4, fourfold::Int8, fourfold::Int8Symmetric, fourfold::Int4Symmetric;
using fourfold::IntFormat, fourfold::Isa, fourfold::Key, fourfold::GroupQuantizer;
using fourfold::laws::error_of, fourfold::laws::normal, fourfold::laws::same_bits;
using ::testing::HasSubstr;
namespace detail = fourfold::detail;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<IntFormat> formats() {
  std::vector<IntFormat> all;
  for (bool symmetric : {false, true})
    for (IntFormat f : {IntFormat{8, 128}, IntFormat{4, 64}, IntFormat{2, 64}, IntFormat{8, 8},
                        IntFormat{4, 24}, IntFormat{2, 40}, IntFormat{4, 1024}}) {
      f.symmetric = symmetric;
      all.push_back(f);
    }
  return all;
}
std::string describe(IntFormat f) { return detail::group_int_name(f); }

std::vector<float> random_values(std::size_t n, double size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> draw(0.3 * size, size);
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(draw(generator));
  return values;
}

TEST(GroupInt, NamesSayTheFormat) {
  EXPECT_EQ(Int8::name(), "Int8");
  EXPECT_EQ(Int4Symmetric::name(), "Int4Symmetric");
  EXPECT_EQ((GroupQuantizer<IntFormat{.bits = 4, .group = 32}>::name()), "Int4/32");
  EXPECT_EQ((GroupQuantizer<IntFormat{.bits = 8, .group = 64, .symmetric = true}>::name()),
            "Int8Symmetric/64");
}

TEST(GroupInt, WordsAreThoseOfTheDefinition) {
  for (IntFormat f : formats())
    for (double size : {1e-20, 1e-3, 1.0, 3e4, 1e30})
      for (unsigned seed = 0; seed < 200; ++seed) {
        const auto values = random_values(1 + seed % 70, size, seed);
        const auto count = static_cast<std::int64_t>(values.size());
        const auto group =
            fourfold::group_decoder(f, detail::group_word_scalar(f, values.data(), count));
        const auto expected = f.symmetric
                                  ? fourfold::reference::symmetric_group(values, levels(f))
                                  : fourfold::reference::asymmetric_group(values, levels(f));
        const auto where = describe(f) + " seed " + std::to_string(seed);
        ASSERT_EQ(group.minimum, expected.minimum) << where;
        if (group.scale == expected.scale) continue;
        // The library divides in fp32, whose rounding may lift it to the next scale: only where the
        // expected one reaches the largest value by no more than that rounding.
        const double hi = *std::max_element(values.begin(), values.end());
        const double lo = *std::min_element(values.begin(), values.end());
        const double end = f.symmetric ? std::max(hi, -lo) : hi;
        const double reach = expected.minimum + levels(f) * expected.scale;
        ASSERT_GT(group.scale, expected.scale) << where;
        ASSERT_LE(reach - end, 0x1p-22 * (end - expected.minimum)) << where;
        ASSERT_LE(group.scale, expected.scale * (f.symmetric ? 1 + 0x1p-22 : 1 + 0x1p-7)) << where;
      }
}

TEST(GroupInt, NearestTakesTheNearestCode) {
  for (IntFormat f : formats())
    for (unsigned seed = 0; seed < 50; ++seed) {
      const auto values = random_values(64, 1.0, seed);
      const auto word = detail::group_word_scalar(f, values.data(), 64);
      const auto encoder = fourfold::group_encoder(f, word, false);
      const auto decoder = fourfold::group_decoder(f, word);
      for (float value : values) {
        const std::uint32_t code = fourfold::encode_nearest(encoder, value);
        ASSERT_LE(code, static_cast<std::uint32_t>(zero_code(f) + levels(f)));
        // fp32 leaves 3 * 2^-24 of the distance to the minimum, at most 255 steps, undecided.
        ASSERT_LE(std::abs(static_cast<double>(value) - decode(decoder, code)),
                  decoder.scale * (0.5 + 255 * 3 * 0x1p-24) + 0x1p-24 * std::abs(value))
            << describe(f);
      }
    }
}

TEST(GroupInt, AllRandomBitsTogetherAverageToTheValue) {
  for (IntFormat f : formats()) {
    const auto values = random_values(24, 1.0, 11);
    const auto word = detail::group_word_scalar(f, values.data(), 24);
    const auto encoder = fourfold::group_encoder(f, word, true);
    for (float value : values) {
      std::uint64_t sum = 0;
      std::uint32_t most = 0;
      for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        const std::uint32_t code = fourfold::encode_stochastic(encoder, value, bits);
        sum += code, most = std::max(most, code);
      }
      // The sum of the codes is 65536 times the value in steps, to the integer.
      ASSERT_EQ(static_cast<std::int64_t>(sum), fourfold::encode_steps(encoder, value))
          << describe(f);
      ASSERT_LE(most, static_cast<std::uint32_t>(zero_code(f) + levels(f))) << describe(f);
    }
  }
}

TEST(GroupInt, Bf16RoundsDownUpAndToNearest) {
  std::mt19937 generator(5);
  for (int i = 0; i < 200'000; ++i) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(generator()));
    const float nearest = fourfold::bf16_to_float(fourfold::bf16_nearest(x));
    EXPECT_TRUE(same_bits(torch::tensor(nearest),
                          torch::tensor(x).to(torch::kBFloat16).to(torch::kFloat)) ||
                std::isnan(x));
    if (!std::isfinite(x)) continue;
    const float down = fourfold::bf16_to_float(fourfold::bf16_down(x));
    const float up = fourfold::bf16_to_float(fourfold::bf16_up(x));
    if (std::abs(x) <= 0x1.FEp127F) {
      ASSERT_EQ(down, fourfold::reference::bf16_towards(x, false));
      ASSERT_EQ(up, fourfold::reference::bf16_towards(x, true));
    } else {
      ASSERT_EQ(x < 0 ? down : up, std::copysign(0x1.FEp127F, x));
    }
  }
  EXPECT_TRUE(std::isnan(fourfold::bf16_to_float(fourfold::bf16_nearest(kNan))));
}

/// Buffers of `values` by one instruction set.
std::vector<torch::Tensor> packed(IntFormat f, const torch::Tensor& values,
                                  const std::optional<Key>& key, Isa isa) {
  return detail::group_int_compress(f, values, key, isa);
}

TEST(GroupInt, EveryInstructionSetGivesTheSameCodesAndValues) {
  for (IntFormat f : formats())
    for (std::int64_t n : {1, 7, 16, 31, 64, 65, 129, 1023, 4096 + 77, 20'011})
      for (double size : {1.0, 1e-41, 1e-25, 2e38})
        for (auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
          if (dtype != torch::kFloat && (n > 5000 || size != 1.0)) continue;
          const auto values =
              (normal({n}, 6) * size).clamp(-FLT_MAX, FLT_MAX).to(torch::kFloat).to(dtype);
          for (const auto& key : {std::optional<Key>(), std::optional(Key{1, 2, 3, 4})}) {
            const auto expected = packed(f, values, key, Isa::kScalar);
            const auto whole =
                detail::group_int_decompress(f, expected, {n}, n, dtype, Isa::kScalar);
            const auto where = describe(f) + " n " + std::to_string(n);
            for (Isa isa : fourfold::available_isas()) {
              const auto got = packed(f, values, key, isa);
              ASSERT_TRUE(same_bits(got[0], expected[0])) << where << " codes by " << name(isa);
              ASSERT_TRUE(same_bits(got[1], expected[1])) << where << " words by " << name(isa);
              ASSERT_TRUE(
                  same_bits(detail::group_int_decompress(f, expected, {n}, n, dtype, isa), whole))
                  << where << " values by " << name(isa);
            }
          }
        }
}

TEST(GroupInt, AMillionValuesOfEveryMagnitudeAreTheSameOnEveryInstructionSet) {
  std::mt19937 generator(9);
  auto values = torch::empty({1 << 20});
  for (float& value : std::span(values.data_ptr<float>(), 1 << 20)) {
    do value = std::bit_cast<float>(static_cast<std::uint32_t>(generator()));
    while (!std::isfinite(value));
  }
  const auto tame = normal({1 << 20}, 10);
  for (IntFormat f : {IntFormat{8, 128}, IntFormat{4, 64}, IntFormat{8, 128, true}})
    for (const auto& x : {values, tame})
      for (const auto& key : {std::optional<Key>(), std::optional(Key{5, 6, 7, 8})}) {
        const auto expected = packed(f, x, key, Isa::kScalar);
        for (Isa isa : fourfold::available_isas()) {
          const auto got = packed(f, x, key, isa);
          EXPECT_TRUE(same_bits(got[0], expected[0])) << describe(f) << " " << name(isa);
          EXPECT_TRUE(same_bits(got[1], expected[1])) << describe(f) << " " << name(isa);
        }
      }
}

TEST(GroupInt, AtenGivesTheSameCodes) {  // what a CUDA tensor gets without kernels
  for (IntFormat f : formats())
    for (std::int64_t n : {1, 65, 5003})
      for (double size : {1.0, 1e-41, 1e37}) {
        const auto values = (normal({n}, 12) * size).to(torch::kFloat);
        for (const auto& key : {std::optional<Key>(), std::optional(Key{1, 2, 3, 4})}) {
          const auto expected = packed(f, values, key, Isa::kScalar);
          const auto got = detail::encode_aten(f, values, key);
          EXPECT_TRUE(same_bits(got[0], expected[0])) << describe(f) << " " << n << " " << size;
          EXPECT_TRUE(same_bits(got[1], expected[1])) << describe(f) << " " << n << " " << size;
          // ATen has no fma: its product, of 2.1 times the largest value at most, is rounded too.
          const auto difference =
              detail::decode_aten(f, got[0], got[1], n)
                  .sub(detail::group_int_decompress(f, expected, {n}, n, torch::kFloat));
          EXPECT_LE(difference.abs().max().item<double>(),
                    0x1p-21 * values.abs().max().item<double>() + 0x1p-148);
        }
      }
}

const std::vector<std::vector<float>>& extremes() {
  constexpr float tiny = std::numeric_limits<float>::denorm_min();
  static const std::vector<std::vector<float>> groups = {{-FLT_MAX, FLT_MAX},
                                                         {FLT_MAX},
                                                         {-FLT_MAX},
                                                         {-FLT_MAX, -FLT_MAX * 0.999F},
                                                         {0, FLT_MAX},
                                                         {tiny},
                                                         {0, tiny},
                                                         {-tiny, tiny, 50 * tiny},
                                                         {-0.0F},
                                                         {-0.0F, 0},
                                                         {1, 1 + FLT_EPSILON},
                                                         {1e-38F, 1e38F}};
  return groups;
}

TEST(GroupInt, ExtremesAreTheSameOnEveryInstructionSet) {
  const auto& groups = extremes();
  for (IntFormat f : {IntFormat{8, 128}, IntFormat{4, 64}, IntFormat{2, 64}}) {
    auto x = normal({40, f.group}, 16);  // whole groups in a row: taken sixteen at a time
    for (std::int64_t g = 0; g < 36; ++g) {
      const auto& values = groups[static_cast<std::size_t>(g) % groups.size()];
      for (std::int64_t i = 0; i < f.group; ++i)
        x[g][i] = values[static_cast<std::size_t>(i) % values.size()];
    }
    auto strange = x.clone();
    strange[7][9] = kNan, strange[12][0] = kInfinity, strange[30][f.group - 1] = -kInfinity;
    for (f.symmetric = false;; f.symmetric = true) {
      for (Isa isa : fourfold::available_isas()) {
        for (int buffer : {0, 1}) {
          const auto at = static_cast<std::size_t>(buffer);
          EXPECT_TRUE(same_bits(packed(f, x, std::nullopt, isa)[at],
                                packed(f, x, std::nullopt, Isa::kScalar)[at]))
              << describe(f) << " nearest " << name(isa);
          EXPECT_TRUE(same_bits(packed(f, strange, Key{3}, isa)[at],
                                packed(f, strange, Key{3}, Isa::kScalar)[at]))
              << describe(f) << " stochastic " << name(isa);
        }
        EXPECT_THAT(error_of([&] { (void)packed(f, strange, std::nullopt, isa); }),
                    HasSubstr("value " + std::to_string(7 * f.group + 9)));
      }
      if (f.symmetric) break;
    }
  }
}

TEST(GroupInt, ExtremesComeBackFiniteAndWithinTheBound) {
  for (const auto& values : extremes()) {
    const auto x = torch::tensor(values);
    const auto check = [&](const auto& codec) {
      const auto bound = codec.error_bound(x);
      const auto nearest = codec.decompress(codec.compress(x));
      EXPECT_TRUE(nearest.isfinite().all().template item<bool>()) << codec.name() << " " << x;
      EXPECT_TRUE(fourfold::laws::within(x, nearest, bound, 1)) << codec.name();
      for (std::uint64_t i = 0; i < 20; ++i)
        EXPECT_TRUE(
            fourfold::laws::within(x, codec.decompress(codec.compress(x, Key{i})), bound, 2))
            << codec.name();
    };
    check(Int8{}), check(Int4{}), check(fourfold::Int2{});
    check(Int8Symmetric{}), check(Int4Symmetric{}), check(fourfold::Int2Symmetric{});
  }
}

TEST(GroupInt, HalfDoesNotOverflowToInfinity) {
  const auto x = torch::tensor({65504.0F, -65504.0F, 3.0F, 60000.0F}).to(torch::kHalf);
  for (std::uint64_t i = 0; i < 50; ++i)
    EXPECT_TRUE(Int4{}.decompress(Int4{}.compress(x, Key{i})).isfinite().all().item<bool>());
}

TEST(GroupInt, ValuesOnCodesNeverMove) {
  const auto relu = torch::relu(normal({500}, 13));
  for (std::uint64_t i = 0; i < 20; ++i) {
    const auto again = Int8{}.decompress(Int8{}.compress(relu, Key{i}));
    EXPECT_TRUE(again.masked_select(relu.eq(0)).eq(0).all().item<bool>()) << "a zero moved";
    const auto constant = torch::full({64}, 0.5);
    EXPECT_TRUE(Int4{}.decompress(Int4{}.compress(constant, Key{i})).equal(constant));
    const auto zeros = Int4Symmetric{}.decompress(Int4Symmetric{}.compress(relu, Key{i}));
    EXPECT_TRUE(zeros.masked_select(relu.eq(0)).eq(0).all().item<bool>()) << "a zero moved";
  }
}

TEST(GroupInt, ANanStaysInItsGroup) {
  for (float strange : {kNan, kInfinity, -kInfinity}) {
    auto x = normal({1000}, 14);
    x[200] = strange;
    const auto again = Int4{}.decompress(Int4{}.compress(x, Key{1}));
    EXPECT_TRUE(again.slice(0, 192, 256).isnan().all().item<bool>());
    EXPECT_TRUE(again.slice(0, 0, 192).isfinite().all().item<bool>());
    EXPECT_TRUE(again.slice(0, 256).isfinite().all().item<bool>());
  }
}

TEST(GroupInt, RefusesByAMessage) {
  auto x = normal({40, 25}, 15);
  x[8][3] = kNan, x[20][0] = kInfinity;
  EXPECT_THAT(error_of([&] { (void)Int8{}.compress(x); }),
              HasSubstr("Int8: value 203 of 1000 is nan, and rounding to nearest takes finite fp32 "
                        "numbers only; look for its origin (stochastic rounding, "
                        "compress(values, key), carries it through"));
  EXPECT_THAT(error_of([&] { (void)Int8{}.compress(x.to(torch::kHalf)); }),
              HasSubstr("value 203 of"));
  EXPECT_THAT(error_of([&] { (void)Int4{}.compress(torch::full({3}, 1e39, torch::kDouble)); }),
              HasSubstr("Int4: value 0 of 3 is 1e+39"));
  EXPECT_THAT(
      error_of([] { (void)Int4{}.compress(torch::arange(5)); }),
      HasSubstr("Int4 takes Float, BFloat16, Half or Double values, but was given Long; keep "
                "such a tensor as it is"));
  EXPECT_THAT(
      error_of([] { (void)Int4{}.compress(torch::eye(5).to_sparse()); }),
      HasSubstr("Int4 packs dense tensors on a CPU or a CUDA device, but was given a Sparse"));
  EXPECT_THAT(error_of([] { (void)Int4{}.compress(torch::empty({5}, torch::kMeta)); }),
              HasSubstr("tensor on meta"));
  EXPECT_THAT(error_of([] { (void)Int4{}.compress(torch::Tensor()); }),
              HasSubstr("Int4 was given an undefined tensor"));
  EXPECT_THAT(error_of([] {
                float one;
                Int4{}.decode(Int4{}.compress(torch::ones({4})), 3, 5, &one);
              }),
              HasSubstr("Int4 was asked for values [3, 5) of 4; ask for a range inside"));
}

}  // namespace

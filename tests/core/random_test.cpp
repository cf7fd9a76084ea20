// SPDX-License-Identifier: Apache-2.0
#include <fourfold/core/random.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <set>

namespace {

using fourfold::Key, fourfold::PhiloxStream;
using Block = std::array<std::uint32_t, 4>;

// Random123's known answers for philox4x32, 10 rounds (tests/kat_vectors of that library).
TEST(Random, PhiloxGivesTheKnownAnswers) {
  EXPECT_EQ(fourfold::philox({.key = 0, .high = 0}, 0),
            (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(fourfold::philox({.key = ~0ULL, .high = ~0ULL}, ~0ULL),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      fourfold::philox({.key = 0x299f31d0a4093822, .high = 0x0370734413198a2e}, 0x85a308d3243f6a88),
      (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, PhiloxIsAConstantExpression) {
  static_assert(fourfold::philox({}, 0)[0] == 0x6627e8d5);
  static_assert(fourfold::random_bits16({}, 0) == 0xe8d5 &&
                fourfold::random_bits16({}, 1) == 0x6627);
}

TEST(Random, EightValuesShareABlockLowHalvesFirst) {
  const PhiloxStream stream = fourfold::philox_stream(Key{1, 2, 3, 4});
  for (std::uint64_t i = 0; i < 64; ++i) {
    const Block block = fourfold::philox(stream, i / 8);
    EXPECT_EQ(fourfold::random_bits16(stream, i), block[(i % 8) / 2] >> (16 * (i % 2)) & 0xFFFF);
  }
}

TEST(Random, MixIsThatOfSplitMix64) {
  EXPECT_EQ(fourfold::mix(0), 0xE220A8397B1DCDAFu);  // its first output from the seed 0
}

TEST(Random, EveryPartOfAKeyMatters) {
  std::set<std::pair<std::uint64_t, std::uint64_t>> streams;
  std::size_t keys = 0;
  for (std::uint64_t seed : {0, 1, 2})
    for (std::uint64_t step : {0, 1, 2})
      for (std::uint64_t forward : {0, 1, 2})
        for (std::uint64_t storage : {0, 1, 2}) {
          const auto stream = fourfold::philox_stream(Key{seed, step, forward, storage});
          streams.emplace(stream.key, stream.high);
          ++keys;
        }
  EXPECT_EQ(streams.size(), keys);
}

TEST(Random, UniformsLieInsideAndAverageToOneHalf) {
  double sum = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float u = fourfold::uniform16(bits);
    EXPECT_GT(u, 0);
    EXPECT_LT(u, 1);
    sum += u;
  }
  EXPECT_EQ(sum / 65536, 0.5);  // each is a multiple of 2^-17, so the sum is exact
}

// 16 bins over 2^16 draws: chi square of 15 degrees of freedom passes 44.3 once in 10^4.
TEST(Random, DrawsAreSpreadEvenly) {
  const auto stream = fourfold::philox_stream(Key{9, 9, 9, 9});
  std::array<double, 16> bins{};
  for (std::uint64_t i = 0; i < 65536; ++i) ++bins[fourfold::random_bits16(stream, i) >> 12];
  double chi_square = 0;
  for (double count : bins) chi_square += (count - 4096) * (count - 4096) / 4096;
  EXPECT_LT(chi_square, 44.3);
}

}  // namespace

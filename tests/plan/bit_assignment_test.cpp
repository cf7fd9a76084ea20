// SPDX-License-Identifier: Apache-2.0
#include <fourfold/plan/bit_assignment.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace {

using fourfold::plan::assign_bits, fourfold::plan::AtBits, fourfold::plan::BitAssignment,
    fourfold::plan::BitItem, fourfold::plan::kBits;

/// A share of `at8` in 8 bits, and as much more in fewer as the steps are longer: 17^2, 85^2.
AtBits share(double at8) { return {at8, 17 * 17 * at8, 85 * 85 * at8}; }

std::vector<BitItem> random_items(std::uint64_t seed, std::size_t count, std::size_t gradients) {
  std::mt19937_64 draws(seed);
  std::uniform_int_distribution<std::int64_t> values(1, 1000);
  std::lognormal_distribution<double> size(-12, 2);
  std::vector<BitItem> items(count);
  for (std::size_t i = 0; i < count; ++i) {
    items[i].values = values(draws);
    for (std::size_t g = 0; g < gradients; ++g)
      if ((i + g) % 3 != 0)
        items[i].effects.push_back({static_cast<std::uint32_t>(g), share(size(draws))});
  }
  return items;
}

struct Whole {
  double bits = 0, variance = 0, most = 0;
};
Whole whole(const std::vector<BitItem>& items, const std::vector<std::size_t>& level,
            std::size_t gradients) {
  Whole out;
  std::vector<double> sums(gradients);
  double values = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    values += static_cast<double>(items[i].values);
    out.bits += static_cast<double>(items[i].values) * kBits[level[i]];
    for (const auto& effect : items[i].effects) sums[effect.gradient] += effect.share[level[i]];
  }
  out.bits /= values;
  for (const double sum : sums) out.variance += sum, out.most = std::max(out.most, sum);
  return out;
}

/// Of all assignments that spend no more bits and keep to the limit, what the best one adds.
double best(const std::vector<BitItem>& items, std::size_t gradients, double bits, double limit) {
  double least = std::numeric_limits<double>::infinity();
  std::vector<std::size_t> level(items.size());
  for (;;) {
    const Whole now = whole(items, level, gradients);
    if (now.bits <= bits * (1 + 1e-12) && now.most <= limit) least = std::min(least, now.variance);
    std::size_t i = 0;
    while (i < level.size() && ++level[i] == kBits.size()) level[i++] = 0;
    if (i == level.size()) return least;
  }
}

TEST(BitAssignment, NoOtherAddsLessForTheBitsThatItSpends) {
  // Lowering by the least increase for each bit walks along the lower convex hull of what can be had,
  // since the increases of one storage only grow: 4 bits save twice what 2 bits save after them, for
  // 288 as much noise against 6936. So nothing that spends as much as it does adds less.
  for (std::uint64_t seed = 0; seed < 30; ++seed)
    for (const double bits : {7.0, 5.0, 4.0, 3.0, 2.0}) {
      const auto items = random_items(seed, 7, 3);
      const BitAssignment made = assign_bits(items, 3, bits, 1e300);
      const Whole now = whole(items, made.level, 3);
      EXPECT_LE(now.bits, bits * (1 + 1e-12));
      EXPECT_NEAR(now.bits, made.bits, 1e-9);
      EXPECT_FALSE(made.guarded);
      const double floor = best(items, 3, now.bits, 1e300);
      EXPECT_NEAR(now.variance, floor, 1e-9 * floor) << "seed " << seed << ", bits " << bits;
    }
}

TEST(BitAssignment, TheGuardGoesBeforeTheAverage) {
  int guarded = 0;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    const auto items = random_items(seed, 7, 3);
    const double start = whole(items, std::vector<std::size_t>(7), 3).most;
    for (const double limit : {1.5 * start, 100 * start, 3000 * start}) {
      const BitAssignment made = assign_bits(items, 3, 2.0, limit);
      const Whole now = whole(items, made.level, 3);
      EXPECT_LE(now.most, limit * (1 + 1e-12));
      for (std::size_t g = 0; g < 3; ++g) EXPECT_LE(made.share[g], limit * (1 + 1e-12));
      EXPECT_EQ(made.guarded, now.bits > 2.0);
      guarded += made.guarded;
      // Where it stopped, no further step is allowed.
      for (std::size_t i = 0; made.guarded && i < items.size(); ++i) {
        if (made.level[i] + 1 == kBits.size()) continue;
        auto further = made.level;
        ++further[i];
        EXPECT_GT(whole(items, further, 3).most, limit * (1 - 1e-12));
      }
    }
  }
  EXPECT_GT(guarded, 30);
}

TEST(BitAssignment, WhatAddsNothingGivesItsBitsFirst) {
  std::vector<BitItem> items(3);
  for (BitItem& item : items) item.values = 100;
  items[0].effects = {{0, share(1e-6)}};
  items[1].effects = {{0, share(0)}};
  items[2].effects = {{1, share(1e-5)}};
  const BitAssignment made = assign_bits(items, 2, 5.0, 0.1);
  EXPECT_EQ(made.level, (std::vector<std::size_t>{1, 2, 0}));  // 4, 2 and 8 bits: 14 / 3
  EXPECT_DOUBLE_EQ(made.bits, 14.0 / 3);
}

TEST(BitAssignment, SmallAndEmptyOnes) {
  const BitAssignment none = assign_bits({}, 0, 4, 0.1);
  EXPECT_EQ(none.bits, 0);
  EXPECT_FALSE(none.guarded);
  std::vector<BitItem> items(2);  // without values: not held in bits of ours
  items[0].values = 10, items[0].effects = {{0, share(1)}};
  const BitAssignment over = assign_bits(items, 1, 4, 0.1);  // 8 bits are above the limit already
  EXPECT_TRUE(over.guarded);
  EXPECT_EQ(over.bits, 8);
  EXPECT_EQ(assign_bits(items, 1, 8, 0.1).guarded, false);
}

}  // namespace

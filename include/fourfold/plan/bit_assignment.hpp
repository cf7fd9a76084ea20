// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Which of 8, 4 and 2 bits each saved storage gets, so that on average no more are spent than asked
/// for, and rounding adds least variance to the gradients.
///
/// min sum of w_i C_i(b_i) so that sum w_i b_i <= bits * sum w_i, by the greedy of ActNN
/// (arXiv:2104.14129): all start at 8 bits, and of all storages the one is lowered whose
/// next step adds least for each bit that it saves. The guard is ours: no step is taken after which
/// rounding would add more than `most_variance` of a gradient's own variance to it. So if no
/// assignment stays below it, more bits are spent than asked for.
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0::plan {

inline constexpr std::array<int, 3> kBits{8, 4, 2};
/// Of something at each of kBits.
using AtBits = std::array<double, kBits.size()>;

/// Variance that rounding one storage adds to one gradient, as a share of that gradient's own.
struct BitEffect {
  std::uint32_t gradient = 0;
  AtBits share{};
};
struct BitItem {
  std::int64_t values = 0;
  std::vector<BitEffect> effects{};
};

struct BitAssignment {
  std::vector<std::size_t> level{};  ///< of each item, an index of kBits
  std::vector<double> share{};       ///< added to each gradient
  double bits = 0;                   ///< on average over values; 0: there are none
  bool guarded = false;              ///< the guard kept more bits than were asked for
};

/// Ties go to the item that comes first, so the same input gives the same bits.
[[nodiscard]] inline BitAssignment assign_bits(const std::vector<BitItem>& items,
                                               std::size_t gradients, double bits,
                                               double most_variance) {
  BitAssignment out{.level = std::vector<std::size_t>(items.size()),
                    .share = std::vector<double>(gradients)};
  double values = 0, spent = 0;
  for (const BitItem& item : items) {
    values += static_cast<double>(item.values);
    for (const BitEffect& effect : item.effects) out.share[effect.gradient] += effect.share[0];
  }
  spent = kBits[0] * values;
  while (spent > bits * values) {
    std::size_t best = items.size();
    double least = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      const std::size_t from = out.level[i];
      if (from + 1 == kBits.size() || items[i].values == 0) continue;
      double added = 0;
      bool allowed = true;
      for (const BitEffect& effect : items[i].effects) {
        const double more = effect.share[from + 1] - effect.share[from];
        allowed = allowed && (more <= 0 || out.share[effect.gradient] + more <= most_variance);
        added += more;
      }
      if (!allowed) continue;
      const double cost =
          added / (static_cast<double>(items[i].values) * (kBits[from] - kBits[from + 1]));
      if (best < items.size() && cost >= least) continue;
      best = i, least = cost;
    }
    if (best == items.size()) {
      out.guarded = true;
      break;
    }
    const std::size_t from = out.level[best]++;
    for (const BitEffect& effect : items[best].effects)
      out.share[effect.gradient] += effect.share[from + 1] - effect.share[from];
    spent -= static_cast<double>(items[best].values) * (kBits[from] - kBits[from + 1]);
  }
  out.bits = values > 0 ? spent / values : 0;
  return out;
}

}  // namespace fourfold::inline v0::plan

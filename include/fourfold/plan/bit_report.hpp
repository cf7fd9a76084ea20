// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The bits that were chosen, in words and numbers.
#include <fourfold/plan/bit_assignment.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>
#include <vector>

namespace fourfold::inline v0::plan {

struct BitReport {
  struct Row {
    std::string producer, saver;      ///< operators: who made it, who saved it first
    std::vector<std::int64_t> sizes;  ///< of the first tensor of it that was saved
    std::int64_t values = 0;
    int bits = 0;
    double share = 0;   ///< at most added to a gradient, of that gradient's own variance
    AtBits variance{};  ///< added to all gradients together, at each of kBits
  };

  double wanted_bits = 0, most_variance = 0;  ///< as asked for
  double bits = 0;            ///< on average over values; 0: nothing has been chosen yet
  double share = 0;           ///< at most added to any gradient, of that gradient's own variance
  double whole_share = 0;     ///< added to all gradients together, of all their variances
  bool guarded = false;       ///< more bits than wanted: with fewer, a share would be too large
  std::uint64_t forward = 0;  ///< the one that was studied, counted from 1
  std::vector<Row> rows{};

  /// One sentence, or nothing.
  void summarise(std::ostream& out) const {
    if (rows.empty()) return;
    std::array<std::int64_t, kBits.size()> storages{};
    for (const Row& row : rows)
      for (std::size_t i = 0; i < kBits.size(); ++i) storages[i] += row.bits == kBits[i];
    char text[256];
    std::snprintf(text, sizeof text,
                  "activations: %.2f bits a value on average (%.2f asked for): %lld storages in 8, "
                  "%lld in 4, %lld in 2; rounding adds %.1f %% to the gradients' variance, at most "
                  "%.1f %% to one's",
                  bits, wanted_bits, static_cast<long long>(storages[0]),
                  static_cast<long long>(storages[1]), static_cast<long long>(storages[2]),
                  100 * whole_share, 100 * share);
    out << text;
    if (!guarded) return;
    std::snprintf(text, sizeof text, "; with fewer bits it would be above the limit of %.1f %%",
                  100 * most_variance);
    out << text;
  }
};

/// A line for each storage, then the sentence.
inline std::ostream& operator<<(std::ostream& out, const BitReport& report) {
  char text[128];
  for (const BitReport::Row& row : report.rows) {
    std::snprintf(text, sizeof text, "%d bits %12lld values %7.3f %%  ", row.bits,
                  static_cast<long long>(row.values), 100 * row.share);
    out << text << (row.producer.empty() ? "input" : row.producer) << " for "
        << (row.saver.empty() ? "a block" : row.saver) << '\n';
  }
  report.summarise(out);
  return out << '\n';
}

}  // namespace fourfold::inline v0::plan

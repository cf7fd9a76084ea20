// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a plan decides, as numbers alone: for each item one of several options, so that the bytes
/// at every position of a step stay within a budget. knapsack.hpp solves it.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0::plan {

/// Bytes that live at the positions `first` to `last`, both included; none if last < first.
struct Span {
  int first = 0, last = -1;
  std::int64_t bytes = 0;
};

/// One way to hold an item. Spans may overlap and add up; bytes may be negative, for what another
/// way would have needed.
struct Option {
  double ms = 0;        ///< more time for a step
  double variance = 0;  ///< added to the gradient's, as a share of the gradient's own
  std::vector<Span> spans{};
};

struct Item {
  std::vector<Option> options{};  ///< at least one
  /// The number of another item, or -1. Where that one is not at its first option, which is empty,
  /// this one has no part: a block is computed again, or held storage by storage.
  int within = -1;
};

struct Problem {
  std::vector<std::int64_t> fixed;  ///< at each position: what no option changes
  std::vector<Item> items;
  double ms_of_variance = 0;  ///< what a variance of 1 costs: noise is paid for by more steps

  [[nodiscard]] double cost(const Option& option) const {
    return option.ms + ms_of_variance * option.variance;
  }
};

/// Whether item `i` has a part in `choice`.
[[nodiscard]] inline bool takes_part(const Problem& problem, const std::vector<int>& choice,
                                     std::size_t i) {
  const int within = problem.items[i].within;
  return within < 0 || choice[static_cast<std::size_t>(within)] == 0;
}

/// An option for each item, and what they come to.
struct Solution {
  std::vector<int> choice;  ///< by item, also of those that have no part
  std::int64_t peak = 0;    ///< bytes at the worst position
  double ms = 0, variance = 0;
  double cost = 0;        ///< ms + ms_of_variance * variance
  double bound = 0;       ///< no feasible choice costs less (Lagrangian dual); 0: not known
  bool feasible = false;  ///< within the budget and the variance asked for
};

/// Bytes at each position under `choice`.
[[nodiscard]] inline std::vector<std::int64_t> usage(const Problem& problem,
                                                     const std::vector<int>& choice) {
  std::vector<std::int64_t> steps(problem.fixed.size() + 1, 0);
  for (std::size_t i = 0; i < problem.items.size(); ++i) {
    if (!takes_part(problem, choice, i)) continue;
    for (const Span& span : problem.items[i].options[static_cast<std::size_t>(choice[i])].spans) {
      if (span.last < span.first) continue;
      steps[static_cast<std::size_t>(span.first)] += span.bytes;
      steps[static_cast<std::size_t>(span.last) + 1] -= span.bytes;
    }
  }
  std::vector<std::int64_t> out(problem.fixed);
  std::int64_t running = 0;
  for (std::size_t p = 0; p < out.size(); ++p) out[p] += (running += steps[p]);
  return out;
}

[[nodiscard]] inline Solution evaluate(const Problem& problem, std::vector<int> choice) {
  Solution out;
  for (std::size_t i = 0; i < problem.items.size(); ++i) {
    if (!takes_part(problem, choice, i)) continue;
    const Option& option = problem.items[i].options[static_cast<std::size_t>(choice[i])];
    out.ms += option.ms, out.variance += option.variance;
  }
  out.cost = out.ms + problem.ms_of_variance * out.variance;
  for (const std::int64_t bytes : usage(problem, choice)) out.peak = std::max(out.peak, bytes);
  out.choice = std::move(choice);
  return out;
}

}  // namespace fourfold::inline v0::plan

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The multiple-choice knapsack of a step: the cheapest options whose bytes fit at every position.
///
///   Solution best = plan::solve(problem, /*budget=*/512 << 20, /*most_variance=*/0.1);
///   if (!best.feasible) refuse(plan::smallest(problem, 0.1).peak);
///
/// Each position is a constraint of its own, and so is the variance. Lagrangian relaxation with a
/// price for each constraint (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 11.2): where one
/// is violated, its price is found by bisection, the others held, until none is; prices that later
/// ones made too high are lowered. What room is left is filled greedily, by single options and by
/// exchanges of two. A price never enters without need, so constraints that do not bind cost
/// nothing. Solution::bound is the dual's value: the distance to the optimum is at most cost -
/// bound.
#include <fourfold/plan/detail/moves.hpp>
#include <fourfold/plan/detail/relaxation.hpp>
#include <fourfold/plan/problem.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

namespace detail {

/// Positions that no choice fills are left out, and spans moved to what is left.
[[nodiscard]] inline Problem without_slack(const Problem& problem, std::int64_t budget) {
  const std::size_t positions = problem.fixed.size();
  std::vector<std::int64_t> most(problem.fixed);
  for (const Item& item : problem.items) {
    std::vector<std::int64_t> largest(positions + 1, 0);  // by starts and ends: an upper bound
    for (const Option& option : item.options)
      for (const Span& span : option.spans)
        if (span.bytes > 0)
          for (int p = span.first; p <= span.last; ++p)
            largest[static_cast<std::size_t>(p)] += span.bytes;
    for (std::size_t p = 0; p < positions; ++p) most[p] += largest[p];
  }
  Problem out;
  out.ms_of_variance = problem.ms_of_variance;
  std::vector<int> after(positions + 1, 0);  // how many positions before p are left
  for (std::size_t p = 0; p < positions; ++p) {
    after[p + 1] = after[p] + (most[p] > budget ? 1 : 0);
    if (most[p] > budget) out.fixed.push_back(problem.fixed[p]);
  }
  out.items = problem.items;
  for (Item& item : out.items)
    for (Option& option : item.options) {
      for (Span& span : option.spans)
        span = {.first = after[static_cast<std::size_t>(span.first)],
                .last = after[static_cast<std::size_t>(span.last + 1)] - 1,
                .bytes = span.bytes};
      std::erase_if(option.spans, [](const Span& span) { return span.last < span.first; });
    }
  return out;
}

}  // namespace detail

/// The cheapest choice found within `budget` bytes at every position and `most_variance` in all.
/// Where none was found, `feasible` is false and the choice is the smallest one that was.
[[nodiscard]] inline Solution solve(const Problem& problem, std::int64_t budget,
                                    double most_variance = 1e300) {
  const Problem tight = detail::without_slack(problem, budget);
  detail::Relaxation relaxation(tight, budget, most_variance);
  const bool within = relaxation.raise();
  if (within) relaxation.lower();
  detail::Moves moves(tight, budget, most_variance, relaxation.choice());
  const bool feasible = moves.repair();
  if (feasible) moves.improve();
  Solution out = evaluate(problem, moves.choice());
  out.bound = relaxation.bound();
  out.feasible = feasible;
  return out;
}

/// The choice with the smallest peak that was found, whatever it costs, within `most_variance`: the
/// least bytes summed over positions, then the worst position lowered option by option. Of few items
/// the budget is bisected besides.
[[nodiscard]] inline Solution smallest(const Problem& problem, double most_variance = 1e300) {
  constexpr std::size_t kFew = 16;
  constexpr int kDescents = 256;
  Problem area = problem;  // costs what it fills
  area.ms_of_variance = 0;
  const std::size_t positions = problem.fixed.size();
  std::vector<std::vector<std::int64_t>> least;  // of each item, at each position
  for (Item& item : area.items) {
    least.emplace_back(positions, std::numeric_limits<std::int64_t>::max());
    for (Option& option : item.options) {
      std::vector<std::int64_t> bytes(positions, 0);
      for (const Span& span : option.spans)
        for (int p = span.first; p <= span.last; ++p)
          bytes[static_cast<std::size_t>(p)] += span.bytes;
      option.ms = 0;
      for (std::size_t p = 0; p < positions; ++p) {
        option.ms += static_cast<double>(bytes[p]);
        least.back()[p] = std::min(least.back()[p], bytes[p]);
      }
    }
  }
  const std::int64_t unlimited = std::numeric_limits<std::int64_t>::max() / 2;
  const Solution filled = solve(area, unlimited, most_variance);
  const auto descended = [&](std::vector<int> from) {
    detail::Moves moves(problem, unlimited, most_variance, std::move(from));
    moves.descend();
    return evaluate(problem, moves.choice());
  };
  Solution best = descended(filled.choice);
  const auto better = [&](std::vector<int> from) {
    if (evaluate(problem, from).variance > most_variance) return false;
    Solution other = descended(std::move(from));
    if (other.peak >= best.peak) return false;
    best = std::move(other);
    return true;
  };
  // A block is one large step down: also from where every block takes it, and where none does.
  std::vector<int> none(filled.choice), every(filled.choice);
  std::vector<bool> blocks(problem.items.size(), false);
  for (std::size_t i = 0; i < problem.items.size(); ++i) {
    const int within = problem.items[i].within;
    if (within < 0) continue;
    const auto block = static_cast<std::size_t>(within);
    const std::vector<Option>& options = area.items[block].options;
    none[block] = 0, blocks[block] = true;
    for (std::size_t o = 1; o < options.size(); ++o)
      if (every[block] == 0 || options[o].ms < options[static_cast<std::size_t>(every[block])].ms)
        every[block] = static_cast<int>(o);
  }
  if (none != filled.choice) better(none);
  if (every != filled.choice) better(every);
  // What is quieter is larger, and what a descent has spent of the variance it does not get back:
  // also from where noise has other prices, in units of what would fill as much as all of it.
  std::vector<std::vector<int>> quieter{filled.choice};
  double full = 0;
  for (const Item& item : area.items) {
    double most = 0;
    for (const Option& option : item.options) most = std::max(most, option.ms);
    full += most;
  }
  for (double price = full / 256; most_variance < 1e299 && price < 1024 * full; price *= 4) {
    std::vector<int> choice(filled.choice);
    for (std::size_t i = 0; i < choice.size(); ++i) {
      const std::vector<Option>& options = area.items[i].options;
      if (blocks[i]) continue;
      const auto priced = [&](int o) {
        const Option& option = options[static_cast<std::size_t>(o)];
        return option.ms + price * option.variance / std::max(most_variance, 1e-12);
      };
      for (int o = 0; o < std::ssize(options); ++o)
        if (priced(o) < priced(choice[i])) choice[i] = o;
    }
    if (choice == quieter.back()) continue;
    better(choice);
    quieter.push_back(std::move(choice));
  }
  // Then block by block, also with its members as they are in one of those: its other options may
  // pay only once all the rest has moved.
  int left = kDescents;
  for (bool lowered = true; lowered && left > 0;) {
    lowered = false;
    for (std::size_t i = 0; i < problem.items.size(); ++i) {
      if (!blocks[i]) continue;
      for (int o = 0; o < std::ssize(problem.items[i].options); ++o)
        for (const std::vector<int>& members : quieter) {
          std::vector<int> start(best.choice);
          start[i] = o;
          for (std::size_t m = 0; o == 0 && m < problem.items.size(); ++m)
            if (problem.items[m].within == static_cast<int>(i)) start[m] = members[m];
          if (start == best.choice || left-- <= 0) continue;
          if (better(std::move(start))) lowered = true;
          if (o != 0) break;
        }
    }
  }
  best.feasible = filled.feasible;
  if (problem.items.size() > kFew) return best;
  for (Item& item : area.items)
    for (Option& option : item.options) option.ms = 0;
  std::int64_t low = 0, high = best.feasible ? best.peak : unlimited;
  for (std::size_t p = 0; p < positions; ++p) {
    std::int64_t bytes = problem.fixed[p];  // no choice has less; a block may be its members
    for (std::size_t i = 0; i < least.size(); ++i)
      bytes += problem.items[i].within < 0 ? least[i][p] : std::min<std::int64_t>(least[i][p], 0);
    low = std::max(low, bytes);
  }
  for (int round = 0; round < 24 && low < high; ++round) {
    const std::int64_t middle = low + (high - low) / 2;
    Solution found = solve(area, middle, most_variance);
    if (found.feasible) {
      best = evaluate(problem, std::move(found.choice));
      best.feasible = true;
      high = best.peak;
    } else {
      low = middle + 1;
    }
  }
  return best;
}

/// The least that a budget costs, at `points` budgets between `small`'s peak and that of the cheapest
/// choice: what a user may move along. By rising peak; each costs less than the one before.
[[nodiscard]] inline std::vector<Solution> trade_off(const Problem& problem, const Solution& small,
                                                     double most_variance, int points) {
  const Solution cheap =
      solve(problem, std::numeric_limits<std::int64_t>::max() / 2, most_variance);
  std::vector<Solution> out;
  for (int i = 0; i < points; ++i) {
    const std::int64_t budget =
        i + 1 == points ? std::max(small.peak, cheap.peak)
                        : small.peak + (cheap.peak - small.peak) * i / std::max(points - 1, 1);
    Solution found = solve(problem, budget, most_variance);
    if (!found.feasible && i == 0) found = small;
    if (!found.feasible || (!out.empty() && found.cost >= out.back().cost)) continue;
    out.push_back(std::move(found));
  }
  return out;
}

}  // namespace fourfold::inline v0::plan

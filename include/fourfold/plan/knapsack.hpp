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
#include <fourfold/plan/problem.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

namespace detail {

/// Constraints are positions, then the variance. An option's `use` of one is in bytes, or variance.
class Relaxation {
 public:
  Relaxation(const Problem& problem, std::int64_t budget, double most_variance)
      : problem_(problem), positions_(problem.fixed.size()) {
    room_.reserve(positions_ + 1);
    for (const std::int64_t fixed : problem.fixed)
      room_.push_back(static_cast<double>(budget - fixed));
    room_.push_back(most_variance);
    price_.assign(room_.size(), 0);
  }

  /// Raises prices until the cheapest options fit; false where one constraint alone cannot be met.
  bool raise() {
    for (std::size_t round = 0; round < 4 * kRounds; ++round) {
      choose();
      const std::size_t worst = most_violated();
      if (worst == room_.size()) return true;
      if (!bisect(worst)) return false;
      // Two constraints that pull at the same items would raise each other by little for long.
      price_[worst] *= 1 + 0.01 * static_cast<double>(round);
    }
    return false;
  }

  /// Lowers each price as far as the choice stays feasible without it.
  void lower() {
    for (std::size_t c = 0; c < price_.size(); ++c) {
      if (price_[c] == 0) continue;
      const double before = price_[c];
      bisect(c);
      choose();
      if (most_violated() == room_.size()) continue;
      price_[c] = before;
      choose();
    }
  }

  [[nodiscard]] const std::vector<int>& choice() const { return choice_; }
  [[nodiscard]] double bound() const { return bound_; }

 private:
  static constexpr std::size_t kRounds = 64;

  [[nodiscard]] double use(const Option& option, std::size_t constraint) const {
    if (constraint == positions_) return option.variance;
    double bytes = 0;
    const int at = static_cast<int>(constraint);
    for (const Span& span : option.spans)
      if (span.first <= at && at <= span.last) bytes += static_cast<double>(span.bytes);
    return bytes;
  }

  /// Costs with all prices, item after item.
  void price_options(std::vector<double>& out) const {
    std::vector<double> sums(positions_ + 1, 0);
    for (std::size_t p = 0; p < positions_; ++p) sums[p + 1] = sums[p] + price_[p];
    out.clear();
    for (const Item& item : problem_.items)
      for (const Option& option : item.options) {
        double price = problem_.cost(option) + price_[positions_] * option.variance;
        for (const Span& span : option.spans)
          if (span.first <= span.last)
            price +=
                static_cast<double>(span.bytes) * (sums[static_cast<std::size_t>(span.last) + 1] -
                                                   sums[static_cast<std::size_t>(span.first)]);
        out.push_back(price);
      }
  }

  /// The cheapest options at the present prices.
  void choose() {
    price_options(priced_);
    choice_.clear();
    double dual = 0;
    std::size_t at = 0;
    for (const Item& item : problem_.items) {
      const auto first = priced_.begin() + static_cast<std::ptrdiff_t>(at);
      const auto best = std::min_element(first, first + std::ssize(item.options));
      choice_.push_back(static_cast<int>(best - first));
      dual += *best;
      at += item.options.size();
    }
    for (std::size_t c = 0; c < room_.size(); ++c) dual -= price_[c] * room_[c];
    bound_ = std::max(bound_, dual);
  }

  /// The constraint that is exceeded by most of what it could be exceeded by, or room_.size().
  [[nodiscard]] std::size_t most_violated() const {
    const std::vector<std::int64_t> bytes = usage(problem_, choice_);
    std::size_t worst = room_.size();
    double most = 0;
    for (std::size_t p = 0; p < positions_; ++p) {
      const double over = static_cast<double>(bytes[p] - problem_.fixed[p]) - room_[p];
      if (over > most) most = over, worst = p;
    }
    if (worst != room_.size()) return worst;
    double variance = 0;
    for (std::size_t i = 0; i < choice_.size(); ++i)
      variance += problem_.items[i].options[static_cast<std::size_t>(choice_[i])].variance;
    return variance > room_[positions_] ? positions_ : room_.size();
  }

  /// The smallest price of `constraint` at which it holds; false if none does.
  bool bisect(std::size_t constraint) {
    price_[constraint] = 0;
    price_options(priced_);
    std::vector<double> uses;
    double least = 0, largest_price = 0, smallest_use = std::numeric_limits<double>::infinity();
    for (const Item& item : problem_.items) {
      double item_least = std::numeric_limits<double>::infinity();
      for (const Option& option : item.options) {
        uses.push_back(use(option, constraint));
        item_least = std::min(item_least, uses.back());
        if (uses.back() != 0) smallest_use = std::min(smallest_use, std::abs(uses.back()));
      }
      least += item_least;
    }
    if (least > room_[constraint]) return false;
    for (const double price : priced_) largest_price = std::max(largest_price, std::abs(price));
    const auto used = [&](double price) {
      double sum = 0;
      std::size_t at = 0;
      for (const Item& item : problem_.items) {
        double best = std::numeric_limits<double>::infinity(), best_use = 0;
        for (std::size_t o = 0; o < item.options.size(); ++o, ++at) {
          const double total = priced_[at] + price * uses[at];
          if (total < best || (total == best && uses[at] < best_use))
            best = total, best_use = uses[at];
        }
        sum += best_use;
      }
      return sum;
    };
    if (used(0) <= room_[constraint]) return true;
    double low = 0, high = std::max(largest_price, 1e-300) / smallest_use;
    for (std::size_t i = 0; i < 2 * kRounds && used(high) > room_[constraint]; ++i) high *= 4;
    for (std::size_t i = 0; i < kRounds && high - low > 1e-12 * high; ++i) {
      const double middle = (low + high) / 2;
      (used(middle) > room_[constraint] ? low : high) = middle;
    }
    price_[constraint] = low;  // where the dual is largest
    choose();
    price_[constraint] = high;
    return true;
  }

  const Problem& problem_;
  const std::size_t positions_;
  std::vector<double> room_, price_, priced_;
  std::vector<int> choice_;
  double bound_ = -std::numeric_limits<double>::infinity();
};

/// A choice that is changed option by option, with its usage at hand.
class Moves {
 public:
  Moves(const Problem& problem, std::int64_t budget, double most_variance, std::vector<int> choice)
      : problem_(problem),
        budget_(budget),
        most_variance_(most_variance),
        choice_(std::move(choice)),
        bytes_(usage(problem, choice_)),
        variance_(evaluate(problem, choice_).variance) {}

  [[nodiscard]] const std::vector<int>& choice() const { return choice_; }
  [[nodiscard]] bool fits() const {
    return variance_ <= most_variance_ &&
           std::all_of(bytes_.begin(), bytes_.end(), [&](auto bytes) { return bytes <= budget_; });
  }

  /// Options that cost less and fit, the largest gain first; then exchanges of two.
  void improve() {
    for (bool changed = true; changed;) {
      changed = false;
      for (const auto& [gain, item, option] : gains()) {
        if (gain <= 0) break;
        const int before = choice_[item];
        if (problem_.cost(option_of(item, before)) - problem_.cost(option_of(item, option)) <= 0)
          continue;  // moved meanwhile
        set(item, option);
        if (fits() || exchange(item, gain)) {
          changed = true;
        } else {
          set(item, before);
        }
      }
    }
  }

  /// Changes options, one or two at a time, until all fits or no change brings it nearer: of those
  /// that do, the one that costs least for what it brings.
  bool repair() {
    double excess = this->excess();
    while (excess > 0) {
      Step best;
      for (std::size_t i = 0; i < choice_.size(); ++i)
        try_options(i, excess, best, [](std::size_t) {});
      if (best.second == kNone && choice_.size() <= kPairs)
        for (std::size_t i = 0; i < choice_.size(); ++i)
          try_options(i, -1, best, [&](std::size_t first) {
            for (std::size_t j = 0; j < first; ++j) try_pair(first, j, excess, best);
          });
      if (best.first == kNone) return false;
      set(best.first, best.first_option);
      if (best.second != kNone) set(best.second, best.second_option);
      excess = this->excess();
    }
    return true;
  }

 private:
  static constexpr std::size_t kNone = ~std::size_t{0}, kPairs = 32;
  struct Gain {
    double gain;
    std::size_t item;
    int option;
  };
  struct Step {
    std::size_t first = kNone, second = kNone;
    int first_option = 0, second_option = 0;
    double price = std::numeric_limits<double>::infinity();
  };

  /// How far all of it is from fitting; 0 where it does.
  [[nodiscard]] double excess() const {
    double sum = 0;
    for (const std::int64_t bytes : bytes_)
      if (bytes > budget_) sum += static_cast<double>(bytes - budget_);
    if (variance_ > most_variance_)
      sum += (variance_ - most_variance_) / std::max(variance_, 1e-12) *
             static_cast<double>(std::max<std::int64_t>(budget_, 1));
    return sum;
  }
  void consider(Step step, double cost, double excess, Step& best) const {
    const double less = excess - this->excess();
    if (less <= 0) return;
    step.price = cost > 0 ? cost / less : -less;
    if (step.price < best.price) best = step;
  }
  /// Each other option of item i: `then` with it set, and itself where `excess` is not negative.
  template <class Then>
  void try_options(std::size_t i, double excess, Step& best, const Then& then) {
    const int before = choice_[i];
    for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
      if (o == before) continue;
      set(i, o);
      if (excess >= 0)
        consider({.first = i, .first_option = o},
                 problem_.cost(option_of(i, o)) - problem_.cost(option_of(i, before)), excess,
                 best);
      then(i);
      set(i, before);
    }
  }
  void try_pair(std::size_t i, std::size_t j, double excess, Step& best) {
    const int before = choice_[j];
    for (int o = 0; o < std::ssize(problem_.items[j].options); ++o) {
      if (o == before) continue;
      set(j, o);
      consider({.first = i, .second = j, .first_option = choice_[i], .second_option = o},
               problem_.cost(option_of(j, o)) - problem_.cost(option_of(j, before)), excess, best);
      set(j, before);
    }
  }

  [[nodiscard]] const Option& option_of(std::size_t item, int option) const {
    return problem_.items[item].options[static_cast<std::size_t>(option)];
  }
  [[nodiscard]] static std::int64_t at(const Option& option, int position) {
    std::int64_t bytes = 0;
    for (const Span& span : option.spans)
      if (span.first <= position && position <= span.last) bytes += span.bytes;
    return bytes;
  }
  void add(const Option& option, std::int64_t sign) {
    for (const Span& span : option.spans)
      for (int p = span.first; p <= span.last; ++p)
        bytes_[static_cast<std::size_t>(p)] += sign * span.bytes;
    variance_ += static_cast<double>(sign) * option.variance;
  }
  void set(std::size_t item, int option) {
    add(option_of(item, choice_[item]), -1);
    choice_[item] = option;
    add(option_of(item, option), 1);
  }

  /// Every option that costs less than the present one, the largest gain first.
  [[nodiscard]] std::vector<Gain> gains() const {
    std::vector<Gain> out;
    for (std::size_t i = 0; i < choice_.size(); ++i)
      for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
        const double gain =
            problem_.cost(option_of(i, choice_[i])) - problem_.cost(option_of(i, o));
        if (gain > 0) out.push_back({gain, i, o});
      }
    std::sort(out.begin(), out.end(), [](const Gain& a, const Gain& b) { return a.gain > b.gain; });
    return out;
  }

  /// `moved` was given an option that does not fit: another item makes room, for less than `gain`.
  bool exchange(std::size_t moved, double gain) {
    const auto worst =
        static_cast<int>(std::max_element(bytes_.begin(), bytes_.end()) - bytes_.begin());
    const std::int64_t over = bytes_[static_cast<std::size_t>(worst)] - budget_;
    for (std::size_t i = 0; i < choice_.size(); ++i) {
      if (i == moved) continue;
      const int before = choice_[i];
      for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
        const Option& from = option_of(i, before);
        const Option& to = option_of(i, o);
        if (o == before || problem_.cost(to) - problem_.cost(from) >= gain * (1 - 1e-9) ||
            at(from, worst) - at(to, worst) < over ||
            variance_ - from.variance + to.variance > most_variance_)
          continue;
        set(i, o);
        if (fits()) return true;
        set(i, before);
      }
    }
    return false;
  }

  const Problem& problem_;
  const std::int64_t budget_;
  const double most_variance_;
  std::vector<int> choice_;
  std::vector<std::int64_t> bytes_;
  double variance_;
};

/// What cannot bind is left out: positions that no choice fills, and of neighbours without a change
/// between them all but the largest. Spans are moved to what is left.
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

/// The choice with the smallest peak that was found, whatever it costs, within `most_variance`.
[[nodiscard]] inline Solution smallest(const Problem& problem, double most_variance = 1e300) {
  Problem free = problem;  // of cost
  free.ms_of_variance = 0;
  std::vector<int> choice;
  std::vector<std::int64_t> least(problem.fixed);
  for (Item& item : free.items) {
    std::vector<double> areas;
    std::vector<std::int64_t> item_least(problem.fixed.size(),
                                         std::numeric_limits<std::int64_t>::max());
    for (Option& option : item.options) {
      option.ms = 0;
      double area = 0;
      std::vector<std::int64_t> bytes(problem.fixed.size(), 0);
      for (const Span& span : option.spans)
        for (int p = span.first; p <= span.last; ++p)
          bytes[static_cast<std::size_t>(p)] += span.bytes;
      for (std::size_t p = 0; p < bytes.size(); ++p) {
        area += static_cast<double>(bytes[p]);
        item_least[p] = std::min(item_least[p], bytes[p]);
      }
      areas.push_back(area);
    }
    for (std::size_t p = 0; p < least.size(); ++p) least[p] += item_least[p];
    choice.push_back(
        static_cast<int>(std::min_element(areas.begin(), areas.end()) - areas.begin()));
  }
  std::int64_t low = 0;
  for (const std::int64_t bytes : least) low = std::max(low, bytes);
  Solution best = evaluate(problem, choice);
  best.feasible = best.variance <= most_variance;
  detail::Moves moves(free, low, most_variance, choice);
  static_cast<void>(moves.repair());
  Solution moved = evaluate(problem, moves.choice());
  moved.feasible = moved.variance <= most_variance;
  if (moved.feasible && (!best.feasible || moved.peak < best.peak)) best = moved;
  std::int64_t high = best.feasible ? best.peak : std::numeric_limits<std::int64_t>::max() / 4;
  for (int round = 0; round < 24 && low < high; ++round) {
    const std::int64_t middle = low + (high - low) / 2;
    Solution found = solve(free, middle, most_variance);
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

/// The least that a budget costs, at `points` budgets between the smallest peak and that of the
/// cheapest choice: what a user may move along. By rising peak; each costs less than the one before.
[[nodiscard]] inline std::vector<Solution> trade_off(const Problem& problem, double most_variance,
                                                     int points) {
  const Solution small = smallest(problem, most_variance);
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

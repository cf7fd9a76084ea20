// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The Lagrangian side of knapsack.hpp: a price for each constraint, found by bisection.
#include <fourfold/plan/problem.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

namespace fourfold::inline v0::plan::detail {

/// Constraints are positions, then the variance. An option's `use` of one is in bytes, or variance.
class Relaxation {
 public:
  Relaxation(const Problem& problem, std::int64_t budget, double most_variance)
      : problem_(problem), positions_(problem.fixed.size()), members_(problem.items.size()) {
    for (std::size_t i = 0; i < problem.items.size(); ++i)
      if (const int within = problem.items[i].within; within >= 0)
        members_[static_cast<std::size_t>(within)].push_back(i);
    first_.reserve(problem.items.size());
    for (std::size_t i = 0, options = 0; i < problem.items.size(); ++i) {
      first_.push_back(options);
      options += problem.items[i].options.size();
    }
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

  struct Best {
    double price = 0, use = 0;
    int option = 0;
  };
  /// The option of item `i` whose `price(option's number)` is least, `use` of it the least then. Of
  /// a block: its first option is what the best of its members come to; `members` gets those.
  template <class Price, class Use>
  [[nodiscard]] Best best_of(std::size_t i, const Price& price, const Use& use,
                             std::vector<int>* members = nullptr) const {
    Best out{.price = std::numeric_limits<double>::infinity()};
    const std::size_t options = problem_.items[i].options.size();
    for (std::size_t o = 0; o < options; ++o) {
      Best one{price(first_[i] + o), use(first_[i] + o), static_cast<int>(o)};
      if (o == 0)
        for (const std::size_t member : members_[i]) {
          const Best held = best_of(member, price, use);
          one.price += held.price, one.use += held.use;
          if (members != nullptr) (*members)[member] = held.option;
        }
      if (one.price < out.price || (one.price == out.price && one.use < out.use)) out = one;
    }
    return out;
  }

  /// The cheapest options at the present prices.
  void choose() {
    price_options(priced_);
    choice_.assign(problem_.items.size(), 0);
    double dual = 0;
    for (std::size_t i = 0; i < problem_.items.size(); ++i) {
      if (problem_.items[i].within >= 0) continue;
      const Best best = best_of(
          i, [&](std::size_t o) { return priced_[o]; }, [](std::size_t) { return 0.0; }, &choice_);
      choice_[i] = best.option;
      dual += best.price;
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
      if (takes_part(problem_, choice_, i))
        variance += problem_.items[i].options[static_cast<std::size_t>(choice_[i])].variance;
    return variance > room_[positions_] ? positions_ : room_.size();
  }

  /// The smallest price of `constraint` at which it holds; false if none does.
  bool bisect(std::size_t constraint) {
    price_[constraint] = 0;
    price_options(priced_);
    std::vector<double> uses;
    double largest_price = 0, smallest_use = std::numeric_limits<double>::infinity();
    for (const Item& item : problem_.items)
      for (const Option& option : item.options) {
        uses.push_back(use(option, constraint));
        if (uses.back() != 0) smallest_use = std::min(smallest_use, std::abs(uses.back()));
      }
    const auto use_of = [&](std::size_t o) { return uses[o]; };
    const auto sum_of = [&](const auto& price) {
      double sum = 0;
      for (std::size_t i = 0; i < problem_.items.size(); ++i)
        if (problem_.items[i].within < 0) sum += best_of(i, price, use_of).use;
      return sum;
    };
    if (sum_of(use_of) > room_[constraint]) return false;
    for (const double price : priced_) largest_price = std::max(largest_price, std::abs(price));
    const auto used = [&](double price) {
      return sum_of([&](std::size_t o) { return priced_[o] + price * uses[o]; });
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
  std::vector<std::vector<std::size_t>> members_;  // of blocks, by item
  std::vector<std::size_t> first_;                 // number of an item's first option
  std::vector<double> room_, price_, priced_;
  std::vector<int> choice_;
  double bound_ = -std::numeric_limits<double>::infinity();
};

}  // namespace fourfold::inline v0::plan::detail

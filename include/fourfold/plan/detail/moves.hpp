// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The greedy side of knapsack.hpp: one or two options changed at a time.
#include <fourfold/plan/problem.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan::detail {

/// A choice that is changed option by option, with its usage at hand.
class Moves {
 public:
  Moves(const Problem& problem, std::int64_t budget, double most_variance, std::vector<int> choice)
      : problem_(problem),
        budget_(budget),
        most_variance_(most_variance),
        choice_(std::move(choice)),
        bytes_(usage(problem, choice_)),
        variance_(evaluate(problem, choice_).variance),
        members_(problem.items.size()),
        together_(problem.items.size()),
        stale_(problem.items.size(), true) {
    for (std::size_t i = 0; i < choice_.size(); ++i)
      if (const int within = problem.items[i].within; within >= 0)
        members_[static_cast<std::size_t>(within)].push_back(i);
    for (const std::int64_t bytes : bytes_) over_ += std::max<std::int64_t>(bytes - budget_, 0);
  }

  [[nodiscard]] const std::vector<int>& choice() const { return choice_; }
  [[nodiscard]] bool fits() const { return over_ == 0 && variance_ <= most_variance_; }

  /// Options that cost less and fit, the largest gain first; then exchanges of two.
  void improve() {
    for (bool changed = true; changed;) {
      changed = false;
      for (const auto& [gain, item, option] : gains()) {
        if (gain <= 0) break;
        if (!takes_part(problem_, choice_, item)) continue;
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
      const auto worst =
          static_cast<int>(std::max_element(bytes_.begin(), bytes_.end()) - bytes_.begin());
      for (std::size_t i = 0; i < choice_.size(); ++i)
        try_options(
            i, excess, best, [](std::size_t) {}, worst);
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

  /// Lowers the worst position while one option does so and makes none as bad: the largest step
  /// first. The budget does not matter.
  void descend() {
    for (;;) {
      const auto worst = std::max_element(bytes_.begin(), bytes_.end());
      if (worst == bytes_.end()) return;
      const auto position = static_cast<int>(worst - bytes_.begin());
      const std::int64_t peak = *worst;
      std::int64_t most = 0;
      std::pair<std::size_t, int> move{kNone, 0};
      for (std::size_t i = 0; i < choice_.size(); ++i) {
        if (!takes_part(problem_, choice_, i)) continue;
        const int before = choice_[i];
        const Option& from = option_of(i, before);
        for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
          const Option& to = option_of(i, o);
          const std::int64_t less = at(from, position) - at(to, position);
          if (less <= most || variance_ - from.variance + to.variance > most_variance_) continue;
          set(i, o);
          if (highest(from) < peak && highest(to) < peak) most = less, move = {i, o};
          set(i, before);
        }
      }
      if (move.first == kNone) return;
      set(move.first, move.second);
    }
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
    auto sum = static_cast<double>(over_);
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
  /// `worst`: only those that need less there, if that is what does not fit.
  template <class Then>
  void try_options(std::size_t i, double excess, Step& best, const Then& then, int worst = -1) {
    if (!takes_part(problem_, choice_, i)) return;
    const int before = choice_[i];
    for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
      if (o == before) continue;
      if (worst >= 0 && variance_ <= most_variance_ &&
          at(option_of(i, o), worst) >= at(option_of(i, before), worst))
        continue;
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
    if (!takes_part(problem_, choice_, j)) return;
    const int before = choice_[j];
    for (int o = 0; o < std::ssize(problem_.items[j].options); ++o) {
      if (o == before) continue;
      set(j, o);
      consider({.first = i, .second = j, .first_option = choice_[i], .second_option = o},
               problem_.cost(option_of(j, o)) - problem_.cost(option_of(j, before)), excess, best);
      set(j, before);
    }
  }

  /// Of a block whose storages are held one by one: what they come to.
  [[nodiscard]] const Option& option_of(std::size_t item, int option) const {
    if (option == 0 && !members_[item].empty()) return together(item);
    return problem_.items[item].options[static_cast<std::size_t>(option)];
  }
  [[nodiscard]] static std::int64_t at(const Option& option, int position) {
    std::int64_t bytes = 0;
    for (const Span& span : option.spans)
      if (span.first <= position && position <= span.last) bytes += span.bytes;
    return bytes;
  }
  /// The most that lives where `option` has anything.
  [[nodiscard]] std::int64_t highest(const Option& option) const {
    std::int64_t most = 0;
    for (const Span& span : option.spans)
      for (int p = span.first; p <= span.last; ++p)
        most = std::max(most, bytes_[static_cast<std::size_t>(p)]);
    return most;
  }
  void add(const Option& option, std::int64_t sign) {
    for (const Span& span : option.spans)
      for (int p = span.first; p <= span.last; ++p) {
        std::int64_t& bytes = bytes_[static_cast<std::size_t>(p)];
        over_ -= std::max<std::int64_t>(bytes - budget_, 0);
        bytes += sign * span.bytes;
        over_ += std::max<std::int64_t>(bytes - budget_, 0);
      }
    variance_ += static_cast<double>(sign) * option.variance;
  }
  void set(std::size_t item, int option) {
    const bool counts = takes_part(problem_, choice_, item);
    if (counts) add(option_of(item, choice_[item]), -1);
    choice_[item] = option;
    if (counts) add(option_of(item, option), 1);
    if (const int within = problem_.items[item].within; within >= 0)
      stale_[static_cast<std::size_t>(within)] = true;
  }
  [[nodiscard]] const Option& together(std::size_t block) const {
    Option& sum = together_[block];
    if (!stale_[block]) return sum;
    stale_[block] = false;
    sum.ms = sum.variance = 0;
    sum.spans.clear();
    for (const std::size_t member : members_[block]) {
      const Option& one = option_of(member, choice_[member]);
      sum.ms += one.ms, sum.variance += one.variance;
      sum.spans.insert(sum.spans.end(), one.spans.begin(), one.spans.end());
    }
    return sum;
  }

  /// Every option that costs less than the present one, the largest gain first.
  [[nodiscard]] std::vector<Gain> gains() const {
    std::vector<Gain> out;
    for (std::size_t i = 0; i < choice_.size(); ++i)
      for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
        if (!takes_part(problem_, choice_, i)) break;
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
    const std::int64_t over = over_ == 0 ? 0 : bytes_[static_cast<std::size_t>(worst)] - budget_;
    for (std::size_t i = 0; i < choice_.size(); ++i) {
      if (i == moved || !takes_part(problem_, choice_, i)) continue;
      const int before = choice_[i];
      for (int o = 0; o < std::ssize(problem_.items[i].options); ++o) {
        if (o == before) continue;
        const Option& from = option_of(i, before);
        const Option& to = option_of(i, o);
        if (problem_.cost(to) - problem_.cost(from) >= gain * (1 - 1e-9) ||
            (over > 0 && at(from, worst) - at(to, worst) < over) ||
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
  std::int64_t over_ = 0;  // bytes above the budget, over all positions
  double variance_;
  std::vector<std::vector<std::size_t>> members_;  // of blocks, by item
  mutable std::vector<Option> together_;           // what a block's members come to
  mutable std::vector<bool> stale_;                // one of them has moved since
};

}  // namespace fourfold::inline v0::plan::detail

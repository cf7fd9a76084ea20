// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The plan of one kind of step: its record, the choice for each storage, and how far the bytes
/// that were predicted are from those that were measured.
#include <fourfold/plan/knapsack.hpp>
#include <fourfold/plan/record.hpp>
#include <fourfold/plan/step_problem.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

class StepPlan {
 public:
  static constexpr int kCurve = 20;  ///< points of the trade-off

  /// `gradients`: that are there when the step begins.
  StepPlan(StepRecord record, std::int64_t gradients, double most_variance)
      : gradients_(gradients), most_variance_(most_variance) {
    record_ = std::move(record);
    for (std::size_t i = 0; i < record_.storages.size(); ++i)
      index_.emplace(key(record_.storages[i].id), i);
    remake();
  }

  /// The storage's number in the record; -1 if it is not there, -2 if another one is.
  [[nodiscard]] std::ptrdiff_t find(const StorageId& id, std::int64_t bytes,
                                    std::string_view producer) const {
    const auto found = index_.find(key(id));
    if (found == index_.end()) return -1;
    const StorageRecord& storage = record_.storages[found->second];
    if (storage.bytes != bytes || storage.producer != producer) return -2;
    return static_cast<std::ptrdiff_t>(found->second);
  }
  /// How it is held; where its block is computed again, as that block's input.
  [[nodiscard]] Way way(std::size_t storage) const {
    const StorageRecord& one = record_.storages[storage];
    if (const int block = block_of(storage); block >= 0)
      if (const BlockWay& held = block_way(static_cast<std::size_t>(block)); held.recompute)
        return {held.input};
    return one.ways()[static_cast<std::size_t>(chosen_.choice[storage])];
  }
  /// The block's number in the record, or -1.
  [[nodiscard]] std::ptrdiff_t find(const BlockId& id) const {
    for (std::size_t i = 0; i < record_.blocks.size(); ++i)
      if (record_.blocks[i].id == id) return static_cast<std::ptrdiff_t>(i);
    return -1;
  }
  [[nodiscard]] const BlockWay& block_way(std::size_t block) const {
    return block_ways_[block]
                      [static_cast<std::size_t>(chosen_.choice[record_.storages.size() + block])];
  }
  [[nodiscard]] const Option& block_option(std::size_t block) const {
    const std::size_t item = record_.storages.size() + block;
    return problem_.items[item].options[static_cast<std::size_t>(chosen_.choice[item])];
  }
  /// The block whose being computed again would leave nothing of it, or make it its input; -1.
  [[nodiscard]] int block_of(std::size_t storage) const {
    const StorageRecord& one = record_.storages[storage];
    if (!one.input_alone) return one.block;
    for (std::size_t b = 0; b < record_.blocks.size(); ++b)
      for (const std::size_t input : record_.blocks[b].inputs)
        if (input == storage) return static_cast<int>(b);
    return -1;
  }
  /// Whether a step by this plan asks for it.
  [[nodiscard]] bool expects(std::size_t storage) const {
    const int block = block_of(storage);
    const bool again = block >= 0 && block_way(static_cast<std::size_t>(block)).recompute;
    if (!again) return !record_.storages[storage].input_alone;
    const std::vector<std::size_t>& inputs = record_.blocks[static_cast<std::size_t>(block)].inputs;
    return std::find(inputs.begin(), inputs.end(), storage) != inputs.end();
  }

  /// The least that such a step needs above what lives when it begins. Of blocks that are computed
  /// again, with a hundredth for what they keep beside their inputs, as choose().
  [[nodiscard]] std::int64_t least() const {
    const std::int64_t room = blocks_again(smallest_) > 0 ? smallest_.peak / 100 : 0;
    return std::max(smallest_.peak + room, least_measured_);
  }

  /// Chooses for a step that may need `room` bytes above what lives when it begins, at the cost of
  /// `notches` points of the trade-off curve.
  void choose(std::int64_t room, std::int64_t budget, int notches) {
    // Until it was measured, and where it was: what it may be wrong by.
    const std::int64_t more = std::max<std::int64_t>(correction_, 0);
    solve_within(room - more - (steps_ == 0 ? budget / 50 : budget / 500), budget, notches);
    // What a block keeps for its second run beside its inputs (statistics that it wrote) is in no
    // record: until such a plan was measured, room for it.
    if (steps_ > 0 && blocks_again(chosen_) > blocks_measured_)
      solve_within(room - more - budget / 100, budget, notches);
  }

  /// Above what lived when the step began.
  [[nodiscard]] std::int64_t predicted() const { return chosen_.peak + correction(); }

  /// A step ran by the plan: `measured` above what lived when it began, `room` as for choose().
  void learn(std::int64_t measured, std::int64_t room, bool whole) {
    const std::int64_t difference = measured - chosen_.peak;
    if (!whole && difference < correction_) return;
    if (measured > room) {
      exceeded_ = true;
      if (chosen_.peak <= smallest_.peak) least_measured_ = std::max(least_measured_, measured);
    }
    if (steps_ == 0 || difference > correction_)
      correction_ = difference;
    else if (!exceeded_)
      correction_ = std::max(difference, last_difference_.value_or(difference));
    last_difference_ = difference;
    measured_ = chosen_.choice;
    blocks_measured_ = std::max(blocks_measured_, blocks_again(chosen_));
    ++steps_;
  }
  /// Storages that were to be computed again could not be: they are kept from now on.
  void cannot_rebuild(const std::vector<std::size_t>& storages) {
    if (storages.empty()) return;
    for (const std::size_t storage : storages) record_.storages[storage].rebuild_fails = true;
    remake();
  }
  /// Whether the plan knows that a storage which it would compute again cannot be: what it is
  /// computed from is saved within a block that runs again itself. It is held as it would be
  /// without Recompute.
  [[nodiscard]] bool foreseen(std::size_t storage) const {
    return lacks_source(chosen_.choice, storage);
  }

  [[nodiscard]] const std::vector<Solution>& curve() const {
    if (curve_.empty()) curve_ = trade_off(small_problem_, smallest_, most_variance_, kCurve);
    return curve_;
  }
  /// Block checkpointing; none where the step has no block.
  [[nodiscard]] const std::optional<Solution>& every_block_again() const { return every_block_; }
  [[nodiscard]] const StepRecord& record() const { return record_; }
  [[nodiscard]] std::int64_t gradients() const { return gradients_; }
  [[nodiscard]] const Problem& problem() const { return problem_; }
  [[nodiscard]] const Solution& chosen() const { return chosen_; }
  /// To the peak of the present choice. That another one needed less than was predicted says nothing
  /// of this one.
  [[nodiscard]] std::int64_t correction() const {
    return chosen_.choice == measured_ ? correction_ : std::max<std::int64_t>(correction_, 0);
  }
  bool strict = true;  ///< a storage that the record does not know asks for a new record

  [[nodiscard]] static std::uint64_t key(const StorageId& id) {
    return id.forward << 56 ^ id.operation << 9 ^ id.place << 1 ^ (id.made ? 1u : 0u);
  }

 private:
  void remake() {
    problem_ = problem_of(record_, gradients_);
    block_ways_.clear();
    for (std::size_t b = 0; b < record_.blocks.size(); ++b)
      block_ways_.push_back(detail::BlockOptions(record_, b).ways());
    whole_ = problem_;
    smallest_ = sound([&] { return smallest(problem_, most_variance_); });
    if (!smallest_.feasible) smallest_ = sound([&] { return smallest(problem_); });  // none quieter
    small_problem_ = problem_;
    chosen_ = smallest_;
    every_block_.reset();
    if (!record_.blocks.empty()) every_block_ = evaluate(problem_, every_block());
    least_measured_ = 0, solved_ = false;
    measured_.clear();
    curve_.clear();
  }
  void solve_within(std::int64_t most, std::int64_t budget, int notches) {
    if (notches > 0) most = std::min(most, cheaper(most, notches));
    most = std::max(most, smallest_.peak);
    if (solved_ && chosen_.peak <= most && (chosen_.cost == 0 || most - most_ <= budget / 200))
      return;
    problem_ = whole_;
    chosen_ = sound([&] { return solve(problem_, most, most_variance_); });
    if (!chosen_.feasible) chosen_ = smallest_, problem_ = small_problem_;
    // The solver is good, not exact: never worse than what everybody does by hand.
    if (every_block_ && every_block_->peak <= most && every_block_->cost < chosen_.cost)
      chosen_ = *every_block_;
    most_ = most, solved_ = true;
  }
  /// What `solved` makes of the problem, where each storage that is computed again has what it is
  /// computed from: one that has not costs what holding it does, one that is read whole by that choice
  /// and was not when it was recorded costs a copy, and the problem is solved anew.
  template <class Solved>
  [[nodiscard]] Solution sound(const Solved& solved) {
    std::vector<bool> replaced(record_.storages.size(), false), copied = replaced;
    for (;;) {
      Solution out = solved();
      bool holds = true;
      for (std::size_t i = 0; i < replaced.size(); ++i) {
        if (replaced[i] || !takes_part(problem_, out.choice, i)) continue;
        std::vector<Option>& options = problem_.items[i].options;
        Option& chosen = options[static_cast<std::size_t>(out.choice[i])];
        if (lacks_source(out.choice, i))
          chosen = options[record_.storages[i].else_held()], replaced[i] = true;
        else if (!copied[i] && must_be_whole(out.choice, i))
          read_whole(chosen, record_.storages[i]), copied[i] = true;
        else
          continue;
        holds = false;
      }
      if (holds) return out;
    }
  }
  [[nodiscard]] Way::Kind kind_of(const std::vector<int>& choice, std::size_t storage) const {
    return record_.storages[storage].ways()[static_cast<std::size_t>(choice[storage])].kind;
  }
  /// How it is held for others; nothing: a block that runs again saves it, so nobody does.
  [[nodiscard]] std::optional<Way::Kind> held(const std::vector<int>& choice,
                                              std::size_t storage) const {
    const StorageRecord& one = record_.storages[storage];
    if (one.block < 0) return kind_of(choice, storage);
    const auto block = static_cast<std::size_t>(one.block);
    const int way = choice[record_.storages.size() + block];
    if (way == 0) return kind_of(choice, storage);
    const auto& inputs = record_.blocks[block].inputs;
    if (std::find(inputs.begin(), inputs.end(), storage) == inputs.end()) return std::nullopt;
    return block_ways_[block][static_cast<std::size_t>(way)].input;
  }
  /// Whether `storage` is to be computed again from what a block saves that runs again itself, or
  /// from what is kept, so that it could be written to unseen.
  [[nodiscard]] bool lacks_source(const std::vector<int>& choice, std::size_t storage) const {
    const std::vector<RebuildSource>& sources = record_.storages[storage].sources;
    return !sources.empty() && kind_of(choice, storage) == Way::Kind::kRebuild &&
           std::any_of(sources.begin(), sources.end(), [&](const RebuildSource& source) {
             const std::optional<Way::Kind> from = held(choice, source.item);
             return !from || (*from == Way::Kind::kKeep && !source.even_kept);
           });
  }
  static void read_whole(Option& option, const StorageRecord& storage) {
    StorageRecord::append(option.spans, StorageRecord::joined({storage.whole(), storage.results}));
    for (const Span& span : storage.pieces)
      option.spans.push_back({span.first, span.last, -span.bytes});
  }
  /// Whether `storage`, which was recorded as read in pieces, comes back to the bit by `choice`.
  [[nodiscard]] bool must_be_whole(const std::vector<int>& choice, std::size_t storage) const {
    return record_.storages[storage].read_in_pieces() &&
           kind_of(choice, storage) == Way::Kind::kRebuild &&
           record_.exact(storage,
                         [&](std::size_t i) { return held(choice, i).value_or(Way::Kind::kPack); });
  }
  [[nodiscard]] std::ptrdiff_t blocks_again(const Solution& of) const {
    const auto first = of.choice.begin() + std::ssize(record_.storages);
    return std::count_if(first, of.choice.end(), [](int way) { return way != 0; });
  }
  /// Block checkpointing: all kept, but what blocks save, which are computed again as they are.
  [[nodiscard]] std::vector<int> every_block() const {
    std::vector<int> choice(problem_.items.size(), 0);
    for (std::size_t b = 0; b < record_.blocks.size(); ++b)
      for (std::size_t way = 0; way < block_ways_[b].size(); ++way)
        if (const BlockWay& one = block_ways_[b][way];
            one.recompute && one.reference && one.input == Way::Kind::kKeep)
          choice[record_.storages.size() + b] = static_cast<int>(way);
    return choice;
  }
  /// The peak of the curve's point that is so many below `most`.
  [[nodiscard]] std::int64_t cheaper(std::int64_t most, int notches) const {
    const std::vector<Solution>& points = curve();
    std::ptrdiff_t at = std::ssize(points) - 1;
    while (at > 0 && points[static_cast<std::size_t>(at)].peak > most) --at;
    return points[static_cast<std::size_t>(std::max<std::ptrdiff_t>(at - notches, 0))].peak;
  }

  const std::int64_t gradients_;
  const double most_variance_;
  StepRecord record_;
  std::unordered_map<std::uint64_t, std::size_t> index_;
  Problem whole_, problem_;  ///< of the record; with what its choice can compute again (sound())
  Problem small_problem_;    ///< the same of smallest_
  std::vector<std::vector<BlockWay>> block_ways_;
  Solution smallest_, chosen_;
  std::optional<Solution> every_block_;
  mutable std::vector<Solution> curve_;
  std::int64_t most_ = 0, correction_ = 0, least_measured_ = 0;
  std::optional<std::int64_t> last_difference_;
  std::vector<int> measured_;  // the choice of the last step that was
  int steps_ = 0;
  std::ptrdiff_t blocks_measured_ = 0;  // computed again, at most, in a step that was measured
  bool solved_ = false, exceeded_ = false;
};

}  // namespace fourfold::inline v0::plan

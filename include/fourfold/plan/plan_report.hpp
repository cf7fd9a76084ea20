// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A plan in words: each storage with who saved it, its bytes, how it is held and what that costs;
/// then what else could be had for how many bytes.
#include <fourfold/plan/step_plan.hpp>
#include <fourfold/report/ledger.hpp>  // detail::mib

#include <cstdint>
#include <cstdio>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

/// Bytes of a step, all CPU tensors of the process.
struct StepBytes {
  std::int64_t base = 0;        ///< when it began
  std::int64_t peak = 0;        ///< at most in forward and backward
  std::int64_t predicted = 0;   ///< of that; 0: the step was recorded
  std::int64_t peak_after = 0;  ///< from then until the next began: the optimizer's
};

struct PlanReport {
  struct Row {
    std::string producer{}, saver{}, way{};
    std::vector<std::int64_t> sizes{};  ///< of a block: its first input's
    std::int64_t bytes = 0, held = 0;
    double ms = 0, variance = 0;
  };
  struct Point {
    std::int64_t bytes = 0;  ///< the whole step's peak
    double ms = 0, variance = 0;
  };

  std::int64_t budget = 0;
  std::int64_t least = 0;  ///< the smallest budget that such a step can obey; 0: not known yet
  StepBytes last;
  double step_ms = 0, ms = 0, variance = 0;
  int notches = 0;  ///< plans below the budget's own, for others on the device
  std::vector<Row> rows{};
  std::vector<Point> curve{};
  std::optional<Point> every_block{};  ///< every block computed again, all else kept

  void fill(const StepPlan& plan);
};

[[nodiscard]] inline std::string name_of(const Way& way, const StorageRecord& storage,
                                         const std::vector<Rung>& rungs) {
  switch (way.kind) {
    case Way::Kind::kKeep: return "keep";
    case Way::Kind::kExact: return "exact code";
    case Way::Kind::kRebuild: return "compute again";
    case Way::Kind::kOffload: return "offload";
    case Way::Kind::kPack:
      return storage.sensitive || way.rung >= rungs.size() ? "sensitive codec"
                                                           : rungs[way.rung].name;
  }
  return "?";
}

inline void PlanReport::fill(const StepPlan& plan) {
  const StepRecord& record = plan.record();
  step_ms = record.ms;
  ms = plan.chosen().ms, variance = plan.chosen().variance;
  least = last.base + plan.least();
  const auto again = [&](int block) {
    return block >= 0 && plan.block_way(static_cast<std::size_t>(block)).recompute;
  };
  for (std::size_t b = 0; b < record.blocks.size(); ++b) {
    const BlockRecord& block = record.blocks[b];
    Row row{.producer = "block " + std::to_string(block.id.number),
            .way = again(static_cast<int>(b)) ? "computed again" : "storage by storage"};
    if (!block.inputs.empty()) row.sizes = record.storages[block.inputs.front()].sizes;
    if (plan.block_way(b).reference) row.way += ", as it is";
    const Option& option = plan.block_option(b);
    row.ms = option.ms, row.variance = option.variance;
    for (const StorageRecord& storage : record.storages)
      if (storage.block == static_cast<int>(b) && !storage.input_alone) row.bytes += storage.bytes;
    rows.push_back(std::move(row));
  }
  for (std::size_t i = 0; i < record.storages.size(); ++i) {
    if (!plan.expects(i)) continue;  // its block's
    const StorageRecord& storage = record.storages[i];
    const Way way = plan.way(i);
    const int block = plan.block_of(i);
    Row row{.producer = storage.producer,
            .saver = storage.saver,
            .sizes = storage.sizes,
            .bytes = storage.bytes};
    if (again(block)) {
      row.way =
          way.kind == Way::Kind::kPack ? "sensitive codec" : name_of(way, storage, record.rungs);
      row.held = way.kind == Way::Kind::kKeep   ? storage.bytes
                 : way.kind == Way::Kind::kPack ? storage.coded_bytes(storage.finest)
                                                : 0;
      row.saver =
          "block " + std::to_string(record.blocks[static_cast<std::size_t>(block)].id.number);
    } else {
      const Option& option =
          plan.problem().items[i].options[static_cast<std::size_t>(plan.chosen().choice[i])];
      row.way = name_of(way, storage, record.rungs), row.held = storage.bytes_held(way);
      row.ms = option.ms, row.variance = option.variance;
    }
    rows.push_back(std::move(row));
  }
  const auto point_of = [&](const Solution& one) {
    return Point{last.base + one.peak + plan.correction(), one.ms, one.variance};
  };
  for (const Solution& point : plan.curve()) curve.push_back(point_of(point));
  if (plan.every_block_again()) every_block = point_of(*plan.every_block_again());
}

inline std::ostream& operator<<(std::ostream& out, const PlanReport& plan) {
  const auto mib = [](std::int64_t bytes) { return fourfold::detail::mib(bytes); };
  const auto number = [](double value, const char* format) {
    char text[32];
    std::snprintf(text, sizeof text, format, value);
    return std::string(text);
  };
  out << "budget " << mib(plan.budget) << " MiB";
  if (plan.least == 0)
    return out << ": no step was recorded yet; the first one that saves anything is\n";
  if (plan.rows.empty() && plan.least > plan.budget)
    return out << ": the last step was refused, for it needs " << mib(plan.least)
               << " MiB; the next one is recorded anew\n";
  out << ", the least that can be met is " << mib(plan.least) << "; last step "
      << mib(plan.last.peak);
  if (plan.last.predicted > 0) out << ", predicted " << mib(plan.last.predicted);
  if (plan.last.peak_after > plan.budget)
    out << "; after backward " << mib(plan.last.peak_after)
        << ", which no plan of activations changes";
  out << '\n';
  if (plan.notches > 0)
    out << "the device is full: " << plan.notches << " plans below what the budget allows\n";
  out << "adds " << number(plan.ms, "%.1f") << " ms to " << number(plan.step_ms, "%.1f")
      << ", variance " << number(100 * plan.variance, "%.2f") << " % of the gradient's own\n";
  fourfold::detail::ledger_row(out, "made by", {"MiB", "held", "ms", "variance %"});
  for (const PlanReport::Row& row : plan.rows) {
    const std::string& name = row.producer.empty() ? row.saver : row.producer;
    fourfold::detail::ledger_row(out, name,
                                 {number(static_cast<double>(row.bytes) / (1 << 20), "%.3f"),
                                  number(static_cast<double>(row.held) / (1 << 20), "%.3f"),
                                  number(row.ms, "%.3f"), number(100 * row.variance, "%.4f")});
    out << "    " << row.way << ": [";
    for (std::size_t i = 0; i < row.sizes.size(); ++i) out << (i > 0 ? ", " : "") << row.sizes[i];
    out << "]";
    if (!row.saver.empty()) out << ", saved by " << row.saver;
    out << '\n';
  }
  fourfold::detail::ledger_row(out, "what else could be had", {"MiB", "ms", "variance %"});
  for (const PlanReport::Point& point : plan.curve)
    fourfold::detail::ledger_row(
        out, "",
        {mib(point.bytes), number(point.ms, "%.1f"), number(100 * point.variance, "%.3f")});
  if (plan.every_block)
    fourfold::detail::ledger_row(
        out, "every block computed again",
        {mib(plan.every_block->bytes), number(plan.every_block->ms, "%.1f"), "0.000"});
  return out;
}

}  // namespace fourfold::inline v0::plan

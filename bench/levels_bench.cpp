// SPDX-License-Identifier: Apache-2.0
/// One table: plain LibTorch, block checkpointing, each level and a few budgets on SimpleTransformer
/// (vocabulary 10000, width 512, 6 layers, batch 8 x 512 tokens, AdamW), with the bytes and the time
/// of a step and the loss after kSteps of them: same start, same data. Printed as Markdown when all
/// have run; --benchmark_filter leaves rows out.
#include <fourfold/fourfold.hpp>
#include <fourfold/plan/budget.hpp>
#include <fourfold/presets_release.hpp>

#include "../examples/models/transformer.hpp"
#include "median.hpp"

#include <benchmark/benchmark.h>
#include <torch/nn/functional/loss.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

using Budgeted =
    fourfold::CompressionPipeline<fourfold::Activations<fourfold::Int4>,
                                  fourfold::Recompute<fourfold::CheapOps>, fourfold::Blocks<>,
                                  fourfold::OptimizerStates<fourfold::Int8>, fourfold::Budget<>>;

constexpr int kSteps = 12, kFirst = 3;  // a budget's first steps are recorded, then corrected
constexpr models::TransformerOptions kModel{.vocabulary = 10000, .width = 512};

struct Row {
  std::string name;
  double peak_mib, saved_mib, ms, loss;
};
std::vector<Row> rows;
std::int64_t least = 0;  ///< of the budgets, once one has run

/// Tokens of which each says much about the next: another batch each step, the same in every row.
std::pair<torch::Tensor, torch::Tensor> batch() {
  auto tokens = torch::empty({8, kModel.context + 1}, torch::kLong);
  auto now = torch::randint(kModel.vocabulary, {8}, torch::kLong);
  for (std::int64_t i = 0; i <= kModel.context; ++i) {
    tokens.select(1, i).copy_(now);
    now = (now * 7 + torch::randint(4, {8}, torch::kLong)).remainder(97);
  }
  return {tokens.slice(1, 0, kModel.context).contiguous(), tokens.slice(1, 1).contiguous()};
}

double mib(std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

/// `budget`: of plain's peak, where `Pipeline` takes one; below 0: the least that can be met.
template <class Pipeline>
void train(benchmark::State& state, const std::string& name, bool whole_logits, double budget) {
  constexpr bool kBudget = requires(Pipeline & p) { p.set_budget(0); };
  const std::int64_t bytes =
      budget < 0     ? least
      : rows.empty() ? 0
                     : static_cast<std::int64_t>(budget * rows.front().peak_mib * (1 << 20));
  if (kBudget && bytes == 0) {
    state.SkipWithError("a budget is a share of the first row: leave that, and another budget, in");
    return;
  }
  fourfold::Meter meter;
  fourfold::Meter::release_free_blocks();
  torch::manual_seed(0);
  models::Transformer model(kModel);
  auto pipeline = [&] {
    if constexpr (kBudget)
      return Pipeline(*model, {.budget = bytes, .high_water = 0});
    else
      return Pipeline(*model);
  }();
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(3e-4));
  std::vector<double> times;
  std::int64_t peak = 0;
  double loss = 0;
  int step = 0;
  for (auto _ : state) {
    const auto [input, target] = batch();
    meter.restart_peak();
    const auto begin = std::chrono::steady_clock::now();
    if constexpr (!Pipeline::kReleases) optimizer->zero_grad();
    const auto value = pipeline.forward([&] {
      if (!whole_logits) return model->loss(input, target);
      return torch::nn::functional::cross_entropy(model(input).flatten(0, 1), target.flatten());
    });
    value.backward();
    if constexpr (!Pipeline::kReleases) optimizer->step();
    const double ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    loss = value.template item<double>();
    if (++step <= kFirst) continue;
    times.push_back(ms);
    peak = std::max(peak, meter.bytes().peak);
  }
  if constexpr (kBudget) least = pipeline.plan().least;
  Row row{name, mib(peak), mib(pipeline.report().saved_bytes), median(times), loss};
  state.counters["peak_MiB"] = row.peak_mib;
  state.counters["saved_MiB"] = row.saved_mib;
  state.counters["median_ms"] = row.ms;
  state.counters["loss"] = row.loss;
  rows.push_back(std::move(row));
}

template <class Pipeline>
void declare(const std::string& name, bool whole_logits = false, double budget = 0) {
  benchmark::RegisterBenchmark(
      ("levels/" + name).c_str(),
      [=](benchmark::State& state) { train<Pipeline>(state, name, whole_logits, budget); })
      ->Iterations(kSteps)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  declare<fourfold::CompressionPipeline<>>("plain, whole logits", /*whole_logits=*/true);
  declare<fourfold::CompressionPipeline<>>("plain");
  declare<fourfold::CompressionPipeline<fourfold::Blocks<>>>("block checkpointing");
  declare<fourfold::Exact>("Exact");
  declare<fourfold::Balanced>("Balanced");
  declare<fourfold::Smallest>("Smallest");
  declare<fourfold::BalancedRelease>("BalancedRelease");
  declare<fourfold::SmallestRelease>("SmallestRelease");
  for (const int percent : {70, 50, 35, 28})
    declare<Budgeted>("budget of " + std::to_string(percent) + " %", false, percent / 100.0);
  declare<Budgeted>("the least budget", false, -1);
  benchmark::RunSpecifiedBenchmarks();
  if (rows.empty()) return 0;
  std::printf(
      "\n| | peak MiB | of plain | saved MiB | step | of plain | loss of step %d |\n"
      "|---|---|---|---|---|---|---|\n",
      kSteps);
  for (const Row& row : rows)
    std::printf("| %s | %.1f | %.3f | %.1f | %.2f s | %.2f | %.4f |\n", row.name.c_str(),
                row.peak_mib, row.peak_mib / rows.front().peak_mib, row.saved_mib, row.ms / 1000,
                row.ms / rows.front().ms, row.loss);
}

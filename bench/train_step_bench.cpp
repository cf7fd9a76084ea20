// SPDX-License-Identifier: Apache-2.0
/// What one training step costs: SimpleTransformer (vocabulary 10000, width 512, 8 heads, 6 layers,
/// batch 8 x 512 tokens, fp32, AdamW) under each preset, CompressionPipeline<> being the baseline.
/// train_step/<preset>/linear_cross_entropy: the same with logits for a few rows at a time.
#include <fourfold/fourfold.hpp>
#include <fourfold/presets_release.hpp>

#include "../examples/models/transformer.hpp"

#include <benchmark/benchmark.h>
#include <torch/nn/functional/loss.h>
#include <torch/utils.h>

#include <string>

namespace {

template <class Pipeline>
void train_step(benchmark::State& state, bool whole_logits) {
  fourfold::Meter meter;
  fourfold::Meter::release_free_blocks();  // the benchmark before
  fourfold::Meter::restart_resident_peak();
  torch::manual_seed(0);
  constexpr std::int64_t kBatch = 8;
  const models::TransformerOptions options{.vocabulary = 10000, .width = 512};
  models::Transformer model(options);
  auto pipeline = Pipeline(model);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-4));
  const auto tokens =
      torch::randint(options.vocabulary, {kBatch, options.context + 1}, torch::kLong);
  const auto input = tokens.slice(1, 0, options.context).contiguous();
  const auto target = tokens.slice(1, 1).contiguous();
  const auto step = [&] {
    if constexpr (!Pipeline::kReleases) optimizer->zero_grad();
    auto loss = pipeline.forward([&] {
      return whole_logits ? torch::nn::functional::cross_entropy(model(input).flatten(0, 1),
                                                                 target.flatten())
                          : model->loss(input, target);
    });
    loss.backward();
    if constexpr (!Pipeline::kReleases) optimizer->step();
  };
  step();  // states exist from here on
  meter.restart_peak();
  for (auto _ : state) step();

  const auto ledger = pipeline.report();
  using fourfold::Place;
  const auto bytes = [](std::int64_t n) { return benchmark::Counter(static_cast<double>(n)); };
  state.counters["peak_bytes"] = bytes(ledger.bytes.peak);
  state.counters["saved_bytes"] = bytes(ledger.saved_bytes);
  state.counters["resident_peak_bytes"] = bytes(fourfold::Meter::resident_peak());
  state.counters["weight_bytes"] = bytes(ledger[Place::kWeights].own_peak);
  state.counters["gradient_bytes"] = bytes(ledger[Place::kGradients].own_peak);
  state.counters["optimizer_bytes"] = bytes(ledger[Place::kOptimizer].own_peak);
  // Of a released gradient but one exists at a time: what the three hold together, as the peak stood.
  state.counters["weights_gradients_states_at_peak"] =
      bytes(ledger[Place::kWeights].at_peak + ledger[Place::kGradients].at_peak +
            ledger[Place::kOptimizer].at_peak);
}

template <class Pipeline>
void declare(const std::string& name) {
  for (const bool whole_logits : {true, false})
    benchmark::RegisterBenchmark(
        (name + (whole_logits ? "" : "/linear_cross_entropy")).c_str(),
        [=](benchmark::State& state) { train_step<Pipeline>(state, whole_logits); })
        ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  declare<fourfold::CompressionPipeline<>>("train_step/none");
  declare<fourfold::Exact>("train_step/exact");
  declare<fourfold::Balanced>("train_step/balanced");
  declare<fourfold::Smallest>("train_step/smallest");
  using fourfold::Precision, fourfold::BFloat16;
  declare<fourfold::CompressionPipeline<Precision<BFloat16>>>("train_step/bf16");
  declare<fourfold::BalancedRelease>("train_step/balanced_release");
  declare<fourfold::SmallestRelease>("train_step/smallest_release");
  declare<fourfold::SmallestRelease24>("train_step/smallest_release24");
  benchmark::RunSpecifiedBenchmarks();
}

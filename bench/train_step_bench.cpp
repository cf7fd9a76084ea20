// SPDX-License-Identifier: Apache-2.0
/// What one training step costs with AdamW under each preset, CompressionPipeline<> being the
/// baseline, on
///   train_step/<preset>                       SimpleTransformer: vocabulary 10000, width 512, 8
///                                             heads, 6 layers, batch 8 x 512 tokens
///   train_step/<preset>/linear_cross_entropy  the same with logits for a few rows at a time
///   train_step/<preset>/resnet50              ResNet-50, 8 images of 224 x 224
///   train_step/<preset>/bert_large            4 of BERT-large's 24 layers, 4 x 256 tokens
/// FOURFOLD_DEVICE=cuda in the environment measures on a GPU: device_peak_bytes is then what its caching
/// allocator says, and the other bytes are the CPU's.
#include <fourfold/fourfold.hpp>
#include <fourfold/plan/by_sensitivity.hpp>
#include <fourfold/presets_release.hpp>

#include "../examples/models/bert.hpp"
#include "../examples/models/resnet.hpp"
#include "../examples/models/transformer.hpp"

#include <benchmark/benchmark.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/nn/functional/loss.h>
#include <torch/utils.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

namespace {

at::Device device() {
  static const char* const named = std::getenv("FOURFOLD_DEVICE");
  return at::Device(named != nullptr ? named : "cpu");
}
/// The step's work is done when its time is taken.
void wait() {
  if (!device().is_cuda()) return;
  const c10::impl::VirtualGuardImpl gpu(at::kCUDA);
  gpu.synchronizeStream(gpu.getStream(gpu.getDevice()));
}

struct Workload {
  std::shared_ptr<torch::nn::Module> module;
  std::function<torch::Tensor()> loss;
};

Workload transformer(bool whole_logits) {
  const models::TransformerOptions options{.vocabulary = 10000, .width = 512};
  models::Transformer model(options);
  const auto tokens = torch::randint(options.vocabulary, {8, options.context + 1}, torch::kLong);
  const auto input = tokens.slice(1, 0, options.context).contiguous().to(device());
  const auto target = tokens.slice(1, 1).contiguous().to(device());
  return {model.ptr(), [=]() mutable {
            if (!whole_logits) return model->loss(input, target);
            const auto logits = model(input).flatten(0, 1);
            return torch::nn::functional::cross_entropy(logits, target.flatten());
          }};
}
Workload resnet50() {
  auto model = models::resnet();
  const auto x = torch::randn({8, 3, 224, 224}).to(device());
  const auto target = torch::randint(1000, {8}, torch::kLong).to(device());
  return {model.ptr(), [=]() mutable {
            return torch::nn::functional::cross_entropy(model->forward(x), target);
          }};
}
Workload bert_large() {
  auto model = models::bert({.layers = 4});
  const auto x = torch::randn({256, 4, 1024}).to(device());
  return {model.ptr(), [=]() mutable { return model->forward(x).square().mean(); }};
}

template <class Pipeline>
void train_step(benchmark::State& state, Workload (*make)()) {
  fourfold::Meter meter;
  fourfold::Meter::release_free_blocks();  // the benchmark before
  fourfold::Meter::restart_resident_peak();
  torch::manual_seed(0);
  Workload workload = make();
  workload.module->to(device());
  auto pipeline = Pipeline(*workload.module);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-4));
  const auto step = [&] {
    if constexpr (!Pipeline::kReleases) optimizer->zero_grad();
    const auto loss = pipeline.forward(workload.loss);
    loss.backward();
    if constexpr (!Pipeline::kReleases) optimizer->step();
    wait();
  };
  step();  // states exist from here on
  meter.restart_peak();
  for (auto _ : state) step();

  const auto ledger = pipeline.report();
  using fourfold::Place;
  const auto bytes = [](std::int64_t n) { return benchmark::Counter(static_cast<double>(n)); };
  state.counters["peak_bytes"] = bytes(ledger.bytes.peak);
  if (device().is_cuda()) state.counters["device_peak_bytes"] = bytes(meter.bytes(device()).peak);
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
void declare(const std::string& preset) {
  const auto add = [&](const std::string& model, Workload (*make)()) {
    benchmark::RegisterBenchmark(
        ("train_step/" + preset + model).c_str(),
        [=](benchmark::State& state) { train_step<Pipeline>(state, make); })
        ->Unit(benchmark::kMillisecond);
  };
  add("", [] { return transformer(/*whole_logits=*/true); });
  add("/linear_cross_entropy", [] { return transformer(/*whole_logits=*/false); });
  add("/resnet50", resnet50);
  add("/bert_large", bert_large);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  declare<fourfold::CompressionPipeline<>>("none");
  declare<fourfold::Exact>("exact");
  declare<fourfold::Balanced>("balanced");
  declare<fourfold::Smallest>("smallest");
  using namespace fourfold;
  declare<CompressionPipeline<ActivationsBySensitivity<4>, Recompute<>, OptimizerStates<Int8>>>(
      "by_sensitivity");
  declare<CompressionPipeline<ActivationsBySensitivity<4>, Recompute<>, Blocks<>,
                              OptimizerStates<Int8>>>("by_sensitivity_blocks");
  declare<fourfold::CompressionPipeline<Precision<BFloat16>>>("bf16");
  declare<fourfold::BalancedRelease>("balanced_release");
  declare<fourfold::SmallestRelease>("smallest_release");
  declare<fourfold::SmallestRelease24>("smallest_release24");
  benchmark::RunSpecifiedBenchmarks();
}

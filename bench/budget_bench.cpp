// SPDX-License-Identifier: Apache-2.0
/// Twenty budgets from the least to plain's own peak, on five models: budget/<model>/<share of the
/// way in percent>. Each is a step (forward and backward) by the budget's plan, once it has settled;
/// the peak is counted by the allocator, and one above the budget, below that of a smaller budget by
/// more than a hundredth, or predicted wrong by 3 % is an error. Beside them budget/<model>/plain, and
/// budget/<model>/blocks: each block recomputed, its inputs kept. `worse_in_both` is 1 where a
/// budget's step takes more bytes than that and more time, beyond what the clock tells (3 %).
#include <fourfold/fourfold.hpp>
#include <fourfold/plan/budget.hpp>

#include "../examples/models/bert.hpp"
#include "../examples/models/resnet.hpp"
#include "../examples/models/transformer.hpp"
#include "median.hpp"

#include <benchmark/benchmark.h>
#include <torch/nn.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace {

namespace nn = torch::nn;
using Plain = fourfold::CompressionPipeline<>;
using Recomputed = fourfold::CompressionPipeline<fourfold::Blocks<>>;
using Planned = fourfold::CompressionPipeline<fourfold::Activations<fourfold::Int4>,
                                              fourfold::Recompute<fourfold::CheapOps>,
                                              fourfold::Blocks<>, fourfold::Budget<>>;

struct Workload {
  std::shared_ptr<nn::Module> module;
  std::function<torch::Tensor()> loss;
};

Workload transformer() {
  const models::TransformerOptions options{.vocabulary = 4096, .width = 256, .context = 256};
  models::Transformer model(options);
  const auto tokens = torch::randint(options.vocabulary, {8, options.context + 1}, torch::kLong);
  const auto input = tokens.slice(1, 0, options.context).contiguous();
  const auto target = tokens.slice(1, 1).contiguous();
  return {model.ptr(), [=]() mutable { return model->loss(input, target); }};
}

/// BERT-large's layer, a quarter as wide, six of its 24.
Workload bert() {
  auto model = models::bert({.width = 256, .heads = 4, .layers = 6});
  const auto x = torch::randn({128, 16, 256});  // (tokens, batch, width)
  return {model.ptr(), [=]() mutable { return model->forward(x).square().mean(); }};
}

/// ResNet-50's four stages, one block of each, at half its width, on images of 96 x 96.
Workload resnet() {
  auto model = models::resnet({.blocks = {1, 1, 1, 1}, .width = 32, .classes = 100});
  const auto x = torch::randn({16, 3, 96, 96});
  const auto target = torch::randint(100, {16}, torch::kLong);
  return {model.ptr(),
          [=]() mutable { return torch::cross_entropy_loss(model->forward(x), target); }};
}

/// A Sequential that may stand in another one.
struct LayerImpl : nn::SequentialImpl {
  using nn::SequentialImpl::SequentialImpl;
  torch::Tensor forward(torch::Tensor x) { return nn::SequentialImpl::forward(x); }
};
TORCH_MODULE(Layer);

Workload mlp() {
  nn::Sequential model(nn::Linear(256, 512));
  for (int i = 0; i < 6; ++i)
    model->push_back(Layer(nn::GELU(), nn::LayerNorm(nn::LayerNormOptions({512})), nn::Dropout(0.1),
                           nn::Linear(512, 512)));
  const auto x = torch::randn({2048, 256});
  return {model.ptr(), [=]() mutable { return model->forward(x).square().mean(); }};
}

/// An encoder of images and a decoder back, with a path across.
struct AutoencoderImpl : nn::Module {
  static Layer convolutions(int in, int out) {
    return Layer(nn::Conv2d(nn::Conv2dOptions(in, out, 3).padding(1)), nn::GroupNorm(8, out),
                 nn::SiLU(), nn::Conv2d(nn::Conv2dOptions(out, out, 3).padding(1)),
                 nn::GroupNorm(8, out), nn::SiLU());
  }
  AutoencoderImpl() {
    register_module("down", down);
    register_module("middle", middle);
    register_module("up", up);
    register_module("last", last);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor across = fourfold::block(down, x);
    const torch::Tensor inner = fourfold::block(middle, torch::avg_pool2d(across, 2));
    const auto deep = torch::upsample_nearest2d(inner, {x.size(2), x.size(3)});
    const torch::Tensor outer = fourfold::block(up, torch::cat({across, deep}, 1));
    return last->forward(outer);
  }
  Layer down = convolutions(3, 16), middle = convolutions(16, 32), up = convolutions(48, 16);
  nn::Conv2d last{nn::Conv2dOptions(16, 3, 1)};
};
TORCH_MODULE(Autoencoder);

Workload autoencoder() {
  Autoencoder model;
  const auto x = torch::randn({8, 3, 64, 64});
  return {model.ptr(), [=]() mutable { return torch::mse_loss(model->forward(x), x); }};
}

/// A model and what is known of it; made for its first benchmark.
template <class Pipeline>
struct Session {
  explicit Session(Workload (*make)()) : Session(make, nullptr) {}
  Session(Workload (*make)(), const fourfold::PlanOptions* options) {
    torch::manual_seed(0);
    workload = make();
    if constexpr (requires { pipeline->plan(); })
      pipeline.emplace(*workload.module, *options);
    else
      pipeline.emplace(*workload.module);
  }
  /// The peak of a step.
  std::int64_t step() {
    for (const at::Tensor& parameter : pipeline->parameters())
      parameter.mutable_grad() = at::Tensor();
    meter.restart_peak();
    pipeline->forward(workload.loss).backward();
    return meter.bytes().peak;
  }
  fourfold::Meter meter;
  Workload workload;
  std::optional<Pipeline> pipeline;
};

constexpr int kBudgets = 20;
double mib(std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

/// What one step needs, and takes at the median.
struct Measured {
  std::int64_t peak = 0;
  double ms = 0;
};
template <class Pipeline>
Measured measure(benchmark::State& state, Session<Pipeline>& session) {
  Measured out;
  std::vector<double> times;
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    out.peak = std::max(out.peak, session.step());
    times.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
            .count());
  }
  out.ms = median(times);
  state.counters["peak_MiB"] = mib(out.peak);
  state.counters["median_ms"] = out.ms;
  return out;
}

/// What is known of a model so far.
struct Known {
  std::unique_ptr<Session<Planned>> session;
  Measured plain, blocks;
  std::int64_t least = 0, before = 0;
};

void run_budget(benchmark::State& state, Known& known, Workload (*make)(), int number) {
  if (known.session == nullptr) {
    if (known.plain.peak == 0) {
      Session<Plain> plain(make);
      plain.step();
      known.plain.peak = plain.step();
    }
    const fourfold::PlanOptions options{.budget = 4 * known.plain.peak, .high_water = 0};
    known.session = std::make_unique<Session<Planned>>(make, &options);
    known.session->step(), known.session->step();
    known.least = known.session->pipeline->plan().least;
  }
  Session<Planned>& session = *known.session;
  const std::int64_t budget =
      known.least + (known.plain.peak - known.least) * number / (kBudgets - 1);
  session.pipeline->set_budget(budget);
  std::int64_t settling = 0;
  for (int i = 0; i < 2; ++i) settling = std::max(settling, session.step());
  const Measured step = measure(state, session);
  const auto plan = session.pipeline->plan();
  state.counters["budget_MiB"] = mib(budget);
  state.counters["predicted_MiB"] = mib(plan.last.predicted);
  state.counters["adds_ms"] = plan.ms;
  state.counters["variance_percent"] = 100 * plan.variance;
  const double worse_than = 1.03 * known.blocks.ms;
  state.counters["worse_in_both"] =
      known.blocks.peak > 0 && step.peak > known.blocks.peak && step.ms > worse_than ? 1 : 0;
  if (std::max(step.peak, settling) > budget) state.SkipWithError("the peak is above the budget");
  if (step.peak < known.before - known.before / 100)
    state.SkipWithError("a larger budget has a smaller peak");
  if (std::abs(plan.last.predicted - plan.last.peak) > plan.last.peak * 3 / 100)
    state.SkipWithError("the peak was predicted wrong by more than 3 %");
  known.before = step.peak;
  if (number + 1 == kBudgets) known.session.reset();
}

void declare(const std::string& name, Workload (*make)()) {
  const auto known = std::make_shared<Known>();
  const auto add = [&](const std::string& what, auto run) {
    benchmark::RegisterBenchmark(("budget/" + name + "/" + what).c_str(), run)
        ->Unit(benchmark::kMillisecond);
  };
  add("plain", [=](benchmark::State& state) {
    Session<Plain> session(make);
    session.step();
    known->plain = measure(state, session);
  });
  add("blocks", [=](benchmark::State& state) {
    Session<Recomputed> session(make);
    session.step();
    known->blocks = measure(state, session);
  });
  for (int i = 0; i < kBudgets; ++i)
    add(std::to_string(100 * i / (kBudgets - 1)),
        [=](benchmark::State& state) { run_budget(state, *known, make, i); });
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const fourfold::Meter meter;  // inputs are counted, too
  declare("transformer", transformer);
  declare("bert", bert);
  declare("resnet", resnet);
  declare("mlp", mlp);
  declare("autoencoder", autoencoder);
  benchmark::RunSpecifiedBenchmarks();
}

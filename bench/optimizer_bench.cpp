// SPDX-License-Identifier: Apache-2.0
/// What an optimizer step costs: AdamW with moments in each code, against torch::optim::AdamW on
/// the same parameters in the same run. `vs_torch` is our time as a share of LibTorch's, the median
/// of steps taken in turn; `state_bytes` is what the moments take.
#include <fourfold/optim/adamw.hpp>

#include <benchmark/benchmark.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <vector>

namespace {

using fourfold::optim::AdamWOf;
using torch::optim::AdamWOptions;

/// Parameters of a transformer: `layers` layers of width `width`, and an embedding.
std::vector<at::Tensor> parameters(std::int64_t width, std::int64_t layers) {
  torch::manual_seed(0);
  std::vector<at::Tensor> all{torch::randn({256, width})};
  for (std::int64_t i = 0; i < layers; ++i)
    for (const auto& sizes : std::vector<std::vector<std::int64_t>>{{3 * width, width},
                                                                    {3 * width},
                                                                    {width, width},
                                                                    {width},
                                                                    {4 * width, width},
                                                                    {4 * width},
                                                                    {width, 4 * width},
                                                                    {width},
                                                                    {width},
                                                                    {width},
                                                                    {width},
                                                                    {width}})
      all.push_back(torch::randn(sizes));
  for (at::Tensor& p : all) {
    p.requires_grad_();
    p.mutable_grad() = 1e-3 * torch::randn(p.sizes());
  }
  return all;
}

double seconds(torch::optim::Optimizer& optimizer) {
  const auto start = std::chrono::steady_clock::now();
  optimizer.step();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

template <class Codec>
void step(benchmark::State& state) {
  const std::vector<at::Tensor> ours = parameters(state.range(0), state.range(1));
  const std::vector<at::Tensor> theirs = parameters(state.range(0), state.range(1));
  AdamWOf<Codec> packed(ours, AdamWOptions(1e-4));
  torch::optim::AdamW plain(theirs, AdamWOptions(1e-4));
  packed.step(), plain.step();  // states exist from here on
  std::vector<double> packed_seconds, plain_seconds;
  for (auto _ : state) {
    plain_seconds.push_back(seconds(plain));
    packed_seconds.push_back(seconds(packed));
    state.SetIterationTime(packed_seconds.back());
  }
  std::int64_t values = 0;
  for (const at::Tensor& p : ours) values += p.numel();
  state.counters["vs_torch"] = median(packed_seconds) / median(plain_seconds);
  state.counters["ns_per_value"] = median(packed_seconds) * 1e9 / static_cast<double>(values);
  state.counters["parameters"] = static_cast<double>(values);
  state.counters["state_bytes"] = static_cast<double>(packed.state_bytes());
}

template <class Codec>
void declare(const char* name) {
  benchmark::RegisterBenchmark(name, step<Codec>)
      ->ArgNames({"width", "layers"})
      ->Args({256, 6})
      ->Args({512, 6})
      ->Unit(benchmark::kMillisecond)
      ->UseManualTime()
      ->Iterations(11);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  declare<fourfold::Int8>("adamw/int8/step");
  declare<fourfold::Int4>("adamw/int4/step");
  declare<fourfold::optim::BFloat16>("adamw/bf16/step");
  declare<fourfold::optim::Fp32>("adamw/fp32/step");
  benchmark::RunSpecifiedBenchmarks();
}

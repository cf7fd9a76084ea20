// SPDX-License-Identifier: Apache-2.0
/// What an optimizer step costs: each rule and code against torch::optim::AdamW on the same fp32
/// parameters in the same run. `vs_torch` is our time as a share of LibTorch's, the median
/// of steps taken in turn; `state_bytes` is what the moments take.
#include <fourfold/optim/optim.hpp>

#include <benchmark/benchmark.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <type_traits>
#include <vector>

namespace {

using fourfold::optim::AdamWOf;
namespace optim = fourfold::optim;
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

/// Ours over parameters of `dtype`; LibTorch's are fp32.
template <class Optimizer>
void step(benchmark::State& state, typename Optimizer::Options options, at::ScalarType dtype) {
  std::vector<at::Tensor> ours = parameters(state.range(0), state.range(1));
  std::vector<at::Tensor> theirs = parameters(state.range(0), state.range(1));
  if (std::is_same_v<typename Optimizer::RuleType, optim::MuonRule>)  // of matrices alone
    for (std::vector<at::Tensor>* all : {&ours, &theirs})
      std::erase_if(*all, [](const at::Tensor& p) { return p.dim() < 2; });
  for (at::Tensor& p : ours) {
    const at::Tensor grad = p.grad().to(dtype);
    p = p.detach().to(dtype).requires_grad_();
    p.mutable_grad() = grad;
  }
  Optimizer packed(ours, options);
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
  const auto count = static_cast<double>(values);
  const double weight = dtype == at::kFloat ? 4 : 2;
  state.counters["vs_torch"] = median(packed_seconds) / median(plain_seconds);
  state.counters["ns_per_value"] = median(packed_seconds) * 1e9 / count;
  state.counters["parameters"] = count;
  state.counters["state_bytes"] = static_cast<double>(packed.state_bytes());
  state.counters["weight_and_state_bytes_per_value"] =
      weight + static_cast<double>(packed.state_bytes()) / count;
}

template <class Optimizer>
void declare(const char* name, typename Optimizer::Options options = 1e-4,
             at::ScalarType dtype = at::kFloat) {
  benchmark::RegisterBenchmark(
      name, [=](benchmark::State& state) { step<Optimizer>(state, options, dtype); })
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
  using fourfold::Int4, fourfold::Int8;
  declare<AdamWOf<Int8>>("adamw/int8/step");
  declare<AdamWOf<Int4>>("adamw/int4/step");
  declare<AdamWOf<optim::BFloat16>>("adamw/bf16/step");
  declare<AdamWOf<optim::Fp32>>("adamw/fp32/step");
  declare<optim::AdamW<optim::Normal4, optim::Factored>>("adamw/int4_factored/step");
  declare<AdamWOf<Int4, optim::ErrorCorrection<8>>>("adamw/int4/bf16_weights_24_bits/step", 1e-4,
                                                    at::kBFloat16);
  declare<AdamWOf<Int4, optim::RoundStochastic>>("adamw/int4/bf16_weights_stochastic/step", 1e-4,
                                                 at::kBFloat16);
  declare<optim::LionOf<Int8>>("lion/int8/step");
  declare<optim::AdamMiniOf<Int8>>("adam_mini/int8/step");
  declare<optim::Adafactor<>>("adafactor/step");
  declare<optim::ScaleOf<Int8, optim::RoundStochastic>>("scale/bf16_weights_stochastic/step", 1e-4,
                                                        at::kBFloat16);
  declare<optim::ApolloMiniOf<optim::Fp32>>("apollo_mini/step");
  declare<optim::ApolloOf<Int8>>("apollo/rank64/step", optim::ApolloOptions(1e-2).rank(64));
  declare<optim::GaLoreOf<Int8>>("galore/rank64/step", optim::GaLoreOptions(1e-2).rank(64));
  declare<optim::MuonOf<Int8>>("muon/int8/step");
  benchmark::RunSpecifiedBenchmarks();
}

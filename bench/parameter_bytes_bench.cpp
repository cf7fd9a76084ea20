// SPDX-License-Identifier: Apache-2.0
/// Bytes that training holds for each parameter: weight, gradient and states, between a step and the
/// next, counted by the allocator. An error where they are not within 2 % of their formula, or the
/// ledger's places do not add up to them.
#include <fourfold/core/place.hpp>
#include <fourfold/gradients/release.hpp>
#include <fourfold/optim/optim.hpp>
#include <fourfold/report/meter.hpp>

#include <benchmark/benchmark.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

namespace {

using fourfold::Int4, fourfold::Int8, fourfold::Meter, fourfold::Place;
using fourfold::optim::AdamWOf;
namespace nn = torch::nn;
namespace optim = fourfold::optim;

constexpr std::int64_t kWidth = 1024, kLayers = 4;

/// A group of 128 values has a scale of 4 bytes (8-bit moments), one of 64 a scale of 2 (4-bit).
constexpr double kMoment8 = 1 + 4.0 / 128, kMoment4 = 0.5 + 2.0 / 64;

template <class Optimizer>
void held(benchmark::State& state, at::ScalarType dtype, bool released, double formula) {
  const Meter meter;
  const std::int64_t before = meter.bytes().current;
  torch::manual_seed(0);
  nn::Sequential model;
  for (std::int64_t i = 0; i < kLayers; ++i)
    model->push_back(nn::Linear(nn::LinearOptions(kWidth, kWidth).bias(false)));
  model->to(dtype);
  meter.adopt(model->parameters(), Place::kWeights);
  std::int64_t now = 0, ledger = 0;
  {
    Optimizer optimizer(model->parameters(), typename Optimizer::Options(1e-3));
    std::optional<fourfold::GradientRelease<>> release;
    if constexpr (requires { fourfold::GradientRelease(optimizer); })
      if (released) release.emplace(optimizer);
    for (auto _ : state) {
      model->forward(torch::ones({8, kWidth}, dtype)).square().mean().backward();
      if (!released) optimizer.step();
    }
    for (const at::Tensor& parameter : model->parameters())
      if (parameter.grad().defined()) meter.adopt(parameter.grad(), Place::kGradients);
    now = meter.bytes().current - before;
    for (const Place place : {Place::kWeights, Place::kGradients, Place::kOptimizer})
      ledger += meter.bytes(place).current;
  }
  constexpr double kParameters = kLayers * kWidth * kWidth;
  const double counted = static_cast<double>(now) / kParameters;
  state.counters["bytes_a_parameter"] = counted;
  state.counters["formula"] = formula;
  state.counters["ledger"] = static_cast<double>(ledger) / kParameters;
  state.counters["of_16"] = counted / 16;
  if (std::abs(counted - formula) > 0.02 * formula)
    state.SkipWithError("the bytes are not within 2 % of their formula");
  if (std::abs(counted - state.counters["ledger"]) > 0.02 * counted)
    state.SkipWithError("the ledger's places do not add up to the bytes");
}

template <class Optimizer>
void declare(const std::string& name, at::ScalarType dtype, bool released, double formula) {
  benchmark::RegisterBenchmark(
      ("parameter_bytes/" + name).c_str(),
      [=](benchmark::State& state) { held<Optimizer>(state, dtype, released, formula); })
      ->Iterations(2)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  constexpr at::ScalarType kF32 = at::kFloat, kB16 = at::kBFloat16;
  declare<AdamWOf<optim::Fp32>>("adamw/fp32", kF32, false, 4 + 4 + 4 + 4);
  declare<AdamWOf<Int8>>("adamw/fp32_weights/8_bit_moments", kF32, false, 4 + 4 + 2 * kMoment8);
  declare<AdamWOf<Int8>>("adamw/fp32_weights/8_bit_moments/released", kF32, true, 4 + 2 * kMoment8);
  declare<AdamWOf<Int8, optim::RoundStochastic>>("adamw/bf16_weights/8_bit_moments", kB16, false,
                                                 2 + 2 + 2 * kMoment8);
  declare<AdamWOf<Int4, optim::ErrorCorrection<8>>>(
      "adamw/bf16_weights_24_bits/4_bit_moments/released", kB16, true, 2 + 1 + 2 * kMoment4);
  declare<AdamWOf<Int4, optim::RoundStochastic>>(
      "adamw/bf16_weights_stochastic/4_bit_moments/released", kB16, true, 2 + 2 * kMoment4);
  declare<optim::ScaleOf<Int8, optim::RoundStochastic>>("scale/bf16_weights_stochastic/released",
                                                        kB16, true, 2);
  declare<optim::ApolloMiniOf<optim::Fp32, optim::RoundStochastic>>(
      "apollo_mini/bf16_weights_stochastic/released", kB16, true, 2);
  benchmark::RunSpecifiedBenchmarks();
}

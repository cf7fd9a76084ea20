// SPDX-License-Identifier: Apache-2.0
/// What fourfold::cuda's kernels cost on a GPU.
///   gpu/codec/<codec>/...   64 Mi fp32 values, beside a copy of the same bytes on the device:
///                           vs_copy is the median time of the copy over ours (1: as quick)
///   gpu/<optimizer>/step    parameters of a transformer, beside torch::optim::AdamW on the same ones in
///                           fp32: vs_torch is our time as a share of LibTorch's, medians
/// bytes_per_second counts bytes of fp32. A time is that of ten calls and of waiting for them once.
/// Where there is no GPU every benchmark is skipped, and says so.
#include <ATen/Context.h>
#include <benchmark/benchmark.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fourfold/codec/bit_mask.hpp>
#include <fourfold/codec/companded.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/cuda/kernels.hpp>
#include <fourfold/optim/optim.hpp>

#include "median.hpp"

#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <chrono>
#include <string>
#include <vector>

namespace {

namespace optim = fourfold::optim;
using torch::optim::AdamWOptions;

constexpr std::int64_t kValues = std::int64_t{1} << 26;

double seconds_of(const auto& f) {
  constexpr int kCalls = 10;
  const c10::impl::VirtualGuardImpl gpu(at::kCUDA);
  const c10::Stream stream = gpu.getStream(gpu.getDevice());
  gpu.synchronizeStream(stream);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) f();
  gpu.synchronizeStream(stream);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / kCalls;
}

void add(const std::string& name, const auto& f) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [f](benchmark::State& state) {
                                 if (!at::hasCUDA())
                                   state.SkipWithError("no GPU");
                                 else if (fourfold::cuda::kernels() == nullptr)
                                   state.SkipWithError("fourfold::cuda is not linked");
                                 else
                                   f(state);
                               })
      ->Unit(benchmark::kMicrosecond)
      ->UseManualTime()
      ->Iterations(11);
}

/// Times f, with `beside` next to it; the median of its times over that of ours.
double measured(benchmark::State& state, const auto& f, const auto& beside) {
  std::vector<double> ours, theirs;
  f(), beside();
  for (auto _ : state) {
    theirs.push_back(seconds_of(beside));
    ours.push_back(seconds_of(f));
    state.SetIterationTime(ours.back());
  }
  return median(theirs) / median(ours);
}

void against_copy(benchmark::State& state, const auto& f) {
  const auto from = torch::randn({kValues}, at::kCUDA), to = torch::empty_like(from);
  state.counters["vs_copy"] = measured(state, f, [&] { to.copy_(from); });
  state.SetBytesProcessed(state.iterations() * kValues * 4);
}

template <class C>
void add_codec(at::Tensor (*domain)(const at::Tensor&)) {
  const std::string name = "gpu/codec/" + C::name() + "/";
  const auto values = [=] { return domain(torch::randn({kValues}, at::kCUDA)); };
  if constexpr (fourfold::StochasticCodec<C>)
    add(name + "compress_stochastic", [=](benchmark::State& state) {
      const auto input = values();
      against_copy(state, [&] {
        benchmark::DoNotOptimize(C{}.compress(input, fourfold::Key{1, 2, 3, 4}));
      });
    });
  else
    add(name + "compress", [=](benchmark::State& state) {
      const auto input = values();
      against_copy(state, [&] { benchmark::DoNotOptimize(C{}.compress(input)); });
    });
  add(name + "decompress", [=](benchmark::State& state) {
    const auto packed = C{}.compress(values());
    against_copy(state, [&] { benchmark::DoNotOptimize(C{}.decompress(packed)); });
  });
}

/// 12 layers of width 1024: 151 M values.
std::vector<at::Tensor> parameters(at::ScalarType dtype) {
  constexpr std::int64_t kWidth = 1024;
  std::vector<at::Tensor> all;
  for (int layer = 0; layer < 12; ++layer)
    for (const auto& sizes : std::vector<std::vector<std::int64_t>>{{3 * kWidth, kWidth},
                                                                    {kWidth, kWidth},
                                                                    {4 * kWidth, kWidth},
                                                                    {kWidth, 4 * kWidth},
                                                                    {4 * kWidth},
                                                                    {kWidth}}) {
      all.push_back(torch::randn(sizes, at::kCUDA).to(dtype).requires_grad_());
      all.back().mutable_grad() = (1e-3 * torch::randn(sizes, at::kCUDA)).to(dtype);
    }
  return all;
}

template <class Optimizer>
void add_step(const std::string& name, at::ScalarType dtype = at::kFloat) {
  add("gpu/" + name + "/step", [=](benchmark::State& state) {
    torch::manual_seed(0);
    auto mine = parameters(dtype), theirs = parameters(at::kFloat);
    Optimizer ours(mine, typename Optimizer::Options(1e-4));
    torch::optim::AdamW plain(theirs, AdamWOptions(1e-4));
    state.counters["vs_torch"] = 1 / measured(
                                         state, [&] { ours.step(); }, [&] { plain.step(); });
    std::int64_t values = 0;
    for (const at::Tensor& p : mine) values += p.numel();
    state.counters["state_bytes"] = static_cast<double>(ours.state_bytes());
    state.SetBytesProcessed(state.iterations() * values * 4);
  });
}

}  // namespace

int main(int argc, char** argv) {
  using namespace fourfold;
  const auto any = [](const at::Tensor& x) { return x; };
  const auto not_negative = [](const at::Tensor& x) { return x.abs(); };
  const auto two_values = [](const at::Tensor& x) { return x.gt(0).to(at::kFloat); };
  const auto bools = [](const at::Tensor& x) { return x.gt(0); };
  add_codec<Int8>(any);
  add_codec<Int4>(any);
  add_codec<Int2>(any);
  add_codec<Nf4>(any);
  add_codec<Companded<8, Softsign>>(any);
  add_codec<Companded<8, Sqrt>>(not_negative);
  add_codec<BitMask>(two_values);
  add("gpu/codec/BitMask/compress_bool", [=](benchmark::State& state) {
    const auto input = bools(torch::randn({kValues}, at::kCUDA));
    against_copy(state, [&] { benchmark::DoNotOptimize(BitMask{}.compress(input)); });
  });
  add_step<optim::AdamWOf<optim::Fp32>>("adamw/fp32");
  add_step<optim::AdamWOf<optim::BFloat16>>("adamw/bf16");
  add_step<optim::AdamWOf<Int8>>("adamw/int8");
  add_step<optim::AdamWOf<Int4>>("adamw/int4");
  add_step<optim::AdamW<Companded<8, Softsign>, optim::Log4>>("adamw/int8_log4");
  add_step<optim::AdamWOf<Int4, optim::ErrorCorrection<8>>>("adamw/int4/bf16_weights_24_bits",
                                                            at::kBFloat16);
  add_step<optim::AdamWOf<Int4, optim::RoundStochastic>>("adamw/int4/bf16_weights_stochastic",
                                                         at::kBFloat16);
  add_step<optim::LionOf<Int8>>("lion/int8");
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}

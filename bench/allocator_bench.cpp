// SPDX-License-Identifier: Apache-2.0
/// What counting costs, and how resident memory follows the count: training steps of a transformer
/// (width 256, 6 layers, 8 x 512 tokens, AdamW) under LibTorch's own CPU allocator and under ours,
/// each in a fresh process, since resident memory belongs to one. Every iteration runs the two in
/// turn.
///
///   allocator/as_shipped      the arena that earns its working set
///   allocator/bounded         never more than 64 MiB kept
///   allocator/nothing_kept    each large block mapped and unmapped
///   allocator/small_pages     as shipped, without huge pages
///   allocator/glibc_mmap      LibTorch's allocator with mallopt(M_MMAP_THRESHOLD, 64 KiB)
///
/// Counters: time_vs_default and cpu_vs_default (least step, ours by LibTorch's own, same
/// iteration), peak_bytes (counted), resident_over_count_bytes (VmHWM - VmHWM before the model -
/// peak_bytes) and the same of LibTorch's own allocator as default_over_count_bytes.
#include <fourfold/report/meter.hpp>

#include "median.hpp"

#include <benchmark/benchmark.h>
#include <malloc.h>
#include <sys/resource.h>
#include <torch/nn.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using fourfold::Meter;

constexpr const char* kVariant = "FOURFOLD_ALLOCATOR_BENCH";

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(std::int64_t width) : width(width) {
    using namespace torch::nn;
    norm1 = register_module("norm1", LayerNorm(LayerNormOptions({width})));
    norm2 = register_module("norm2", LayerNorm(LayerNormOptions({width})));
    qkv = register_module("qkv", Linear(width, 3 * width));
    projection = register_module("projection", Linear(width, width));
    up = register_module("up", Linear(width, 4 * width));
    down = register_module("down", Linear(4 * width, width));
  }
  at::Tensor forward(at::Tensor x) {
    const auto batch = x.size(0), tokens = x.size(1);
    const auto heads =
        qkv(norm1(x)).view({batch, tokens, 3, 8, width / 8}).permute({2, 0, 3, 1, 4});
    const auto mixed =
        at::scaled_dot_product_attention(heads[0], heads[1], heads[2], {}, 0.0, /*is_causal=*/true);
    x = x + projection(mixed.transpose(1, 2).reshape({batch, tokens, width}));
    return x + down(at::gelu(up(norm2(x))));
  }
  std::int64_t width;
  torch::nn::LayerNorm norm1{nullptr}, norm2{nullptr};
  torch::nn::Linear qkv{nullptr}, projection{nullptr}, up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

/// Prints "least seconds, least cpu seconds, counted peak, resident over its start".
int child(const std::string& variant) {
  if (variant == "glibc_mmap") mallopt(M_MMAP_THRESHOLD, 64 << 10);
  if (variant != "default" && variant != "glibc_mmap") {
    auto& arena = fourfold::door::install_allocator().arena();
    if (variant == "bounded") arena.limit({.earns = false});
    if (variant == "nothing_kept") arena.limit({.allowance = 0, .slack = 0, .earns = false});
    if (variant == "small_pages") arena.limit({.huge_pages = false});
  }
  const std::int64_t before = Meter::resident_peak();
  torch::manual_seed(0);
  constexpr std::int64_t kWidth = 256;
  torch::nn::Sequential model;
  for (int i = 0; i < 6; ++i) model->push_back(Block(kWidth));
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-3));
  const auto x = at::randn({8, 512, kWidth});
  double least = 1e9, least_cpu = 1e9;
  for (int step = 0; step < 4; ++step) {
    const auto start = std::chrono::steady_clock::now();
    const double start_cpu = cpu_seconds();
    optimizer.zero_grad();
    model->forward(x).square().mean().backward();
    optimizer.step();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (step == 0) continue;  // states are made there
    least = std::min(least, seconds), least_cpu = std::min(least_cpu, cpu_seconds() - start_cpu);
  }
  std::printf("%.6f %.6f %lld %lld\n", least, least_cpu,
              static_cast<long long>(fourfold::door::counters().read().all.peak),
              static_cast<long long>(Meter::resident_peak() - before));
  return 0;
}

struct Result {
  double seconds = 0, cpu = 0;
  long long peak = 0, resident = 0;
};

Result run(const std::string& variant) {
  const std::string command = std::string(kVariant) + "=" + variant + " '" +
                              std::filesystem::read_symlink("/proc/self/exe").string() + "'";
  Result result;
  std::FILE* const pipe = popen(command.c_str(), "r");
  const int read = pipe ? std::fscanf(pipe, "%lf %lf %lld %lld", &result.seconds, &result.cpu,
                                      &result.peak, &result.resident)
                        : 0;
  if (!pipe || pclose(pipe) != 0 || read != 4)
    throw std::runtime_error("the child for " + variant + " failed");
  return result;
}

void allocator(benchmark::State& state, const std::string& variant) {
  static const long long peak = run("as_shipped").peak;  // the same whoever allocates
  std::vector<double> time_ratio, cpu_ratio, over, default_over;
  for (auto _ : state) {
    const Result plain = run("default"), ours = run(variant);
    state.SetIterationTime(ours.seconds);
    time_ratio.push_back(ours.seconds / plain.seconds), cpu_ratio.push_back(ours.cpu / plain.cpu);
    over.push_back(static_cast<double>(ours.resident - peak));
    default_over.push_back(static_cast<double>(plain.resident - peak));
  }
  state.counters["time_vs_default"] = median(time_ratio);
  state.counters["cpu_vs_default"] = median(cpu_ratio);
  state.counters["peak_bytes"] = static_cast<double>(peak);
  state.counters["resident_over_count_bytes"] = median(over);
  state.counters["default_over_count_bytes"] = median(default_over);
}

}  // namespace

int main(int argc, char** argv) {
  if (const char* variant = std::getenv(kVariant)) return child(variant);
  for (const std::string variant :
       {"as_shipped", "bounded", "nothing_kept", "small_pages", "glibc_mmap"})
    benchmark::RegisterBenchmark(("allocator/" + variant).c_str(),
                                 [variant](benchmark::State& state) { allocator(state, variant); })
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond)
        ->Iterations(3);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

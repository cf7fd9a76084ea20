// SPDX-License-Identifier: Apache-2.0
/// What a product with a packed weight costs, against at::linear in fp32 (and, backward, against
/// the fp32 gradient with respect to the input). Each iteration runs both, ours timed and fp32
/// beside it, and takes the next of many weights, as a model with many layers does: 256 MiB of them
/// in fp32. vs_fp32 is the median time of fp32 over the median time of ours, more is better.
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <c10/core/GradMode.h>
#include <torch/utils.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/codec/packed_matmul.hpp>

#include "median.hpp"

#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace {

using fourfold::Payload;

struct Shape {
  std::int64_t n, k;
};

constexpr std::int64_t kWeightValues = 64 << 20;  // 256 MiB of fp32

/// The values of all weights of all shapes.
const at::Tensor& values() {
  static const at::Tensor all = [] {
    torch::manual_seed(0);
    return at::randn({kWeightValues});
  }();
  return all;
}

at::Tensor dense(const Shape& shape, std::int64_t index) {
  return values().narrow(0, index * shape.n * shape.k, shape.n * shape.k).view({shape.n, shape.k});
}

/// All weights of one shape, packed; those of the last codec and shape that were asked for are
/// kept.
template <class C>
const std::vector<std::shared_ptr<const Payload>>& packed(const Shape& shape) {
  static std::string made;
  static std::vector<std::shared_ptr<const Payload>> weights;
  const std::string asked = C::name() + std::to_string(shape.n);
  if (made != asked) {
    weights.clear();
    for (std::int64_t i = 0; i < kWeightValues / (shape.n * shape.k); ++i)
      weights.push_back(fourfold::make_payload<C>(dense(shape, i)));
    made = asked;
  }
  return weights;
}

template <class C>
void run(benchmark::State& state, const Shape& shape, std::int64_t m, bool backward) {
  using Clock = std::chrono::steady_clock;
  const c10::NoGradGuard no_grad;
  const auto& weights = packed<C>(shape);
  const at::Tensor x = at::randn({m, backward ? shape.n : shape.k});
  std::vector<double> ours, fp32;
  const auto timed = [](std::vector<double>& seconds, auto&& product) {
    const auto before = Clock::now();
    benchmark::DoNotOptimize(product());
    seconds.push_back(std::chrono::duration<double>(Clock::now() - before).count());
  };
  std::size_t next = 0;
  for (auto _ : state) {
    state.PauseTiming();
    next = (next + 1) % weights.size();
    const at::Tensor w = dense(shape, static_cast<std::int64_t>(next));
    timed(fp32, [&] { return backward ? at::matmul(x, w) : at::linear(x, w); });
    state.ResumeTiming();
    timed(ours, [&] {
      return backward ? fourfold::packed_matmul(x, *weights[next])
                      : fourfold::packed_linear(x, *weights[next]);
    });
  }
  state.counters["vs_fp32"] = median(fp32) / median(ours);
  state.counters["packed_bytes"] = static_cast<double>(weights.front()->nbytes());
}

template <class C>
void add(const Shape& shape) {
  for (const bool backward : {false, true})
    for (const std::int64_t m : {1, 4, 16, 64, 256, 512}) {
      const std::string name = (backward ? "linear_backward/" : "linear/") + C::name() + "/" +
                               std::to_string(shape.n) + "x" + std::to_string(shape.k) +
                               "/M:" + std::to_string(m);
      benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
        run<C>(state, shape, m, backward);
      })->Unit(benchmark::kMicrosecond);
    }
}

}  // namespace

int main(int argc, char** argv) {
  // Before the user's own options, which therefore win: the whole run stays under 90 s.
  std::string brief = "--benchmark_min_time=0.1";
  std::vector<char*> arguments{argv[0], brief.data()};
  arguments.insert(arguments.end(), argv + 1, argv + argc);
  int count = static_cast<int>(arguments.size());
  for (const Shape& shape : {Shape{1024, 1024}, Shape{4096, 1024}}) {
    add<fourfold::Int8>(shape);
    add<fourfold::Int4>(shape);
    add<fourfold::Nf4>(shape);
  }
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
  benchmark::AddCustomContext("threads", std::to_string(at::get_num_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an optimizer step costs against torch::optim::AdamW's on the same fp32 parameters in the same
/// run: medians of steps taken in turn.
///   vs_torch         our time as a share of LibTorch's
///   GB_per_s         what a step reads and writes (weights, gradients, states), beside that of
///                    LibTorch's AdamW and of memcpy of as many fp32 values, on as many threads
///   state_bytes      what the states take
///   vs_memory        of states on a file: against the same step with states in memory;
///   cold_vs_memory   likewise, the file's pages dropped before each step, so that a disk is read
#include <fourfold/core/mapped_file.hpp>
#include <fourfold/core/parallel.hpp>

#include "median.hpp"

#include <benchmark/benchmark.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

/// Parameters of a transformer: `layers` layers of width `width`, and an embedding.
inline std::vector<at::Tensor> parameters(std::int64_t width, std::int64_t layers) {
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

inline double seconds(torch::optim::Optimizer& optimizer) {
  const auto start = std::chrono::steady_clock::now();
  optimizer.step();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Time of memcpy, on as many threads as a step has.
inline double seconds_of_memcpy(at::Tensor& to, const at::Tensor& from) {
  const auto start = std::chrono::steady_clock::now();
  auto* const out = static_cast<char*>(to.mutable_data_ptr());
  const auto* const in = static_cast<const char*>(from.const_data_ptr());
  fourfold::parallel_for(0, from.numel(), 1 << 16, [&](std::int64_t a, std::int64_t b) {
    std::memcpy(out + 4 * a, in + 4 * a, static_cast<std::size_t>(4 * (b - a)));
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Ours over parameters of `dtype`; LibTorch's are fp32.
template <class Optimizer>
void step(benchmark::State& state, typename Optimizer::Options options, at::ScalarType dtype,
          bool on_file) {
  std::vector<at::Tensor> ours = parameters(state.range(0), state.range(1));
  std::vector<at::Tensor> theirs = parameters(state.range(0), state.range(1));
  if (Optimizer::RuleType::name() == "Muon")  // of matrices alone
    for (std::vector<at::Tensor>* all : {&ours, &theirs})
      std::erase_if(*all, [](const at::Tensor& p) { return p.dim() < 2; });
  for (at::Tensor& p : ours) {
    const at::Tensor grad = p.grad().to(dtype);
    p = p.detach().to(dtype).requires_grad_();
    p.mutable_grad() = grad;
  }
  std::shared_ptr<fourfold::MappedFile> file;
  if (on_file) file = std::make_shared<fourfold::MappedFile>();
  Optimizer packed(ours, options, {.offload = file});
  std::vector<at::Tensor> again;  // for the same in memory
  for (const at::Tensor& p : file ? ours : std::vector<at::Tensor>{}) {
    again.push_back(p.detach().clone().requires_grad_());
    again.back().mutable_grad() = p.grad().clone();
  }
  Optimizer in_memory(again, options);
  torch::optim::AdamW plain(theirs, torch::optim::AdamWOptions(1e-4));
  packed.step(), plain.step(), in_memory.step();  // states exist from here on
  std::int64_t values = 0;
  for (const at::Tensor& p : ours) values += p.numel();
  const auto count = static_cast<double>(values);
  const at::Tensor from = torch::ones({values});
  at::Tensor to = torch::ones({values});
  std::vector<double> packed_seconds, plain_seconds, copy_seconds, cold_seconds, memory_seconds;
  for (auto _ : state) {
    plain_seconds.push_back(seconds(plain));
    packed_seconds.push_back(seconds(packed));
    state.SetIterationTime(packed_seconds.back());
    copy_seconds.push_back(seconds_of_memcpy(to, from));
    if (file == nullptr) continue;
    memory_seconds.push_back(seconds(in_memory));
    file->drop_cache();
    cold_seconds.push_back(seconds(packed));
  }
  const double weight = dtype == at::kFloat ? 4 : 2;
  state.counters["vs_torch"] = median(packed_seconds) / median(plain_seconds);
  state.counters["ns_per_value"] = median(packed_seconds) * 1e9 / count;
  state.counters["parameters"] = count;
  state.counters["state_bytes"] = static_cast<double>(packed.state_bytes());
  // Read and written: weights and states; read: gradients.
  const double bytes = count * 3 * weight + 2 * static_cast<double>(packed.state_bytes());
  state.counters["GB_per_s"] = bytes / median(packed_seconds) / 1e9;
  state.counters["torch_GB_per_s"] = count * 28 / median(plain_seconds) / 1e9;
  state.counters["memcpy_GB_per_s"] = count * 8 / median(copy_seconds) / 1e9;
  if (file != nullptr) {
    state.counters["file_bytes"] = static_cast<double>(file->held_bytes());
    state.counters["vs_memory"] = median(packed_seconds) / median(memory_seconds);
    state.counters["cold_vs_memory"] = median(cold_seconds) / median(memory_seconds);
  }
  state.counters["weight_and_state_bytes_per_value"] =
      weight + static_cast<double>(packed.state_bytes()) / count;
}

template <class Optimizer>
void declare(const char* name, typename Optimizer::Options options = 1e-4,
             at::ScalarType dtype = at::kFloat, bool on_file = false) {
  benchmark::RegisterBenchmark(
      name, [=](benchmark::State& state) { step<Optimizer>(state, options, dtype, on_file); })
      ->ArgNames({"width", "layers"})
      ->Args({256, 6})
      ->Args({512, 6})
      ->Unit(benchmark::kMillisecond)
      ->UseManualTime()
      ->Iterations(11);
}

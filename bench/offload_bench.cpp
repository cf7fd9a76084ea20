// SPDX-License-Identifier: Apache-2.0
/// How fast tensors leave memory and come back: offload/write and offload/read through the Offloader
/// (nothing in flight, so each piece waits for its file), offload/both with 64 MiB in flight (the
/// newest never leave), beside a memcpy of the same pieces and a plain file's pwrite and pread, on
/// the directory that TMPDIR names. The system's page cache is part of all of them.
#include <fourfold/activations/offloader.hpp>
#include <fourfold/report/meter.hpp>

#include <benchmark/benchmark.h>
#include <torch/types.h>

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr int kPieces = 32;

std::string directory() {
  const char* const temporary = std::getenv("TMPDIR");
  return temporary != nullptr && *temporary != 0 ? temporary : "/tmp";
}
std::vector<torch::Tensor> pieces(std::int64_t bytes) {
  std::vector<torch::Tensor> out;
  for (int i = 0; i < kPieces; ++i) out.push_back(torch::full({bytes / 4}, i, torch::kFloat));
  return out;
}
void count(benchmark::State& state) {
  state.SetBytesProcessed(state.iterations() * kPieces * state.range(0));
}

void copy(benchmark::State& state) {
  const auto from = pieces(state.range(0)), to = pieces(state.range(0));
  for (auto _ : state)
    for (int i = 0; i < kPieces; ++i)
      std::memcpy(to[i].data_ptr(), from[i].const_data_ptr(), from[i].nbytes());
  count(state);
}

/// A file without a name, as the Offloader's.
struct File {
  File() {
    std::string name = directory() + "/fourfold-bench-XXXXXX";
    handle = ::mkstemp(name.data());
    TORCH_CHECK(handle >= 0, "cannot make a file in ", directory());
    ::unlink(name.c_str());
  }
  ~File() { ::close(handle); }
  int handle;
};
void plain_file(benchmark::State& state, bool read) {
  const File file;
  const auto values = pieces(state.range(0));
  const auto write = [&] {
    for (int i = 0; i < kPieces; ++i)
      TORCH_CHECK(::pwrite(file.handle, values[i].const_data_ptr(), values[i].nbytes(),
                           i * state.range(0)) == state.range(0));
  };
  write();
  for (auto _ : state) {
    if (!read) {
      write();
      continue;
    }
    for (int i = kPieces; i-- > 0;) {
      const auto again = torch::empty({state.range(0) / 4});
      TORCH_CHECK(::pread(file.handle, again.mutable_data_ptr(), again.nbytes(),
                          i * state.range(0)) == state.range(0));
    }
  }
  count(state);
}

/// Pieces of a step: put in forward, taken in the reverse order.
void offload(benchmark::State& state, std::int64_t in_flight, bool write, bool read) {
  fourfold::Offloader offloader({.directory = directory(), .bytes_in_flight = in_flight});
  const auto values = pieces(state.range(0));
  std::vector<std::shared_ptr<fourfold::detail::OffloadPiece>> put;
  const auto forward = [&] {
    for (const torch::Tensor& one : values) put.push_back(offloader.put(one));
    offloader.settle();
  };
  forward();
  put.clear();
  for (auto _ : state) {
    if (!write) state.PauseTiming();
    forward();
    if (!write) state.ResumeTiming();
    for (; read && !put.empty(); put.pop_back()) benchmark::DoNotOptimize(put.back()->get());
    put.clear();
  }
  const auto counts = offloader.counts();
  state.counters["written"] = static_cast<double>(counts.written) / (state.iterations() + 1);
  state.counters["read_ahead"] = static_cast<double>(counts.read_ahead) / state.iterations();
  count(state);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const fourfold::Meter meter;  // blocks as a pipeline's come
  const auto add = [](const char* name, auto run) {
    benchmark::RegisterBenchmark(name, run)
        ->Arg(8 << 20)
        ->Unit(benchmark::kMillisecond)
        ->UseRealTime();
  };
  add("offload/memcpy", copy);
  add("offload/plain_write", [](benchmark::State& state) { plain_file(state, false); });
  add("offload/plain_read", [](benchmark::State& state) { plain_file(state, true); });
  add("offload/write", [](benchmark::State& state) { offload(state, 0, true, false); });
  add("offload/read", [](benchmark::State& state) { offload(state, 0, false, true); });
  add("offload/both",
      [](benchmark::State& state) { offload(state, std::int64_t{64} << 20, true, true); });
  benchmark::RunSpecifiedBenchmarks();
}

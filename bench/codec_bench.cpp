// SPDX-License-Identifier: Apache-2.0
/// What packing and unpacking cost on one thread, against memcpy of the same fp32 bytes. Buffers
/// are 64 Mi values, 256 MiB, well past the caches. Each iteration runs the codec, which is timed,
/// and memcpy beside it, since a shared machine's bandwidth wanders; vs_memcpy is the median time
/// of memcpy over the median time of the codec (1: as quick as memcpy), and bytes_per_second counts
/// bytes of fp32. The counting allocator gives the memory, as in a pipeline, and keeps what was
/// freed: with glibc's, page faults of fresh memory took 1053 ms of a decompress that takes 38 (Xeon
/// at 2.6 GHz, a virtual machine), and memcpy into an old buffer has none.
/// FOURFOLD_ISA=avx2 measures AVX2: the context printed first says which.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <fourfold/codec/bit_mask.hpp>
#include <fourfold/codec/companded.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/torch/allocator.hpp>

#include "median.hpp"

#include <cstdint>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t kValues = std::int64_t{1} << 26;

/// Normal numbers; drawn once and repeated, which is quicker and the same to a codec.
const at::Tensor& values() {
  static const at::Tensor all = [] {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(0);
    return at::randn({1 << 20}, generator).repeat({kValues >> 20});
  }();
  return all;
}

const at::Tensor& copy() {
  static const at::Tensor all = at::ones_like(values());
  return all;
}

/// On this thread's clock, which stands still while other programs run.
double seconds_of(const auto& f) {
  const auto now = [] {
    std::timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double start = now();
  f();
  return now() - start;
}

double memcpy_seconds() {
  return seconds_of([] {
    std::memcpy(copy().mutable_data_ptr(), values().const_data_ptr(), values().nbytes());
    benchmark::ClobberMemory();
  });
}

/// Times f, with memcpy beside it.
void against_memcpy(benchmark::State& state, const auto& f) {
  std::vector<double> ours, theirs;
  f(), memcpy_seconds();  // memory is touched for the first time
  for (auto _ : state) {
    ours.push_back(seconds_of(f));
    state.PauseTiming();
    theirs.push_back(memcpy_seconds());
    state.ResumeTiming();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(values().nbytes()));
  state.counters["vs_memcpy"] = median(theirs) / median(ours);
}

void add(const std::string& name, const auto& f) {
  benchmark::RegisterBenchmark(name.c_str(), [f](benchmark::State& state) {
    f(state);
  })->Unit(benchmark::kMillisecond);
}

template <class C>
void add_codec(at::Tensor (*domain)(const at::Tensor&)) {
  const std::string name = "codec/" + C::name() + "/";
  add(name + "compress", [=](benchmark::State& state) {
    const at::Tensor input = domain(values());
    against_memcpy(state, [&] { benchmark::DoNotOptimize(C{}.compress(input)); });
  });
  if constexpr (fourfold::StochasticCodec<C>)
    add(name + "compress_stochastic", [=](benchmark::State& state) {
      const at::Tensor input = domain(values());
      against_memcpy(state, [&] {
        benchmark::DoNotOptimize(C{}.compress(input, fourfold::Key{1, 2, 3, 4}));
      });
    });
  add(name + "decompress", [=](benchmark::State& state) {
    const auto packed = C{}.compress(domain(values()));
    against_memcpy(state, [&] { benchmark::DoNotOptimize(C{}.decompress(packed)); });
  });
}

}  // namespace

int main(int argc, char** argv) {
  fourfold::door::install_allocator();
  at::set_num_threads(1);
  using namespace fourfold;
  const auto any = [](const at::Tensor& x) { return x; };
  const auto not_negative = [](const at::Tensor& x) { return x.abs(); };
  const auto two_values = [](const at::Tensor& x) { return x.gt(0).to(at::kFloat); };
  add("memcpy", [](benchmark::State& state) { against_memcpy(state, [] { memcpy_seconds(); }); });
  add_codec<Int8>(any);
  add_codec<Int4>(any);
  add_codec<Int2>(any);
  add_codec<Int8Symmetric>(any);
  add_codec<Int4Symmetric>(any);
  add_codec<Nf4>(any);
  add_codec<Companded<8, Softsign>>(any);
  add_codec<Companded<8, Sqrt>>(not_negative);
  add_codec<BitMask>(two_values);
  benchmark::AddCustomContext("isa", std::string(name(isa())));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A loop over [begin, end) on LibTorch's own threads. at::parallel_for is a template of its caller
/// and runs on one thread where that caller is compiled without -fopenmp; this one calls the OpenMP
/// library that LibTorch brought: no user needs a flag, and no second pool of threads is begun.
#include <ATen/Parallel.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

// Three entry points of libgomp (its ABI since GCC 4.9) that LLVM's and Intel's libomp have as well.
// Weak: null where LibTorch was built without OpenMP. Under names of our own, so that omp.h may be
// included too.
extern "C" {
[[gnu::weak]] void fourfold_omp_parallel(void (*body)(void*), void* data, unsigned threads,
                                         unsigned flags) __asm__("GOMP_parallel");
[[gnu::weak]] int fourfold_omp_thread() __asm__("omp_get_thread_num");
[[gnu::weak]] int fourfold_omp_threads() __asm__("omp_get_num_threads");
}

namespace fourfold::inline v0 {
namespace detail {

struct ParallelLoop {
  std::int64_t begin, end, grain;
  c10::function_ref<void(std::int64_t, std::int64_t)> f;
  std::atomic_flag failed{};
  std::exception_ptr error{};

  void piece(std::int64_t thread, std::int64_t threads) noexcept {
    const auto pieces = std::min(threads, at::divup(end - begin, std::max<std::int64_t>(1, grain)));
    const auto size = at::divup(end - begin, pieces);
    const auto first = begin + thread * size;
    if (first >= end) return;
    try {
      const at::internal::ThreadIdGuard number(static_cast<int>(thread));
      const c10::ParallelGuard inside(true);
      f(first, std::min(end, first + size));
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

}  // namespace detail

/// Calls f(first, last) on disjoint pieces that together are [begin, end): as many as there are
/// threads, or fewer, so that `grain` is reached. As for at::parallel_for: f touches data (tensors
/// under guards of its own alone, which other threads do not inherit); its first exception is
/// rethrown once all pieces have ended; inside another such loop it is one piece.
inline void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                         c10::function_ref<void(std::int64_t, std::int64_t)> f) {
  const bool one = end - begin <= std::max<std::int64_t>(1, grain) || at::in_parallel_region() ||
                   at::get_num_threads() == 1;
#if AT_PARALLEL_OPENMP
  if (one || !fourfold_omp_parallel || !fourfold_omp_thread || !fourfold_omp_threads)
    return at::parallel_for(begin, end, end - begin, f);
  detail::ParallelLoop loop{begin, end, grain, f};
  fourfold_omp_parallel(
      [](void* data) {
        static_cast<detail::ParallelLoop*>(data)->piece(fourfold_omp_thread(),
                                                        fourfold_omp_threads());
      },
      &loop, 0, 0);
  if (loop.error) std::rethrow_exception(loop.error);
#else
  at::parallel_for(begin, end, one ? end - begin : grain, f);
#endif
}

}  // namespace fourfold::inline v0

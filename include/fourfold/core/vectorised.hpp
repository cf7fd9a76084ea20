// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Loops written once that the compiler turns into vector code for each instruction set:
///   struct Negate {
///     FOURFOLD_LOOP static void run(float* __restrict out, const float* __restrict x, std::int64_t n) {
///       for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = -x[i]; });
///     }
///   };
///   run_vectorised<Negate>(isa, out, x, n);
/// The paths are bit-equal as long as a kernel writes each multiply-add as fourfold::fma, and adds
/// no product otherwise: compilers contract those where a processor has the instruction. Kernels
/// copy structs given by reference, so that no store can alias them.
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>

#include <cstdint>

#define FOURFOLD_LOOP_BODY __attribute__((always_inline))
#define FOURFOLD_LOOP FOURFOLD_LOOP_BODY inline

namespace fourfold::inline v0 {
namespace detail {

/// f(i) for i in [0, n): runs of a constant length are what GCC vectorises at -O2 too.
template <class F>
FOURFOLD_LOOP void for_each_value(std::int64_t n, const F& f) {
  std::int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
    for (std::int64_t j = 0; j < 64; ++j) f(i + j);
  }
  for (; i < n; ++i) f(i);
}

#if defined(__x86_64__)
template <class Kernel, class... Args>
FOURFOLD_AVX512 void run_avx512(Args... args) {
  Kernel::run(args...);
}
template <class Kernel, class... Args>
FOURFOLD_AVX2 void run_avx2(Args... args) {
  Kernel::run(args...);
}
#endif

template <class Kernel, class... Args>
void run_vectorised(Isa isa, Args... args) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return run_avx512<Kernel>(args...);
  if (isa == Isa::kAvx2) return run_avx2<Kernel>(args...);
#endif
  static_cast<void>(isa);
  Kernel::run(args...);
}

}  // namespace detail
}  // namespace fourfold::inline v0

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
#include <c10/util/BFloat16.h>
#include <fourfold/core/host_device.hpp>
#include <fourfold/core/isa.hpp>

#include <bit>
#include <cstdint>
#include <type_traits>

#define FOURFOLD_LOOP_BODY __attribute__((always_inline))
#define FOURFOLD_LOOP FOURFOLD_LOOP_BODY inline

namespace fourfold::inline v0 {
namespace optim::detail {

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
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void run_avx512(Args... args) {
  Kernel::run(args...);
}
template <class Kernel, class... Args>
__attribute__((target("avx2,fma"))) void run_avx2(Args... args) {
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

/// fp32 of any floating values.
struct Widen {
  template <class T>
  FOURFOLD_LOOP static void run(float* __restrict out, const T* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      if constexpr (std::is_same_v<T, c10::BFloat16>)
        out[i] = std::bit_cast<float>(std::uint32_t{x[i].x} << 16);
      else
        out[i] = static_cast<float>(x[i]);
    });
  }
};
/// bf16 or fp16, rounded to nearest.
struct Narrow {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict out, const float* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      if constexpr (std::is_same_v<T, c10::BFloat16>) {  // c10's arithmetic, without its branch
        const auto bits = std::bit_cast<std::uint32_t>(x[i]);
        const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        out[i].x =
            static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
      } else {
        out[i] = static_cast<T>(x[i]);
      }
    });
  }
};
struct Negate {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict out, const T* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = -x[i]; });
  }
};
struct NegateInPlace {
  FOURFOLD_LOOP static void run(float* x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { x[i] = -x[i]; });
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

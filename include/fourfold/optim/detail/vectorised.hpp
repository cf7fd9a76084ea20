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
#include <c10/util/Half.h>
#include <fourfold/core/host_device.hpp>
#include <fourfold/core/isa.hpp>

#include <bit>
#include <cstdint>

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

/// NaN's bits have one form, since an error of NaN's lower bits could make it infinity.
FOURFOLD_LOOP std::uint32_t bits_of(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
}
FOURFOLD_LOOP float widened(c10::BFloat16 x) {
  return std::bit_cast<float>(std::uint32_t{x.x} << 16);
}
FOURFOLD_LOOP float widened(c10::Half x) { return static_cast<float>(x); }
FOURFOLD_LOOP void narrow(float x, c10::BFloat16& out) {
  const std::uint32_t bits = bits_of(x);
  out.x = static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
FOURFOLD_LOOP void narrow(float x, c10::Half& out) { out = static_cast<c10::Half>(x); }

/// fp32 of bf16 or fp16.
struct Widen {
  template <class T>
  FOURFOLD_LOOP static void run(float* __restrict out, const T* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = widened(x[i]); });
  }
};
/// bf16 or fp16, rounded to nearest.
struct Narrow {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict out, const float* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { narrow(x[i], out[i]); });
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

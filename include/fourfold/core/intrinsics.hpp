// SPDX-License-Identifier: Apache-2.0
#pragma once
/// <immintrin.h>, where there is one. GCC 12 warns of its own intrinsics where they are used (its
/// bug 105593): what uses them stands between FOURFOLD_INTRINSICS_BEGIN and FOURFOLD_INTRINSICS_END.
///   FOURFOLD_AVX2 void negate(float* x) { ... }   // where isa() is Isa::kAvx2 or above
#if defined(__x86_64__)
#include <immintrin.h>
#define FOURFOLD_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FOURFOLD_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define FOURFOLD_INTRINSICS_BEGIN                                                      \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wuninitialized\"") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define FOURFOLD_INTRINSICS_END _Pragma("GCC diagnostic pop")
#else
#define FOURFOLD_INTRINSICS_BEGIN
#define FOURFOLD_INTRINSICS_END
#endif

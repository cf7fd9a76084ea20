// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Marks the scalar arithmetic that the plain loop, the vector loop and the CUDA kernels share, and
/// the one multiply-add they all use: compilers contract a * b + c as they like, and one contracted
/// differently moves a code by one, so every multiply-add of ours is written as this explicit fma.
#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define FOURFOLD_HOST_DEVICE __host__ __device__
#else
#define FOURFOLD_HOST_DEVICE
#endif
/// Arithmetic of one value that vectorised loops call: inlined there for their instruction set.
#define FOURFOLD_ONE_VALUE __attribute__((always_inline)) FOURFOLD_HOST_DEVICE inline

namespace fourfold::inline v0 {

/// a * b + c, rounded once.
FOURFOLD_HOST_DEVICE inline float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
FOURFOLD_HOST_DEVICE inline double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

}  // namespace fourfold::inline v0

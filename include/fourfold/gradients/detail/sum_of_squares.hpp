// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The sum of squares of many values in one pass, in double: plain, AVX2, AVX-512, with the same
/// sum to the last bit. Squares of fp32 values are exact in double, sixteen sums run side by side,
/// and those of pieces of 2^15 values are added in order, so that neither instructions nor threads
/// change the result. n values err by (n / 16 + 32) 2^-53 of it at most.
#include <fourfold/core/isa.hpp>
#include <fourfold/core/parallel.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fourfold::inline v0 {
namespace detail {

inline constexpr int kSquareLanes = 16;
inline constexpr std::int64_t kSquarePiece = 32768;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline std::int64_t add_squares_avx512(const float* x,
                                                                          std::int64_t n,
                                                                          double* lanes) {
  __m512d low = _mm512_loadu_pd(lanes), high = _mm512_loadu_pd(lanes + 8);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(x + i));
    const __m512d b = _mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8));
    low = _mm512_fmadd_pd(a, a, low), high = _mm512_fmadd_pd(b, b, high);
  }
  _mm512_storeu_pd(lanes, low), _mm512_storeu_pd(lanes + 8, high);
  return i;
}

__attribute__((target("avx2,fma"))) inline std::int64_t add_squares_avx2(const float* x,
                                                                         std::int64_t n,
                                                                         double* lanes) {
  __m256d sums[4];
  for (int part = 0; part < 4; ++part) sums[part] = _mm256_loadu_pd(lanes + 4 * part);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int part = 0; part < 4; ++part) {
      const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * part));
      sums[part] = _mm256_fmadd_pd(a, a, sums[part]);
    }
  for (int part = 0; part < 4; ++part) _mm256_storeu_pd(lanes + 4 * part, sums[part]);
  return i;
}
#endif

/// lanes[i % 16] += x[i]^2.
inline void add_squares(const float* x, std::int64_t n, double* lanes, Isa isa) {
  std::int64_t i = 0;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) i = add_squares_avx512(x, n, lanes);
  if (isa == Isa::kAvx2) i = add_squares_avx2(x, n, lanes);
#endif
  static_cast<void>(isa);
  for (; i < n; ++i) lanes[i % kSquareLanes] += static_cast<double>(x[i]) * x[i];
}

/// The sum of the squares of n contiguous values of a floating type.
template <class T>
double sum_of_squares(const T* x, std::int64_t n, Isa isa = fourfold::isa()) {
  const std::int64_t pieces = (n + kSquarePiece - 1) / kSquarePiece;
  std::vector<double> of_piece(static_cast<std::size_t>(pieces));
  parallel_for(0, pieces, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t piece = first; piece < last; ++piece) {
      const std::int64_t begin = piece * kSquarePiece, end = std::min(n, begin + kSquarePiece);
      double lanes[kSquareLanes] = {};
      if constexpr (std::is_same_v<T, float>) {
        add_squares(x + begin, end - begin, lanes, isa);
      } else if constexpr (std::is_same_v<T, double>) {
        for (std::int64_t i = begin; i < end; ++i)
          lanes[i % kSquareLanes] = std::fma(x[i], x[i], lanes[i % kSquareLanes]);
      } else {
        constexpr std::int64_t kPart = 512;
        float part[kPart];
        for (std::int64_t at = begin; at < end; at += kPart) {
          const std::int64_t size = std::min(kPart, end - at);
          for (std::int64_t i = 0; i < size; ++i) part[i] = static_cast<float>(x[at + i]);
          add_squares(part, size, lanes, isa);
        }
      }
      for (int width = kSquareLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
      of_piece[static_cast<std::size_t>(piece)] = lanes[0];
    }
  });
  double sum = 0;
  for (const double one : of_piece) sum += one;
  return sum;
}

}  // namespace detail
}  // namespace fourfold::inline v0

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// AdamW's arithmetic on one tile of fp32 values (Loshchilov and Hutter, arXiv 1711.05101,
/// algorithm 2) as torch::optim::AdamW writes it: plain, AVX2, AVX-512, bit-equal. It differs from
/// LibTorch in the denominator alone, by two roundings at most: LibTorch divides where this
/// multiplies by a reciprocal, and its square root is MKL's, which is not always correctly rounded.
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/optim/detail/update_code.hpp>

#include <cmath>
#include <cstdint>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0 {
namespace optim::detail {

#if defined(__x86_64__)
FOURFOLD_AVX512 inline std::int64_t update_avx512(float* p, const float* g, float* m, float* v,
                                                  std::int64_t n, const AdamWFactors& k) {
  const __m512 one = _mm512_set1_ps(1.0F);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 grad = _mm512_loadu_ps(g + i);
    const __m512 first =
        _mm512_fmadd_ps(grad, _mm512_set1_ps(k.take_first),
                        _mm512_mul_ps(_mm512_loadu_ps(m + i), _mm512_set1_ps(k.keep_first)));
    const __m512 second =
        _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(k.take_second), grad), grad,
                        _mm512_mul_ps(_mm512_loadu_ps(v + i), _mm512_set1_ps(k.keep_second)));
    const __m512 denominator =
        _mm512_fmadd_ps(_mm512_sqrt_ps(second), _mm512_set1_ps(k.root), _mm512_set1_ps(k.eps));
    const __m512 step = _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(k.rate), first), denominator);
    const __m512 decayed = _mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_set1_ps(k.decay));
    _mm512_storeu_ps(m + i, first);
    _mm512_storeu_ps(v + i, second);
    _mm512_storeu_ps(p + i, _mm512_fmadd_ps(step, one, decayed));
  }
  return i;
}

FOURFOLD_AVX2 inline std::int64_t update_avx2(float* p, const float* g, float* m, float* v,
                                              std::int64_t n, const AdamWFactors& k) {
  const __m256 one = _mm256_set1_ps(1.0F);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 grad = _mm256_loadu_ps(g + i);
    const __m256 first =
        _mm256_fmadd_ps(grad, _mm256_set1_ps(k.take_first),
                        _mm256_mul_ps(_mm256_loadu_ps(m + i), _mm256_set1_ps(k.keep_first)));
    const __m256 second =
        _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(k.take_second), grad), grad,
                        _mm256_mul_ps(_mm256_loadu_ps(v + i), _mm256_set1_ps(k.keep_second)));
    const __m256 denominator =
        _mm256_fmadd_ps(_mm256_sqrt_ps(second), _mm256_set1_ps(k.root), _mm256_set1_ps(k.eps));
    const __m256 step = _mm256_div_ps(_mm256_mul_ps(_mm256_set1_ps(k.rate), first), denominator);
    const __m256 decayed = _mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(k.decay));
    _mm256_storeu_ps(m + i, first);
    _mm256_storeu_ps(v + i, second);
    _mm256_storeu_ps(p + i, _mm256_fmadd_ps(step, one, decayed));
  }
  return i;
}
#endif

/// p, m, v <- AdamW(p, g, m, v) for n values.
inline void update(float* p, const float* g, float* m, float* v, std::int64_t n,
                   const AdamWFactors& k, Isa isa) {
  std::int64_t i = 0;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) i = update_avx512(p, g, m, v, n, k);
  if (isa == Isa::kAvx2) i = update_avx2(p, g, m, v, n, k);
#endif
  static_cast<void>(isa);
  for (; i < n; ++i) update_adamw(p[i], g[i], m[i], v[i], k);
}

/// The same for double parameters, whose moments are fp32.
inline void update(double* p, const double* g, float* m, float* v, std::int64_t n,
                   const AdamWFactors& k, Isa isa) {
  static_cast<void>(isa);
  for (std::int64_t i = 0; i < n; ++i) {
    const double first = double{m[i]} * k.keep_first + g[i] * k.take_first;
    const double second = double{v[i]} * k.keep_second + g[i] * g[i] * k.take_second;
    p[i] = p[i] * k.decay + k.rate * first / (std::sqrt(second) * k.root + k.eps);
    m[i] = static_cast<float>(first), v[i] = static_cast<float>(second);
  }
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

FOURFOLD_INTRINSICS_END

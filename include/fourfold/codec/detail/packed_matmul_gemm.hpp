// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A gemm against panels: c (rows, 32) = a (rows, depth) b (depth, 32), b contiguous, a and c
/// strided by rows. Ours, since ATen's gives sums in an order that depends on the number of threads
/// (seen with MKL even within a parallel region), and since codes are decoded right into its
/// panels. Each sum runs over depth in order; by fma where the processor has it.
///
/// The register block is that of Goto and van de Geijn, "Anatomy of high-performance matrix
/// multiplication" (TOMS 2008), section 6: b's rows are loaded, a's values broadcast.
#include <fourfold/core/host_device.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <utility>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail::packed {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline constexpr std::int64_t kPanel = 32;  // columns of a panel: two AVX-512 registers

template <class T>
using PanelKernel = void (*)(const T* a, std::int64_t a_stride, const T* b, std::int64_t depth,
                             T* c, std::int64_t c_stride, bool accumulate);

template <class T, int Rows>
void multiply_panel_scalar(const T* a, std::int64_t a_stride, const T* b, std::int64_t depth, T* c,
                           std::int64_t c_stride, bool accumulate) {
  for (int row = 0; row < Rows; ++row) {
    T sum[kPanel] = {};
    if (accumulate) std::copy(c + row * c_stride, c + row * c_stride + kPanel, sum);
    for (std::int64_t k = 0; k < depth; ++k)
      for (std::int64_t j = 0; j < kPanel; ++j) sum[j] += a[row * a_stride + k] * b[k * kPanel + j];
    std::copy(sum, sum + kPanel, c + row * c_stride);
  }
}

#if defined(__x86_64__)
template <int Rows>  // 2 x 12 sums, 2 of b, 1 broadcast: 27 of 32 registers
FOURFOLD_AVX512 void multiply_panel_avx512(const float* a, std::int64_t a_stride, const float* b,
                                           std::int64_t depth, float* c, std::int64_t c_stride,
                                           bool accumulate) {
  __m512 sum[Rows][2];
#pragma GCC unroll 12
  for (int row = 0; row < Rows; ++row) {
    sum[row][0] = accumulate ? _mm512_loadu_ps(c + row * c_stride) : _mm512_setzero_ps();
    sum[row][1] = accumulate ? _mm512_loadu_ps(c + row * c_stride + 16) : _mm512_setzero_ps();
  }
  for (std::int64_t k = 0; k < depth; ++k, b += kPanel) {
    const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 12
    for (int row = 0; row < Rows; ++row) {
      const __m512 value = _mm512_set1_ps(a[row * a_stride + k]);
      sum[row][0] = _mm512_fmadd_ps(value, b0, sum[row][0]);
      sum[row][1] = _mm512_fmadd_ps(value, b1, sum[row][1]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < Rows; ++row) {
    _mm512_storeu_ps(c + row * c_stride, sum[row][0]);
    _mm512_storeu_ps(c + row * c_stride + 16, sum[row][1]);
  }
}

template <int Rows>  // 3 x 4 sums, 4 of b: 16 of 16 registers
FOURFOLD_AVX2 void multiply_panel_avx2(const float* a, std::int64_t a_stride, const float* b,
                                       std::int64_t depth, float* c, std::int64_t c_stride,
                                       bool accumulate) {
  __m256 sum[Rows][4];
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[row][j] = accumulate ? _mm256_loadu_ps(c + row * c_stride + 8 * j) : _mm256_setzero_ps();
  for (std::int64_t k = 0; k < depth; ++k, b += kPanel) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
    const __m256 b2 = _mm256_loadu_ps(b + 16), b3 = _mm256_loadu_ps(b + 24);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      const __m256 value = _mm256_set1_ps(a[row * a_stride + k]);
      sum[row][0] = _mm256_fmadd_ps(value, b0, sum[row][0]);
      sum[row][1] = _mm256_fmadd_ps(value, b1, sum[row][1]);
      sum[row][2] = _mm256_fmadd_ps(value, b2, sum[row][2]);
      sum[row][3] = _mm256_fmadd_ps(value, b3, sum[row][3]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm256_storeu_ps(c + row * c_stride + 8 * j, sum[row][j]);
}
#endif

/// What a path can hold in registers at most, and its kernel for each count of rows from 1.
template <class T>
struct PanelKernels {
  std::int64_t rows = 0;
  std::array<PanelKernel<T>, 12> by_rows{};
};

template <class T>
PanelKernels<T> panel_kernels([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if constexpr (std::same_as<T, float>) {
    if (isa == Isa::kAvx512) return [&]<int... I>(std::integer_sequence<int, I...>) {
        return PanelKernels<T>{sizeof...(I), {multiply_panel_avx512<I + 1>...}};
      }
    (std::make_integer_sequence<int, 12>{});
    if (isa == Isa::kAvx2) return [&]<int... I>(std::integer_sequence<int, I...>) {
        return PanelKernels<T>{sizeof...(I), {multiply_panel_avx2<I + 1>...}};
      }
    (std::make_integer_sequence<int, 3>{});
  }
#endif
  return {1, {multiply_panel_scalar<T, 1>}};
}

/// c (rows, columns) = or += a (rows, depth) times panels b (ceil(columns / 32), depth, 32).
template <class T>
void multiply_panels(Isa isa, const T* a, std::int64_t a_stride, const T* b, T* c,
                     std::int64_t c_stride, std::int64_t rows, std::int64_t columns,
                     std::int64_t depth, bool accumulate) {
  const PanelKernels<T> kernels = panel_kernels<T>(isa);
  const std::int64_t strips = ceil_div(rows, kernels.rows);
  for (std::int64_t strip = 0; strip < strips; ++strip) {
    const std::int64_t first = rows * strip / strips, last = rows * (strip + 1) / strips;
    const PanelKernel<T> kernel = kernels.by_rows[static_cast<std::size_t>(last - first - 1)];
    for (std::int64_t j = 0; j < columns; j += kPanel) {
      T* target = c + first * c_stride + j;
      const T* left = a + first * a_stride;
      if (columns - j >= kPanel) {
        kernel(left, a_stride, b + j * depth, depth, target, c_stride, accumulate);
        continue;
      }
      std::array<T, 12 * kPanel> edge{};  // a panel reaches beyond the last column
      for (std::int64_t i = 0; accumulate && i < last - first; ++i)
        std::copy_n(target + i * c_stride, columns - j, edge.data() + i * kPanel);
      kernel(left, a_stride, b + j * depth, depth, edge.data(), kPanel, accumulate);
      for (std::int64_t i = 0; i < last - first; ++i)
        std::copy_n(edge.data() + i * kPanel, columns - j, target + i * c_stride);
    }
  }
}

}  // namespace fourfold::inline v0::detail::packed
FOURFOLD_INTRINSICS_END

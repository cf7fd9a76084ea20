// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A rectangle of a packed matrix, decoded into the panels that packed_matmul_gemm.hpp multiplies
/// by: (ceil(free / 32), depth, 32), where "free" is the dimension that the result keeps and
/// "depth" the one that is summed over. Panels that reach beyond the rectangle are filled up with
/// zeros.
#include <fourfold/codec/detail/packed_matmul_gemm.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/payload.hpp>

#include <algorithm>
#include <cstdint>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail::packed {

inline constexpr std::int64_t kPanelRows =
    16;  // rows of the weight that are decoded before a transpose

/// Rows [row, row + rows) and columns [column, column + columns) of a 2-D payload, into `out`
/// (rows, columns).
template <class = void>
void decode_rectangle(const Payload& weight, std::int64_t row, std::int64_t rows,
                      std::int64_t column, std::int64_t columns, float* out) {
  const std::int64_t width = weight.sizes()[1];
  if (columns == width) return weight.decode(row * width, (row + rows) * width, out);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t begin = (row + i) * width + column;
    weight.decode(begin, begin + columns, out + i * columns);
  }
}

#if defined(__x86_64__)
/// 16 x 16 values transposed; `to` has rows of kPanel values.
FOURFOLD_AVX512 inline void transpose_16(const float* from, std::int64_t stride, float* to) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    // r[4 i + j] holds, in its 128-bit lane l, column 4 l + j of rows 4 i .. 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88),
                 b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88),
                 d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
    _mm512_storeu_ps(to + j * kPanel, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(to + (4 + j) * kPanel, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(to + (8 + j) * kPanel, _mm512_shuffle_f32x4(a, c, 0xDD));
    _mm512_storeu_ps(to + (12 + j) * kPanel, _mm512_shuffle_f32x4(b, d, 0xDD));
  }
}

/// 8 x 8 values transposed; `to` has rows of kPanel values.
FOURFOLD_AVX2 inline void transpose_8(const float* from, std::int64_t stride, float* to) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * kPanel, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * kPanel, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}
#endif

/// `from` (rows <= 16, columns) into columns [0, rows) of a panel (columns, 32).
template <class T>
void transpose_rows([[maybe_unused]] Isa isa, const float* from, std::int64_t rows,
                    std::int64_t columns, T* to) {
  std::int64_t done = 0;
#if defined(__x86_64__)
  if constexpr (std::same_as<T, float>) {
    if (rows == kPanelRows && isa == Isa::kAvx512)
      for (; done + 16 <= columns; done += 16)
        transpose_16(from + done, columns, to + done * kPanel);
    if (rows == kPanelRows && isa == Isa::kAvx2)
      for (; done + 8 <= columns; done += 8)
        for (int half = 0; half < 16; half += 8)
          transpose_8(from + half * columns + done, columns, to + done * kPanel + half);
  }
#endif
  for (std::int64_t k = done; k < columns; ++k)
    for (std::int64_t i = 0; i < rows; ++i) to[k * kPanel + i] = from[i * columns + k];
}

/// Panels of W^T: `free` rows of W from `first` on, of each the columns [start, start + depth).
/// `rows` is scratch of 16 x depth.
template <class T>
void pack_transposed(Isa isa, const Payload& weight, std::int64_t first, std::int64_t free,
                     std::int64_t start, std::int64_t depth, float* rows, T* panels) {
  if (free % kPanel != 0)
    std::fill_n(panels + free / kPanel * kPanel * depth, kPanel * depth, T{0});
  for (std::int64_t i = 0; i < free; i += kPanelRows) {
    const std::int64_t count = std::min(kPanelRows, free - i);
    decode_rectangle(weight, first + i, count, start, depth, rows);
    transpose_rows(isa, rows, count, depth, panels + i / kPanel * kPanel * depth + i % kPanel);
  }
}

/// Panels of W: `free` columns of W from `first` on, of the rows [start, start + depth). `rows` is
/// scratch of 16 x free.
template <class T>
void pack_straight(const Payload& weight, std::int64_t first, std::int64_t free, std::int64_t start,
                   std::int64_t depth, float* rows, T* panels) {
  if (free % kPanel != 0)
    std::fill_n(panels + free / kPanel * kPanel * depth, kPanel * depth, T{0});
  for (std::int64_t k = 0; k < depth; k += kPanelRows) {
    const std::int64_t count = std::min(kPanelRows, depth - k);
    decode_rectangle(weight, start + k, count, first, free, rows);
    for (std::int64_t j = 0; j < free; j += kPanel)
      for (std::int64_t i = 0; i < count; ++i)
        std::copy_n(rows + i * free + j, std::min(kPanel, free - j),
                    panels + j * depth + (k + i) * kPanel);
  }
}

}  // namespace fourfold::inline v0::detail::packed
FOURFOLD_INTRINSICS_END

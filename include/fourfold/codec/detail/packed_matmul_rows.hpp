// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The packed product for few rows of x: four rows of the weight are decoded into first-level cache
/// and used from there at once, without the panels that many rows pay for. Reading codes, not
/// arithmetic, is what takes time here.
#include <fourfold/codec/detail/packed_matmul_codes.hpp>
#include <fourfold/codec/detail/packed_matmul_gemm.hpp>
#include <fourfold/codec/detail/packed_matmul_pack.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/payload.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail::packed {

inline constexpr std::int64_t kRowBlock = 4;       // rows of the weight decoded at once
inline constexpr std::int64_t kRowColumns = 1024;  // of each, at most: 16 KiB in all

#if defined(__x86_64__)
/// sums (Rows, 4) += x (Rows, columns) w^T, w (4, columns) with rows `w_stride` apart.
template <int Rows>
FOURFOLD_AVX512 void dot_block_avx512(const float* x, std::int64_t x_stride, const float* w,
                                      std::int64_t w_stride, std::int64_t columns, float* sums) {
  __m512 sum[Rows][4];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < columns; k += 16) {
    const __mmask16 mask =
        static_cast<__mmask16>(columns - k >= 16 ? 0xFFFF : (1 << (columns - k)) - 1);
    __m512 row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) row[j] = _mm512_maskz_loadu_ps(mask, w + j * w_stride + k);
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
      const __m512 value = _mm512_maskz_loadu_ps(mask, x + i * x_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_fmadd_ps(value, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) sums[i * 4 + j] += _mm512_reduce_add_ps(sum[i][j]);
}

/// out (Rows, columns) += x (Rows, 4) w, w (4, columns).
template <int Rows>
FOURFOLD_AVX512 void add_block_avx512(const float* x, std::int64_t x_stride, const float* w,
                                      std::int64_t w_stride, std::int64_t columns, float* out,
                                      std::int64_t out_stride) {
  __m512 value[Rows][4];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) value[i][j] = _mm512_set1_ps(x[i * x_stride + j]);
  for (std::int64_t k = 0; k < columns; k += 16) {
    const __mmask16 mask =
        static_cast<__mmask16>(columns - k >= 16 ? 0xFFFF : (1 << (columns - k)) - 1);
    __m512 row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) row[j] = _mm512_maskz_loadu_ps(mask, w + j * w_stride + k);
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
      __m512 sum = _mm512_maskz_loadu_ps(mask, out + i * out_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum = _mm512_fmadd_ps(value[i][j], row[j], sum);
      _mm512_mask_storeu_ps(out + i * out_stride + k, mask, sum);
    }
  }
}

template <int Rows>
FOURFOLD_AVX2 void dot_block_avx2(const float* x, std::int64_t x_stride, const float* w,
                                  std::int64_t w_stride, std::int64_t columns, float* sums) {
  __m256 sum[Rows][4];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm256_setzero_ps();
  std::int64_t k = 0;
  for (; k + 8 <= columns; k += 8) {
    __m256 row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) row[j] = _mm256_loadu_ps(w + j * w_stride + k);
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
      const __m256 value = _mm256_loadu_ps(x + i * x_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm256_fmadd_ps(value, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) {
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, sum[i][j]);
      float total = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
                    ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
      for (std::int64_t rest = k; rest < columns; ++rest)
        total += x[i * x_stride + rest] * w[j * w_stride + rest];
      sums[i * 4 + j] += total;
    }
}

template <int Rows>
FOURFOLD_AVX2 void add_block_avx2(const float* x, std::int64_t x_stride, const float* w,
                                  std::int64_t w_stride, std::int64_t columns, float* out,
                                  std::int64_t out_stride) {
  __m256 value[Rows][4];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) value[i][j] = _mm256_set1_ps(x[i * x_stride + j]);
  std::int64_t k = 0;
  for (; k + 8 <= columns; k += 8) {
    __m256 row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) row[j] = _mm256_loadu_ps(w + j * w_stride + k);
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
      __m256 sum = _mm256_loadu_ps(out + i * out_stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum = _mm256_fmadd_ps(value[i][j], row[j], sum);
      _mm256_storeu_ps(out + i * out_stride + k, sum);
    }
  }
  for (; k < columns; ++k)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < 4; ++j)
        out[i * out_stride + k] += x[i * x_stride + j] * w[j * w_stride + k];
}
#endif

/// sums (rows, 4) += x (rows, columns) w^T. Rows of w that a last block lacks are read all the
/// same.
template <class = void>
void dot_block([[maybe_unused]] Isa isa, const float* x, std::int64_t x_stride, std::int64_t rows,
               const float* w, std::int64_t w_stride, std::int64_t columns, float* sums) {
  for (std::int64_t i = 0; i < rows;) {
    const float* left = x + i * x_stride;
    const std::int64_t count = std::min<std::int64_t>(2, rows - i);
    float* to = sums + i * kRowBlock;
    i += count;
#if defined(__x86_64__)
    if (isa != Isa::kScalar) {
      const auto kernel = isa == Isa::kAvx512
                              ? (count == 2 ? dot_block_avx512<2> : dot_block_avx512<1>)
                              : (count == 2 ? dot_block_avx2<2> : dot_block_avx2<1>);
      kernel(left, x_stride, w, w_stride, columns, to);
      continue;
    }
#endif
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t j = 0; j < kRowBlock; ++j)
        for (std::int64_t k = 0; k < columns; ++k)
          to[r * kRowBlock + j] += left[r * x_stride + k] * w[j * w_stride + k];
  }
}

/// out (rows, columns) += x (rows, 4) w.
template <class = void>
void add_block([[maybe_unused]] Isa isa, const float* x, std::int64_t x_stride, std::int64_t rows,
               const float* w, std::int64_t w_stride, std::int64_t columns, float* out,
               std::int64_t out_stride) {
  for (std::int64_t i = 0; i < rows;) {
    const float* left = x + i * x_stride;
    const std::int64_t count = std::min<std::int64_t>(2, rows - i);
    float* to = out + i * out_stride;
    i += count;
#if defined(__x86_64__)
    if (isa != Isa::kScalar) {
      const auto kernel = isa == Isa::kAvx512
                              ? (count == 2 ? add_block_avx512<2> : add_block_avx512<1>)
                              : (count == 2 ? add_block_avx2<2> : add_block_avx2<1>);
      kernel(left, x_stride, w, w_stride, columns, to, out_stride);
      continue;
    }
#endif
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t j = 0; j < kRowBlock; ++j)
        for (std::int64_t k = 0; k < columns; ++k)
          to[r * out_stride + k] += left[r * x_stride + j] * w[j * w_stride + k];
  }
}

/// out (m, n) = x (m, k) W^T, all contiguous fp32, W (n, k) on a CPU.
template <class = void>
void multiply_rows_transposed(Isa isa, const float* x, std::int64_t m, const Payload& weight,
                              float* out) {
  const std::int64_t n = weight.sizes()[0], k = weight.sizes()[1];
  const std::int64_t depth = std::min(kRowColumns, k);
  const std::optional<GroupCodes> codes = group_codes(isa, weight);
  // A thread takes what it decodes in some 10 us at least.
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / (kRowBlock * k));
  parallel_for(0, ceil_div(n, kRowBlock), grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> rows(static_cast<std::size_t>(kRowBlock * depth));
    std::vector<float> sums(static_cast<std::size_t>(kRowBlock * m));
    for (std::int64_t j = begin * kRowBlock; j < std::min(n, end * kRowBlock); j += kRowBlock) {
      const std::int64_t count = std::min(kRowBlock, n - j);
      std::fill(sums.begin(), sums.end(), 0.0F);
      if (codes) dot_codes(*codes, j, count, x, m, sums.data());
      for (std::int64_t start = 0; !codes && start < k; start += depth) {
        const std::int64_t columns = std::min(depth, k - start);
        decode_rectangle(weight, j, count, start, columns, rows.data());
        dot_block(isa, x + start, k, m, rows.data(), columns, columns, sums.data());
      }
      for (std::int64_t i = 0; i < m; ++i)
        std::copy_n(sums.data() + i * kRowBlock, count, out + i * n + j);
    }
  });
}

/// Into how many parts the rows of an (n, k) weight are cut when they are what is summed over.
/// Fixed by the sizes, so that sums do not depend on the number of threads.
constexpr std::int64_t row_parts(std::int64_t n, std::int64_t k) {
  return n * k < (1 << 18) || n < 64 ? 1 : n * k < (1 << 20) ? 4 : 16;
}

/// out (m, k) += rows [first, last) of W times their columns of x (m, n).
template <class = void>
void add_rows(Isa isa, const float* x, std::int64_t m, const Payload& weight, std::int64_t first,
              std::int64_t last, float* out) {
  const std::int64_t n = weight.sizes()[0], k = weight.sizes()[1];
  const std::int64_t width = std::min(kRowColumns, k);
  const std::optional<GroupCodes> codes = group_codes(isa, weight);
  std::vector<float> rows(static_cast<std::size_t>(kRowBlock * width));
  std::vector<float> left(static_cast<std::size_t>(kRowBlock * m));
  for (std::int64_t j = first; j < last; j += kRowBlock) {
    const std::int64_t count = std::min(kRowBlock, last - j);
    for (std::int64_t i = 0; i < m; ++i) {
      float* to = left.data() + i * kRowBlock;
      std::fill(std::copy_n(x + i * n + j, count, to), to + kRowBlock, 0.0F);
    }
    if (codes) add_codes(*codes, j, count, left.data(), m, out);
    for (std::int64_t start = 0; !codes && start < k; start += width) {
      const std::int64_t columns = std::min(width, k - start);
      decode_rectangle(weight, j, count, start, columns, rows.data());
      if (count < kRowBlock)  // rows that are not there: zeros of x times zeros
        std::fill(rows.begin() + count * columns, rows.end(), 0.0F);
      add_block(isa, left.data(), kRowBlock, m, rows.data(), columns, columns, out + start, k);
    }
  }
}

/// out (m, k) = x (m, n) W, all contiguous fp32, W (n, k) on a CPU.
template <class = void>
void multiply_rows(Isa isa, const float* x, std::int64_t m, const Payload& weight, float* out) {
  const std::int64_t n = weight.sizes()[0], k = weight.sizes()[1], parts = row_parts(n, k);
  std::fill_n(out, m * k, 0.0F);
  if (parts == 1) return add_rows(isa, x, m, weight, 0, n, out);
  const std::int64_t height = ceil_div(ceil_div(n, parts), kRowBlock) * kRowBlock;
  std::vector<float> sums(static_cast<std::size_t>(parts * m * k));
  parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part)
      add_rows(isa, x, m, weight, part * height, std::min(n, (part + 1) * height),
               sums.data() + part * m * k);
  });
  constexpr std::array<float, kRowBlock> ones{1, 1, 1, 1};
  parallel_for(0, m * k, 1 << 13, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = 0; part < parts; part += kRowBlock)
      add_block(isa, ones.data(), kRowBlock, 1, sums.data() + part * m * k + begin, m * k,
                end - begin, out + begin, m * k);
  });
}

/// Rows of x up to which the functions above beat the panels, as measured.
inline constexpr std::int64_t kFewRows = 8;
}  // namespace fourfold::inline v0::detail::packed
FOURFOLD_INTRINSICS_END

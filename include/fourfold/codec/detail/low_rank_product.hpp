// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The product of two factors, all of it or a range of its values. Every value is a chain of fma
/// over the rank in order, whichever the range and the instructions, so a tile equals its part of
/// the whole.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/parallel.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace fourfold::inline v0::detail::low_rank {

#if defined(__x86_64__)
/// out (columns) = left (rank) right (rank, columns); gives how many columns it did.
FOURFOLD_AVX2 inline std::int64_t combine_rows_avx2(const float* left, std::int64_t rank,
                                                    const float* right, std::int64_t stride,
                                                    std::int64_t columns, float* out) {
  std::int64_t j = 0;
  for (; j + 32 <= columns; j += 32) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                     _mm256_setzero_ps()};
    for (std::int64_t r = 0; r < rank; ++r) {
      const __m256 value = _mm256_set1_ps(left[r]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sum[i] = _mm256_fmadd_ps(value, _mm256_loadu_ps(right + r * stride + j + 8 * i), sum[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + j + 8 * i, sum[i]);
  }
  return j;
}
#endif

/// out (columns) = left (rank) right (rank, columns), rows of right `stride` apart.
template <class T>
void combine_rows([[maybe_unused]] Isa isa, const T* left, std::int64_t rank, const T* right,
                  std::int64_t stride, std::int64_t columns, T* out) {
  std::int64_t done = 0;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>)
    if (isa != Isa::kScalar) done = combine_rows_avx2(left, rank, right, stride, columns, out);
#endif
  for (std::int64_t j = done; j < columns; ++j) {
    T sum = 0;
    for (std::int64_t r = 0; r < rank; ++r) sum = std::fma(left[r], right[r * stride + j], sum);
    out[j] = sum;
  }
}

/// Values [begin, end) of left right; left (rows, rank), right (rank, columns) contiguous.
template <class T>
void combine(Isa isa, const at::Tensor& left, const at::Tensor& right, std::int64_t begin,
             std::int64_t end, T* out) {
  const std::int64_t rank = left.size(1), columns = right.size(1);
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t row = at / columns, column = at % columns;
    const std::int64_t count = std::min(end - at, columns - column);
    combine_rows(isa, left.const_data_ptr<T>() + row * rank, rank,
                 right.const_data_ptr<T>() + column, columns, count, out + (at - begin));
    at += count;
  }
}

/// Values [begin, end) as fp32, of CPU factors in any floating dtype.
template <class = void>
void decode(const at::Tensor& left, const at::Tensor& right, std::int64_t begin, std::int64_t end,
            float* out, Isa isa = fourfold::isa()) {
  if (begin == end) return;
  const c10::NoGradGuard no_grad;
  const std::int64_t columns = right.size(1), first = begin / columns, last = (end - 1) / columns;
  if (left.scalar_type() == at::kFloat) return combine(isa, left, right, begin, end, out);
  const bool wide = left.scalar_type() == at::kDouble;
  // Only the rows and, within one row, only the columns that are asked for are converted.
  const std::int64_t from = first == last ? begin % columns : 0;
  const std::int64_t width = first == last ? end - begin : columns;
  const at::ScalarType type = wide ? at::kDouble : at::kFloat;
  const at::Tensor rows = left.narrow(0, first, last - first + 1).to(type);
  const at::Tensor part = right.narrow(1, from, width).to(type).contiguous();
  const std::int64_t start = first == last ? 0 : begin - first * columns;
  if (!wide) return combine(isa, rows, part, start, start + end - begin, out);
  std::vector<double> values(static_cast<std::size_t>(end - begin));
  combine(isa, rows, part, start, start + end - begin, values.data());
  std::copy(values.begin(), values.end(), out);
}

/// The whole product in `dtype`; sums in fp32, of fp64 factors in fp64.
template <class = void>
at::Tensor decompress(const at::Tensor& left, const at::Tensor& right, at::IntArrayRef sizes,
                      at::ScalarType dtype, Isa isa = fourfold::isa()) {
  const c10::NoGradGuard no_grad;
  const at::ScalarType type = left.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor rows = left.detach().to(type), columns = right.detach().to(type);
  if (!left.is_cpu()) return at::mm(rows, columns).to(dtype).view(sizes);
  const at::Tensor product = at::empty({rows.size(0), columns.size(1)}, rows.options());
  const std::int64_t width = columns.size(1);
  parallel_for(0, rows.size(0), std::max<std::int64_t>(1, (1 << 15) / (width * rows.size(1))),
               [&](std::int64_t begin, std::int64_t end) {
                 const auto run = [&]<class T>(std::type_identity<T>) {
                   combine(isa, rows, columns, begin * width, end * width,
                           product.mutable_data_ptr<T>() + begin * width);
                 };
                 type == at::kDouble ? run(std::type_identity<double>{})
                                     : run(std::type_identity<float>{});
               });
  return product.to(dtype).view(sizes);
}

}  // namespace fourfold::inline v0::detail::low_rank

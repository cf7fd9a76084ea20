// SPDX-License-Identifier: Apache-2.0
#pragma once
/// y = x V^T U^T for a weight held as two factors U (rows, rank) and V (rank, columns), without
/// their product and without x V^T in memory: a block keeps it, for 16 rows of x, in shared memory.
#include "launch.cuh"

namespace fourfold::cuda {

/// Beyond this rank two plain products are as good, and the launcher says so by its error.
inline constexpr int kMaxRank = 256;

template <class T>
__global__ __launch_bounds__(kThreads) void factor_matmul_kernel(
    T* __restrict__ y,            // (rows_x, rows)
    const T* __restrict__ x,      // (rows_x, columns)
    const T* __restrict__ left,   // U: (rows, rank)
    const T* __restrict__ right,  // V: (rank, columns)
    std::int64_t rows_x, std::int64_t rows, std::int64_t columns, int rank) {
  constexpr int kRows = 16, kWarps = kThreads / 32;
  __shared__ float inner[kRows][kMaxRank];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t m0 = std::int64_t{blockIdx.x} * kRows; m0 < rows_x;
       m0 += std::int64_t{gridDim.x} * kRows) {
    const int some = rows_x - m0 < kRows ? static_cast<int>(rows_x - m0) : kRows;
    for (int i = warp; i < some * rank; i += kWarps) {  // a warp an inner value
      const int m = i / rank, r = i % rank;
      float sum = 0;
      for (std::int64_t k = lane; k < columns; k += 32)
        sum = fma(to_float(x[(m0 + m) * columns + k]), to_float(right[r * columns + k]), sum);
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
      if (lane == 0) inner[m][r] = sum;
    }
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < some * rows; i += kThreads) {
      const auto m = static_cast<int>(i / rows);
      const std::int64_t n = i % rows;
      float sum = 0;
      for (int r = 0; r < rank; ++r) sum = fma(inner[m][r], to_float(left[n * rank + r]), sum);
      y[(m0 + m) * rows + n] = from_float<T>(sum);
    }
    __syncthreads();
  }
}

/// cudaErrorInvalidValue for a rank above kMaxRank.
template <class T>
cudaError_t factor_matmul(T* y, const T* x, const T* left, const T* right, std::int64_t rows_x,
                          std::int64_t rows, std::int64_t columns, std::int64_t rank,
                          cudaStream_t stream) {
  if (rank > kMaxRank) return cudaErrorInvalidValue;
  if (rows_x == 0 || rows == 0) return cudaSuccess;
  return launch(factor_matmul_kernel<T>, blocks_for(rows_x, 16), kThreads, 0, stream, y, x, left,
                right, rows_x, rows, columns, static_cast<int>(rank));
}

}  // namespace fourfold::cuda

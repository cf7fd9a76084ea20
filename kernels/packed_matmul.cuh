// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Products with a weight that stays packed: y = x W^T (forward) and y = x W (the input's
/// gradient), W of (rows, columns) read as codes and decoded on the way into registers or shared
/// memory, so that no dense copy ever exists. Few rows of x: one warp an output, bound by the bytes
/// of codes. Many: a 64 x 64 tile of y a block, W decoded once for 64 rows of x. Sums are fp32.
#include "group_int.cuh"

namespace fourfold::cuda {

/// A weight in integer group codes. Sources are what the kernels here read; Nf4 has its own.
template <int Bits, int Group, bool Symmetric>
struct GroupIntSource {
  const std::uint8_t* codes;   // (ceil(rows * columns * bits / 8))
  const std::uint32_t* words;  // (ceil(rows * columns / group))

  __device__ float value(std::int64_t i) const {
    constexpr IntFormat F{.bits = Bits, .group = Group, .symmetric = Symmetric};
    const std::uint32_t code = codes[i * Bits / 8] >> (i * Bits % 8) & ((1u << Bits) - 1u);
    return decode(group_decoder(F, words[i / Group]), code);
  }
  /// Values [i, i + count), count <= 8; the rest are 0.
  __device__ void values8(float (&out)[8], std::int64_t i, int count) const {
    constexpr IntFormat F{.bits = Bits, .group = Group, .symmetric = Symmetric};
    if (i % 8 != 0) {  // a row that begins within a byte or across groups
      for (int j = 0; j < 8; ++j) out[j] = j < count ? value(i + j) : 0.0F;
      return;
    }
    const GroupDecoder group = group_decoder(F, words[i / Group]);
    std::uint32_t in[8];
    load_codes<Bits>(in, codes + i / 8 * Bits, count);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = j < count ? decode(group, in[j]) : 0.0F;
  }
};

/// Rows of x that the direct kernel takes at once.
inline constexpr int kFewRows = 8;

template <class Source, class T>
__global__ __launch_bounds__(kThreads) void packed_linear_few_kernel(
    T* __restrict__ y,        // (rows_x, rows)
    const T* __restrict__ x,  // (rows_x, columns), rows_x <= kFewRows
    Source weight, int rows_x, std::int64_t rows, std::int64_t columns) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t stride = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t row = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; row < rows;
       row += stride) {  // the same for a whole warp
    float sums[kFewRows] = {};
    for (std::int64_t k = lane * 8; k < columns; k += 32 * 8) {
      const int count = columns - k < 8 ? static_cast<int>(columns - k) : 8;
      float w[8];
      weight.values8(w, row * columns + k, count);
#pragma unroll
      for (int m = 0; m < kFewRows; ++m) {
        if (m >= rows_x) break;
        float values[8];
        load8(values, x + m * columns + k, count, 0.0F);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[m] = fma(w[j], values[j], sums[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
      if (m >= rows_x) break;
      for (int lanes = 16; lanes > 0; lanes /= 2)
        sums[m] += __shfl_xor_sync(kFullWarp, sums[m], lanes);
      if (lane == 0) y[m * rows + row] = from_float<T>(sums[m]);
    }
  }
}

/// y (rows_x, outer): outer = rows and inner = columns, or with `Transposed` the other way round.
template <class Source, class T, bool Transposed>
__global__ __launch_bounds__(kThreads) void packed_matmul_tile_kernel(
    T* __restrict__ y,        // (rows_x, outer)
    const T* __restrict__ x,  // (rows_x, inner)
    Source weight, std::int64_t rows_x, std::int64_t outer, std::int64_t inner) {
  constexpr int kTile = 64, kDepth = 32, kEach = 4;  // a thread sums 4 x 4 of the tile
  __shared__ float xs[kDepth][kTile + 1];
  __shared__ float ws[kDepth][kTile + 1];
  const std::int64_t m0 = std::int64_t{blockIdx.y} * kTile, n0 = std::int64_t{blockIdx.x} * kTile;
  const int tm = static_cast<int>(threadIdx.x) / 16, tn = static_cast<int>(threadIdx.x) % 16;
  float sums[kEach][kEach] = {};
  for (std::int64_t k0 = 0; k0 < inner; k0 += kDepth) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      const int m = i / kDepth, k = i % kDepth;
      const bool inside = m0 + m < rows_x && k0 + k < inner;
      xs[k][m] = inside ? to_float(x[(m0 + m) * inner + k0 + k]) : 0.0F;
    }
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      const int n = Transposed ? i % kTile : i / kDepth, k = Transposed ? i / kTile : i % kDepth;
      const bool inside = n0 + n < outer && k0 + k < inner;
      const std::int64_t at = Transposed ? (k0 + k) * outer + n0 + n : (n0 + n) * inner + k0 + k;
      ws[k][n] = inside ? weight.value(at) : 0.0F;
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int a = 0; a < kEach; ++a)
#pragma unroll
        for (int b = 0; b < kEach; ++b)
          sums[a][b] = fma(xs[k][tm + 16 * a], ws[k][tn + 16 * b], sums[a][b]);
    __syncthreads();
  }
  for (int a = 0; a < kEach; ++a)
    for (int b = 0; b < kEach; ++b) {
      const std::int64_t m = m0 + tm + 16 * a, n = n0 + tn + 16 * b;
      if (m < rows_x && n < outer) y[m * outer + n] = from_float<T>(sums[a][b]);
    }
}

namespace detail {
/// Blocks along y are 65535 at most, so very tall x goes in pieces.
template <bool Transposed, class Source, class T>
cudaError_t tiles(T* y, const T* x, const Source& weight, std::int64_t rows_x, std::int64_t outer,
                  std::int64_t inner, cudaStream_t stream) {
  constexpr std::int64_t kTile = 64;
  for (std::int64_t m = 0; m < rows_x; m += kMaxBlocks * kTile) {
    const std::int64_t some = rows_x - m < kMaxBlocks * kTile ? rows_x - m : kMaxBlocks * kTile;
    const dim3 grid(static_cast<unsigned>(ceil_div(outer, kTile)),
                    static_cast<unsigned>(ceil_div(some, kTile)));
    const cudaError_t error =
        launch(packed_matmul_tile_kernel<Source, T, Transposed>, grid, kThreads, 0, stream,
               y + m * outer, x + m * inner, weight, some, outer, inner);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
}  // namespace detail

/// y (rows_x, rows) = x (rows_x, columns) W^T.
template <class Source, class T>
cudaError_t packed_linear(T* y, const T* x, const Source& weight, std::int64_t rows_x,
                          std::int64_t rows, std::int64_t columns, cudaStream_t stream) {
  if (rows_x == 0 || rows == 0) return cudaSuccess;
  if (rows_x > kFewRows) return detail::tiles<false>(y, x, weight, rows_x, rows, columns, stream);
  return launch(packed_linear_few_kernel<Source, T>, blocks_for(rows, kThreads / 32), kThreads, 0,
                stream, y, x, weight, static_cast<int>(rows_x), rows, columns);
}
/// y (rows_x, columns) = x (rows_x, rows) W.
template <class Source, class T>
cudaError_t packed_matmul(T* y, const T* x, const Source& weight, std::int64_t rows_x,
                          std::int64_t rows, std::int64_t columns, cudaStream_t stream) {
  if (rows_x == 0 || columns == 0) return cudaSuccess;
  return detail::tiles<true>(y, x, weight, rows_x, columns, rows, stream);
}

}  // namespace fourfold::cuda

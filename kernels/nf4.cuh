// SPDX-License-Identifier: Apache-2.0
#pragma once
/// NF4 (codec/nf4_code.hpp), blocks of 64 with fp32 scales: eight lanes a block, eight values a
/// lane. Reads sizeof(T), writes 1/2 + 4 / 64 bytes a value: memory bound. Scales are found, or
/// given (by nf4_scales.cuh, which quantises those of a first pass).
#include <fourfold/codec/nf4_code.hpp>

#include "group_int.cuh"

namespace fourfold::cuda {

/// nf4_code.hpp's tables, as a kernel can index them.
struct Nf4Tables {
  std::array<float, 16> levels = nf4::kLevels, midpoints = nf4::kMidpoints, inner = nf4::kInner,
                        gaps = nf4::kGaps;
};
inline constexpr int kNf4Block = 64;

template <class T, bool Stochastic, bool Given>
__global__ __launch_bounds__(kThreads) void nf4_compress_kernel(
    std::uint8_t* __restrict__ codes,  // (ceil(n / 2)), lower nibble first
    float* __restrict__ scales,        // (ceil(n / 64)); read where given, else written
    const T* __restrict__ x,           // (n)
    std::int64_t n, PhiloxStream stream) {
  static constexpr Nf4Tables kTables;
  constexpr int kLanes = kNf4Block / 8, kBlocks = kThreads / kLanes;
  const std::int64_t blocks = ceil_div(n, kNf4Block), stride = std::int64_t{gridDim.x} * kBlocks;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (std::int64_t base = std::int64_t{blockIdx.x} * kBlocks; base < blocks; base += stride) {
    const std::int64_t block = base + static_cast<int>(threadIdx.x) / kLanes;
    const std::int64_t at = block * kNf4Block + lane * 8, left = n - at;
    const int count = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    float values[8];
    load8(values, x + at, count, 0.0F);
    std::uint32_t largest = 0;  // by bits: infinity and NaN above all numbers
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu;
      largest = bits > largest ? bits : largest;
    }
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      const std::uint32_t other = __shfl_xor_sync(kFullWarp, largest, lanes, kLanes);
      largest = other > largest ? other : largest;
    }
    if (block >= blocks) continue;
    const float magnitude = std::bit_cast<float>(largest);
    const float scale = Given                        ? scales[block]
                        : largest >= 0x7F800000u     ? NAN
                        : magnitude < nf4::kSmallest ? 0.0F
                                                     : magnitude;
    if (lane == 0 && !Given) scales[block] = scale;
    if (count == 0) continue;
    const auto noise = Stochastic ? philox(stream, static_cast<std::uint64_t>(at) / 8)
                                  : std::array<std::uint32_t, 4>{};
    std::uint32_t out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float share = values[i] / scale;
      int code = nf4::kZeroCode;
      if (scale > 0 && Stochastic) {
        const float u = uniform16(noise[i / 2] >> (16 * (i % 2)) & 0xFFFFu);
        code = nf4::count_below(kTables.inner, share);
        code += share - kTables.levels[code] > u * kTables.gaps[code] ? 1 : 0;
      } else if (scale > 0) {
        code = nf4::count_below(kTables.midpoints, share);
      }
      out[i] = static_cast<std::uint32_t>(i < count ? code : nf4::kZeroCode);
    }
    store_codes<4>(codes + at / 2, out, count + count % 2);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void nf4_decompress_kernel(
    T* __restrict__ out,                     // (n)
    const std::uint8_t* __restrict__ codes,  // (ceil(n / 2))
    const float* __restrict__ scales,        // (ceil(n / 64))
    std::int64_t n) {
  static constexpr Nf4Tables kTables;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * 8;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8; at < n;
       at += stride) {
    const int count = n - at < 8 ? static_cast<int>(n - at) : 8;
    std::uint32_t in[8];
    load_codes<4>(in, codes + at / 2, count);
    const float scale = scales[at / kNf4Block];
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = saturate<T>(kTables.levels[in[i]] * scale);
    store8(out + at, values, count);
  }
}

/// A weight in NF4, for packed_matmul.cuh.
struct Nf4Source {
  const std::uint8_t* codes;
  const float* scales;

  __device__ float value(std::int64_t i) const {
    static constexpr Nf4Tables kTables;
    return kTables.levels[codes[i / 2] >> (4 * (i % 2)) & 15] * scales[i / kNf4Block];
  }
  __device__ void values8(float (&out)[8], std::int64_t i, int count) const {
    for (int j = 0; j < 8; ++j) out[j] = j < count ? value(i + j) : 0.0F;
  }
};

/// `key` null: nearest. Given: `scales` are read.
template <bool Given = false, class T>
cudaError_t nf4_compress(std::uint8_t* codes, float* scales, const T* x, std::int64_t n,
                         const Key* key, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const unsigned blocks = blocks_for(n, kThreads * 8);
  if (key == nullptr)
    return launch(nf4_compress_kernel<T, false, Given>, blocks, kThreads, 0, stream, codes, scales,
                  x, n, PhiloxStream{});
  return launch(nf4_compress_kernel<T, true, Given>, blocks, kThreads, 0, stream, codes, scales, x,
                n, philox_stream(*key));
}
template <class T>
cudaError_t nf4_decompress(T* out, const std::uint8_t* codes, const float* scales, std::int64_t n,
                           cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(nf4_decompress_kernel<T>, blocks_for(n, kThreads * 8), kThreads, 0, stream, out,
                codes, scales, n);
}

}  // namespace fourfold::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// NF4's scales quantised again (codec/nf4_code.hpp, double_quant): a group of 256 to a block of
/// threads. A 64th of the values, so its time does not count.
#include <fourfold/codec/nf4_code.hpp>

#include "launch.cuh"

namespace fourfold::cuda {

static __global__ __launch_bounds__(kThreads) void nf4_compress_scales_kernel(
    std::uint8_t* __restrict__ codes,  // (blocks)
    float* __restrict__ steps,         // (ceil(blocks / 256))
    float* __restrict__ scales,        // (blocks); in: as found, out: as the codes say
    std::int64_t blocks, bool up) {
  static_assert(kThreads == nf4::kScalesPerGroup);
  __shared__ std::uint32_t largest[kThreads];
  const int lane = static_cast<int>(threadIdx.x);
  for (std::int64_t group = blockIdx.x; group * kThreads < blocks; group += gridDim.x) {
    const std::int64_t at = group * kThreads + lane;
    const float scale = at < blocks ? scales[at] : 0.0F;
    largest[lane] = std::bit_cast<std::uint32_t>(scale);  // none is negative; NaN above all numbers
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half && largest[lane + half] > largest[lane]) largest[lane] = largest[lane + half];
    }
    __syncthreads();
    const float most = std::bit_cast<float>(largest[0]);
    __syncthreads();  // all have read it: the next group may write
    const bool finite = most == most;
    const float step = finite ? nf4::scale_step(most) : NAN;
    if (lane == 0) steps[group] = step;
    if (at >= blocks) continue;
    const int code = finite ? nf4::encode_scale(scale, step, up) : 0;
    codes[at] = static_cast<std::uint8_t>(code);
    scales[at] = nf4::decode_scale(code, step);
  }
}

static __global__ __launch_bounds__(kThreads) void nf4_decompress_scales_kernel(
    float* __restrict__ scales,              // (blocks)
    const std::uint8_t* __restrict__ codes,  // (blocks)
    const float* __restrict__ steps,         // (ceil(blocks / 256))
    std::int64_t blocks) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; at < blocks;
       at += stride)
    scales[at] = nf4::decode_scale(codes[at], steps[at / nf4::kScalesPerGroup]);
}

inline cudaError_t nf4_compress_scales(std::uint8_t* codes, float* steps, float* scales,
                                       std::int64_t blocks, bool up, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  return launch(nf4_compress_scales_kernel, blocks_for(blocks, kThreads), kThreads, 0, stream,
                codes, steps, scales, blocks, up);
}
inline cudaError_t nf4_decompress_scales(float* scales, const std::uint8_t* codes,
                                         const float* steps, std::int64_t blocks,
                                         cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  return launch(nf4_decompress_scales_kernel, blocks_for(blocks, kThreads), kThreads, 0, stream,
                scales, codes, steps, blocks);
}

}  // namespace fourfold::cuda

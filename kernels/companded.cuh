// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Companded 8-bit codes (codec/companded_code.hpp): sixteen lanes a group of 128, eight values a
/// lane. Reads sizeof(T), writes 1 + 4 / 128 bytes a value: memory bound.
#include <fourfold/codec/companded_code.hpp>
#include <fourfold/core/random.hpp>

#include "launch.cuh"

namespace fourfold::cuda {

template <class Curve>
using CompandedCode = std::conditional_t<std::is_same_v<Curve, Sqrt>, std::uint8_t, std::int8_t>;

template <class Curve, class T, bool Stochastic>
__global__ __launch_bounds__(kThreads) void compand_kernel(
    CompandedCode<Curve>* __restrict__ codes,  // (n)
    float* __restrict__ scales,                // (ceil(n / 128))
    const T* __restrict__ x,                   // (n)
    std::int64_t n, PhiloxStream stream) {
  constexpr int kGroup = companded::kGroup, kLanes = kGroup / 8, kGroups = kThreads / kLanes;
  constexpr std::uint32_t kInfinityBits = 0x7F800000u;
  const std::int64_t groups = ceil_div(n, kGroup), stride = std::int64_t{gridDim.x} * kGroups;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (std::int64_t base = std::int64_t{blockIdx.x} * kGroups; base < groups; base += stride) {
    const std::int64_t group = base + static_cast<int>(threadIdx.x) / kLanes;
    const std::int64_t at = group * kGroup + lane * 8, left = n - at;
    const int count = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    float values[8];
    load8(values, x + at, count, 0.0F);
    std::uint32_t largest = 0;  // by bits: NaN above infinity, and below zero above both for Sqrt
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      std::uint32_t bits = std::bit_cast<std::uint32_t>(values[i] + 0.0F);
      if constexpr (std::is_same_v<Curve, Softsign>) bits &= 0x7FFFFFFFu;
      largest = bits > largest ? bits : largest;
    }
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      const std::uint32_t other = __shfl_xor_sync(kFullWarp, largest, lanes, kLanes);
      largest = other > largest ? other : largest;
    }
    if (group >= groups) continue;
    const float scale = largest >= kInfinityBits
                            ? NAN
                            : companded::scale_of(Curve{}, std::bit_cast<float>(largest));
    if (lane == 0) scales[group] = scale;
    const float factor = std::is_same_v<Curve, Sqrt> ? 1.0F / scale : scale;
    const auto noise = Stochastic ? philox(stream, static_cast<std::uint64_t>(at) / 8)
                                  : std::array<std::uint32_t, 4>{};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= count) break;
      const float u = Stochastic ? uniform16(noise[i / 2] >> (16 * (i % 2)) & 0xFFFFu) : 0.5F;
      codes[at + i] =
          scale > 0 ? companded::encode(Curve{}, values[i], factor, u) : CompandedCode<Curve>{0};
    }
  }
}

template <class Curve, class T>
__global__ __launch_bounds__(kThreads) void expand_kernel(
    T* __restrict__ out,                             // (n)
    const CompandedCode<Curve>* __restrict__ codes,  // (n)
    const float* __restrict__ scales,                // (ceil(n / 128))
    std::int64_t n) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride)
    out[i] = from_float<T>(
        saturate<T>(companded::decode(Curve{}, codes[i], scales[i / companded::kGroup])));
}

/// `key` null: nearest.
template <class Curve, class T>
cudaError_t compand(CompandedCode<Curve>* codes, float* scales, const T* x, std::int64_t n,
                    const Key* key, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const unsigned blocks = blocks_for(n, kThreads * 8);
  if (key == nullptr)
    return launch(compand_kernel<Curve, T, false>, blocks, kThreads, 0, stream, codes, scales, x, n,
                  PhiloxStream{});
  return launch(compand_kernel<Curve, T, true>, blocks, kThreads, 0, stream, codes, scales, x, n,
                philox_stream(*key));
}
template <class Curve, class T>
cudaError_t expand(T* out, const CompandedCode<Curve>* codes, const float* scales, std::int64_t n,
                   cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(expand_kernel<Curve, T>, blocks_for(n, kThreads), kThreads, 0, stream, out, codes,
                scales, n);
}

}  // namespace fourfold::cuda

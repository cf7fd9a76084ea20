// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Integer group codes (codec/int_code.hpp): values to codes and words, and back. A lane takes
/// eight consecutive values at a time, which are `bits` whole bytes of codes and one Philox block
/// of noise; the lanes of a group find its range by shuffles. Reads sizeof(T), writes bits / 8 + 4
/// / group bytes a value: memory bound.
#include <fourfold/core/random.hpp>

#include "launch.cuh"

namespace fourfold::cuda {

/// Lanes that share a group: as many as have eight values of it, at most a warp.
template <IntFormat F>
inline constexpr int kLanesPerGroup = [] {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < F.group) lanes *= 2;
  return lanes;
}();

/// Eight codes of F.bits each, value 0 lowest.
template <int Bits>
__device__ inline void store_codes(std::uint8_t* out, const std::uint32_t (&codes)[8], int count) {
  std::uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) word |= std::uint64_t{codes[i]} << (i * Bits);
#pragma unroll
  for (int byte = 0; byte < Bits; ++byte)
    if (byte * 8 < count * Bits) out[byte] = static_cast<std::uint8_t>(word >> (byte * 8));
}
template <int Bits>
__device__ inline void load_codes(std::uint32_t (&codes)[8], const std::uint8_t* in, int count) {
  std::uint64_t word = 0;
#pragma unroll
  for (int byte = 0; byte < Bits; ++byte)
    if (byte * 8 < count * Bits) word |= std::uint64_t{in[byte]} << (byte * 8);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    codes[i] = static_cast<std::uint32_t>(word >> (i * Bits)) & ((1u << Bits) - 1u);
}

template <int Bits, int Group, bool Symmetric, class T, bool Stochastic>
__global__ __launch_bounds__(kThreads) void quantize_groups_kernel(
    std::uint8_t* __restrict__ codes,   // (ceil(n * bits / 8))
    std::uint32_t* __restrict__ words,  // (ceil(n / group))
    const T* __restrict__ x,            // (n)
    std::int64_t n, PhiloxStream stream) {
  constexpr IntFormat F{.bits = Bits, .group = Group, .symmetric = Symmetric};
  constexpr int kLanes = kLanesPerGroup<F>;
  const std::int64_t groups = ceil_div(n, F.group),
                     stride = std::int64_t{gridDim.x} * (kThreads / kLanes);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  // Every lane of a warp goes through every shuffle, so a warp's groups end together.
  const std::int64_t first = std::int64_t{blockIdx.x} * (kThreads / kLanes);
  for (std::int64_t base = first; base < groups; base += stride) {
    const std::int64_t group = base + static_cast<int>(threadIdx.x) / kLanes;
    const std::int64_t begin = group * F.group;
    const int size =
        group < groups ? static_cast<int>(n - begin < F.group ? n - begin : F.group) : 0;
    float lo = INFINITY, hi = -INFINITY;
    bool finite = true;
    for (int at = lane * 8; at < size; at += kLanes * 8) {
      const int count = size - at < 8 ? size - at : 8;
      float values[8];
      load8(values, x + begin + at, count, to_float(x[begin + at]));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        finite = finite && values[i] - values[i] == 0;
        lo = values[i] < lo ? values[i] : lo, hi = values[i] > hi ? values[i] : hi;
      }
    }
    if (!finite) lo = NAN;
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      const float other_lo = __shfl_xor_sync(kFullWarp, lo, lanes, kLanes);
      const float other_hi = __shfl_xor_sync(kFullWarp, hi, lanes, kLanes);
      lo = other_lo != other_lo || other_lo < lo ? other_lo : lo;  // a NaN stays
      hi = other_hi > hi ? other_hi : hi;
    }
    if (size == 0) continue;
    const std::uint32_t word = group_word(F, lo, hi);
    if (lane == 0) words[group] = word;
    const GroupEncoder encoder = group_encoder(F, word, Stochastic);
    for (int at = lane * 8; at < size; at += kLanes * 8) {
      const int count = size - at < 8 ? size - at : 8;
      float values[8];
      load8(values, x + begin + at, count, 0.0F);
      std::uint32_t out[8];
      if constexpr (Stochastic) {
        const auto noise = philox(stream, static_cast<std::uint64_t>(begin + at) / 8);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          out[i] = encode_stochastic(encoder, values[i], noise[i / 2] >> (16 * (i % 2)) & 0xFFFFu);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = encode_nearest(encoder, values[i]);
      }
      store_codes<F.bits>(codes + (begin + at) / 8 * F.bits, out, count);
    }
  }
}

template <int Bits, int Group, bool Symmetric, class T>
__global__ __launch_bounds__(kThreads) void dequantize_groups_kernel(
    T* __restrict__ out,                      // (n)
    const std::uint8_t* __restrict__ codes,   // (ceil(n * bits / 8))
    const std::uint32_t* __restrict__ words,  // (ceil(n / group))
    std::int64_t n) {
  constexpr IntFormat F{.bits = Bits, .group = Group, .symmetric = Symmetric};
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * 8;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8; at < n;
       at += stride) {
    const int count = n - at < 8 ? static_cast<int>(n - at) : 8;
    const GroupDecoder group = group_decoder(F, words[at / F.group]);
    std::uint32_t in[8];
    load_codes<F.bits>(in, codes + at / 8 * F.bits, count);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = saturate<T>(decode(group, in[i]));
    store8(out + at, values, count);
  }
}

template <IntFormat F, class T>
cudaError_t quantize_groups(std::uint8_t* codes, std::uint32_t* words, const T* x, std::int64_t n,
                            cudaStream_t stream) {
  static_assert(F.group % 8 == 0,
                "a lane takes eight values, so IntFormat::group is a multiple of 8");
  if (n == 0) return cudaSuccess;  // an empty grid is an error to CUDA, not to us
  return launch(quantize_groups_kernel<F.bits, F.group, F.symmetric, T, false>,
                blocks_for(ceil_div(n, F.group), kThreads / kLanesPerGroup<F>), kThreads, 0, stream,
                codes, words, x, n, PhiloxStream{});
}
/// Rounds stochastically, with the noise that the CPU draws from the same Key.
template <IntFormat F, class T>
cudaError_t quantize_groups(std::uint8_t* codes, std::uint32_t* words, const T* x, std::int64_t n,
                            const Key& key, cudaStream_t stream) {
  static_assert(F.group % 8 == 0,
                "a lane takes eight values, so IntFormat::group is a multiple of 8");
  if (n == 0) return cudaSuccess;
  return launch(quantize_groups_kernel<F.bits, F.group, F.symmetric, T, true>,
                blocks_for(ceil_div(n, F.group), kThreads / kLanesPerGroup<F>), kThreads, 0, stream,
                codes, words, x, n, philox_stream(key));
}
template <IntFormat F, class T>
cudaError_t dequantize_groups(T* out, const std::uint8_t* codes, const std::uint32_t* words,
                              std::int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(dequantize_groups_kernel<F.bits, F.group, F.symmetric, T>,
                blocks_for(n, kThreads * 8), kThreads, 0, stream, out, codes, words, n);
}

}  // namespace fourfold::cuda

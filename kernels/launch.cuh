// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How every kernel of this folder is started, and what they share. nvcc compiles these files for a
/// GPU; tests/emulator compiles the very same ones for the CPU. They know no Torch.
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <emulator/cuda_emulator.hpp>
#endif
#include <fourfold/codec/int_code.hpp>  // bf16_to_float, bf16_nearest

#include <cstdint>
#include <utility>

namespace fourfold::cuda {

/// Blocks of one launch at most; kernels stride over what is left.
inline constexpr std::int64_t kMaxBlocks = 65535;
inline constexpr int kThreads = 256;
inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

FOURFOLD_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
constexpr unsigned blocks_for(std::int64_t work, std::int64_t per_block) {
  const std::int64_t blocks = ceil_div(work, per_block);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

/// kernel<<<grid, block, shared, stream>>>(args...), or the emulator's twin of it.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t stream, Arguments... arguments) {
#if defined(__CUDACC__)
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
#else
  static_cast<void>(shared), static_cast<void>(stream);
  return emulator::launch(kernel, grid, block, arguments...);
#endif
}

/// 16-bit values as they lie in memory; arithmetic is fp32.
struct Bf16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

FOURFOLD_HOST_DEVICE inline float to_float(float x) { return x; }
FOURFOLD_HOST_DEVICE inline float to_float(Bf16 x) { return bf16_to_float(x.bits); }
FOURFOLD_HOST_DEVICE inline float to_float(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // Subnormals too: 2^112 moves the exponent's bias from 15 to 127, exactly.
  return std::bit_cast<float>(
      sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112F));
}

template <class T>
FOURFOLD_HOST_DEVICE T from_float(float x);
template <>
FOURFOLD_HOST_DEVICE inline float from_float<float>(float x) {
  return x;
}
template <>
FOURFOLD_HOST_DEVICE inline Bf16 from_float<Bf16>(float x) {
  return {static_cast<std::uint16_t>(bf16_nearest(x))};
}
template <>
FOURFOLD_HOST_DEVICE inline Half from_float<Half>(float x) {  // nearest, ties to even
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and above
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

/// Decoded values within a step of a 16-bit type's largest must not come back infinite. NaN stays
/// NaN.
template <class T>
FOURFOLD_HOST_DEVICE inline float saturate(float x) {
  if constexpr (sizeof(T) == 2) {
    constexpr float kLargest = std::is_same_v<T, Half> ? 65504.0F : 0x1.FEp127F;
    x = x > kLargest ? kLargest : x;
    x = x < -kLargest ? -kLargest : x;
  }
  return x;
}

/// Up to 8 values from `x`, `count` of them there, the rest `fill`.
template <class T>
__device__ inline void load8(float (&out)[8], const T* x, int count, float fill) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i < count ? to_float(x[i]) : fill;
}
template <class T>
__device__ inline void store8(T* out, const float (&x)[8], int count) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) out[i] = from_float<T>(x[i]);
}

}  // namespace fourfold::cuda

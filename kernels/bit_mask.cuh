// SPDX-License-Identifier: Apache-2.0
#pragma once
/// BitMask (codec/bit_mask.hpp): values that are 0 or one other bit pattern, to bits and back. A
/// warp takes 256 values a turn and votes on 32 at a time. Reads sizeof(U), writes 1/8 byte a value,
/// and reads what lies before the first value that is not 0 twice: memory bound.
#include "launch.cuh"

namespace fourfold::cuda {

/// Indices of values, as atomicMin takes them.
using MaskIndex = unsigned long long;

template <class U>
__global__ void bit_mask_start_kernel(MaskIndex* found, U* other, std::int64_t n) {
  found[0] = found[1] = static_cast<MaskIndex>(n);
  *other = 0;
}

/// First pass: found[0] becomes the index of the first value that is not 0, which is the other one.
/// Second pass: the bits, and found[1], the first that is neither. What lies behind an index that
/// was found already is not read.
template <class U, bool Second>
__global__ __launch_bounds__(kThreads) void bit_mask_kernel(
    std::uint8_t* __restrict__ bits,  // (ceil(n / 8)), low bit first
    U* __restrict__ other,            // (1)
    MaskIndex* found,                 // (2)
    const U* __restrict__ x,          // (n)
    std::int64_t n) {
  constexpr int kWords = 8, kTurn = 32 * kWords, kWarps = kThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const U known = Second && found[0] < static_cast<MaskIndex>(n) ? x[found[0]] : U{0};
  MaskIndex* const first = Second ? found + 1 : found;
  if (Second && blockIdx.x == 0 && threadIdx.x == 0) *other = known;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps * kTurn;
  for (std::int64_t begin = (std::int64_t{blockIdx.x} * kWarps + warp) * kTurn; begin < n;
       begin += stride) {  // the same for a whole warp
    const MaskIndex seen = *const_cast<const volatile MaskIndex*>(first);
    if (__any_sync(kFullWarp, seen < static_cast<MaskIndex>(begin))) return;
    U values[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const std::int64_t at = begin + word * 32 + lane;
      values[word] = at < n ? x[at] : U{0};
    }
    unsigned mine = 0;  // lane w keeps word w
    bool ended = false;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const bool some = values[word] != 0;
      // Of bools all that is not 0 is true, so that nobody need wait for found[1].
      const bool strange = some && values[word] != known && (!Second || sizeof(U) > 1);
      const unsigned votes = __ballot_sync(kFullWarp, some);
      const unsigned strangers = __ballot_sync(kFullWarp, strange);
      if (lane == word) mine = votes;
      if (strange && !ended && (strangers & ((1u << lane) - 1u)) == 0)
        atomicMin(first, static_cast<MaskIndex>(begin + word * 32 + lane));
      ended = ended || strangers != 0;
    }
    if (ended) return;
    if constexpr (Second) {
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const std::int64_t at = begin / 8 + lane * 4 + byte;
        if (lane < kWords && at * 8 < n) bits[at] = static_cast<std::uint8_t>(mine >> (byte * 8));
      }
    }
  }
}

template <class U>
__global__ __launch_bounds__(kThreads) void bit_mask_expand_kernel(
    U* __restrict__ out,                    // (n)
    const std::uint8_t* __restrict__ bits,  // (ceil(n / 8))
    const U* __restrict__ other,            // (1)
    std::int64_t n) {
  const U value = *other;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += stride)
    out[i] = (bits[i / 8] >> (i % 8) & 1) != 0 ? value : U{0};
}

/// found (2): the index of the first value that is not 0, and of the first that is a third one; n
/// where there is none. With a third one the bits are not all written.
template <class U>
cudaError_t compress_mask(std::uint8_t* bits, U* other, MaskIndex* found, const U* x,
                          std::int64_t n, cudaStream_t stream) {
  cudaError_t error = launch(bit_mask_start_kernel<U>, 1, 1, 0, stream, found, other, n);
  if (error != cudaSuccess || n == 0) return error;
  const unsigned blocks = blocks_for(n, kThreads * 8);
  error = launch(bit_mask_kernel<U, false>, blocks, kThreads, 0, stream, bits, other, found, x, n);
  if (error != cudaSuccess) return error;
  return launch(bit_mask_kernel<U, true>, blocks, kThreads, 0, stream, bits, other, found, x, n);
}
template <class U>
cudaError_t decompress_mask(U* out, const std::uint8_t* bits, const U* other, std::int64_t n,
                            cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(bit_mask_expand_kernel<U>, blocks_for(n, kThreads), kThreads, 0, stream, out, bits,
                other, n);
}

}  // namespace fourfold::cuda

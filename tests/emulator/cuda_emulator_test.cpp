// SPDX-License-Identifier: Apache-2.0
#include "cuda_emulator.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

namespace {

__global__ void sum_kernel(float* out, const float* in, int n) {  // one block's sum, twice by warps
  __shared__ float partial[32];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
    out[blockIdx.x] = total;
  }
  __syncthreads();  // `partial` is used again by the next block
}

__global__ void missing_barrier_kernel() {
  if (threadIdx.x != 3) __syncthreads();
}
__global__ void unnamed_lane_kernel() { __shfl_sync(0x0000FFFFu, 1, 0); }
__global__ void ballot_kernel(unsigned* out) {
  out[threadIdx.x] = __ballot_sync(~0u, threadIdx.x % 3 == 0);
}

TEST(CudaEmulator, SumsABlockThroughShufflesAndSharedMemory) {
  std::vector<float> in(1000), out(3);
  std::iota(in.begin(), in.end(), 0.0F);
  ASSERT_EQ(emulator::launch(sum_kernel, dim3(3), dim3(128), out.data(), in.data(), 1000),
            cudaSuccess);
  EXPECT_THAT(out, testing::Each(999 * 1000 / 2));
}

TEST(CudaEmulator, BallotCollectsTheWarp) {
  std::vector<unsigned> out(64);
  emulator::launch(ballot_kernel, dim3(1), dim3(64), out.data());
  unsigned expected[2] = {};
  for (unsigned i = 0; i < 64; ++i) expected[i / 32] |= (i % 3 == 0 ? 1u : 0u) << i % 32;
  for (unsigned i = 0; i < 64; ++i) EXPECT_EQ(out[i], expected[i / 32]);
}

TEST(CudaEmulator, ReportsAThreadThatMissesABarrier) {
  EXPECT_THAT([] { emulator::launch(missing_barrier_kernel, dim3(1), dim3(32)); },
              testing::ThrowsMessage<std::runtime_error>(testing::HasSubstr("the kernel hangs")));
}

TEST(CudaEmulator, ReportsALaneThatItsMaskDoesNotName) {
  EXPECT_THAT([] { emulator::launch(unnamed_lane_kernel, dim3(1), dim3(32)); },
              testing::ThrowsMessage<std::runtime_error>(testing::HasSubstr("mask does not name")));
}

TEST(CudaEmulator, RefusesTheGridsThatADeviceRefuses) {
  EXPECT_EQ(emulator::launch(missing_barrier_kernel, dim3(0), dim3(32)),
            cudaErrorInvalidConfiguration);
  EXPECT_EQ(emulator::launch(missing_barrier_kernel, dim3(1), dim3(2048)),
            cudaErrorInvalidConfiguration);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <kernels/nf4.cuh>
#include <kernels/nf4_scales.cuh>

#include <gtest/gtest.h>
#include <fourfold/codec/detail/nf4_loops.hpp>

#include <cmath>
#include <random>

namespace {

using namespace fourfold;

constexpr int kBlock = cuda::kNf4Block;

/// Blocks of widely different magnitudes, some of them zero.
std::vector<float> some_values(std::int64_t n) {
  std::vector<float> x(cuda::ceil_div(n, kBlock) * kBlock);
  std::mt19937 generator(static_cast<unsigned>(n));
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t block = i / kBlock;
    x[i] = block % 11 == 5 ? 0.0F : normal(generator) * std::exp2(static_cast<float>(block % 7));
  }
  return x;
}

TEST(EmulatedNf4Scales, CodesStepsAndValuesEqualThePlainLoops) {
  const Key key{.seed = 9, .step = 8, .forward = 7, .storage = 6};
  for (const std::int64_t n : {1, 64, 65, 255 * 64, 256 * 64, 256 * 64 + 1, 600 * 64 + 7})
    for (const bool spoiled : {false, true}) {
      auto x = some_values(n);
      if (spoiled) x[n / 2] = INFINITY;
      const std::int64_t blocks = cuda::ceil_div(n, kBlock);
      const std::int64_t groups = cuda::ceil_div(blocks, nf4::kScalesPerGroup);
      for (const Key* one : {static_cast<const Key*>(nullptr), &key}) {
        std::vector<std::uint8_t> codes(cuda::ceil_div(n, 2)), scale_codes(blocks);
        std::vector<float> scales(blocks), steps(groups), again(blocks);
        ASSERT_EQ(cuda::nf4_compress(codes.data(), scales.data(), x.data(), n, one, nullptr),
                  cudaSuccess);
        const std::vector<float> found = scales;
        ASSERT_EQ(cuda::nf4_compress_scales(scale_codes.data(), steps.data(), scales.data(), blocks,
                                            /*up=*/one != nullptr, nullptr),
                  cudaSuccess);
        ASSERT_EQ(cuda::nf4_compress<true>(codes.data(), scales.data(), x.data(), n, one, nullptr),
                  cudaSuccess);
        ASSERT_EQ(cuda::nf4_decompress_scales(again.data(), scale_codes.data(), steps.data(),
                                              blocks, nullptr),
                  cudaSuccess);
        for (std::int64_t group = 0; group < groups; ++group) {
          const std::int64_t first = group * nf4::kScalesPerGroup;
          const std::int64_t last = std::min<std::int64_t>(blocks, first + nf4::kScalesPerGroup);
          float largest = 0;
          bool finite = true;
          for (std::int64_t b = first; b < last; ++b) {
            finite = finite && !std::isnan(found[b]);
            largest = std::max(largest, found[b]);
          }
          const float step = finite ? nf4::scale_step(largest) : NAN;
          ASSERT_TRUE(steps[group] == step || (std::isnan(step) && std::isnan(steps[group])));
          for (std::int64_t b = first; b < last; ++b) {
            ASSERT_EQ(scale_codes[b],
                      finite ? nf4::encode_scale(found[b], step, one != nullptr) : 0);
            const float scale = nf4::decode_scale(scale_codes[b], step);
            ASSERT_TRUE(scales[b] == scale || (std::isnan(scale) && std::isnan(scales[b])));
            ASSERT_TRUE(again[b] == scale || (std::isnan(scale) && std::isnan(again[b])));
            std::uint16_t random[kBlock];
            for (int i = 0; i < kBlock; ++i)
              random[i] = random_bits16(philox_stream(key), b * kBlock + i);
            std::uint8_t expected[kBlock / 2];
            nf4::detail::encode_block(x.data() + b * kBlock, kBlock, scale,
                                      one == nullptr ? nullptr : random, expected, Isa::kScalar);
            for (std::int64_t i = b * kBlock / 2;
                 i < std::min<std::int64_t>((b + 1) * kBlock / 2, cuda::ceil_div(n, 2)); ++i)
              ASSERT_EQ(codes[i], expected[i - b * kBlock / 2]) << i << " of " << n;
          }
        }
      }
    }
}

}  // namespace

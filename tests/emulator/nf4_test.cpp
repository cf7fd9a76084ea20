// SPDX-License-Identifier: Apache-2.0
#include <kernels/nf4.cuh>
#include <kernels/packed_matmul.cuh>

#include <gtest/gtest.h>
#include <fourfold/codec/detail/nf4_loops.hpp>

#include <random>

namespace {

using namespace fourfold;

std::vector<float> some_values(std::int64_t n) {
  std::vector<float> x(cuda::ceil_div(n, cuda::kNf4Block) * cuda::kNf4Block);
  std::mt19937 generator(static_cast<unsigned>(n));
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < n; ++i) x[i] = normal(generator);
  return x;
}

TEST(EmulatedNf4, CodesScalesAndValuesEqualThePlainLoops) {
  constexpr int kBlock = cuda::kNf4Block;
  const Key key{.seed = 9, .step = 8, .forward = 7, .storage = 6};
  for (std::int64_t n : {0, 1, 2, 63, 64, 65, 131, 3333}) {
    auto x = some_values(n);
    if (n > 1000) x[700] = INFINITY;
    if (n > 1000) std::fill_n(x.begin() + 3 * kBlock, kBlock, 1e-39F);  // held as zeros
    const std::int64_t blocks = cuda::ceil_div(n, kBlock);
    for (const Key* one : {static_cast<const Key*>(nullptr), &key}) {
      std::vector<std::uint8_t> codes(cuda::ceil_div(n, 2)), expected(x.size() / 2);
      std::vector<float> scales(blocks), out(n), expected_out(x.size());
      ASSERT_EQ(cuda::nf4_compress(codes.data(), scales.data(), x.data(), n, one, nullptr),
                cudaSuccess);
      ASSERT_EQ(cuda::nf4_decompress(out.data(), codes.data(), scales.data(), n, nullptr),
                cudaSuccess);
      for (std::int64_t block = 0; block < blocks; ++block) {
        std::uint16_t random[kBlock];
        for (int i = 0; i < kBlock; ++i)
          random[i] = random_bits16(philox_stream(key), block * kBlock + i);
        const float scale =
            nf4::detail::largest_magnitude(x.data() + block * kBlock, kBlock, Isa::kScalar);
        ASSERT_TRUE(scales[block] == scale || (std::isnan(scales[block]) && std::isnan(scale)));
        nf4::detail::encode_block(x.data() + block * kBlock, kBlock, scale,
                                  one == nullptr ? nullptr : random,
                                  expected.data() + block * kBlock / 2, Isa::kScalar);
        nf4::detail::decode_block(expected.data() + block * kBlock / 2, kBlock, scale,
                                  expected_out.data() + block * kBlock, Isa::kScalar);
      }
      for (std::size_t i = 0; i < codes.size(); ++i)
        ASSERT_EQ(codes[i], expected[i]) << i << " of " << n;
      for (std::int64_t i = 0; i < n; ++i)
        ASSERT_TRUE(out[i] == expected_out[i] ||
                    (std::isnan(out[i]) && std::isnan(expected_out[i])));
    }
  }
}

TEST(EmulatedNf4, MultipliesFromCodes) {
  constexpr std::int64_t m = 3, n = 7, k = 65;
  auto w = some_values(n * k);
  const auto x = some_values(m * k);
  std::vector<std::uint8_t> codes(cuda::ceil_div(n * k, 2));
  std::vector<float> scales(cuda::ceil_div(n * k, cuda::kNf4Block)), y(m * n);
  cuda::nf4_compress(codes.data(), scales.data(), w.data(), n * k, nullptr, nullptr);
  cuda::nf4_decompress(w.data(), codes.data(), scales.data(), n * k, nullptr);
  ASSERT_EQ(cuda::packed_linear(y.data(), x.data(), cuda::Nf4Source{codes.data(), scales.data()}, m,
                                n, k, nullptr),
            cudaSuccess);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      double exact = 0, magnitude = 0;
      for (std::int64_t l = 0; l < k; ++l) {
        exact += double{x[i * k + l]} * w[j * k + l];
        magnitude += std::abs(double{x[i * k + l]} * w[j * k + l]);
      }
      EXPECT_LE(std::abs(y[i * n + j] - exact), (k + 2) * 0x1p-24 * magnitude);
    }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <kernels/factor_matmul.cuh>
#include <kernels/packed_matmul.cuh>

#include <gtest/gtest.h>
#include <fourfold/codec/detail/group_int_scalar.hpp>

#include <random>
#include <tuple>

namespace {

using namespace fourfold;

/// A weight of (rows, columns) in codes, and what it decodes to.
struct Weight {
  static constexpr IntFormat F{.bits = 4, .group = 64};
  Weight(std::int64_t rows, std::int64_t columns, unsigned seed)
      : codes(cuda::ceil_div(rows * columns, 2)),
        words(cuda::ceil_div(rows * columns, F.group)),
        values(rows * columns) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(generator);
    const auto n = static_cast<std::int64_t>(values.size());
    cuda::quantize_groups<F>(codes.data(), words.data(), values.data(), n, nullptr);
    cuda::dequantize_groups<F>(values.data(), codes.data(), words.data(), n, nullptr);
  }
  cuda::GroupIntSource<4, 64, false> source() const { return {codes.data(), words.data()}; }
  std::vector<std::uint8_t> codes;
  std::vector<std::uint32_t> words;
  std::vector<float> values;
};

std::vector<float> some_values(std::int64_t n) {
  std::mt19937 generator(static_cast<unsigned>(n));
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = normal(generator);
  return x;
}

/// |fp32 sum - exact| <= (k + 2) eps * sum |terms|, whatever the order (Higham, 2002, section 3.1).
void expect_dot(float got, const std::vector<std::pair<double, double>>& terms) {
  double exact = 0, magnitude = 0;
  for (auto [a, b] : terms) exact += a * b, magnitude += std::abs(a * b);
  EXPECT_LE(std::abs(got - exact), (static_cast<double>(terms.size()) + 2) * 0x1p-24 * magnitude);
}

class EmulatedPackedMatmul
    : public testing::TestWithParam<std::tuple<std::int64_t, std::int64_t, std::int64_t>> {};

TEST_P(EmulatedPackedMatmul, ForwardAndInputGradientAgreeWithTheDefinition) {
  const auto [m, n, k] = GetParam();
  const Weight weight(n, k, 3);
  const auto x = some_values(m * k), g = some_values(m * n);
  std::vector<float> y(m * n), dx(m * k);
  ASSERT_EQ(cuda::packed_linear(y.data(), x.data(), weight.source(), m, n, k, nullptr),
            cudaSuccess);
  ASSERT_EQ(cuda::packed_matmul(dx.data(), g.data(), weight.source(), m, n, k, nullptr),
            cudaSuccess);
  std::vector<std::pair<double, double>> terms;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      terms.clear();
      for (std::int64_t l = 0; l < k; ++l)
        terms.emplace_back(x[i * k + l], weight.values[j * k + l]);
      expect_dot(y[i * n + j], terms);
    }
    for (std::int64_t l = 0; l < k; ++l) {
      terms.clear();
      for (std::int64_t j = 0; j < n; ++j)
        terms.emplace_back(g[i * n + j], weight.values[j * k + l]);
      expect_dot(dx[i * k + l], terms);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AwkwardSizes, EmulatedPackedMatmul,
                         testing::Values(std::tuple{1, 1, 1}, std::tuple{1, 9, 64},
                                         std::tuple{3, 10, 77}, std::tuple{8, 33, 256},
                                         std::tuple{9, 65, 40}, std::tuple{70, 5, 130},
                                         std::tuple{65, 64, 33}));

class EmulatedFactorMatmul
    : public testing::TestWithParam<
          std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>> {};

TEST_P(EmulatedFactorMatmul, AgreesWithTheDefinition) {
  const auto [m, n, k, rank] = GetParam();
  const auto x = some_values(m * k), left = some_values(n * rank),
             right = some_values(rank * k + 1);
  std::vector<float> y(m * n);
  ASSERT_EQ(
      cuda::factor_matmul(y.data(), x.data(), left.data(), right.data(), m, n, k, rank, nullptr),
      cudaSuccess);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      double exact = 0, magnitude = 0;
      for (std::int64_t r = 0; r < rank; ++r)
        for (std::int64_t l = 0; l < k; ++l) {
          const double term = double{x[i * k + l]} * right[r * k + l] * left[j * rank + r];
          exact += term, magnitude += std::abs(term);
        }
      EXPECT_LE(std::abs(y[i * n + j] - exact),
                static_cast<double>(k + rank + 4) * 0x1p-24 * magnitude);
    }
}

INSTANTIATE_TEST_SUITE_P(AwkwardSizes, EmulatedFactorMatmul,
                         testing::Values(std::tuple{1, 1, 1, 1}, std::tuple{17, 9, 40, 3},
                                         std::tuple{16, 33, 31, 8}, std::tuple{2, 5, 7, 40}));

TEST(EmulatedFactorMatmulRank, AboveTheLargestIsRefused) {
  float value = 0;
  EXPECT_EQ(
      cuda::factor_matmul(&value, &value, &value, &value, 1, 1, 1, cuda::kMaxRank + 1, nullptr),
      cudaErrorInvalidValue);
}

}  // namespace

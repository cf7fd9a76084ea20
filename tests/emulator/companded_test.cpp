// SPDX-License-Identifier: Apache-2.0
#include <kernels/companded.cuh>

#include <gtest/gtest.h>
#include <fourfold/codec/detail/companded_loops.hpp>

#include <random>

namespace {

using namespace fourfold;

template <class Curve>
class EmulatedCompanded : public testing::Test {};
using Curves = testing::Types<Softsign, Sqrt>;
TYPED_TEST_SUITE(EmulatedCompanded, Curves);

TYPED_TEST(EmulatedCompanded, CodesScalesAndValuesEqualThePlainLoops) {
  using Curve = TypeParam;
  using Code = cuda::CompandedCode<Curve>;
  constexpr int kGroup = companded::kGroup;
  const Key key{.seed = 5, .step = 6, .forward = 7, .storage = 8};
  const PhiloxStream stream = philox_stream(key);
  for (std::int64_t n : {0, 1, 9, 127, 128, 130, 1027, 4096}) {
    const std::int64_t groups = cuda::ceil_div(n, kGroup);
    std::vector<float> x(groups * kGroup);
    std::mt19937 generator(static_cast<unsigned>(n));
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < n; ++i) {
      x[i] = normal(generator) * std::exp(3 * normal(generator));
      if (std::is_same_v<Curve, Sqrt>) x[i] = std::abs(x[i]);
    }
    if (n > 1000) x[200] = NAN;  // its group is NaN, the others are not
    if (n > 1000) std::fill_n(x.begin() + 3 * kGroup, kGroup, 1e-39F);  // held as zeros
    for (const Key* one : {static_cast<const Key*>(nullptr), &key}) {
      std::vector<Code> codes(n), expected(x.size());
      std::vector<float> scales(groups), expected_scales(groups), out(n), expected_out(x.size());
      ASSERT_EQ((cuda::compand<Curve>(codes.data(), scales.data(), x.data(), n, one, nullptr)),
                cudaSuccess);
      ASSERT_EQ((cuda::expand<Curve>(out.data(), codes.data(), scales.data(), n, nullptr)),
                cudaSuccess);
      for (std::int64_t group = 0; group < groups; ++group) {
        std::uint16_t random[kGroup];
        for (int i = 0; i < kGroup; ++i) random[i] = random_bits16(stream, group * kGroup + i);
        expected_scales[group] = companded::detail::encode_group<Curve>(
            x.data() + group * kGroup, expected.data() + group * kGroup,
            one == nullptr ? nullptr : random, Isa::kScalar);
        companded::detail::decode_group<Curve>(expected.data() + group * kGroup,
                                               expected_scales[group],
                                               expected_out.data() + group * kGroup, Isa::kScalar);
      }
      for (std::int64_t i = 0; i < groups; ++i)
        ASSERT_TRUE(scales[i] == expected_scales[i] ||
                    (std::isnan(scales[i]) && std::isnan(expected_scales[i])));
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(codes[i], expected[i]) << i << " of " << n;
        ASSERT_TRUE(out[i] == expected_out[i] ||
                    (std::isnan(out[i]) && std::isnan(expected_out[i])));
      }
    }
  }
}

}  // namespace

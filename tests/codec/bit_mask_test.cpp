// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/bit_mask.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <vector>

#include "../laws/codec_laws.hpp"

namespace fourfold::laws {
template <>
struct CodecDomain<BitMask> : AnyValues {
  static at::Tensor project(const at::Tensor& normal) {
    return normal.gt(0).to(normal.scalar_type()) * 2.5;
  }
  static std::optional<std::int64_t> nbytes(std::int64_t n, at::ScalarType dtype) {
    return (n + 7) / 8 + static_cast<std::int64_t>(c10::elementSize(dtype));
  }
};
}  // namespace fourfold::laws

INSTANTIATE_TYPED_TEST_SUITE_P(BitMask, CodecLaws, ::testing::Types<fourfold::BitMask>);

namespace {

using fourfold::BitMask;
using fourfold::Isa;
using fourfold::laws::error_of, fourfold::laws::same_bits;
using ::testing::HasSubstr;

/// n values of {0, other}, drawn with the global generator.
torch::Tensor two_valued(std::int64_t n, double other, torch::ScalarType dtype) {
  return torch::where(torch::rand({n}) < 0.5, torch::tensor(other, torch::kDouble),
                      torch::tensor(0.0, torch::kDouble))
      .to(dtype);
}

TEST(BitMask, HoldsTwoValuesInOneBitEach) {
  torch::manual_seed(1);
  for (auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf, torch::kDouble, torch::kBool}) {
    for (std::int64_t n : {0, 1, 7, 8, 63, 64, 65, 1000, 70001}) {
      const auto x = two_valued(n, 1 / 0.9, dtype);
      const auto packed = BitMask{}.compress(x);
      EXPECT_TRUE(same_bits(BitMask{}.decompress(packed), x)) << dtype << " " << n;
      EXPECT_EQ(packed.nbytes(), (n + 7) / 8 + static_cast<std::int64_t>(x.element_size()));
    }
  }
}

TEST(BitMask, EveryInstructionSetGivesTheSameBits) {
  torch::manual_seed(2);
  for (auto dtype : {torch::kFloat, torch::kBFloat16, torch::kDouble, torch::kBool}) {
    const auto x = two_valued(4099, 2.5, dtype);
    const auto expected = fourfold::detail::bit_mask_compress(x, Isa::kScalar);
    const auto composed =
        dtype == torch::kBool     ? fourfold::detail::bit_mask_aten<std::uint8_t>(x)
        : dtype == torch::kFloat  ? fourfold::detail::bit_mask_aten<std::uint32_t>(x)
        : dtype == torch::kDouble ? fourfold::detail::bit_mask_aten<std::uint64_t>(x)
                                  : fourfold::detail::bit_mask_aten<std::uint16_t>(x);
    EXPECT_TRUE(composed.buffers[0].equal(expected.buffers[0])) << dtype;
    EXPECT_TRUE(same_bits(composed.buffers[1], expected.buffers[1])) << dtype;
    for (Isa isa : fourfold::available_isas()) {
      const auto got = fourfold::detail::bit_mask_compress(x, isa);
      EXPECT_TRUE(got.buffers[0].equal(expected.buffers[0])) << name(isa) << " " << dtype;
      EXPECT_TRUE(same_bits(fourfold::detail::bit_mask_decompress(got.buffers, x.sizes(), x.numel(),
                                                                  x.scalar_type(), isa),
                            x))
          << name(isa) << " " << dtype;
    }
  }
}

TEST(BitMask, KeepsWhateverTheOtherValueIs) {
  for (float other : {-std::numeric_limits<float>::infinity(), -0.0F, 1e-45F,
                      std::numeric_limits<float>::quiet_NaN()}) {
    auto x = torch::zeros({3, 50});
    x.index_put_({torch::indexing::Slice(), torch::indexing::Slice(0, torch::indexing::None, 3)},
                 other);
    EXPECT_TRUE(same_bits(BitMask{}.decompress(BitMask{}.compress(x)), x)) << other;
  }
}

TEST(BitMask, TakesConstantTensorsAndTransposedOnes) {
  for (const auto& x : {torch::zeros({9, 5}), torch::full({9, 5}, 3.0),
                        two_valued(45, 2, torch::kFloat).reshape({9, 5}).t()})
    EXPECT_TRUE(same_bits(BitMask{}.decompress(BitMask{}.compress(x)), x));
}

TEST(BitMask, TryCompressFailsQuietlyOnAThirdValue) {
  auto x = two_valued(200000, 2, torch::kFloat);
  EXPECT_TRUE(BitMask::try_compress(x).has_value());
  for (std::int64_t at : {0, 77, 150000, 199999}) {
    auto y = x.clone();
    y[at] = 3.0;
    EXPECT_FALSE(BitMask::try_compress(y).has_value()) << at;
  }
  EXPECT_FALSE(BitMask::try_compress(torch::arange(4)).has_value());
  EXPECT_FALSE(BitMask::try_compress(torch::Tensor()).has_value());
  EXPECT_FALSE(BitMask::try_compress(torch::eye(3).to_sparse()).has_value());
}

TEST(BitMask, RefusesByAMessage) {
  auto x = torch::zeros({100});
  x[3] = 1.0, x[70] = 2.0, x[80] = 1.0;
  EXPECT_THAT(
      error_of([&] { (void)BitMask{}.compress(x); }),
      HasSubstr("BitMask: value 70 of 100 is neither 0 nor the tensor's first other value"));
  EXPECT_THAT(
      error_of([&] { (void)BitMask{}.compress(torch::arange(4)); }),
      HasSubstr("BitMask packs dense Float, BFloat16, Half, Double or Bool tensors, but was "
                "given a Strided tensor of Long; keep such a tensor as it is"));
  EXPECT_THAT(error_of([&] {
                std::vector<float> out(200);
                BitMask{}.decode(BitMask{}.compress(torch::zeros({100})), 0, 101, out.data());
              }),
              HasSubstr("was asked for values [0, 101) of 100; ask for a range inside"));
}

}  // namespace

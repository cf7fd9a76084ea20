// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/nf4.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "../laws/codec_laws.hpp"

template <fourfold::Nf4Format F>
struct fourfold::laws::CodecDomain<fourfold::NormalFloat<F>> : AnyValues {
  static constexpr std::int64_t kGroup = F.block;
  static std::optional<std::int64_t> nbytes(std::int64_t n, at::ScalarType) {
    const std::int64_t blocks = (n + F.block - 1) / F.block;
    return (n + 1) / 2 + (F.double_quant ? blocks + 4 * ((blocks + 255) / 256) : 4 * blocks);
  }
};
using Nf4Codecs = testing::Types<fourfold::Nf4, fourfold::Nf4DoubleQuant, fourfold::Nf4Search>;
INSTANTIATE_TYPED_TEST_SUITE_P(Nf4, CodecLaws, Nf4Codecs);

namespace {

using fourfold::Isa, fourfold::Key, fourfold::Nf4Format, fourfold::NormalFloat;
using fourfold::Nf4, fourfold::Nf4DoubleQuant, fourfold::Nf4Search;
using testing::HasSubstr;

torch::Tensor weights(std::int64_t n) {
  torch::manual_seed(3);
  return torch::randn({n}) * 0.02;
}
double mean_error(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().mean().item<double>();
}

template <class C>
class Nf4Test : public testing::Test {};
using Codecs =
    testing::Types<Nf4, Nf4DoubleQuant, Nf4Search,
                   NormalFloat<Nf4Format{.block = 32, .double_quant = true, .search = true}>,
                   NormalFloat<Nf4Format{.block = 256}>>;
TYPED_TEST_SUITE(Nf4Test, Codecs);

TYPED_TEST(Nf4Test, RoundTripStaysWithinTheBound) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf, torch::kDouble})
    for (const std::int64_t n : {0, 1, 2, 63, 64, 65, 1000, 16384 + 77}) {
      const auto x = weights(n).to(dtype), wide = x.to(torch::kDouble);
      const auto bound = TypeParam{}.error_bound(x).to(torch::kDouble);
      const auto error =
          (TypeParam{}.decompress(TypeParam{}.compress(x)).to(torch::kDouble) - wide).abs();
      EXPECT_TRUE((error <= bound).all().template item<bool>()) << n << " of " << dtype;
      const auto noisy = TypeParam{}.decompress(TypeParam{}.compress(x, Key{1, 2, 3, 4}));
      EXPECT_EQ(noisy.scalar_type(), dtype);
      EXPECT_EQ(noisy.sizes(), x.sizes());
    }
}

TYPED_TEST(Nf4Test, EveryPathGivesTheSameCodesAndValues) {
  constexpr Nf4Format kFormat = TypeParam::kFormat;
  namespace nf4 = fourfold::nf4::detail;
  for (const double size : {1.0, 1e-36, 1e-43, 1e39})
    for (const std::optional<Key>& key : {std::optional<Key>(), std::optional(Key{1, 2, 3, 4})}) {
      const auto x =
          (weights(16'384 + 77) * size)
              .clamp(-std::numeric_limits<float>::max(), std::numeric_limits<float>::max());
      const auto expected = nf4::compress(kFormat, x, key, Isa::kScalar);
      std::vector<float> whole(static_cast<std::size_t>(x.numel())), seen = whole;
      nf4::decode(kFormat, expected, x.numel(), 0, x.numel(), whole.data(), Isa::kScalar);
      for (const Isa isa : fourfold::available_isas()) {
        const auto codes = nf4::compress(kFormat, x, key, isa);
        for (std::size_t i = 0; i < codes.size(); ++i)
          EXPECT_TRUE(codes[i].equal(expected[i]))
              << name(isa) << ", buffer " << i << " at " << size;
        nf4::decode(kFormat, expected, x.numel(), 0, x.numel(), seen.data(), isa);
        EXPECT_EQ(seen, whole) << name(isa) << " at " << size;
      }
    }
}

TYPED_TEST(Nf4Test, AnyPieceDecodesAsTheWhole) {
  const auto packed = TypeParam{}.compress(weights(1234));
  const auto whole = TypeParam{}.decompress(packed);
  for (const auto& [begin, end] :
       {std::pair{0, 1234}, {1, 2}, {63, 65}, {31, 1233}, {1200, 1234}, {7, 7}}) {
    std::vector<float> piece(static_cast<std::size_t>(end - begin));
    TypeParam{}.decode(packed, begin, end, piece.data());
    EXPECT_TRUE(torch::tensor(piece).equal(whole.slice(0, begin, end))) << begin << ", " << end;
  }
}

/// A draw is one of the two levels around the value, its mean over N draws within 5 standard
/// deviations of at most half the gap; 16 bits a draw and fp32 add 2^-16 of the gap.
TYPED_TEST(Nf4Test, StochasticRoundingIsUnbiased) {
  constexpr std::int64_t kBlock = TypeParam::kFormat.block, kBlocks = 60'000 / kBlock;
  for (const float value : {-1.0F, -0.9F, -0.31F, -0.01F, 0.0F, 0.04F, 0.5F, 0.99F, 1.0F}) {
    auto x = torch::full({kBlocks, kBlock}, value);
    x.select(1, 0).fill_(1);
    const auto drawn = TypeParam{}
                           .decompress(TypeParam{}.compress(x, Key{5, 6, 7, 8}))
                           .slice(1, 1)
                           .to(torch::kDouble);
    const double gap = 0.31;  // the widest; double_quant's scale is up to 1 % above 1
    EXPECT_NEAR(
        drawn.mean().template item<double>(), value,
        5 * gap / 2 / std::sqrt(static_cast<double>(drawn.numel())) + gap * 0x1p-16 + 0x1p-21);
    EXPECT_LE((drawn - value).abs().max().template item<double>(), gap);
  }
}

TYPED_TEST(Nf4Test, ThreadsDoNotChangeACode) {
  const auto x = weights(200'000);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = TypeParam{}.compress(x, Key{9, 9, 9, 9});
  at::set_num_threads(3);
  const auto three = TypeParam{}.compress(x, Key{9, 9, 9, 9});
  at::set_num_threads(before);
  for (std::size_t i = 0; i < one.buffers.size(); ++i)
    EXPECT_TRUE(one.buffers[i].equal(three.buffers[i])) << i;
}

TYPED_TEST(Nf4Test, NotFiniteIsRefusedByNearestAndCarriedByStochastic) {
  for (const float odd :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    auto x = torch::ones({70'000});
    x[65'600] = odd;
    try {
      static_cast<void>(TypeParam{}.compress(x));
      ADD_FAILURE() << "must throw";
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("value 65600 of 70000 is"));
      EXPECT_THAT(error.what(), HasSubstr(TypeParam::name()));
    }
    const auto again = TypeParam{}.decompress(TypeParam{}.compress(x, Key{}));
    EXPECT_TRUE(again[65'600].isnan().template item<bool>());
    EXPECT_FALSE(again.slice(0, 0, 49'152).isnan().any().template item<bool>());
  }
  EXPECT_THROW(static_cast<void>(TypeParam{}.compress(torch::ones({3}, torch::kInt))), c10::Error);
}

TEST(Nf4, CodesAreTheNearestLevels) {
  const auto x = weights(64 * 50 + 9);
  const auto packed = Nf4{}.compress(x);
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const double scale = packed.buffers[1][i / 64].item<float>(), v = x[i].item<float>();
    const int byte = packed.buffers[0][i / 2].item<int>(),
              code = i % 2 == 0 ? byte & 15 : byte >> 4;
    double least = 2 * scale;
    for (const float level : fourfold::nf4::kLevels)
      least = std::min(least, std::abs(level * scale - v));
    const auto level = fourfold::nf4::kLevels[static_cast<std::size_t>(code)];
    EXPECT_LE(std::abs(level * scale - v), least + scale * 0x1p-23) << i;
  }
}

/// Published for N(0, 1) weights in blocks of 64: mean absolute error 0.072798 (bitsandbytes, its
/// own tests). The sample of 2^20 has a standard error of 0.06 / 2^10.
TEST(Nf4, ErrorOfNormalWeightsIsThePublishedOne) {
  torch::manual_seed(0);
  const auto x = torch::randn({1 << 20});
  const double plain = mean_error(Nf4{}.decompress(Nf4{}.compress(x)), x);
  EXPECT_NEAR(plain, 0.072798, 4 * 0.06 / 1024);
  const double nested = mean_error(Nf4DoubleQuant{}.decompress(Nf4DoubleQuant{}.compress(x)), x);
  EXPECT_NEAR(nested, 0.0728, 4 * 0.06 / 1024 + 0.00005);
  const double searched = mean_error(Nf4Search{}.decompress(Nf4Search{}.compress(x)), x);
  EXPECT_LE(searched, 0.0691);  // 12 points: 0.0689 in the study that set the goal
}

TEST(Nf4, SearchNeverHasTheLargerSquaredError) {
  torch::manual_seed(4);
  const auto x = torch::randn({500, 64}) * torch::exp(torch::randn({500, 1}));
  const auto plain = (Nf4{}.decompress(Nf4{}.compress(x)) - x).square().sum(1);
  const auto searched = (Nf4Search{}.decompress(Nf4Search{}.compress(x)) - x).square().sum(1);
  EXPECT_TRUE((searched <= plain * (1 + 1e-5)).all().item<bool>());  // fp32 sums of 64
  EXPECT_LT(searched.sum().item<double>(), 0.95 * plain.sum().item<double>());
}

TEST(Nf4, BytesAValue) {
  EXPECT_EQ(Nf4{}.compress(torch::ones({6400})).nbytes(), 3200 + 4 * 100);
  constexpr std::int64_t kMany = 64 * 256 * 10;  // bits a value: 4 + 8 / 64 + 32 / (64 * 256)
  EXPECT_EQ(Nf4DoubleQuant{}.compress(torch::ones({kMany})).nbytes(),
            kMany / 2 + kMany / 64 + 4 * 10);
  EXPECT_EQ(Nf4{}.compress(torch::ones({65})).nbytes(), 33 + 4 * 2);
}

TEST(Nf4, NamesTellFormatsApart) {
  EXPECT_EQ(Nf4::name(), "Nf4");
  EXPECT_EQ(Nf4DoubleQuant::name(), "Nf4DoubleQuant");
  EXPECT_EQ((NormalFloat<Nf4Format{.block = 32, .search = true}>::name()), "Nf4Search/32");
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/companded.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "../laws/codec_laws.hpp"

template <int Bits, class Curve>
struct fourfold::laws::CodecDomain<fourfold::Companded<Bits, Curve>> : AnyValues {
  static at::Tensor project(const at::Tensor& normal) {
    return std::is_same_v<Curve, fourfold::Sqrt> ? normal.abs() : normal;
  }
  static constexpr std::int64_t kGroup = 128;
  static std::optional<std::int64_t> nbytes(std::int64_t n, at::ScalarType) {
    return n + 4 * ((n + 127) / 128);
  }
};
using CompandedCodecs = testing::Types<fourfold::Companded<8, fourfold::Softsign>,
                                       fourfold::Companded<8, fourfold::Sqrt>>;
INSTANTIATE_TYPED_TEST_SUITE_P(Companded, CodecLaws, CompandedCodecs);

namespace {

using fourfold::Companded, fourfold::Softsign, fourfold::Sqrt, fourfold::Isa, fourfold::Key;
using testing::HasSubstr;
using Signed = Companded<8, Softsign>;
using Root = Companded<8, Sqrt>;

/// The definition in double: what code k stands for in a group of scale s.
double value_of(Softsign, int k, double s) { return s * k / (254.0 - std::abs(k)); }
double value_of(Sqrt, int k, double s) { return (k * s) * (k * s); }

/// Values of every size that a moment may have, `n` of them.
torch::Tensor moments(std::int64_t n, bool not_negative) {
  torch::manual_seed(7);
  const auto x = torch::randn({n}) * torch::exp(3 * torch::randn({n}));
  return not_negative ? x * x : x;
}

template <class C>
class CompandedTest : public testing::Test {
 protected:
  static constexpr bool kNotNegative = std::is_same_v<C, Root>;
  using Curve = std::conditional_t<kNotNegative, Sqrt, Softsign>;
  static constexpr int kLowest = kNotNegative ? 0 : -127, kHighest = kNotNegative ? 255 : 127;
};
using Codecs = testing::Types<Signed, Root>;
TYPED_TEST_SUITE(CompandedTest, Codecs);

TYPED_TEST(CompandedTest, NearestIsTheNearestOfAllCodes) {
  const auto x = moments(128 * 20 + 37, this->kNotNegative);
  const auto packed = TypeParam{}.compress(x);
  const auto codes = packed.buffers[0].to(torch::kInt), scales = packed.buffers[1];
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const double v = x[i].template item<float>(), s = scales[i / 128].template item<float>();
    double least = std::numeric_limits<double>::infinity();
    for (int k = this->kLowest; k <= this->kHighest; ++k)
      least = std::min(least, std::abs(value_of(typename TestFixture::Curve{}, k, s) - v));
    const double ours =
        std::abs(value_of(typename TestFixture::Curve{}, codes[i].template item<int>(), s) - v);
    // Two codes equally near in exact arithmetic may be told apart by fp32's rounding of the value.
    EXPECT_LE(ours, least + std::abs(v) * 8 * 0x1p-24) << "value " << i << " = " << v;
  }
}

TYPED_TEST(CompandedTest, EveryCodeIsItsOwn) {
  std::vector<float> values;
  for (int k = this->kLowest; k <= this->kHighest; ++k) {
    values.push_back(static_cast<float>(value_of(typename TestFixture::Curve{}, k, 0.375)));
    values.resize(
        (values.size() + 127) / 128 * 128,  // the rest of its group: only the largest code
        static_cast<float>(value_of(typename TestFixture::Curve{}, this->kHighest, 0.375)));
  }
  const auto x = torch::tensor(values);
  const auto again = TypeParam{}.decompress(TypeParam{}.compress(x));
  EXPECT_TRUE(((again - x).abs() <= x.abs() * 4 * 0x1p-24).all().template item<bool>());
}

TYPED_TEST(CompandedTest, EveryPathGivesTheSameCodesAndValues) {
  for (const double size : {1.0, 1e-36, 1e-42, 1e30}) {
    const auto x =
        (moments(128 * 64 + 5, this->kNotNegative) * size)
            .clamp(-std::numeric_limits<float>::max(), std::numeric_limits<float>::max());
    for (const std::optional<Key>& key : {std::optional<Key>(), std::optional(Key{1, 2, 3, 4})}) {
      auto scalar = TypeParam{}.zeros(x.sizes()), other = TypeParam{}.zeros(x.sizes());
      TypeParam{}.encode(scalar, 0, x.numel(), x.template const_data_ptr<float>(), key,
                         Isa::kScalar);
      std::vector<float> expected(static_cast<std::size_t>(x.numel())), seen = expected;
      TypeParam{}.decode(scalar, 0, x.numel(), expected.data(), Isa::kScalar);
      for (const Isa isa : fourfold::available_isas()) {
        TypeParam{}.encode(other, 0, x.numel(), x.template const_data_ptr<float>(), key, isa);
        EXPECT_TRUE(other.buffers[0].equal(scalar.buffers[0])) << name(isa) << " at " << size;
        EXPECT_TRUE(other.buffers[1].equal(scalar.buffers[1])) << name(isa) << " at " << size;
        TypeParam{}.decode(scalar, 0, x.numel(), seen.data(), isa);
        EXPECT_EQ(seen, expected) << name(isa) << " at " << size;
      }
    }
  }
}

/// A stochastic code is a or b; its mean over N draws lies within 5 standard deviations,
/// (b - a) / 2 each draw at most, of the value; 16 bits a draw and fp32 add 2^-16 of the gap.
TYPED_TEST(CompandedTest, StochasticRoundingIsUnbiasedInTheValue) {
  constexpr std::int64_t kGroups = 400;
  for (const float value : {0.9993F, 0.75F, 0.5004F, 0.31F, 0.1F, 0.013F, 0.0021F, 3e-4F, 2e-6F}) {
    auto x = torch::full({kGroups, 128}, value);
    x.select(1, 0).fill_(1);
    const auto packed = TypeParam{}.compress(x, Key{5, 6, 7, 8});
    const auto drawn = TypeParam{}.decompress(packed).slice(1, 1).to(torch::kDouble);
    const double gap = fourfold::companded::gap(typename TestFixture::Curve{}, value,
                                                packed.buffers[1][0].template item<float>());
    const auto draws = static_cast<double>(drawn.numel());
    EXPECT_NEAR(drawn.mean().template item<double>(), value,
                5 * gap / 2 / std::sqrt(draws) + gap * 0x1p-16 + value * 8 * 0x1p-24);
    EXPECT_LE((drawn - value).abs().max().template item<double>(), gap + value * 8 * 0x1p-24);
    EXPECT_GT(drawn.std().template item<double>(), 0) << "both neighbours are drawn for " << value;
  }
}

/// An optimizer's state differs from compress() in one thing: a second moment above zero has a code
/// above zero. One code too large at most; zero itself stays zero.
TEST(Companded, AStateAboveZeroStaysAboveZero) {
  auto x = moments(128 * 64 + 5, true);
  x.slice(0, 0, x.numel(), 7).zero_();
  for (const std::optional<Key>& key : {std::optional<Key>(), std::optional(Key{1, 2, 3, 4})}) {
    const auto compressed = key ? Root{}.compress(x, *key) : Root{}.compress(x);
    auto state = Root{}.zeros(x.sizes());
    Root{}.encode(state, 0, x.numel(), x.const_data_ptr<float>(), key);
    const auto above = (x > 0).to(torch::kByte);
    EXPECT_TRUE(state.buffers[0].equal(compressed.buffers[0].maximum(above)));
    EXPECT_GT((compressed.buffers[0] < above).sum().item<std::int64_t>(), 100) << "tests nothing";
  }
}

/// Why: Adam's step divides by the second moment's root. Rows whose gradients differ by orders of
/// magnitude share groups (tokens of an embedding, rare and frequent), and a rare one's gradients
/// stay away for long. In exact arithmetic |m| <= r sqrt(v) with r = (1 - beta1) / sqrt(1 - beta2) /
/// sqrt(1 - beta1^2 / beta2) = 7.3 (Cauchy and Schwarz). Codes add to m an error of one gap a step,
/// ten gaps in sum at beta1 = 0.9, a gap being max|m| / 253 * 1.5 where |m| is below a tenth of the
/// largest; and sqrt(v) is max(sqrt(v)) / 255 at least. So r (1 + 10 * 1.5 * 255 / 253) bounds a
/// step in units of the rate. Rounded to zero, second moments let it be 456000.
TEST(Companded, AdamsStepsStayBoundedWhereGradientsDifferByOrdersOfMagnitude) {
  constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
  constexpr std::int64_t kRows = 8, kWidth = 96, kN = kRows * kWidth;
  auto first = Signed{}.zeros({kN});
  auto second = Root{}.zeros({kN});
  std::vector<float> m(kN), v(kN);
  torch::manual_seed(3);
  double largest = 0;
  for (int step = 1; step <= 60; ++step) {
    auto g = torch::randn({kRows, kWidth});
    for (std::int64_t row = 0; row < kRows; ++row)
      g[row] *= (step - 1) % (row + 1) == 0 ? std::pow(10.0, -row) : 0.0;
    const float* grad = g.const_data_ptr<float>();
    Signed{}.decode(first, 0, kN, m.data());
    Root{}.decode(second, 0, kN, v.data());
    for (std::int64_t i = 0; i < kN; ++i) {
      m[i] = static_cast<float>(kBeta1 * m[i] + (1 - kBeta1) * grad[i]);
      v[i] = static_cast<float>(kBeta2 * v[i] + (1 - kBeta2) * grad[i] * grad[i]);
      const double mean = m[i] / (1 - std::pow(kBeta1, step));
      const double root = std::sqrt(v[i] / (1 - std::pow(kBeta2, step)));
      largest = std::max(largest, std::abs(mean) / (root + 1e-8));
    }
    const auto at = static_cast<std::uint64_t>(step);
    Signed{}.encode(first, 0, kN, m.data(), Key{9, at, 0, 0});
    Root{}.encode(second, 0, kN, v.data(), Key{9, at, 0, 1});
  }
  EXPECT_LE(largest, 7.3 * (1 + 10 * 1.5 * 255 / 253));
}

TYPED_TEST(CompandedTest, RoundTripStaysWithinTheBound) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf, torch::kDouble})
    for (const std::int64_t n : {0, 1, 127, 128, 129, 1000}) {
      const auto x = (moments(n, this->kNotNegative) * 0.01).clamp(-1e4, 1e4).to(dtype);
      const auto bound = TypeParam{}.error_bound(x).to(torch::kDouble);
      const auto wide = x.to(torch::kDouble);
      const auto error =
          (TypeParam{}.decompress(TypeParam{}.compress(x)).to(torch::kDouble) - wide).abs();
      EXPECT_TRUE((error <= bound).all().template item<bool>()) << n << " of " << dtype;
      const auto noisy = TypeParam{}.decompress(TypeParam{}.compress(x, Key{1, 2, 3, 4}));
      EXPECT_EQ(noisy.scalar_type(), dtype);
      EXPECT_TRUE(
          ((noisy.to(torch::kDouble) - wide).abs() <= 2 * bound).all().template item<bool>());
    }
  const auto turned = moments(130 * 70, this->kNotNegative).view({130, 70}).t();
  EXPECT_TRUE(TypeParam{}
                  .decompress(TypeParam{}.compress(turned))
                  .equal(TypeParam{}.decompress(TypeParam{}.compress(turned.contiguous()))));
}

TYPED_TEST(CompandedTest, AnyPieceDecodesAsTheWhole) {
  const auto x = moments(128 * 3 + 50, this->kNotNegative);
  const auto packed = TypeParam{}.compress(x);
  const auto whole = TypeParam{}.decompress(packed);
  for (const auto& [begin, end] :
       {std::pair{0, 434}, {1, 2}, {127, 129}, {100, 433}, {384, 434}, {7, 7}}) {
    std::vector<float> piece(static_cast<std::size_t>(end - begin));
    TypeParam{}.decode(packed, begin, end, piece.data());
    EXPECT_TRUE(torch::tensor(piece).equal(whole.slice(0, begin, end))) << begin << ", " << end;
  }
}

TYPED_TEST(CompandedTest, ThreadsDoNotChangeACode) {
  const auto x = moments(300'000, this->kNotNegative);
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = TypeParam{}.compress(x, Key{9, 9, 9, 9});
  at::set_num_threads(3);
  const auto three = TypeParam{}.compress(x, Key{9, 9, 9, 9});
  at::set_num_threads(before);
  EXPECT_TRUE(one.buffers[0].equal(three.buffers[0]));
  EXPECT_TRUE(one.buffers[1].equal(three.buffers[1]));
}

TYPED_TEST(CompandedTest, NotFiniteIsRefusedByNearestAndCarriedByStochastic) {
  for (const float odd :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto x = torch::ones({400});
    x[131] = odd;
    try {
      static_cast<void>(TypeParam{}.compress(x));
      ADD_FAILURE() << "must throw";
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("value 131 of 400 is"));
      EXPECT_THAT(error.what(), HasSubstr(TypeParam::name()));
    }
    const auto again = TypeParam{}.decompress(TypeParam{}.compress(x, Key{}));
    EXPECT_TRUE(again.slice(0, 128, 256).isnan().all().template item<bool>());
    EXPECT_TRUE(again.slice(0, 0, 128).equal(torch::ones({128})));
    EXPECT_TRUE(again.slice(0, 256).equal(torch::ones({144})));
  }
}

TYPED_TEST(CompandedTest, MessagesNameWhatCameAndWhatToDo) {
  const auto message = [](const torch::Tensor& x) -> std::string {
    try {
      static_cast<void>(TypeParam{}.compress(x));
    } catch (const c10::Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(message(torch::ones({3}, torch::kLong)), HasSubstr("was given Long"));
  EXPECT_THAT(message(torch::ones({3}, torch::kComplexFloat)), HasSubstr("was given ComplexFloat"));
  EXPECT_THAT(message(torch::eye(3).to_sparse()), HasSubstr("packs dense tensors"));
  EXPECT_THAT(message(torch::Tensor()), HasSubstr("undefined tensor"));
}

TEST(Companded, NegativeSecondMomentIsRefused) {
  auto x = torch::ones({300});
  x[200] = -0.25;
  x[10] = -0.0;  // is zero
  for (const bool stochastic : {false, true}) try {
      static_cast<void>(stochastic ? Root{}.compress(x, Key{}) : Root{}.compress(x));
      ADD_FAILURE() << "must throw";
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("value 200 of 300 is -0.25"));
      EXPECT_THAT(error.what(), HasSubstr("use Companded<8, Softsign>"));
    }
}

/// fp16 scales, as others use, turn gradients below 3e-8 into zeros (anchors: FlashOptim).
TEST(Companded, SmallMomentsSurvive) {
  const auto m = torch::full({128}, 2e-8F), v = m * m;
  EXPECT_TRUE(torch::allclose(Signed{}.decompress(Signed{}.compress(m)), m, 1e-6, 0));
  EXPECT_TRUE(torch::allclose(Root{}.decompress(Root{}.compress(v)), v, 1e-6, 0));
}

TEST(Companded, RandomBitsAreThoseOfTheCounter) {
  const auto stream = fourfold::philox_stream({0xFEDCBA9876543210u, 2, 3, 4});
  for (const std::int64_t tile : {std::int64_t{0}, std::int64_t{12345}, std::int64_t{1} << 30})
    for (const Isa isa : fourfold::available_isas()) {
      std::array<std::uint16_t, 128> bits{};
      fourfold::detail::random16(stream, tile, bits.data(), isa);
      for (std::uint64_t i = 0; i < 128; ++i)
        EXPECT_EQ(bits[i],
                  fourfold::random_bits16(stream, 128 * static_cast<std::uint64_t>(tile) + i))
            << name(isa) << ", value " << i << " of tile " << tile;
    }
}

TEST(Companded, BytesAValue) {
  EXPECT_EQ(Signed{}.compress(torch::ones({1280})).nbytes(), 1280 + 4 * 10);
  EXPECT_EQ(Root{}.compress(torch::ones({1281})).nbytes(), 1281 + 4 * 11);
}

/// The direction m / sqrt(v) after both are packed. With a noise of independent nearest roundings
/// the squared error is e_m^2 + e_v^2 / 4, relative; groups of 128 gave 1.4e-4 in a study of ours,
/// and 3.8e-4 is what 8-bit dynamic maps in blocks of 256 reach.
TEST(Companded, DirectionOfTheUpdateSurvives) {
  torch::manual_seed(1);
  const auto row = torch::exp(1.5 * torch::randn({64, 1}));
  const auto s = 1e-4 * torch::exp(0.5 * torch::randn({64, 1024})) * row;
  const auto m = 0.23 * torch::randn({64, 1024}) * s,
             v = s * s * (0.7 + 0.6 * torch::rand({64, 1024}));
  const auto exact = m / (v.sqrt() + 1e-8);
  const auto packed = Signed{}.decompress(Signed{}.compress(m)) /
                      (Root{}.decompress(Root{}.compress(v)).sqrt() + 1e-8);
  const double nmse = ((packed - exact).square().sum() / exact.square().sum()).item<double>();
  EXPECT_LE(nmse, 1.4e-4);
}

}  // namespace

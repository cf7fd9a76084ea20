// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adamw.hpp>
#include <tests/optim/rule_checks.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

namespace {

using fourfold::Companded, fourfold::Softsign, fourfold::Sqrt, fourfold::Int4, fourfold::Int8,
    fourfold::Isa, fourfold::Key;
using namespace fourfold::optim;
using torch::optim::AdamWOptions;

template <class C>
at::Tensor coded(const at::Tensor& values, const std::optional<Key>& key = {},
                 Isa isa = fourfold::isa()) {
  auto packed = C{}.zeros(values.sizes());
  C{}.encode(packed, 0, values.numel(), values.const_data_ptr<float>(), key, isa);
  const auto out = torch::empty(values.sizes());
  C{}.decode(packed, 0, values.numel(), out.template mutable_data_ptr<float>(), isa);
  return out;
}
/// Of both signs, or not negative; some far from their block's largest.
template <class C>
at::Tensor values(std::int64_t n, std::uint64_t seed = 0) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto x = torch::randn({n}, generator) * torch::exp(torch::randn({n}, generator));
  return std::is_same_v<C, Log4> ? x * x : x;
}

template <class C>
class StateCodes : public OneThread {};
using All = testing::Types<BFloat16, Normal4, Log4>;
TYPED_TEST_SUITE(StateCodes, All);

TYPED_TEST(StateCodes, EveryPathGivesTheSameBits) {
  for (const std::int64_t n : {1, 63, 64, 65, 127, 128, 200, 1024, 5003})
    for (const bool stochastic : {false, true}) {
      const auto key = stochastic ? std::optional(Key{1, 2, 0, 3}) : std::nullopt;
      const auto x = values<TypeParam>(n);
      const auto expected = coded<TypeParam>(x, key, Isa::kScalar);
      for (const Isa isa : fourfold::available_isas())
        EXPECT_TRUE(coded<TypeParam>(x, key, isa).equal(expected)) << name(isa) << ", " << n;
    }
}
/// A tile alone is what it is within the whole, and changes nothing beside it.
TYPED_TEST(StateCodes, TilesAreCodedAlone) {
  const std::int64_t n = 1000, kTile = TypeParam::kTile;
  const auto x = values<TypeParam>(n);
  const Key key{1, 2, 0, 3};
  const auto whole = coded<TypeParam>(x, key);
  auto packed = TypeParam{}.zeros({n});
  const auto out = torch::zeros({n});
  for (std::int64_t begin = (n - 1) / kTile * kTile; begin >= 0; begin -= kTile)
    TypeParam{}.encode(packed, begin, std::min(n, begin + kTile),
                       x.template const_data_ptr<float>() + begin, key);
  for (std::int64_t begin = 0; begin < n; begin += kTile)
    TypeParam{}.decode(packed, begin, std::min(n, begin + kTile),
                       out.template mutable_data_ptr<float>() + begin);
  EXPECT_TRUE(out.equal(whole));
}
/// The mean of k codes lies within 5 standard errors of the value: a code errs by at most its
/// neighbours' distance d, with a standard deviation of at most d / 2. A draw of 16 bits leaves a
/// bias of d * 2^-17.
TYPED_TEST(StateCodes, StochasticRoundingIsUnbiased) {
  constexpr int kDraws = 4000;
  const auto x = values<TypeParam>(128, 7);
  auto sum = torch::zeros({128}, torch::kDouble), least = torch::full({128}, INFINITY);
  auto most = -least;
  for (int draw = 0; draw < kDraws; ++draw) {
    const auto y = coded<TypeParam>(x, Key{9, static_cast<std::uint64_t>(draw), 0, 1});
    sum += y;
    least = torch::minimum(least, y), most = torch::maximum(most, y);
  }
  const auto gap = (most - least).to(torch::kDouble);
  auto wanted = x.to(torch::kDouble);
  if (std::is_same_v<TypeParam, Log4>)  // what lies below the smallest level is held as that level
    wanted = torch::maximum(wanted, coded<TypeParam>(x).to(torch::kDouble).where(gap == 0, wanted));
  const auto bound = gap * (5 / (2 * std::sqrt(kDraws)) + 0x1p-17) + 0x1p-20 * wanted.abs() + 1e-30;
  EXPECT_TRUE(((sum / kDraws - wanted).abs() <= bound).all().template item<bool>());
  EXPECT_GE((gap > 0).sum().template item<std::int64_t>(), 64);
}
TYPED_TEST(StateCodes, ZerosStayZerosAndNaNShows) {
  EXPECT_TRUE(coded<TypeParam>(torch::zeros({200})).equal(torch::zeros({200})));
  auto x = values<TypeParam>(256);
  for (const float bad : {NAN, INFINITY}) {
    x[70] = bad;
    for (const auto& key : {std::optional<Key>(), std::optional(Key{1, 1, 0, 1})}) {
      const auto y = coded<TypeParam>(x, key);
      EXPECT_FALSE(y[70].isfinite().template item<bool>());
      EXPECT_TRUE(y.slice(0, 128).isfinite().all().template item<bool>());
    }
  }
}
TYPED_TEST(StateCodes, HugeAndTinyGroupsHoldTheirLargest) {
  for (const double size : {3e-38, 2e-8, 1.0, 3.3e38}) {
    auto x = torch::full({64}, size);
    const auto y = coded<TypeParam>(x);
    EXPECT_TRUE(torch::allclose(y, x, 0x1p-7)) << y[0] << " for " << size;
  }
}

class StateCodes4 : public OneThread {};

/// Of 16 levels the nearest: among values for Normal4, among roots for Log4.
TEST_F(StateCodes4, NearestIsNearest) {
  const auto check = [](const auto& levels, const at::Tensor& x, bool roots, const at::Tensor& y) {
    auto table = torch::empty({16}, torch::kDouble);
    for (std::size_t i = 0; i < 16; ++i) table[static_cast<std::int64_t>(i)] = levels[i];
    // one block, whose scale is its largest: 1 here
    auto value = x.to(torch::kDouble).unsqueeze(1), level = table.unsqueeze(0);
    if (roots) value = value.sqrt(), level = level.sqrt();
    const auto best = std::get<0>((value - level).abs().min(1));
    const auto mine = roots ? (x.to(torch::kDouble).sqrt() - y.to(torch::kDouble).sqrt()).abs()
                            : (x - y).to(torch::kDouble).abs();
    EXPECT_TRUE((mine <= best + 1e-7).all().item<bool>());
  };
  auto x = torch::rand({64}) * 2 - 1;
  x[5] = -1;
  check(fourfold::nf4::kLevels, x, false, coded<Normal4>(x));
  x = torch::rand({64}).square();
  x[5] = 1;
  check(fourfold::optim::detail::LogLevels::kLevels, x, true, coded<Log4>(x));
  EXPECT_NEAR(fourfold::optim::detail::LogLevels::kLevels[0], 0.0025, 1e-9);
  EXPECT_EQ(fourfold::optim::detail::LogLevels::kLevels[15], 1);
}

/// Directions m / (sqrt(v) + eps) of 64 rows that differ in size, with nearest rounding: the squared
/// error as a share (section 3.1 and 3.3 of the study that set the goals; sigma 1.5).
template <class First, class Second>
double direction_error() {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const auto normal = [&] { return torch::randn({64, 1024}, generator); };
  const auto row = torch::exp(1.5 * torch::randn({64, 1}, generator));
  const auto size = 1e-4 * torch::exp(0.5 * normal()) * row;
  const auto m = (0.23 * normal() * size).contiguous();
  const auto v = (size * size * (0.7 + 0.6 * torch::rand({64, 1024}, generator))).contiguous();
  const auto exact = (m / (v.sqrt() + 1e-8)).to(torch::kDouble);
  const auto ours = (coded<First>(m) / (coded<Second>(v).sqrt() + 1e-8)).to(torch::kDouble);
  return ((ours - exact).square().sum() / exact.square().sum()).template item<double>();
}
TEST_F(StateCodes4, DirectionsErrLittle) {
  EXPECT_LE((direction_error<Companded<8, Softsign>, Companded<8, Sqrt>>()), 1.4e-4);
  EXPECT_LE((direction_error<Normal4, Log4>()), 0.03);
  EXPECT_LE((direction_error<Companded<8, Softsign>, Log4>()), 6.5e-3);
  EXPECT_LE((direction_error<BFloat16, BFloat16>()), 1e-5);
}

/// Half of the coordinates' gradients shrink to 0.3 at step 1000: 2000 steps later nearest rounding
/// has left second moments where they were (a step changes one by 0.1 %, less than half a code), but
/// for the decay of their group's scale; stochastic rounding follows. 0.09 in the study that set the
/// goal. Neighbours in Log4 differ by 1.22 in their roots, and an EMA's memory of 1000 steps holds a
/// few jumps between them: it follows, with noise.
template <class C>
double error_after_shrinking(bool stochastic) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const auto size = torch::exp(0.7 * torch::randn({128}, generator));
  auto packed = C{}.zeros({128});
  auto exact = torch::zeros({128});
  std::vector<float> now(128);
  for (std::int64_t step = 0; step < 3000; ++step) {
    auto g = torch::randn({128}, generator) * size;
    if (step >= 1000) g.slice(0, 0, 128, 2).mul_(0.3);
    exact.mul_(0.999).addcmul_(g, g, 0.001);
    C{}.decode(packed, 0, 128, now.data(), fourfold::isa());
    const auto next = torch::tensor(now).mul_(0.999).addcmul_(g, g, 0.001);
    std::optional<Key> key;
    if (stochastic) key = Key{1, static_cast<std::uint64_t>(step), 0, 1};
    C{}.encode(packed, 0, 128, next.template const_data_ptr<float>(), key);
  }
  C{}.decode(packed, 0, 128, now.data(), fourfold::isa());
  const auto root = torch::tensor(now).sqrt(), wanted = exact.sqrt();
  return ((root - wanted) / wanted).abs().mean().template item<double>();
}
TEST_F(StateCodes4, SecondMomentsFollowShrinkingGradients) {
  EXPECT_LE((error_after_shrinking<Companded<8, Sqrt>>(true)), 0.1);
  EXPECT_GE((error_after_shrinking<Companded<8, Sqrt>>(false)), 0.3);
  EXPECT_LE(error_after_shrinking<BFloat16>(true), 0.1);
  EXPECT_GE(error_after_shrinking<BFloat16>(false), 0.3) << "then it needs no random numbers";
  EXPECT_LE(error_after_shrinking<Log4>(true), 0.7 * error_after_shrinking<Log4>(false));
}

template <class C>
std::int64_t state_bytes() {
  auto p = torch::randn({128, 64}).requires_grad_(), odd = torch::randn({4097}).requires_grad_();
  p.mutable_grad() = torch::ones_like(p), odd.mutable_grad() = torch::ones_like(odd);
  AdamWOf<C> optimizer({p, odd});
  optimizer.step();
  return optimizer.state_bytes();
}
TEST_F(StateCodes4, BytesAParameter) {
  EXPECT_EQ(state_bytes<BFloat16>(), 2 * 2 * (8192 + 4097));
  EXPECT_EQ(state_bytes<Int4>(), 2 * (128 + 65) * (32 + 2));  // 1.0625 a parameter for both
}

TEST_F(StateCodes4, ASmallTaskConverges) {
  const StateOptions all{.min_packed_elements = 0};
  EXPECT_LE(final_loss(make<AdamWOf<Fp32>>(AdamWOptions(3e-3), all)), 0.02);
  EXPECT_LE(final_loss(make<AdamWOf<BFloat16>>(AdamWOptions(3e-3), all)), 0.02);
  EXPECT_LE(final_loss(make<AdamWOf<Int4>>(AdamWOptions(3e-3), all)), 0.04);
}

template <class Codec>
void expect_codes_to_be_resumed() {
  const auto train = [](auto& optimizer, at::Tensor& p, int from, int to) {
    for (int step = from; step < to; ++step) {
      p.mutable_grad() = values<BFloat16>(p.numel(), static_cast<std::uint64_t>(step)).view_as(p);
      optimizer.step();
    }
  };
  auto whole = torch::zeros({90, 71}).requires_grad_(),
       parted = torch::zeros({90, 71}).requires_grad_();
  AdamWOf<Codec> one({whole}), first({parted}), second({parted});
  train(one, whole, 0, 8), train(first, parted, 0, 4);
  std::stringstream file;
  torch::save(first, file);
  torch::load(second, file);
  train(second, parted, 4, 8);
  EXPECT_TRUE(parted.equal(whole));

  AdamWOf<Int8> other({parted});  // another code: decoded and encoded anew
  std::stringstream again;
  torch::save(second, again);
  torch::load(other, again);
  EXPECT_EQ(other.state_bytes(), 2 * (6390 + 4 * 50));
  train(other, parted, 8, 9);
  train(one, whole, 8, 9);
  EXPECT_LE((parted - whole).norm().template item<double>(), 0.1 * 1e-3 * std::sqrt(6390));
}
TEST_F(StateCodes4, SavedStatesGoOnBitForBit) {
  expect_codes_to_be_resumed<BFloat16>();
  expect_codes_to_be_resumed<Int4>();
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/low_rank.hpp>
// what is tested comes first
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/core/payload.hpp>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "../laws/codec_laws.hpp"

template <>
struct fourfold::laws::CodecDomain<fourfold::LowRank<4>> : AnyValues {
  static constexpr bool kMatricesOnly = true;
  static constexpr std::int64_t kSmallest = 4;
};
INSTANTIATE_TYPED_TEST_SUITE_P(LowRank, CodecLaws, ::testing::Types<fourfold::LowRank<4>>);

namespace fourfold {
namespace {

using ::testing::HasSubstr;

std::string message(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// U diag(singular) V^T with random orthonormal U and V.
at::Tensor matrix_of(std::int64_t rows, std::int64_t columns, const at::Tensor& singular) {
  const auto orthonormal = [&](std::int64_t n) {
    return std::get<0>(at::linalg_qr(torch::randn({n, singular.numel()}, at::kDouble)));
  };
  return at::mm(orthonormal(rows) * singular, orthonormal(columns).t());
}

/// Frobenius norm of what no matrix of rank `rank` can do without (Eckart and Young 1936).
double smallest_error(const at::Tensor& values, std::int64_t rank) {
  const at::Tensor singular = at::linalg_svdvals(values.to(at::kDouble));
  return singular.slice(0, rank).norm().item<double>();
}

template <class C>
double error_of(const at::Tensor& values) {
  return (C{}.decompress(C{}.compress(values)) - values)
      .to(at::kDouble)
      .norm()
      .template item<double>();
}

/// One thread: the many small steps of a decomposition gain nothing from two, and wait long for
/// each other where a machine is shared.
class LowRankCodec : public ::testing::Test {
 protected:
  LowRankCodec() { at::set_num_threads(1); }
  ~LowRankCodec() override { at::set_num_threads(threads_); }

 private:
  int threads_ = at::get_num_threads();
};

TEST_F(LowRankCodec, IsAsGoodAsTheBestOfItsRank) {
  torch::manual_seed(0);
  const at::Tensor falling = at::pow(0.8, torch::arange(150, at::kDouble));
  const at::Tensor slowly = 1 / torch::arange(1, 151, at::kDouble);
  // A flat spectrum is the hardest for a sketch, and has the least to gain; a weight's lies
  // between.
  for (const auto& [values, factor] :
       std::vector<std::pair<at::Tensor, double>>{{torch::randn({200, 150}, at::kDouble), 1.02},
                                                  {matrix_of(300, 150, slowly), 1.002},
                                                  {matrix_of(150, 300, falling), 1 + 1e-6}}) {
    const double best = smallest_error(values, 16);
    EXPECT_GE(error_of<LowRank<16>>(values), best * (1 - 1e-12));
    EXPECT_LE(error_of<LowRank<16>>(values), best * factor);
    const auto exact = LowRank<16>{}.compress_exact(values);
    EXPECT_NEAR((LowRank<16>{}.decompress(exact) - values).norm().item<double>(), best,
                best * 1e-10);
  }
}

TEST_F(LowRankCodec, NeedsItsPowerSteps) {
  // The error of a sketch without power steps on a flat spectrum is far from the best: what the
  // test above asserts is not given by the sizes alone.
  torch::manual_seed(0);
  const at::Tensor values = torch::randn({200, 150}, at::kDouble);
  const at::Tensor q =
      std::get<0>(at::linalg_qr(at::mm(values, torch::randn({150, 16}, at::kDouble))));
  const double sketched = (values - at::mm(q, at::mm(q.t(), values))).norm().item<double>();
  EXPECT_GT(sketched, smallest_error(values, 16) * 1.02);
}

TEST_F(LowRankCodec, RecoversWhatIsOfItsRank) {
  torch::manual_seed(1);
  const at::Tensor values = matrix_of(90, 120, torch::linspace(1, 5, 6, at::kDouble));
  EXPECT_LE(error_of<LowRank<6>>(values), 1e-13 * values.norm().item<double>());
  EXPECT_LE(error_of<LowRank<9>>(values),
            1e-13 * values.norm().item<double>());  // and has room left
  const at::Tensor floats =
      at::mm(torch::randint(-3, 4, {90, 4}), torch::randint(-3, 4, {4, 70})).to(at::kFloat);
  const at::Tensor again = LowRank<4>{}.decompress(LowRank<4>{}.compress(floats));
  EXPECT_TRUE(torch::equal(again.round(), floats));
  // Factors rounded to fp32, and a product of 4 terms: (2 u + gamma_4) |left| |right| elementwise.
  EXPECT_LE((again - floats).abs().max().item<double>(),
            8 * 0x1p-24 * at::linalg_svdvals(floats)[0].item<double>());
}

TEST_F(LowRankCodec, ErrsLessThanItsBound) {
  torch::manual_seed(2);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf})
    for (auto [rows, columns] : {std::pair<int, int>{3, 3}, {3, 70}, {70, 3}, {64, 65}, {130, 90}})
      for (double scale : {1.0, 1e-3, 1e3}) {
        const at::Tensor values = (torch::randn({rows, columns}) * scale).to(type);
        const at::Tensor bound = LowRank<3>{}.error_bound(values);
        const at::Tensor again = LowRank<3>{}.decompress(LowRank<3>{}.compress(values));
        ASSERT_EQ(again.scalar_type(), type);
        EXPECT_TRUE(
            ((again.to(at::kDouble) - values.to(at::kDouble)).abs() <= bound).all().item<bool>())
            << type << ' ' << rows << " x " << columns << " times " << scale;
        // The bound is no better than it says: the Frobenius norm of the residual.
        if (type == at::kDouble) {
          EXPECT_NEAR(bound.max().item<double>(), (again - values).norm().item<double>(),
                      1e-6 * values.norm().item<double>());
        }
      }
}

TEST_F(LowRankCodec, StandsExtremesOfRange) {
  torch::manual_seed(3);
  for (double scale : {1e-300, 1e-160, 1e160, 1e300}) {
    const at::Tensor values = torch::randn({40, 30}, at::kDouble) * scale;
    const double relative = error_of<LowRank<30>>(values / scale);
    EXPECT_LE((LowRank<30>{}.decompress(LowRank<30>{}.compress(values)) / scale - values / scale)
                  .norm()
                  .item<double>(),
              relative + 1e-12);
  }
  const at::Tensor zeros = torch::zeros({40, 30});
  EXPECT_TRUE(torch::equal(LowRank<4>{}.decompress(LowRank<4>{}.compress(zeros)), zeros));
}

TEST_F(LowRankCodec, RepeatsAndLeavesTheGeneratorAlone) {
  torch::manual_seed(4);
  const at::Tensor values = torch::randn({100, 80});
  const at::Tensor before = at::globalContext().defaultGenerator(at::kCPU).get_state();
  const auto once = LowRank<8>{}.compress(values), twice = LowRank<8>{}.compress(values);
  EXPECT_TRUE(torch::equal(before, at::globalContext().defaultGenerator(at::kCPU).get_state()));
  EXPECT_TRUE(torch::equal(once.buffers[0], twice.buffers[0]));
  EXPECT_TRUE(torch::equal(once.buffers[1], twice.buffers[1]));
}

TEST_F(LowRankCodec, HoldsTwoBalancedFactors) {
  torch::manual_seed(5);
  const auto packed = LowRank<5>{}.compress(torch::randn({12, 3, 4, 2}).to(at::kBFloat16));
  ASSERT_EQ(packed.buffers.size(), 2U);
  EXPECT_EQ(packed.buffers[0].sizes(), (std::vector<std::int64_t>{12, 5}));
  EXPECT_EQ(packed.buffers[1].sizes(), (std::vector<std::int64_t>{5, 24}));
  EXPECT_EQ(packed.nbytes(), (12 + 24) * 5 * 2);
  EXPECT_EQ(LowRank<5>{}.decompress(packed).sizes(), (std::vector<std::int64_t>{12, 3, 4, 2}));
  // Column r of left and row r of right have one norm, the root of singular value r.
  const auto exact = LowRank<5>{}.compress(torch::randn({60, 50}, at::kDouble));
  EXPECT_TRUE(at::allclose(exact.buffers[0].norm(2, 0), exact.buffers[1].norm(2, 1), 1e-12, 0));
  const auto payload = make_payload<LowRank<5>>(torch::randn({12, 10}));
  EXPECT_TRUE(payload->factorised());
  EXPECT_EQ(payload->codec(), "LowRank/5");
}

TEST_F(LowRankCodec, DecodesAnyRangeAsTheWhole) {
  torch::manual_seed(6);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    auto packed = LowRank<3>{}.compress(torch::randn({7, 45}).to(type));
    packed.dtype = at::kFloat;
    const at::Tensor whole = LowRank<3>{}.decompress(packed).view({-1});
    for (auto [begin, end] :
         {std::pair<int, int>{0, 315}, {0, 0}, {44, 46}, {10, 40}, {90, 135}, {100, 315}}) {
      at::Tensor part = torch::full({end - begin + 1}, 77.0F);
      LowRank<3>{}.decode(packed, begin, end, part.mutable_data_ptr<float>());
      EXPECT_TRUE(torch::equal(part.narrow(0, 0, end - begin), whole.slice(0, begin, end)))
          << type << begin;
      EXPECT_EQ(part[end - begin].item<float>(), 77.0F);  // nothing beyond the range
    }
  }
}

TEST_F(LowRankCodec, GivesTheSameProductByAnyInstructions) {
  torch::manual_seed(7);
  const at::Tensor left = torch::randn({9, 5}), right = torch::randn({5, 77});
  const at::Tensor scalar =
      detail::low_rank::decompress(left, right, {9, 77}, at::kFloat, Isa::kScalar);
  for (Isa isa : available_isas())
    EXPECT_TRUE(
        torch::equal(scalar, detail::low_rank::decompress(left, right, {9, 77}, at::kFloat, isa)))
        << name(isa);
  EXPECT_TRUE(at::allclose(scalar, at::mm(left, right), 1e-5, 1e-5));
}

TEST_F(LowRankCodec, ReadsStridedValues) {
  torch::manual_seed(8);
  const at::Tensor values = torch::randn({40, 30});
  const auto a = LowRank<4>{}.compress(values.t()),
             b = LowRank<4>{}.compress(values.t().contiguous());
  EXPECT_TRUE(torch::equal(a.buffers[0], b.buffers[0]));
  const at::Tensor trained = values.clone().requires_grad_();
  EXPECT_FALSE(LowRank<4>{}.compress(trained).buffers[0].requires_grad());
}

TEST_F(LowRankCodec, RefusesWhatItCannotFactorise) {
  EXPECT_THAT(message([] {
                (void)LowRank<8>{}.compress(torch::randn({7, 3, 4}));
              }),
              HasSubstr("LowRank/8: a rank of 8 is above min(rows, columns) of a 7 x 12 matrix "
                        "(sizes [7, 3, 4]); "
                        "take a rank of 7 at most"));
  EXPECT_THAT(message([] {
                (void)LowRank<8>{}.compress(torch::randn({0, 4}));
              }),
              HasSubstr("of a 0 x 0 matrix"));
  EXPECT_THAT(message([] { (void)LowRank<1>{}.compress(torch::randn({7})); }),
              HasSubstr("factorises a matrix, but was given sizes [7]; leave tensors of fewer than "
                        "2 dimensions"));
  at::Tensor bad = torch::zeros({4, 5});
  bad[2][3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(message([&] { (void)LowRank<1>{}.compress(bad); }),
              HasSubstr("LowRank/1: value 13 of 20 is nan"));
  bad[0][1] = -std::numeric_limits<float>::infinity();
  EXPECT_THAT(message([&] { (void)LowRank<1>{}.compress(bad); }),
              HasSubstr("value 1 of 20 is -inf"));
  EXPECT_THAT(message([] {
                (void)LowRank<1>{}.compress(torch::ones({4, 5}, at::kLong));
              }),
              HasSubstr("was given Long"));
  EXPECT_THAT(message([] { (void)LowRank<1>{}.compress(at::Tensor()); }),
              HasSubstr("undefined tensor"));
}

}  // namespace
}  // namespace fourfold

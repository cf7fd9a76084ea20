// SPDX-License-Identifier: Apache-2.0
/// What fourfold::cuda computes on a GPU is what the CPU computes: codes, scales and decoded values
/// bit for bit, products within the bounds of their sums. All suites here are named Gpu..., and all
/// of their cases are skipped where there is no GPU: ctest runs them as an entry of their own.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/bit_mask.hpp>
#include <fourfold/codec/companded.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/codec/packed_matmul.hpp>
#include <fourfold/presets.hpp>
#include <fourfold/weights/compress_weights.hpp>
#include "tests/gpu/on_gpu.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace fourfold;

using fourfold::tests::OnGpu;

/// The same bits, the second ones on a GPU.
bool same(const at::Tensor& cpu, const at::Tensor& gpu) {
  return gpu.is_cuda() && fourfold::tests::same_bits(cpu, gpu);
}

template <class Packed>
void expect_same_packed(const Packed& cpu, const Packed& gpu) {
  ASSERT_EQ(cpu.buffers.size(), gpu.buffers.size());
  for (std::size_t i = 0; i < cpu.buffers.size(); ++i)
    EXPECT_TRUE(same(cpu.buffers[i], gpu.buffers[i])) << "buffer " << i;
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

const std::vector<std::int64_t> kSizes{0, 1, 63, 64, 65, 1000, 65537};
const std::vector<at::ScalarType> kDtypes{at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

template <class C>
at::Tensor values_for(std::int64_t n, at::ScalarType dtype) {
  const at::Tensor normal = torch::randn({n}) * torch::exp(torch::randn({n}));
  return (std::is_same_v<C, Companded<8, Sqrt>> ? normal.abs() : normal).to(dtype);
}

template <class C>
class GpuCodec : public OnGpu {};
using Codecs = testing::Types<Int8, Int4, Int2, Int8Symmetric, Int4Symmetric, Nf4, Nf4Search,
                              Nf4DoubleQuant, Companded<8, Softsign>, Companded<8, Sqrt>>;
TYPED_TEST_SUITE(GpuCodec, Codecs);

TYPED_TEST(GpuCodec, PacksAndUnpacksAsTheCpu) {
  const TypeParam codec;
  const Key key{.seed = 1, .step = 2, .forward = 3, .storage = 4};
  for (const at::ScalarType dtype : kDtypes)
    for (const std::int64_t n : kSizes) {
      const at::Tensor x = values_for<TypeParam>(n, dtype), there = x.to(at::kCUDA);
      for (const bool stochastic : {false, true}) {
        SCOPED_TRACE(testing::Message() << TypeParam::name() << ", " << dtype << ", " << n
                                        << (stochastic ? ", stochastic" : ", nearest"));
        const auto cpu = stochastic ? codec.compress(x, key) : codec.compress(x);
        const auto gpu = stochastic ? codec.compress(there, key) : codec.compress(there);
        expect_same_packed(cpu, gpu);
        EXPECT_TRUE(same(codec.decompress(cpu), codec.decompress(gpu)));
      }
    }
}

TYPED_TEST(GpuCodec, TakesAnyStrides) {
  const TypeParam codec;
  const at::Tensor x = values_for<TypeParam>(300 * 70, at::kFloat).reshape({300, 70}).t();
  const at::Tensor there = x.to(at::kCUDA);
  EXPECT_TRUE(same(codec.decompress(codec.compress(x)), codec.decompress(codec.compress(there))));
  EXPECT_TRUE(same(codec.decompress(codec.compress(x.slice(1, 3, 200))),
                   codec.decompress(codec.compress(there.slice(1, 3, 200)))));
}

TYPED_TEST(GpuCodec, RefusesWhatTheCpuRefusesInTheSameWords) {
  const TypeParam codec;
  const Key key{.seed = 1, .step = 2, .forward = 3, .storage = 4};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -1.0F}) {
    at::Tensor x = values_for<TypeParam>(1000, at::kFloat);
    x[700] = bad;
    const at::Tensor there = x.to(at::kCUDA);
    SCOPED_TRACE(bad);
    const std::string refused = error_of([&] { static_cast<void>(codec.compress(x)); });
    constexpr bool kNotNegative = std::is_same_v<TypeParam, Companded<8, Sqrt>>;
    EXPECT_EQ(refused.empty(), bad == -1.0F && !kNotNegative);
    EXPECT_EQ(error_of([&] { static_cast<void>(codec.compress(there)); }), refused);
    const std::string noisy = error_of([&] { static_cast<void>(codec.compress(x, key)); });
    EXPECT_EQ(error_of([&] { static_cast<void>(codec.compress(there, key)); }), noisy);
    if (noisy.empty()) {
      EXPECT_TRUE(same(codec.decompress(codec.compress(x, key)),
                       codec.decompress(codec.compress(there, key))));
    }
  }
}

class GpuBitMask : public OnGpu {};

TEST_F(GpuBitMask, PacksAndUnpacksAsTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble, at::kBool})
    for (const std::int64_t n : kSizes)
      for (const double share : {0.0, 0.5, 1.0})
        for (const double other : {1 / 0.9, -0.0, -std::numeric_limits<double>::infinity(),
                                   std::numeric_limits<double>::quiet_NaN()}) {
          SCOPED_TRACE(testing::Message() << dtype << ", " << n << ", " << share << ", " << other);
          const at::Tensor x =
              torch::zeros({n}, dtype).masked_fill(torch::rand({n}) < share, other);
          const auto cpu = BitMask{}.compress(x), gpu = BitMask{}.compress(x.to(at::kCUDA));
          expect_same_packed(cpu, gpu);
          EXPECT_TRUE(same(BitMask{}.decompress(cpu), BitMask{}.decompress(gpu)));
        }
}

TEST_F(GpuBitMask, NamesTheThirdValueAsTheCpu) {
  for (const std::int64_t at : {1, 255, 256, 70000, 4999999}) {
    at::Tensor x = torch::zeros({5000000});
    x[0] = 2, x[at] = 3;
    const std::string refused = error_of([&] { static_cast<void>(BitMask{}.compress(x)); });
    EXPECT_FALSE(refused.empty());
    const at::Tensor there = x.to(at::kCUDA);
    EXPECT_EQ(error_of([&] { static_cast<void>(BitMask{}.compress(there)); }), refused);
    EXPECT_FALSE(BitMask::try_compress(there).has_value());
  }
  EXPECT_FALSE(BitMask::try_compress(torch::randn({1 << 20}, at::kCUDA)).has_value());
}

double eps_of(at::ScalarType dtype) {
  return dtype == at::kFloat      ? 0x1p-23
         : dtype == at::kHalf     ? 0x1p-10
         : dtype == at::kBFloat16 ? 0x1p-7
                                  : 0x1p-52;
}

/// Two sums of `length` terms, each in any order, lie within length * unit roundoff of the exact
/// one and so within length * eps of each other (Higham, section 3.1); two more for rounding the
/// results and the terms. `magnitude` is the sum of the terms' magnitudes.
void expect_close(const at::Tensor& cpu, const at::Tensor& gpu, const at::Tensor& magnitude,
                  std::int64_t length, at::ScalarType dtype) {
  ASSERT_TRUE(gpu.is_cuda());
  ASSERT_EQ(cpu.sizes(), gpu.sizes());
  ASSERT_EQ(cpu.scalar_type(), gpu.scalar_type());
  const double least = dtype == at::kHalf ? 0x1p-24 : 0.0;  // what half cannot hold
  const at::Tensor bound =
      magnitude.to(at::kDouble) * (static_cast<double>(length + 2) * eps_of(dtype)) + least;
  const at::Tensor error = (cpu.to(at::kDouble) - gpu.cpu().to(at::kDouble)).abs();
  EXPECT_TRUE(error.le(bound).all().item<bool>())
      << "largest error over bound: " << error.div(bound).max().item<double>();
}

at::Tensor magnitude_of(const at::Tensor& x, const at::Tensor& right) {
  return at::matmul(x.to(at::kDouble).abs(), right.to(at::kDouble).abs());
}

template <class C>
class GpuProduct : public OnGpu {};
TYPED_TEST_SUITE(GpuProduct, Codecs);

TYPED_TEST(GpuProduct, EqualsTheCpusWithinItsSums) {
  for (const auto& [rows, columns] :
       {std::pair<std::int64_t, std::int64_t>{1, 1}, {37, 200}, {130, 257}}) {
    const auto weight = make_payload<TypeParam>(
        values_for<TypeParam>(rows * columns, at::kFloat).reshape({rows, columns}));
    const auto there = weight->to(at::kCUDA, at::kFloat);
    const at::Tensor w = weight->decompress();
    for (const at::ScalarType dtype : kDtypes)
      for (const std::int64_t m : {0, 1, 8, 9, 70}) {
        SCOPED_TRACE(testing::Message() << TypeParam::name() << " " << rows << " x " << columns
                                        << ", " << m << " rows of " << dtype);
        const at::Tensor x = torch::randn({m, columns}).to(dtype),
                         y = torch::randn({m, rows}).to(dtype);
        expect_close(packed_linear(x, *weight), packed_linear(x.to(at::kCUDA), *there),
                     magnitude_of(x, w.t()), columns, dtype);
        expect_close(packed_matmul(y, *weight), packed_matmul(y.to(at::kCUDA), *there),
                     magnitude_of(y, w), rows, dtype);
      }
  }
}

class GpuFactors : public OnGpu {};

TEST_F(GpuFactors, MultiplyAsOnTheCpu) {
  constexpr std::int64_t kRows = 130, kColumns = 257, kRank = 24;
  const auto weight = make_payload<LowRank<kRank>>(torch::randn({kRows, kColumns}));
  const auto there = weight->to(at::kCUDA, at::kFloat);
  const at::Tensor left = weight->buffers()[0], right = weight->buffers()[1];
  for (const at::ScalarType dtype : kDtypes)
    for (const std::int64_t m : {0, 1, 16, 17}) {
      SCOPED_TRACE(testing::Message() << m << " rows of " << dtype);
      const at::Tensor x = torch::randn({m, kColumns}).to(dtype),
                       y = torch::randn({m, kRows}).to(dtype);
      // One sum after the other, and the factors are rounded to x's dtype first.
      expect_close(packed_linear(x, *weight), packed_linear(x.to(at::kCUDA), *there),
                   at::matmul(magnitude_of(x, right.t()), left.t().to(at::kDouble).abs()),
                   kColumns + kRank + 4, dtype);
      expect_close(packed_matmul(y, *weight), packed_matmul(y.to(at::kCUDA), *there),
                   at::matmul(magnitude_of(y, left), right.to(at::kDouble).abs()),
                   kRows + kRank + 4, dtype);
    }
}

template <class C>
class GpuModule : public OnGpu {};
using WeightCodecs = testing::Types<Int8, Int4, Int8Symmetric, Int4Symmetric, Nf4, Nf4DoubleQuant>;
TYPED_TEST_SUITE(GpuModule, WeightCodecs);

TYPED_TEST(GpuModule, ForwardsWithPackedWeightsAsOnTheCpu) {
  const torch::NoGradGuard no_grad;
  constexpr std::int64_t kIn = 257, kOut = 130;
  torch::nn::Linear here(kIn, kOut), there(kIn, kOut);
  there->weight.copy_(here->weight), there->bias.copy_(here->bias);
  there->to(at::kCUDA);
  compress_weights<TypeParam>(here);
  compress_weights<TypeParam>(there);
  const auto w = door::payload_of(here->weight)->decompress();
  EXPECT_TRUE(same(w, door::payload_of(there->weight)->decompress()));
  for (const std::int64_t m : {1, 8, 70}) {
    SCOPED_TRACE(m);
    const at::Tensor x = torch::randn({m, kIn});
    expect_close(here->forward(x), there->forward(x.to(at::kCUDA)),
                 magnitude_of(x, w.t()) + here->bias.to(at::kDouble).abs(), kIn + 1, at::kFloat);
  }
}

class GpuTraining : public OnGpu {};

TEST_F(GpuTraining, StepsUnderBalanced) {
  torch::nn::Sequential model(torch::nn::Linear(64, 128), torch::nn::GELU(),
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({128})),
                              torch::nn::Dropout(0.25), torch::nn::Linear(128, 32));
  model->to(at::kCUDA);
  const at::Tensor x = torch::randn({256, 64}, at::kCUDA),
                   target = torch::randn({256, 32}, at::kCUDA);
  Balanced pipeline(*model);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-2));
  std::vector<at::Tensor> before;
  for (const at::Tensor& p : model->parameters()) before.push_back(p.detach().clone());
  for (int step = 0; step < 3; ++step) {
    optimizer->zero_grad();
    auto loss = pipeline.forward([&] { return torch::mse_loss(model->forward(x), target); });
    loss.backward();
    optimizer->step();
    EXPECT_TRUE(std::isfinite(loss.item<float>())) << "step " << step;
  }
  const auto after = model->parameters();
  for (std::size_t i = 0; i < after.size(); ++i) {
    EXPECT_TRUE(after[i].is_cuda());
    EXPECT_TRUE(after[i].isfinite().all().item<bool>()) << "parameter " << i;
    EXPECT_FALSE(after[i].equal(before[i])) << "parameter " << i;
  }
}

}  // namespace

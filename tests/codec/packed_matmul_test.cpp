// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/packed_matmul.hpp>
// what is tested comes first
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/codec/nf4.hpp>

#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

namespace fourfold {
namespace {

using ::testing::HasSubstr;

/// What is compared with needs no threads, and waits long for them where a machine is shared.
class OneThread {
 public:
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(threads_); }

 private:
  int threads_ = at::get_num_threads();
};

/// Any payload, seen from the tile loop: fp32 values that count how they are read.
class WatchedPayload final : public Payload {
 public:
  explicit WatchedPayload(at::Tensor values)
      : values_(values.contiguous()), sizes_(values.sizes().vec()) {}

  at::Tensor decompress() const override {
    decompressed = true;
    return values_.clone();
  }
  void decode(std::int64_t begin, std::int64_t end, float* out) const override {
    EXPECT_GE(begin, 0);
    EXPECT_LE(end, values_.numel());
    EXPECT_LT(begin, end);
    std::copy(values_.const_data_ptr<float>() + begin, values_.const_data_ptr<float>() + end, out);
    decoded += end - begin;
    std::int64_t before = largest;
    while (before < end - begin && !largest.compare_exchange_weak(before, end - begin)) {
    }
  }
  std::shared_ptr<const Payload> compress(const at::Tensor& values) const override {
    return std::make_shared<WatchedPayload>(values);
  }
  std::shared_ptr<const Payload> to(at::Device, at::ScalarType) const override { return nullptr; }
  at::IntArrayRef sizes() const override { return sizes_; }
  at::ScalarType dtype() const override { return at::kFloat; }
  at::Device device() const override { return at::kCPU; }
  std::int64_t nbytes() const override { return static_cast<std::int64_t>(values_.nbytes()); }
  std::string codec() const override { return "Watched"; }
  bool factorised() const override { return false; }
  const std::vector<at::Tensor>& buffers() const override { return buffers_; }

  mutable std::atomic<std::int64_t> largest{0}, decoded{0};
  mutable std::atomic<bool> decompressed{false};

 private:
  at::Tensor values_;
  std::vector<std::int64_t> sizes_;
  std::vector<at::Tensor> buffers_;
};

double unit_roundoff(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return std::ldexp(1.0, -53);
    case at::kFloat: return std::ldexp(1.0, -24);
    case at::kHalf: return std::ldexp(1.0, -11);
    default: return std::ldexp(1.0, -8);  // bf16
  }
}

/// |got - x right| <= gamma_n |x| |right| + the rounding of the result (Higham, Accuracy and
/// Stability of Numerical Algorithms, section 3.1: any order of summation). `magnitude` stands for
/// |right| where a kernel sums larger terms that cancel.
void expect_product(const at::Tensor& got, const at::Tensor& x, const at::Tensor& right,
                    const at::Tensor& magnitude, std::int64_t extra_operations = 0) {
  const at::Tensor wide = x.to(at::kDouble), exact = at::matmul(wide, right.to(at::kDouble));
  ASSERT_EQ(got.sizes(), exact.sizes());
  ASSERT_EQ(got.scalar_type(), x.scalar_type());
  const double u = unit_roundoff(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const double n = static_cast<double>(right.size(0) + extra_operations);
  const at::Tensor sum =
      at::matmul(wide.abs(), magnitude.to(at::kDouble).abs()) * (n * u / (1 - n * u));
  const at::Tensor bound = sum + (exact.abs() + sum) * unit_roundoff(x.scalar_type()) +
                           (x.scalar_type() == at::kHalf ? std::ldexp(1.0, -25) : 0.0);
  const at::Tensor error = (got.to(at::kDouble) - exact).abs();
  EXPECT_TRUE((error <= bound).all().item<bool>())
      << x.sizes() << " x " << right.sizes() << " " << x.scalar_type()
      << ": largest error over bound " << (error / bound).max().item<double>();
}

TEST(PackedMatmul, EqualsTheDenseProductAtAwkwardSizes) {
  const OneThread one;
  torch::manual_seed(0);
  for (auto [n, k] : {std::pair<int, int>{1, 1},
                      {3, 5},
                      {1, 1500},
                      {1500, 1},
                      {257, 1025},
                      {64, 64},
                      {300, 2100}}) {
    const at::Tensor w = torch::randn({n, k});
    const WatchedPayload packed(w);
    for (int m : {1, 2, 7, 33, 513}) {
      const at::Tensor x = torch::randn({m, k}), y = torch::randn({m, n});
      expect_product(packed_linear(x, packed), x, w.t(), w.t());
      expect_product(packed_matmul(y, packed), y, w, w);
    }
  }
}

template <class C>
class PackedMatmulOf : public ::testing::Test {};
using Codecs = ::testing::Types<Int8, Int4, Int8Symmetric, Int4Symmetric, Nf4>;
TYPED_TEST_SUITE(PackedMatmulOf, Codecs);

TYPED_TEST(PackedMatmulOf, EqualsTheProductWithTheDecompressedWeight) {
  const OneThread one;
  torch::manual_seed(10);
  // Groups that fit rows, groups that cross them (K = 50, 200, 1), short last groups.
  for (auto [n, k] : {std::pair<int, int>{1, 128},
                      {5, 50},
                      {130, 256},
                      {37, 200},
                      {64, 1},
                      {70, 1152},
                      {1029, 256}}) {
    const auto packed = make_payload<TypeParam>(torch::randn({n, k}) + 0.5);
    const at::Tensor w = packed->decompress();
    for (int m : {1, 3, 8, 14}) {
      const at::Tensor x = torch::randn({m, k}), y = torch::randn({m, n});
      for (Isa isa : available_isas()) {
        SCOPED_TRACE(testing::Message() << n << " x " << k << ", " << m << " rows, " << name(isa));
        expect_product(detail::packed::product("packed_linear", x, *packed, true, isa), x, w.t(),
                       w.t());
        expect_product(detail::packed::product("packed_matmul", y, *packed, false, isa), y, w, w);
      }
    }
  }
}

TYPED_TEST(PackedMatmulOf, MultipliesHalfPrecision) {
  const OneThread one;
  torch::manual_seed(11);
  const auto packed = make_payload<TypeParam>(torch::randn({96, 256}));
  const at::Tensor w = packed->decompress();
  for (at::ScalarType type : {at::kBFloat16, at::kHalf, at::kDouble})
    for (int m : {1, 20}) {
      const at::Tensor x = torch::randn({m, 256}).to(type);
      expect_product(packed_linear(x, *packed), x, w.t(), w.t());
    }
}

TEST(PackedMatmul, MultipliesFactorsOneByOne) {
  const OneThread one;
  torch::manual_seed(12);
  const auto packed = make_payload<LowRank<6>>(torch::randn({50, 70}));
  const at::Tensor left = packed->buffers()[0], right = packed->buffers()[1];
  const at::Tensor magnitude = at::mm(left.abs(), right.abs());
  const at::Tensor w = at::mm(left.to(at::kDouble), right.to(at::kDouble));
  for (int m : {1, 9, 64}) {
    const at::Tensor x = torch::randn({m, 70}), y = torch::randn({m, 50});
    expect_product(packed_linear(x, *packed), x, w.t(), magnitude.t(), /*extra_operations=*/8);
    expect_product(packed_matmul(y, *packed), y, w, magnitude, /*extra_operations=*/8);
  }
  EXPECT_EQ(packed_linear(torch::randn({2, 3, 70}).to(at::kBFloat16), *packed).scalar_type(),
            at::kBFloat16);
}

TEST(PackedMatmul, KeepsTheDtypeOfX) {
  const OneThread one;
  torch::manual_seed(1);
  const at::Tensor w = torch::randn({130, 1100});
  const WatchedPayload packed(w);
  for (at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (int m : {1, 40}) {
      const at::Tensor x = torch::randn({m, 1100}).to(type), y = torch::randn({m, 130}).to(type);
      expect_product(packed_linear(x, packed), x, w.t(), w.t());
      expect_product(packed_matmul(y, packed), y, w, w);
    }
}

TEST(PackedMatmul, TakesAnyShapeAndStride) {
  const OneThread one;
  torch::manual_seed(2);
  const at::Tensor w = torch::randn({6, 10});
  const WatchedPayload packed(w);
  for (const at::Tensor& x :
       {torch::randn({10}), torch::randn({2, 3, 10}), torch::randn({10, 7}).t(),
        torch::randn({4, 20}).slice(1, 0, 20, 2), torch::randn({3, 10, 2}).transpose(1, 2),
        torch::randn({1, 10}).expand({5, 10})})
    expect_product(packed_linear(x, packed), x, w.t(), w.t());
  EXPECT_EQ(packed_linear(torch::randn({0, 10}), packed).sizes(),
            (std::vector<std::int64_t>{0, 6}));
  EXPECT_EQ(packed_matmul(torch::randn({2, 0, 6}), packed).sizes(),
            (std::vector<std::int64_t>{2, 0, 10}));
  const at::Tensor nothing =
      packed_linear(torch::randn({2, 0}), WatchedPayload(torch::randn({6, 0})));
  EXPECT_TRUE(torch::equal(nothing, torch::zeros({2, 6})));  // an empty sum
}

TEST(PackedMatmul, NeverHoldsADenseCopy) {
  const WatchedPayload packed(torch::randn({1100, 2100}));
  for (int m : {1, 64}) {
    (void)packed_linear(torch::randn({m, 2100}), packed);
    (void)packed_matmul(torch::randn({m, 1100}), packed);
  }
  EXPECT_FALSE(packed.decompressed);
  EXPECT_LE(packed.largest, (1 << 20) / 4);                  // 1 MiB of fp32
  EXPECT_EQ(packed.decoded, 4 * std::int64_t{1100} * 2100);  // and each value once a product
}

TEST(PackedMatmul, IsTheSameOnAnyNumberOfThreads) {
  torch::manual_seed(3);
  const int threads = at::get_num_threads();
  for (auto [n, k] : {std::pair<int, int>{700, 1344}, {1100, 1024}, {90, 70}}) {
    const auto packed = make_payload<Int4>(torch::randn({n, k}));
    for (int m : {1, 3, 70, 600}) {
      const at::Tensor x = torch::randn({m, k}), y = torch::randn({m, n});
      at::set_num_threads(1);
      const at::Tensor forward = packed_linear(x, *packed), backward = packed_matmul(y, *packed);
      for (int more : {2, 3}) {
        at::set_num_threads(more);
        EXPECT_TRUE(torch::equal(forward, packed_linear(x, *packed))) << m << " on " << more;
        EXPECT_TRUE(torch::equal(backward, packed_matmul(y, *packed))) << m << " on " << more;
      }
    }
  }
  at::set_num_threads(threads);
}

TEST(PackedMatmul, IsPlainArithmetic) {
  const WatchedPayload packed(torch::randn({6, 10}));
  const at::Tensor x = torch::randn({3, 10}, torch::requires_grad());
  const at::Tensor y = packed_linear(x, packed);
  EXPECT_FALSE(y.requires_grad());
  {
    c10::InferenceMode guard;
    EXPECT_TRUE(torch::equal(y, packed_linear(x, packed)));
  }
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(PackedMatmul, SaysWhatItWanted) {
  const WatchedPayload packed(torch::randn({6, 10})), cube(torch::randn({2, 3, 4}));
  EXPECT_THAT(
      message_of([&] {
        (void)packed_linear(torch::randn({3, 6}), packed);
      }),
      HasSubstr(
          "packed_linear: the last size of x must be 10 for a packed weight of sizes [6, 10]"));
  EXPECT_THAT(message_of([&] {
                (void)packed_matmul(torch::randn({3, 10}), packed);
              }),
              HasSubstr("packed_matmul: the last size of x must be 6"));
  EXPECT_THAT(message_of([&] {
                (void)packed_linear(torch::ones({3, 10}, at::kLong), packed);
              }),
              HasSubstr("takes an fp32, fp64, bf16 or fp16 tensor, got Long; convert it"));
  EXPECT_THAT(message_of([&] { (void)packed_linear(torch::randn({}), packed); }),
              HasSubstr("the last size"));
  EXPECT_THAT(message_of([&] {
                (void)packed_linear(torch::randn({3, 4}), cube);
              }),
              HasSubstr("multiplies by a packed matrix, but the weight has sizes [2, 3, 4]"));
}

}  // namespace
}  // namespace fourfold

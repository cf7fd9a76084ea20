// SPDX-License-Identifier: Apache-2.0
#include <fourfold/weights/packed_matmul.hpp>
// what is tested comes first
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

namespace fourfold {
namespace {

using ::testing::HasSubstr;

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

TEST(PackedMatmul, KeepsTheDtypeOfX) {
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
  const at::Tensor w = torch::randn({700, 1300});
  const WatchedPayload packed(w);
  for (int m : {1, 3, 70, 600}) {
    const at::Tensor x = torch::randn({m, 1300}), y = torch::randn({m, 700});
    at::set_num_threads(1);
    const at::Tensor forward = packed_linear(x, packed), backward = packed_matmul(y, packed);
    at::set_num_threads(2);
    EXPECT_TRUE(torch::equal(forward, packed_linear(x, packed))) << m;
    EXPECT_TRUE(torch::equal(backward, packed_matmul(y, packed))) << m;
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

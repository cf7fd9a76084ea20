// SPDX-License-Identifier: Apache-2.0
/// Each operator of backward that reads a packed tensor in pieces, against the same on plain values.
#include <fourfold/codec/group_int.hpp>
#include <fourfold/torch/packed_backward.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "../support/message_of.hpp"

namespace {

using fourfold::CodecPayload, fourfold::Int4, fourfold::Int8, fourfold::Payload;
namespace door = fourfold::door;
namespace packed = fourfold::door::detail;
using torch::Tensor;

/// A tensor as autograd would have saved it: 8-bit codes, and a note of what was read of them.
class Saved final : public door::SavedPayload {
 public:
  explicit Saved(const Tensor& values, bool exact = false)
      : codes_(fourfold::make_payload<Int8>(values.flatten(), fourfold::Key{.seed = 1})),
        exact_(exact) {}

  Tensor decompress() const override {
    ++whole;
    return codes_->decompress();
  }
  Tensor decompress(std::int64_t begin, std::int64_t end) const override {
    ++pieces, most = std::max(most, end - begin);
    if (pieces == throw_at) throw std::runtime_error("in the middle");
    return codes_->decompress(begin, end);
  }
  std::int64_t granule() const override { return codes_->granule(); }
  bool exact() const override { return exact_; }
  void reading(std::int64_t bytes) const override { ++open, overwritten = bytes; }
  void read() const noexcept override { --open; }
  void decode(std::int64_t begin, std::int64_t end, float* out) const override {
    codes_->decode(begin, end, out);
  }
  std::shared_ptr<const Payload> compress(const Tensor&) const override {
    TORCH_CHECK(false, "it was saved for reading");
  }
  std::shared_ptr<const Payload> to(at::Device, at::ScalarType) const override { return nullptr; }
  at::IntArrayRef sizes() const override { return codes_->sizes(); }
  at::ScalarType dtype() const override { return codes_->dtype(); }
  at::Device device() const override { return codes_->device(); }
  std::int64_t nbytes() const override { return codes_->nbytes(); }
  std::string codec() const override { return codes_->codec(); }
  bool factorised() const override { return false; }
  const std::vector<Tensor>& buffers() const override { return codes_->buffers(); }

  mutable int whole = 0, pieces = 0, throw_at = 0, open = 0;
  mutable std::int64_t most = 0, overwritten = 0;

 private:
  const std::shared_ptr<const Payload> codes_;
  const bool exact_;
};

class PackedBackward : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(0);
    before_ = door::parameters_state().piece.exchange(kPiece);
  }
  void TearDown() override { door::parameters_state().piece = before_; }

  /// `values` as a packed tensor of the same sizes; `plain()` is what it decodes to.
  Tensor pack(const Tensor& values, bool exact = false) {
    saved_ = std::make_shared<Saved>(values, exact);
    return door::packed_saved_tensor(saved_, values.sizes(), values.contiguous().strides(), 0);
  }
  Tensor plain(const Tensor& like) const {
    const Tensor out = saved_->decompress().view(like.sizes());
    saved_->whole = 0;
    return out;
  }
  /// Read in pieces alone.
  void expect_pieces(std::int64_t most = kPiece) const {
    EXPECT_EQ(saved_->whole, 0);
    EXPECT_GT(saved_->pieces, 1);
    EXPECT_LE(saved_->most, most);
  }
  static constexpr std::int64_t kPiece = 4096;
  std::shared_ptr<Saved> saved_;
  const torch::NoGradGuard no_grad_;

 private:
  std::int64_t before_ = 0;
};

void expect_equal(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  EXPECT_EQ(a.strides(), b.strides());
  EXPECT_EQ(a.scalar_type(), b.scalar_type());
  EXPECT_TRUE(a.equal(b)) << (a - b).abs().max();
}

struct Elementwise {
  const char* name;
  Tensor (*run)(const Tensor& gradient, const Tensor& saved);
};
const std::vector<Elementwise> kElementwise{
    {"gelu", [](const Tensor& g, const Tensor& x) { return at::gelu_backward(g, x); }},
    {"gelu_tanh", [](const Tensor& g, const Tensor& x) { return at::gelu_backward(g, x, "tanh"); }},
    {"silu", [](const Tensor& g, const Tensor& x) { return at::silu_backward(g, x); }},
    {"threshold",
     [](const Tensor& g, const Tensor& x) { return at::threshold_backward(g, x, 0.25); }},
    {"softmax",
     [](const Tensor& g, const Tensor& y) {
       return at::_softmax_backward_data(g, y, -1, y.scalar_type());
     }},
    {"log_softmax",
     [](const Tensor& g, const Tensor& y) {
       return at::_log_softmax_backward_data(g, y, -1, y.scalar_type());
     }},
};

TEST_F(PackedBackward, ElementwiseAndRowsEqualTheWhole) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf})
    for (const Elementwise& op : kElementwise) {
      SCOPED_TRACE(op.name);
      const Tensor x = torch::randn({8, 24, 256}).to(dtype), g = torch::randn_like(x);
      const Tensor held = g;  // so that it is not written over
      const Tensor packed = pack(x);
      const Tensor made = op.run(g, packed);
      expect_pieces();
      expect_equal(made, op.run(g, plain(x)));
    }
}

TEST_F(PackedBackward, AGradientOfNobodyElseTakesTheResult) {
  for (const Elementwise& op : kElementwise) {
    SCOPED_TRACE(op.name);
    const Tensor x = torch::randn({64, 256});
    const Tensor packed = pack(x);
    Tensor g = torch::randn_like(x);
    const Tensor expected = op.run(g, plain(x)), copy = g.clone();
    const void* memory = g.data_ptr();
    EXPECT_EQ(op.run(g, packed).data_ptr(), memory);
    expect_equal(g, expected);
    EXPECT_EQ(saved_->overwritten, g.nbytes()) << "who saved it is told";

    g.copy_(copy);
    const Tensor seen = g;  // somebody else holds it
    EXPECT_NE(op.run(g, packed).data_ptr(), memory);
    EXPECT_TRUE(g.equal(copy));
    EXPECT_EQ(saved_->overwritten, 0);
  }
}

TEST_F(PackedBackward, AGradientThatSharesMemoryIsNotWrittenTo) {
  const Tensor x = torch::randn({64, 256});
  const Tensor packed = pack(x);
  Tensor base = torch::randn({64, 256});
  {
    Tensor view = base.view({64, 256});  // the base is held here
    EXPECT_FALSE(packed::is_ours_to_write(view));
    EXPECT_NE(at::gelu_backward(view, packed).data_ptr(), base.data_ptr());
  }
  Tensor view = base.view({64, 256});
  base.reset();  // now by the view alone
  EXPECT_TRUE(packed::is_ours_to_write(view));
  const Tensor other = view.narrow(0, 0, 1);
  EXPECT_FALSE(packed::is_ours_to_write(view));

  std::vector<float> memory(64 * 256, 1.0F);
  Tensor borrowed = torch::from_blob(memory.data(), {64, 256});
  EXPECT_FALSE(packed::is_ours_to_write(borrowed));
  const Tensor expanded = torch::ones({1, 256}).expand({64, 256});
  expect_equal(at::gelu_backward(expanded, packed), at::gelu_backward(expanded, plain(x)));
}

TEST_F(PackedBackward, LayerNormTakesAPackedWeight) {
  const Tensor x = torch::randn({8, 256}), g = torch::randn_like(x), weight = torch::randn({256});
  const auto statistics = at::native_layer_norm(x, {256}, weight, weight, 1e-5);
  const auto backward = [&](const Tensor& gain) {
    return at::native_layer_norm_backward(g, x, {256}, std::get<1>(statistics),
                                          std::get<2>(statistics), gain, gain, {true, true, true});
  };
  const auto ours = backward(pack(weight)), expected = backward(plain(weight));
  expect_equal(std::get<0>(ours), std::get<0>(expected));
  expect_equal(std::get<1>(ours), std::get<1>(expected));
}

TEST_F(PackedBackward, LayerNormEqualsTheWholeInItsInputAndWithinRoundingInItsWeights) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    const std::int64_t rows = 96, row = 256;
    const Tensor x = torch::randn({4, rows / 4, row}).to(dtype), g = torch::randn_like(x);
    const Tensor held = g;
    const Tensor weight = torch::randn({row}).to(dtype), bias = torch::randn({row}).to(dtype);
    const auto statistics = at::native_layer_norm(x, {row}, weight, bias, 1e-5);
    const Tensor mean = std::get<1>(statistics), rstd = std::get<2>(statistics);
    const Tensor packed = pack(x);
    const auto backward = [&](const Tensor& input, std::array<bool, 3> mask) {
      return at::native_layer_norm_backward(g, input, {row}, mean, rstd, weight, bias, mask);
    };
    const auto [dx, dw, db] = backward(packed, {true, true, true});
    expect_pieces();
    const Tensor values = plain(x);
    const Tensor ex = std::get<0>(backward(values, {true, true, true}));
    expect_equal(dx, ex);
    // LibTorch sums the rows of a piece in the weight's dtype, after some four operations; we add
    // the pieces in fp32 and round once more. So the error is at most (rows of a piece + 5) units of
    // the dtype and as many units of fp32 as there are pieces, of the sum of magnitudes.
    const double unit = dtype == torch::kFloat ? 0x1p-24 : 0x1p-8;
    const double share = static_cast<double>(kPiece / row + 5) * unit + saved_->pieces * 0x1p-24;
    const Tensor normal =
        (values.to(torch::kDouble) - mean.to(torch::kDouble)) * rstd.to(torch::kDouble);
    const auto within = [&](const Tensor& got, const Tensor& terms) {
      const Tensor flat = terms.flatten(0, 1), error = (got.to(torch::kDouble) - flat.sum(0)).abs();
      EXPECT_EQ(got.scalar_type(), dtype);
      EXPECT_TRUE((error <= share * flat.abs().sum(0)).all().item<bool>());
    };
    within(dw, g.to(torch::kDouble) * normal);
    within(db, g.to(torch::kDouble));
    const auto alone = backward(packed, {true, false, false});
    expect_equal(std::get<0>(alone), ex);
    EXPECT_FALSE(std::get<1>(alone).defined() || std::get<2>(alone).defined());
  }
}

/// Sums of k products in pieces: LibTorch's bound for each of two orders, and what rounding each of
/// `pieces` adds (packed_backward.hpp).
void expect_product(const Tensor& got, const Tensor& a, const Tensor& b, int pieces) {
  const Tensor x = a.to(torch::kDouble), y = b.to(torch::kDouble);
  const double unit = got.scalar_type() == torch::kFloat ? 0x1p-24 : 0x1p-8;
  const double sums = static_cast<double>(a.size(1)) * 0x1p-24 + (pieces + 1) * unit;
  const Tensor bound = sums * x.abs().mm(y.abs());
  EXPECT_EQ(got.sizes(), (at::IntArrayRef{a.size(0), b.size(1)}));
  EXPECT_TRUE(got.is_contiguous());
  EXPECT_TRUE(((got.to(torch::kDouble) - x.mm(y)).abs() <= bound).all().item<bool>())
      << ((got.to(torch::kDouble) - x.mm(y)).abs() / bound).max();
}

TEST_F(PackedBackward, ProductsOnEitherSideAndTransposed) {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    const Tensor x = torch::randn({200, 256}).to(dtype);
    const Tensor left = torch::randn({200, 48}).to(dtype),
                 right = torch::randn({256, 24}).to(dtype);
    const Tensor packed = pack(x);
    const Tensor values = plain(x);
    expect_product(left.t().mm(packed), left.t(), values, 7);
    expect_product(packed.t().mm(left), values.t(), left, 7);
    expect_product(packed.mm(right), values, right, 1);
    expect_product(right.t().mm(packed.t()), right.t(), values.t(), 1);
    expect_pieces(2 * kPiece);
  }
}

TEST_F(PackedBackward, ASumOverWhatIsHeldExactlyIsLibTorchsOwn) {
  const Tensor x = torch::randn({200, 256}), g = torch::randn({200, 48});
  const Tensor packed = pack(x, /*exact=*/true);
  const Tensor made = g.t().mm(packed);
  EXPECT_EQ(saved_->pieces, 0);
  EXPECT_EQ(saved_->whole, 1);
  expect_equal(made, g.t().mm(plain(x)));
}

TEST_F(PackedBackward, ViewsThatCannotBeReadInPiecesAreReadWhole) {
  const Tensor x = torch::randn({64, 256});
  const Tensor packed = pack(x);
  const Tensor values = plain(x);
  const Tensor g = torch::randn({256, 64});
  expect_equal(at::gelu_backward(g, packed.t()), at::gelu_backward(g, values.t()));
  const Tensor part = torch::randn({64, 100});
  expect_equal(at::gelu_backward(part, packed.narrow(1, 3, 100)),
               at::gelu_backward(part, values.narrow(1, 3, 100)));
  const Tensor rows = torch::randn({40, 256}), held = rows;
  saved_->whole = saved_->pieces = 0;
  const Tensor made = at::gelu_backward(rows, packed.narrow(0, 8, 40));
  expect_pieces();
  expect_equal(made, at::gelu_backward(rows, values.narrow(0, 8, 40)));
}

TEST_F(PackedBackward, AnyOtherOperatorGetsPlainValues) {
  const Tensor x = torch::randn({64, 256});
  const Tensor packed = pack(x);
  const Tensor values = plain(x);
  expect_equal(packed.mul(2), values * 2);
  expect_equal(torch::cat({packed, values}), torch::cat({values, values}));
  expect_equal(packed.to(torch::kDouble), values.to(torch::kDouble));
  expect_equal(packed.conj(), values);
  EXPECT_THAT(message_of([&] { packed.data_ptr(); }), testing::HasSubstr("held packed"));
  Tensor target = packed;
  EXPECT_THAT(message_of([&] { target.add_(1); }), testing::HasSubstr("saved"));
}

TEST_F(PackedBackward, WhatLibTorchRefusesItRefusesInItsWords) {
  const Tensor x = torch::randn({64, 256}), g = torch::randn({60, 48});
  const Tensor packed = pack(x);
  const Tensor values = plain(x);
  EXPECT_EQ(message_of([&] { g.t().mm(packed); }), message_of([&] { g.t().mm(values); }));
  EXPECT_THAT(message_of([&] { g.t().mm(packed); }), testing::HasSubstr("shapes"));
}

TEST_F(PackedBackward, AnErrorInTheMiddleLeavesNoTensorHeld) {
  const Tensor x = torch::randn({64, 256}), g = torch::randn({64, 256});
  const Tensor packed = pack(x);
  const Tensor held = g;
  for (int i = 0; i < 2; ++i) {
    saved_->throw_at = saved_->pieces + 2;
    if (i == 0) {
      EXPECT_THROW(at::gelu_backward(g, packed), std::runtime_error);
    }
    if (i == 1) {
      EXPECT_THROW(g.t().mm(packed), std::runtime_error);
    }
    EXPECT_EQ(saved_->open, 0) << "reading has ended";
  }
  saved_->throw_at = 0;
  expect_equal(at::gelu_backward(g, packed), at::gelu_backward(g, plain(x)));
}

}  // namespace

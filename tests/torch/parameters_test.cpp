// SPDX-License-Identifier: Apache-2.0
#include <fourfold/torch/parameters.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/torch/saved_tensors.hpp>

#include "tests/support/message_of.hpp"

#include <atomic>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace fourfold::tests {
namespace {

using door::is_packed;
using door::payload_of;
using testing::AllOf;
using testing::HasSubstr;

at::Tensor packed(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return door::packed_tensor(make_payload<Int8>(torch::randn(sizes, dtype)));
}

/// is_alias_of looks at data pointers where storages differ, and a packed storage refuses.
bool same_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

/// Two sums of the same `terms` products in fp32, in any two orders: each is within
/// gamma(terms) * sum |products| of the exact one (Higham, Accuracy and Stability, section 3.1).
at::Tensor order_bound(const at::Tensor& x, const at::Tensor& w, std::int64_t terms) {
  return at::matmul(x.detach().abs(), w.detach().abs()) *
         (2.1 * static_cast<double>(terms + 1) * 0x1p-24);
}

class ParametersDoor : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }
};

TEST_F(ParametersDoor, APackedTensorLooksLikeAPlainOne) {
  const at::Tensor w = packed({6, 4}, at::kHalf);
  EXPECT_TRUE(is_packed(w));
  EXPECT_EQ(w.sizes(), (at::IntArrayRef{6, 4}));
  EXPECT_EQ(w.strides(), (at::IntArrayRef{4, 1}));
  EXPECT_EQ(w.scalar_type(), at::kHalf);
  EXPECT_TRUE(w.device().is_cpu() && w.is_leaf() && w.is_contiguous());
  EXPECT_EQ(w.nbytes(), 6u * 4 * 2);
  EXPECT_EQ(payload_of(w)->codec(), "Int8");
  const at::Tensor plain = torch::ones({2});
  EXPECT_FALSE(is_packed(plain) || is_packed(at::Tensor()));
  EXPECT_EQ(payload_of(plain), nullptr);
  EXPECT_TRUE(decompress(plain).is_same(plain));
}

TEST_F(ParametersDoor, ItsBytesCannotBePointedTo) {
  const at::Tensor w = packed({6, 4});
  const auto wanted =
      AllOf(HasSubstr("Int8"), HasSubstr("fourfold::decompress"), HasSubstr("fourfold::save"));
  EXPECT_THAT(message_of([&] { (void)w.data_ptr(); }), wanted);
  EXPECT_THAT(message_of([&] { (void)w.const_data_ptr<float>(); }), wanted);
  EXPECT_THAT(message_of([&] { (void)w.t().mutable_data_ptr<float>(); }), wanted);
  EXPECT_THAT(message_of([&] { (void)w.storage().data(); }), wanted);
  EXPECT_THAT(message_of([&] { (void)w.accessor<float, 2>(); }), wanted);
}

TEST_F(ParametersDoor, PrintsItsValues) {
  const at::Tensor w = packed({2, 3});
  std::ostringstream of_packed, of_plain;
  of_packed << w;
  of_plain << decompress(w);
  EXPECT_EQ(of_packed.str(), of_plain.str());
}

TEST_F(ParametersDoor, ViewsStayPacked) {
  const at::Tensor w = packed({4, 6}), values = decompress(w);
  const std::vector<std::function<at::Tensor(const at::Tensor&)>> views{
      [](const at::Tensor& t) { return t.t(); },
      [](const at::Tensor& t) { return t.numpy_T(); },
      [](const at::Tensor& t) { return t.transpose(0, 1); },
      [](const at::Tensor& t) {
        return t.permute({1, 0});
      },
      [](const at::Tensor& t) { return t.detach(); },
      [](const at::Tensor& t) { return t.alias(); },
      [](const at::Tensor& t) {
        return t.view({3, 8});
      },
      [](const at::Tensor& t) { return t.reshape({24}); },
      [](const at::Tensor& t) { return t.flatten(); },
      [](const at::Tensor& t) { return t.select(0, 2); },
      [](const at::Tensor& t) { return t.slice(1, 1, 6, 2); },
      [](const at::Tensor& t) { return t.narrow(0, 1, 2); },
      [](const at::Tensor& t) { return t[3]; },
      [](const at::Tensor& t) {
        return t.unsqueeze(0).expand({2, 4, 6});
      },
      [](const at::Tensor& t) { return t.chunk(2, 1)[1]; },
      [](const at::Tensor& t) { return t.split(3)[1]; },
      [](const at::Tensor& t) { return t.unbind(1)[4]; },
      [](const at::Tensor& t) { return t.diagonal(); },
      [](const at::Tensor& t) {
        return t.as_strided({3, 2}, {1, 7}, 2);
      },
      [](const at::Tensor& t) { return t.unfold(1, 3, 2); },
      [](const at::Tensor& t) { return t.squeeze().contiguous(); },
      [](const at::Tensor& t) { return t.to(at::kFloat); }};
  for (std::size_t i = 0; i < views.size(); ++i) {
    const at::Tensor view = views[i](w);
    EXPECT_TRUE(is_packed(view)) << "view " << i;
    EXPECT_TRUE(same_storage(view, w)) << "view " << i;
    EXPECT_TRUE(torch::equal(decompress(view), views[i](values))) << "view " << i;
    EXPECT_TRUE(torch::equal(view + 0, views[i](values))) << "view " << i;
  }
  EXPECT_FALSE(is_packed(w.t().contiguous()));  // a copy in another order: plain values
  EXPECT_TRUE(torch::equal(w.t().contiguous(), values.t()));
  EXPECT_THAT(message_of([&] { (void)w.view(at::kInt); }),
              AllOf(HasSubstr("other bytes"), HasSubstr("to(dtype)")));
}

TEST_F(ParametersDoor, CopiesStayPackedAndAreApart) {
  const at::Tensor w = packed({4, 6}), values = decompress(w);
  for (const at::Tensor& copy :
       {w.clone(), w.t().clone().t(), w.to(at::kFloat, false, /*copy=*/true)}) {
    ASSERT_TRUE(is_packed(copy));
    EXPECT_FALSE(same_storage(copy, w));
    copy.zero_();
    EXPECT_TRUE(torch::equal(decompress(w), values));
    EXPECT_TRUE(torch::equal(decompress(copy), torch::zeros({4, 6})));
  }
  const at::Tensor half = w.to(at::kHalf);
  EXPECT_TRUE(is_packed(half));
  EXPECT_TRUE(torch::equal(decompress(half), values.to(at::kHalf)));
  EXPECT_EQ(payload_of(half)->buffers()[0].const_data_ptr(),
            payload_of(w)->buffers()[0].const_data_ptr());
  EXPECT_FALSE(is_packed(w.to(at::kInt)));
  EXPECT_TRUE(torch::equal(w.to(at::kInt), values.to(at::kInt)));
  EXPECT_FALSE(is_packed(w.slice(0, 0, 1).clone()));  // would hold on to all of it
}

TEST_F(ParametersDoor, AnyOperatorReadsItsValues) {
  const at::Tensor w = packed({4, 6}), values = decompress(w), x = torch::randn({4, 6});
  EXPECT_TRUE(torch::equal(w + x, values + x));
  EXPECT_TRUE(torch::equal(x * w, x * values));
  EXPECT_TRUE(torch::equal(w.sum(0), values.sum(0)));
  EXPECT_TRUE(torch::equal(w.tanh(), values.tanh()));
  EXPECT_TRUE(torch::equal(torch::cat({x, w, w}), torch::cat({x, values, values})));
  EXPECT_TRUE(torch::equal(torch::stack({w, x}), torch::stack({values, x})));
  EXPECT_TRUE(torch::equal(torch::where(w > 0, w, x), torch::where(values > 0, values, x)));
  EXPECT_TRUE(
      torch::equal(w.index({torch::tensor({2, 0})}), values.index({torch::tensor({2, 0})})));
  EXPECT_TRUE(torch::equal(x.index({w > 0}), x.index({values > 0})));
  EXPECT_TRUE(torch::equal(std::get<0>(w.max(1)), std::get<0>(values.max(1))));
  EXPECT_TRUE(torch::equal(torch::layer_norm(x, {6}, w[0], w[1]),
                           torch::layer_norm(x, {6}, values[0], values[1])));
  EXPECT_EQ(w[1][2].item<float>(), values[1][2].item<float>());
  EXPECT_TRUE(torch::equal(w, values) && w.allclose(values));
  at::Tensor y = x.clone();
  y.add_(w).copy_(y.mul(w));
  EXPECT_TRUE(torch::equal(y, (x + values) * values));
  at::Tensor out = torch::empty({4, 6});
  at::add_out(out, w, w);
  EXPECT_TRUE(torch::equal(out, values + values));
}

TEST_F(ParametersDoor, DifferentiatesTheOthersThroughAnyOperator) {
  const at::Tensor w = packed({4, 6}), values = decompress(w);
  const at::Tensor x = torch::randn({4, 6}, torch::requires_grad());
  const auto gradient = [&](const at::Tensor& by) {
    return torch::autograd::grad({((x * by).tanh() + by).pow(2).sum()}, {x})[0];
  };
  EXPECT_TRUE(torch::equal(gradient(w), gradient(values)));
}

// ---- products ---------------------------------------------------------------------------------

struct Product {
  const char* name;
  std::vector<std::int64_t> packed_sizes, x_sizes;
  std::function<at::Tensor(const at::Tensor& w, const at::Tensor& x)> call;
  /// (left, right) whose product of magnitudes bounds the rounding, shaped as the result.
  std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor& w, const at::Tensor& x)>
      factors;
};

const std::vector<Product>& products() {
  using T = at::Tensor;
  static const std::vector<Product> all{
      {"mm(x, w)",
       {7, 5},
       {3, 7},
       [](const T& w, const T& x) { return x.mm(w); },
       [](const T& w, const T& x) { return std::pair(x, w); }},
      {"mm(x, w^T)",
       {7, 5},
       {3, 5},
       [](const T& w, const T& x) { return x.mm(w.t()); },
       [](const T& w, const T& x) { return std::pair(x, w.t()); }},
      {"mm(w, x)",
       {7, 5},
       {5, 3},
       [](const T& w, const T& x) { return w.mm(x); },
       [](const T& w, const T& x) { return std::pair(w, x); }},
      {"mm(w^T, x)",
       {7, 5},
       {7, 3},
       [](const T& w, const T& x) { return w.t().mm(x); },
       [](const T& w, const T& x) { return std::pair(w.t(), x); }},
      {"mm(x, rows of w^T)",
       {7, 5},
       {3, 5},
       [](const T& w, const T& x) { return x.mm(w.narrow(0, 2, 4).t()); },
       [](const T& w, const T& x) { return std::pair(x, w.narrow(0, 2, 4).t()); }},
      {"mm(x, columns of w)",
       {7, 5},
       {3, 7},
       [](const T& w, const T& x) { return x.mm(w.narrow(1, 1, 3)); },
       [](const T& w, const T& x) { return std::pair(x, w.narrow(1, 1, 3)); }},
      {"mv(w, x)",
       {7, 5},
       {5},
       [](const T& w, const T& x) { return w.mv(x); },
       [](const T& w, const T& x) { return std::pair(w, x); }},
      {"linear(x, w)",
       {7, 5},
       {2, 3, 5},
       [](const T& w, const T& x) { return at::linear(x, w); },
       [](const T& w, const T& x) { return std::pair(x, w.t()); }},
      {"matmul(x, w)",
       {7, 5},
       {2, 3, 7},
       [](const T& w, const T& x) { return x.matmul(w); },
       [](const T& w, const T& x) { return std::pair(x, w); }},
      {"matmul(w, x)",
       {7, 5},
       {2, 5, 3},
       [](const T& w, const T& x) { return w.matmul(x); },
       [](const T& w, const T& x) { return std::pair(w, x); }},
      {"matmul(v, w)",
       {7, 5},
       {7},
       [](const T& w, const T& x) { return x.matmul(w); },
       [](const T& w, const T& x) { return std::pair(x, w); }},
      {"bmm(x, w)",
       {2, 7, 5},
       {2, 3, 7},
       [](const T& w, const T& x) { return x.bmm(w); },
       [](const T& w, const T& x) { return std::pair(x, w); }},
      {"bmm(x, w^T)",
       {2, 7, 5},
       {2, 3, 5},
       [](const T& w, const T& x) { return x.bmm(w.transpose(1, 2)); },
       [](const T& w, const T& x) { return std::pair(x, w.transpose(1, 2)); }},
      {"bmm(w, x)",
       {2, 7, 5},
       {2, 5, 3},
       [](const T& w, const T& x) { return w.bmm(x); },
       [](const T& w, const T& x) { return std::pair(w, x); }},
  };
  return all;
}

TEST_F(ParametersDoor, MultipliesLikePlainValues) {
  for (const Product& product : products()) {
    SCOPED_TRACE(product.name);
    const at::Tensor w = packed(product.packed_sizes), values = decompress(w);
    const at::Tensor x = torch::randn(product.x_sizes, torch::requires_grad());
    const at::Tensor y = product.call(w, x), wanted = product.call(values, x);
    ASSERT_EQ(y.sizes(), wanted.sizes());
    const auto [left, right] = product.factors(values, x);
    EXPECT_TRUE(((y - wanted).abs() <= order_bound(left, right, 7)).all().item<bool>());

    // The gradient is such a product too: of at most 7 terms, each at most |g| |w|.
    const at::Tensor g = torch::randn_like(y);
    const at::Tensor dx = torch::autograd::grad({y}, {x}, {g})[0];
    const at::Tensor dx_wanted = torch::autograd::grad({wanted}, {x}, {g})[0];
    const double bound =
        2.1 * 15 * 0x1p-24 * 14 * (g.abs().max() * values.abs().max()).item<double>();
    EXPECT_LE((dx - dx_wanted).abs().max().item<double>(), bound);
  }
}

TEST_F(ParametersDoor, GradientsOfProductsAreRightTwice) {
  for (const Product& product : products()) {
    SCOPED_TRACE(product.name);
    const at::Tensor w = packed(product.packed_sizes, at::kDouble), values = decompress(w);
    const at::Tensor x =
        torch::randn(product.x_sizes, torch::dtype(at::kDouble).requires_grad(true));
    const auto twice = [&](const at::Tensor& by) {
      const at::Tensor y = product.call(by, x.tanh());
      const at::Tensor dx =
          torch::autograd::grad({y.pow(3).sum()}, {x}, {}, true, /*create_graph=*/true)[0];
      return std::pair(dx.detach(), torch::autograd::grad({dx.pow(2).sum()}, {x})[0]);
    };
    const auto [first, second] = twice(w);
    const auto [first_wanted, second_wanted] = twice(values);
    // fp64: thousands of roundings of 2^-53 stay under 2^-40 of the largest value.
    EXPECT_LE((first - first_wanted).abs().max().item<double>(),
              0x1p-40 * (1 + first_wanted.abs().max().item<double>()));
    EXPECT_LE((second - second_wanted).abs().max().item<double>(),
              0x1p-40 * (1 + second_wanted.abs().max().item<double>()));
    EXPECT_GT(second_wanted.abs().max().item<double>(), 1e-3);
  }
}

TEST_F(ParametersDoor, AddmmTakesItsScalars) {
  const at::Tensor w = packed({7, 5}, at::kDouble), values = decompress(w);
  const at::Tensor x = torch::randn({3, 5}, at::kDouble),
                   bias = torch::randn({7}, torch::dtype(at::kDouble).requires_grad(true));
  for (const auto& [beta, alpha] :
       {std::pair(1.0, 1.0), std::pair(0.0, 1.0), std::pair(2.0, -0.5)}) {
    const at::Tensor y = at::addmm(bias, x, w.t(), beta, alpha),
                     wanted = at::addmm(bias, x, values.t(), beta, alpha);
    EXPECT_LE((y - wanted).abs().max().item<double>(), 0x1p-40);
    if (beta != 0) {
      EXPECT_TRUE(torch::equal(torch::autograd::grad({y.sum()}, {bias})[0],
                               torch::full({7}, 3 * beta, at::kDouble)));
    }
  }
  EXPECT_TRUE(torch::allclose(at::addmm(w, torch::eye(7, at::kDouble), w),
                              2 * values));  // packed on every place
}

TEST_F(ParametersDoor, RefusesProductsThatDoNotFit) {
  const at::Tensor w = packed({7, 5});
  EXPECT_THAT(message_of([&] {
                (void)torch::randn({3, 6}).mm(w);
              }),
              HasSubstr("mat1 and mat2 shapes cannot be multiplied"));
  EXPECT_THAT(message_of([&] {
                (void)torch::randn({3, 7}, at::kDouble).mm(w);
              }),
              HasSubstr("one dtype, but got Double and a packed Float"));
  EXPECT_THAT(message_of([&] {
                (void)torch::randn({2, 3, 6}).bmm(packed({2, 7, 5}));
              }),
              HasSubstr("size"));
  EXPECT_THAT(message_of([&] {
                (void)at::conv1d(torch::randn({1, 4, 9}), packed({6, 5, 3}));
              }),
              HasSubstr("channels"));
}

TEST_F(ParametersDoor, EmbeddingReadsRows) {
  const at::Tensor w = packed({10, 6}), values = decompress(w);
  const at::Tensor which = torch::tensor({{3, 9}, {0, 3}});
  EXPECT_TRUE(torch::equal(at::embedding(w, which), at::embedding(values, which)));
  EXPECT_TRUE(torch::equal(at::embedding(w.narrow(0, 2, 4), which.fmod(4)),
                           at::embedding(values.narrow(0, 2, 4), which.fmod(4))));
  for (const int wrong : {10, -1}) {
    EXPECT_THAT(message_of([&] {
                  (void)at::embedding(w, torch::tensor({0, wrong}));
                }),
                AllOf(HasSubstr("index out of range in self"), HasSubstr(std::to_string(wrong)),
                      HasSubstr("10 rows")));
  }
  EXPECT_EQ(at::embedding(w.to(at::kBFloat16), which).scalar_type(), at::kBFloat16);
}

TEST_F(ParametersDoor, AutocastCastsAsForPlainValues) {
  const at::Tensor w = packed({8, 8}), values = decompress(w), x = torch::randn({4, 8}),
                   kernel = packed({8, 4, 3});
  const at::Tensor batch = packed({2, 8, 8}), image = torch::randn({1, 4, 9}),
                   bias = torch::randn({8});
  const at::Tensor xs = torch::randn({2, 4, 8});
  const std::vector<std::function<at::Tensor(bool)>> calls{
      [&](bool p) { return x.mm(p ? w : values); },
      [&](bool p) { return at::addmm(bias, x, (p ? w : values).t()); },
      [&](bool p) { return at::linear(x, p ? w : values, bias); },
      [&](bool p) { return at::linear(xs, p ? w : values); },
      [&](bool p) { return x.matmul(p ? w : values); },
      [&](bool p) { return xs.bmm(p ? batch : decompress(batch)); },
      [&](bool p) { return at::conv1d(image, p ? kernel : decompress(kernel), bias); },
      [&](bool p) {
        return at::conv_transpose1d(torch::ones({1, 8, 5}), p ? kernel : decompress(kernel));
      },
      [&](bool p) {
        return at::embedding(p ? w : values, torch::tensor({1, 2}));
      },
      [&](bool p) { return (p ? w : values).tanh(); },
      [&](bool p) { return (p ? w : values).mv(x[0]); },
      [&](bool p) { return at::layer_norm(x, {8}, (p ? w : values)[0]); }};
  const bool cache = at::autocast::is_autocast_cache_enabled();
  at::autocast::set_autocast_cache_enabled(false);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const at::Tensor got = calls[i](true), wanted = calls[i](false);
    EXPECT_EQ(got.scalar_type(), wanted.scalar_type()) << "call " << i;
    // bf16: plain values are rounded first (2^-9 each), then the result; at most 32 products.
    const double unit = wanted.scalar_type() == at::kBFloat16 ? 0x1p-8 : 0x1p-22;
    EXPECT_LE((got.to(at::kFloat) - wanted.to(at::kFloat)).abs().max().item<double>(),
              32 * 3 * unit * 4)
        << "call " << i;
  }
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::set_autocast_cache_enabled(cache);
  EXPECT_EQ(at::linear(x, w).scalar_type(), at::kFloat);
}

// ---- writes -----------------------------------------------------------------------------------

/// Every way of writing: on a packed tensor it must do what it does on plain values, up to the
/// codec's half step, or be refused. None may be lost.
TEST_F(ParametersDoor, EveryWriteGoesThrough) {
  const at::Tensor x = torch::randn({4, 6});
  const std::vector<std::function<void(at::Tensor)>> writes{
      [&](at::Tensor w) { w.copy_(x); },
      [&](at::Tensor w) { w.add_(x); },
      [&](at::Tensor w) { w.sub_(x, 2); },
      [&](at::Tensor w) { w.mul_(3); },
      [&](at::Tensor w) { w.div_(2); },
      [&](at::Tensor w) { w.zero_(); },
      [&](at::Tensor w) { w.fill_(1.5); },
      [&](at::Tensor w) {
        torch::manual_seed(1);
        w.normal_();
      },
      [&](at::Tensor w) {
        torch::manual_seed(1);
        w.uniform_(-1, 1);
      },
      [&](at::Tensor w) { w.clamp_(-0.5, 0.5); },
      [&](at::Tensor w) { w.relu_(); },
      [&](at::Tensor w) { w.addcmul_(x, x, 0.1); },
      [&](at::Tensor w) { w.lerp_(x, 0.3); },
      [&](at::Tensor w) { w.masked_fill_(x > 0, 2); },
      [&](at::Tensor w) { w.index_fill_(0, torch::tensor({1}), 4); },
      [&](at::Tensor w) {
        w.index_put_({torch::tensor({1, 3})}, x.slice(0, 0, 2));
      },
      [&](at::Tensor w) {
        w.scatter_(1, torch::zeros({4, 1}, at::kLong), 7.0);
      },
      [&](at::Tensor w) { w += x; },
      [&](at::Tensor w) { w[2] = x[0]; },
      [&](at::Tensor w) { w[1][3].fill_(9); },
      [&](at::Tensor w) { w.t().mul_(x.t()); },
      [&](at::Tensor w) {
        w.view({3, 8}).select(0, 1).zero_();
      },
      [&](at::Tensor w) { w.slice(1, 0, 6, 2).add_(1); },
      [&](at::Tensor w) { w.detach().add_(1); },
      [&](at::Tensor w) { w.index_put_({0}, x[1]); },
      [&](at::Tensor w) { at::add_out(w, x, x); },
      [&](at::Tensor w) {
        at::mm_out(w, x, torch::ones({6, 6}));
      },
      [&](at::Tensor w) { at::clamp_out(w, x, -1, 1); },
      [&](at::Tensor w) {
        w.addmm_(x, torch::ones({6, 6}));
      },
      [&](at::Tensor w) { w.fill_diagonal_(3); },
      [&](at::Tensor w) { w.add_(w); },
      [&](at::Tensor w) { w.mul_(w.flip(0)); },
      [&](at::Tensor w) {
        w.copy_(w.view({6, 4}).t().clone());
      },
      [&](at::Tensor w) {
        at::_foreach_mul_({w, w.clone()}, 2);
      },
      [&](at::Tensor w) { w.data().fill_(1); },
      [&](at::Tensor w) { w.tril_(); },
      [&](at::Tensor w) { w.cumsum_(0); },
      [&](at::Tensor w) { w.set_(x.clone()); },
      [&](at::Tensor w) {
        torch::manual_seed(1);
        torch::nn::init::xavier_uniform_(w);
      },
      [&](at::Tensor w) {
        torch::manual_seed(1);
        torch::nn::init::orthogonal_(w);
      },
      [&](at::Tensor w) {
        at::embedding_renorm_(w, torch::tensor({1, 2}), 0.5, 2);
      },
      [&](at::Tensor w) { w.variable_data().mul_(2); },
      [&](at::Tensor w) { at::special_expit_out(w, x); },
      [&](at::Tensor w) { w.multiply_(2); },
      [&](at::Tensor w) { w.swapaxes(0, 1)[2].fill_(5); },
      [&](at::Tensor w) { w.unbind(0)[1].zero_(); },
      [&](at::Tensor w) {
        w.exponential_();
        w.fill_(2);
      }};
  torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < writes.size(); ++i) {
    const at::Tensor w = packed({4, 6}), alias = w.t(), plain = decompress(w).clone();
    const std::int64_t version = w._version(), plain_version = plain._version();
    writes[i](w);
    writes[i](plain);
    ASSERT_TRUE(is_packed(w)) << "write " << i;
    // What was written was rounded once: half a step of what plain values are now. A call with two
    // writes rounds in between, but then its last write sets every value.
    const at::Tensor error = (decompress(w) - plain).abs();
    EXPECT_TRUE((error <= Int8{}.error_bound(plain) + plain.abs() * 0x1p-20).all().item<bool>())
        << "write " << i << "\n"
        << w << plain;
    EXPECT_TRUE(torch::equal(decompress(alias), decompress(w).t())) << "write " << i;
    EXPECT_EQ(w._version() > version, plain._version() > plain_version) << "write " << i;
  }
}

TEST_F(ParametersDoor, WritesThatCannotBeAreRefusedAndChangeNothing) {
  const at::Tensor w = packed({4, 6}), x = torch::randn({4, 6});
  const at::Tensor values = decompress(w).clone();
  const std::vector<std::pair<std::function<void(at::Tensor)>, const char*>> writes{
      {[&](at::Tensor t) {
         t.resize_({2, 3});
       },
       "sizes, strides or memory"},
      {[&](at::Tensor t) { t.t_(); }, "sizes, strides or memory"},
      {[&](at::Tensor t) { t.transpose_(0, 1); }, "sizes, strides or memory"},
      {[&](at::Tensor t) { t.unsqueeze_(0); }, "sizes, strides or memory"},
      {[&](at::Tensor t) { t.as_strided_({2}, {1}); }, "sizes, strides or memory"},
      {[&](at::Tensor t) { t.set_(); }, "sizes, strides or memory"},
      {[&](at::Tensor t) { t.set_(torch::ones({3})); }, "of sizes [4, 6] the sizes [3]"},
      {[&](at::Tensor t) {
         at::mm_out(t, x, torch::ones({6, 2}));
       },
       "sizes, strides or memory"},
      {[&](at::Tensor t) { t.fill_(std::numeric_limits<float>::quiet_NaN()); }, "nan"},
      {[&](at::Tensor t) { t.div_(0); }, "finite"},
      {[&](at::Tensor t) {
         t.copy_(torch::ones({5, 5}));
       },
       "size"},
      {[&](at::Tensor t) {
         t.add_(torch::ones({4, 6}, torch::requires_grad()));
       },
       "detach() the values first"}};
  for (const auto& [write, words] : writes) {
    EXPECT_THAT(message_of([&] { write(w); }), HasSubstr(words));
    EXPECT_EQ(w.sizes(), (at::IntArrayRef{4, 6}));
    EXPECT_TRUE(torch::equal(decompress(w), values)) << words;
    EXPECT_FALSE(w.requires_grad());
  }
}

TEST_F(ParametersDoor, SetDataReplacesIt) {
  const at::Tensor w = packed({4, 6}), plain = torch::randn({4, 6}, torch::requires_grad());
  w.set_data(torch::ones({4, 6}));
  EXPECT_FALSE(is_packed(w));
  EXPECT_TRUE(torch::equal(w, torch::ones({4, 6})));
  plain.set_data(packed({4, 6}));  // as Module::clone does
  EXPECT_TRUE(is_packed(plain));
  EXPECT_FALSE(plain.requires_grad());
}

// ---- frozen -----------------------------------------------------------------------------------

TEST_F(ParametersDoor, RequiresGradIsRefused) {
  const at::Tensor w = packed({4, 6});
  const auto wanted =
      AllOf(HasSubstr("Int8"), HasSubstr("frozen"), HasSubstr("LowRank"), HasSubstr("decompress"));
  EXPECT_THAT(message_of([&] { w.requires_grad_(true); }), wanted);
  EXPECT_FALSE(w.requires_grad());
  w.requires_grad_(false);
  EXPECT_THAT(message_of([&] { w.__dispatch_requires_grad_(true); }), wanted);
  // Past every hook: found by the next operator.
  w.set_requires_grad(true);
  for (const auto& use : std::vector<std::function<void()>>{
           [&] {
             (void)torch::ones({2, 4}).mm(w);
           },
           [&] {
             (void)at::linear(torch::ones({2, 6}), w);
           },
           [&] { (void)(w + 1); }, [&] { (void)w.t(); },
           [&] { (void)at::embedding(w, torch::tensor({1})); },
           [&] {
             (void)at::conv1d(torch::ones({1, 6, 5}), w.unsqueeze(-1));
           }})
    EXPECT_THAT(message_of(use), wanted);
  torch::NoGradGuard no_grad;
  EXPECT_EQ((w + 1).sizes(), w.sizes());  // no gradient is asked for
  const at::Tensor plain = torch::ones({2});
  plain.requires_grad_(true);  // any other tensor is as ever
  EXPECT_TRUE(plain.requires_grad());
}

TEST_F(ParametersDoor, BackwardKeepsThePayloadAndNotTheValues) {
  const at::Tensor w = packed({64, 64});
  const at::Tensor x = torch::randn({2, 64}, torch::requires_grad());
  const at::Tensor y = at::linear(x, w), before = decompress(w).clone();
  {
    torch::NoGradGuard no_grad;
    w.zero_();
  }  // the graph has the codes that forward saw
  const at::Tensor dx = torch::autograd::grad({y.sum()}, {x})[0];
  EXPECT_TRUE(torch::allclose(dx, before.sum(0).expand({2, 64}), 1e-5, 1e-5));
}

// ---- what the fallback decompresses -----------------------------------------------------------

/// Asks of every tensor that autograd saves whose values it has.
class Asks : public door::SavedTensors {
 public:
  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    seen.push_back(door::payload_of_dense(tensor));
    return door::saved_reference(tensor);
  }
  std::vector<std::shared_ptr<const Payload>> seen;
};

TEST_F(ParametersDoor, KnowsThePayloadOfWhatItDecompressed) {
  const at::Tensor w = packed({8, 8}), x = torch::randn({8, 8}, torch::requires_grad());
  const auto packer = std::make_shared<Asks>();
  {
    const door::SavedTensorsScope scope(packer);
    (void)(x * w);  // saves plain values of w, since x requires a gradient
  }
  EXPECT_THAT(packer->seen, testing::ElementsAre(payload_of(w)));
  at::Tensor dense = decompress(w);
  EXPECT_EQ(door::payload_of_dense(dense), payload_of(w));
  EXPECT_EQ(door::payload_of_dense(dense.t()), payload_of(w));  // by storage
  EXPECT_EQ(door::payload_of_dense(decompress(w.t())), payload_of(w));
  EXPECT_EQ(door::payload_of_dense(decompress(w.narrow(0, 2, 3))), nullptr);  // a part of it
  dense.add_(1);
  EXPECT_EQ(door::payload_of_dense(dense), nullptr);  // no longer what the payload says
  EXPECT_EQ(door::payload_of_dense(x), nullptr);
  EXPECT_EQ(door::payload_of_dense(at::Tensor()), nullptr);
}

TEST_F(ParametersDoor, ForgetsWhatDied) {
  const at::Tensor w = packed({8, 8});
  for (int i = 0; i < 1000; ++i) (void)decompress(w);
  EXPECT_LE(door::parameters_state().dense.size(), 256u);
}

TEST_F(ParametersDoor, PayloadsDieWithTheirTensors) {
  std::weak_ptr<const Payload> payload;
  {
    const at::Tensor w = packed({8, 8});
    payload = payload_of(w);
    const at::Tensor y = at::linear(torch::randn({2, 8}, torch::requires_grad()), w);
    y.sum().backward();
    EXPECT_FALSE(payload.expired());
  }
  EXPECT_TRUE(payload.expired());
}

// ---- surroundings -----------------------------------------------------------------------------

TEST_F(ParametersDoor, WorksUnderInferenceMode) {
  const at::Tensor w = packed({8, 8}), values = decompress(w);
  c10::InferenceMode mode;
  EXPECT_TRUE(torch::allclose(at::linear(torch::ones({1, 8}), w), values.sum(1), 1e-5, 1e-5));
  EXPECT_TRUE(torch::equal(w.t() + 1, values.t() + 1));
  const at::Tensor made_here = packed({8, 8});
  EXPECT_TRUE(torch::equal(made_here + 0, decompress(made_here)));
}

TEST_F(ParametersDoor, IsReadByManyThreadsWhileOneWrites) {
  const at::Tensor w = packed({64, 64}), x = torch::ones({1, 64});
  w.fill_(1);
  std::atomic<bool> torn{false}, done{false};
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i)
    readers.emplace_back([&] {
      torch::NoGradGuard no_grad;
      while (!done) {
        const at::Tensor y = at::linear(x, w);  // all of one write: 64, or all of the other: 128
        torn = torn || !torch::equal(y, y[0][0].expand({1, 64}));
      }
    });
  for (int i = 0; i < 50; ++i) w.fill_(1 + i % 2);
  done = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_FALSE(torn);
}

TEST_F(ParametersDoor, EmptyAndScalarTensors) {
  for (const std::vector<std::int64_t>& sizes :
       {std::vector<std::int64_t>{0, 4}, std::vector<std::int64_t>{}}) {
    const at::Tensor w = packed(sizes), values = decompress(w);
    EXPECT_TRUE(torch::equal(w + 1, values + 1));
    EXPECT_TRUE(is_packed(w.clone()));
  }
  EXPECT_EQ(torch::ones({3, 0}).mm(packed({0, 4})).sizes(), (at::IntArrayRef{3, 4}));
}

void foreign_fallback(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) {}

using ParametersDoorDeathTest = ParametersDoor;

TEST_F(ParametersDoorDeathTest, RefusesAKeyThatIsTaken) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a fresh process, in which no door is open
  EXPECT_EXIT(
      {
        const auto handle = c10::Dispatcher::singleton().registerFallback(
            door::kPackedKey, c10::KernelFunction::makeFromBoxedFunction<&foreign_fallback>(),
            "a test");
        std::cerr << message_of([] { door::open_parameters_door(); });
        std::_Exit(door::parameters_state().open ? 1 : 0);
      },
      testing::ExitedWithCode(0), "TESTING_ONLY_GenericWrapper.*has one there already");
}

}  // namespace
}  // namespace fourfold::tests

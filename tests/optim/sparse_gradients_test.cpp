// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/release.hpp>
#include <fourfold/optim/adafactor.hpp>
#include <fourfold/optim/adam_mini.hpp>
#include <fourfold/optim/galore.hpp>
#include <fourfold/optim/muon.hpp>
#include <fourfold/report/meter.hpp>
#include <tests/optim/rule_checks.hpp>

#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <vector>

namespace {

using fourfold::Int4, fourfold::Int8;
namespace optim = fourfold::optim;
using optim::AdamWOf;
using testing::HasSubstr;

/// A gradient of few rows, some of them in several parts, the last one negative zero.
at::Tensor sparse_gradient(const at::Tensor& p, int step) {
  const std::int64_t rows = p.size(0), n = 7;
  const auto index = torch::arange(n, torch::kLong).mul(31 * step).add(step).remainder(rows);
  index[1] = rows - 1, index[2] = 0, index[3] = index[4];
  auto sizes = p.sizes().vec();
  sizes[0] = n;
  const auto values = oracle::gradient(torch::empty(sizes, p.options().requires_grad(false)), step);
  values[n - 1] = -0.0;
  return torch::sparse_coo_tensor(index.unsqueeze(0), values, p.sizes());
}

/// After steps with sparse gradients, and with the same ones made dense.
template <class Optimizer>
void expect_sparse_to_be_dense(const typename Optimizer::Options& options, at::ScalarType dtype,
                               const std::vector<std::int64_t>& sizes,
                               at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  std::vector<at::Tensor> ends;
  for (const bool sparse : {false, true})
    for (const bool maximize : {false, true}) {
      auto p = oracle::start(sizes, dtype).contiguous(format).requires_grad_();
      Optimizer optimizer({p}, options, {.maximize = maximize});
      for (int step = 1; step <= 4; ++step) {
        const at::Tensor gradient = sparse_gradient(p, step);
        p.mutable_grad() = sparse ? gradient : gradient.coalesce().to_dense();
        optimizer.step();
        ASSERT_EQ(p.grad().is_sparse(), sparse);
      }
      ends.push_back(p.detach());
    }
  EXPECT_TRUE(ends[0].equal(ends[2])) << dtype;
  EXPECT_TRUE(ends[1].equal(ends[3])) << dtype << ", maximize";
  EXPECT_FALSE(ends[0].equal(ends[1]));
}

class SparseGradients : public OneThread {};

TEST_F(SparseGradients, AreSteppedWithAsTheDenseOnes) {
  for (const std::vector<std::int64_t>& sizes :
       std::vector<std::vector<std::int64_t>>{{300, 20}, {9, 5000}, {40, 3, 50}, {6000}}) {
    expect_sparse_to_be_dense<AdamWOf<Int8>>(1e-2, at::kFloat, sizes);
    expect_sparse_to_be_dense<AdamWOf<Int4, optim::RoundStochastic>>(1e-2, at::kBFloat16, sizes);
  }
  expect_sparse_to_be_dense<AdamWOf<Int8>>(1e-2, at::kDouble, {300, 20});
}
TEST_F(SparseGradients, RulesForMatricesTakeThemToo) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    expect_sparse_to_be_dense<optim::Adafactor<>>(1e-2, dtype, {300, 20});
    expect_sparse_to_be_dense<optim::AdamMiniOf<Int8>>(1e-2, dtype, {300, 20});
    expect_sparse_to_be_dense<optim::MuonOf<Int8>>(1e-2, dtype, {40, 3, 50});
    expect_sparse_to_be_dense<optim::GaLoreOf<Int8>>(optim::GaLoreOptions(1e-2).rank(4), dtype,
                                                     {300, 20});
  }
}
TEST_F(SparseGradients, OfAnotherOrderOfMemoryAreMadeDense) {
  expect_sparse_to_be_dense<AdamWOf<Int8>>(1e-2, at::kFloat, {12, 8, 9, 10},
                                           at::MemoryFormat::ChannelsLast);
}
/// Two sparse dimensions, no dense one, nothing in it at all.
TEST_F(SparseGradients, OfAnyShape) {
  auto p = oracle::start({90, 70}, at::kFloat).requires_grad_(), q = p.detach().clone();
  q.requires_grad_();
  AdamWOf<Int8> one({p}, 1e-2), other({q}, 1e-2);
  const at::Tensor dense = oracle::gradient(p, 1).masked_fill(oracle::gradient(p, 2) > 0, 0);
  for (const at::Tensor& gradient : {dense, torch::zeros_like(dense), dense.neg()}) {
    p.mutable_grad() = gradient.to_sparse(), q.mutable_grad() = gradient;
    one.step(), other.step();
    EXPECT_TRUE(p.equal(q));
  }
}
TEST_F(SparseGradients, AreNotMadeDense) {
  const fourfold::Meter meter;
  auto p = torch::zeros({1 << 15, 64}).requires_grad_();  // 8 MiB
  AdamWOf<Int8> optimizer({p}, 1e-2);
  for (int step = 1; step <= 2; ++step) {
    p.mutable_grad() = sparse_gradient(p, step);
    if (step == 2) meter.restart_peak();
    const std::int64_t before = meter.bytes().current;
    optimizer.step();
    if (step == 2) {
      EXPECT_LT(meter.bytes().peak - before, 1 << 16);
    }
  }
}
TEST_F(SparseGradients, OtherLayoutsAreNamed) {
  auto p = torch::ones({8, 9}).requires_grad_();
  AdamWOf<Int8> optimizer({p}, 1e-2);
  p.mutable_grad() = torch::ones({8, 9}).to_sparse_csr();
  EXPECT_THAT(message_of([&] { optimizer.step(); }),
              HasSubstr("AdamW takes dense gradients and those of layout Sparse, and that of "
                        "parameter 0 is SparseCsr; convert it with to_sparse() or to_dense()"));
  EXPECT_TRUE(p.equal(torch::ones({8, 9})));
}

/// An embedding whose gradients are sparse, and a head.
struct Words : torch::nn::Module {
  explicit Words(bool sparse)
      : words(register_module(
            "words", torch::nn::Embedding(torch::nn::EmbeddingOptions(500, 16).sparse(sparse)))),
        head(register_module("head", torch::nn::Linear(16, 3))) {
    const torch::NoGradGuard no_grad;
    for (const at::Tensor& p : parameters()) p.copy_(oracle::start(p.sizes(), at::kFloat));
  }
  at::Tensor loss(int step) {  // each word once: sums have one order
    const auto index = torch::arange(20, torch::kLong).mul(7).add(step * 3).remainder(500);
    return head->forward(words->forward(index)).square().mean();
  }
  torch::nn::Embedding words;
  torch::nn::Linear head;
};
void expect_equal(const Words& a, const Words& b) {
  for (std::size_t i = 0; i < a.parameters().size(); ++i)
    EXPECT_TRUE(a.parameters()[i].equal(b.parameters()[i])) << i;
}
TEST_F(SparseGradients, AreReleasedClippedAndAccumulated) {
  using fourfold::ClipGradients;
  for (const fourfold::GradientReleaseOptions& options :
       std::vector<fourfold::GradientReleaseOptions>{
           {},
           {.clip = ClipGradients::kGlobalNorm, .max_norm = 0.1},
           {.clip = ClipGradients::kLastNorm, .max_norm = 0.1},
           {.clip = ClipGradients::kLocalNorm, .max_norm = 0.1},
           {.clip = ClipGradients::kGlobalNorm, .max_norm = 0.1, .micro_batches = 2},
           {.micro_batches = 2, .accumulate = fourfold::AccumulateGradients::kMoments}}) {
    Words sparse(true), dense(false);
    AdamWOf<Int8> one(sparse.parameters(), 1e-2), other(dense.parameters(), 1e-2);
    // Buffers in codes round dense sums: not here.
    auto plain = options;
    plain.min_packed_elements = 1 << 20;
    fourfold::GradientRelease released(one, plain), reference(other, plain);
    for (int step = 0; step < 4; ++step) {
      released.backward(sparse.loss(step)), reference.backward(dense.loss(step));
      if (options.micro_batches == 1) {
        EXPECT_FALSE(sparse.words->weight.grad().defined());
      }
    }
    expect_equal(sparse, dense);
  }
}
TEST_F(SparseGradients, AreUnscaled) {
  Words sparse(true), dense(false);
  AdamWOf<Int8> one(sparse.parameters(), 1e-2), other(dense.parameters(), 1e-2);
  fourfold::GradScaler a, b;
  for (int step = 0; step < 3; ++step) {
    sparse.zero_grad(), dense.zero_grad();
    a.scale(sparse.loss(step)).backward(), b.scale(dense.loss(step)).backward();
    a.step(one), b.step(other);
    a.update(), b.update();
  }
  expect_equal(sparse, dense);
}

}  // namespace

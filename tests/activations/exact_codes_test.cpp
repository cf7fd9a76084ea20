// SPDX-License-Identifier: Apache-2.0
// What is held in fewer bits by what its operator's backward reads: gradients are those of plain
// LibTorch, to the bit.
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/recompute.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/within.hpp"

namespace {

using fourfold::ActivationOptions;
using fourfold::ActivationStore;
using fourfold::CheapOps;
namespace door = fourfold::door;

using Store = std::shared_ptr<ActivationStore>;
using Function = std::function<torch::Tensor(const torch::Tensor&)>;

Store exact(bool cheap = false) {
  ActivationOptions options{.min_numel = 1, .min_bytes = 1};
  options.recompute = {"mylib::none"};  // on, and nothing is computed again
  if (cheap) options.recompute = fourfold::operator_names<CheapOps>();
  return ActivationStore::make(std::move(options));
}

/// The gradient of `fn` at `x`, and what the store held after forward, if there is one.
struct Ran {
  torch::Tensor gradient;
  std::int64_t held = 0;
  fourfold::SavedCounts counts;
};
Ran run(const Function& fn, const torch::Tensor& x, const Store& store) {
  const auto leaf = x.detach().clone().requires_grad_();
  Ran out;
  const auto y = store ? within(store, [&] { return fn(leaf); }) : fn(leaf);
  if (store) out.held = store->held_bytes().current, out.counts = store->counts();
  torch::manual_seed(9);
  out.gradient = torch::autograd::grad({y}, {leaf}, {torch::randn_like(y)})[0];
  return out;
}
bool same_bits(const torch::Tensor& a, const torch::Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() &&
         std::memcmp(a.contiguous().data_ptr(), b.contiguous().data_ptr(), a.nbytes()) == 0;
}

struct Gate {
  std::string name;
  Function fn;
  bool one_bit = true;  ///< there is a value that passes, and one that does not
};
std::vector<Gate> gates() {
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<Gate> out{{"relu6", [](const torch::Tensor& x) { return torch::relu6(x * 1); }}};
  for (const auto& [low, high] : std::vector<std::pair<double, double>>{{-1, 1},
                                                                        {0, 6},
                                                                        {0.5, 0.75},
                                                                        {-3, -1},
                                                                        {-2, 0},
                                                                        {0, 1e-45},
                                                                        {-infinity, infinity},
                                                                        {0.1, 0.1},
                                                                        {-infinity, 0.3}})
    out.push_back({"hardtanh " + std::to_string(low) + " " + std::to_string(high),
                   [low = low, high = high](const torch::Tensor& x) {
                     return at::hardtanh(x * 1, low, high);
                   },
                   high - low > 1e-3});
  for (const double threshold : {0.0, 0.5, -0.5, 0.1, infinity, -infinity, double(NAN)}) {
    const bool one_bit = threshold < infinity;
    out.push_back({"threshold " + std::to_string(threshold),
                   [=](const torch::Tensor& x) { return at::threshold(x * 1, threshold, 20); },
                   one_bit});
    out.push_back({"threshold_ " + std::to_string(threshold),
                   [=](const torch::Tensor& x) {
                     auto y = x * 1;
                     return at::threshold_(y, threshold, -7);
                   },
                   one_bit});
  }
  out.push_back({"hardtanh_", [](const torch::Tensor& x) {
                   auto y = x * 1;
                   return at::hardtanh_(y, -0.5, 0.5);
                 }});
  return out;
}

TEST(ExactCodes, GatesTakeOneBitAndPassTheSameGradients) {
  torch::manual_seed(0);
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    // Values on the borders and beside them among the others; 4099 is no multiple of any vector.
    auto values = torch::randn({4099}).to(dtype);
    const auto borders = torch::tensor({0.0, -0.0, 0.1, 0.3, 0.5, -0.5, 0.75, 1.0, -1.0, 6.0, 1e-45,
                                        1e30, -1e30, double(INFINITY), -double(INFINITY)},
                                       torch::kDouble)
                             .to(dtype);
    values.slice(0, 100, 100 + borders.numel()).copy_(borders);
    for (const auto& [name, fn, one_bit] : gates()) {
      SCOPED_TRACE(name + " " + c10::toString(dtype));
      const Ran plain = run(fn, values, nullptr);
      const Ran ours = run(fn, values, exact());
      EXPECT_TRUE(same_bits(ours.gradient, plain.gradient));
      EXPECT_EQ(ours.counts.masks, one_bit ? 1 : 0);
      if (one_bit) {
        EXPECT_LE(ours.held, (4099 + 7) / 8 + 4);
      }
    }
  }
}

TEST(ExactCodes, ANanInAGateIsWhatPlainLibTorchMakesOfIt) {
  torch::manual_seed(1);
  auto values = torch::randn({4099});
  for (const std::int64_t at : {0, 17, 2000, 4098}) values[at] = NAN;
  for (const auto& [name, fn, one_bit] : gates())
    EXPECT_TRUE(same_bits(run(fn, values, exact()).gradient, run(fn, values, nullptr).gradient))
        << name;
}

TEST(ExactCodes, AGateWhoseResultIsComputedAgainKeepsItsInput) {
  const auto fn = [](const torch::Tensor& x) {
    const auto y = torch::relu6(x * 1);
    return y * y;
  };
  torch::manual_seed(2);
  const auto x = torch::randn({64, 64});
  const Store store = exact(/*cheap=*/true);
  const Ran ours = run(fn, x, store);
  EXPECT_EQ(ours.counts.masks, 0);
  EXPECT_EQ(ours.held, static_cast<std::int64_t>(x.nbytes()));  // not the result beside it
  EXPECT_TRUE(same_bits(ours.gradient, run(fn, x, nullptr).gradient));
}

TEST(ExactCodes, PoolIndicesAreOneByteEach) {
  torch::manual_seed(3);
  const std::vector<std::pair<torch::Tensor, Function>> cases{
      {torch::randn({4, 6, 50}),
       [](const torch::Tensor& x) { return torch::max_pool1d(x * 1, 3, 2, 1); }},
      {torch::randn({4, 6, 20, 22}),
       [](const torch::Tensor& x) {
         return torch::max_pool2d(x * 1, {3, 2}, {2, 2}, {1, 1});
       }},
      {torch::randn({4, 6, 20, 22}).contiguous(at::MemoryFormat::ChannelsLast),
       [](const torch::Tensor& x) {
         return torch::max_pool2d(x * 1, {3, 3}, {2, 2}, {1, 1});
       }},
      {torch::randn({6, 20, 22}),
       [](const torch::Tensor& x) { return torch::max_pool2d(x * 1, 2); }},
      {torch::randn({2, 3, 8, 9, 10}),
       [](const torch::Tensor& x) {
         return torch::max_pool3d(x * 1, {2, 3, 2}, {2, 2, 2}, {1, 1, 1}, {1, 1, 2}, true);
       }},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    const auto& [x, fn] = cases[i];
    const Ran ours = run(fn, x, exact());
    EXPECT_TRUE(same_bits(ours.gradient, run(fn, x, nullptr).gradient));
    EXPECT_EQ(ours.counts.masks, 1);
    // The input, kept, and a byte for each value of the result.
    EXPECT_EQ(ours.held, static_cast<std::int64_t>(x.nbytes()) + fn(x).numel());
  }
}

/// As on a GPU, where dropout is this operator, whose mask is a bool tensor.
TEST(ExactCodes, MaskThatAnOperatorReturnsTakesOneBit) {
  const auto x = torch::randn({4096 + 5});
  const Function fn = [](const torch::Tensor& leaf) {
    torch::manual_seed(11);
    return std::get<0>(torch::native_dropout(leaf * 1, 0.25, true));
  };
  const Ran ours = run(fn, x, exact());
  EXPECT_TRUE(same_bits(ours.gradient, run(fn, x, nullptr).gradient));
  EXPECT_EQ(ours.counts.masks, 1);
  EXPECT_EQ(ours.held, (4096 + 5 + 7) / 8 + 1);
}

TEST(ExactCodes, IntegersOfTheForwardsOwnAreNarrowed) {
  torch::manual_seed(4);
  const auto x = torch::randn({3000, 4});
  const Function fn = [](const torch::Tensor& leaf) {
    const auto order = torch::argsort(leaf.detach().select(1, 0));  // 0 to 2999: two bytes
    return torch::index_select(leaf, 0, order);
  };
  const Ran ours = run(fn, x, exact());
  EXPECT_TRUE(same_bits(ours.gradient, run(fn, x, nullptr).gradient));
  EXPECT_EQ(ours.counts.masks, 1);
  EXPECT_EQ(ours.held, 2 * 3000 + 8);
}

TEST(ExactCodes, IndicesFromOutsideAreHeldAsTheyAre) {
  const auto table = torch::randn({200, 8}).requires_grad_();
  const auto tokens = torch::randint(200, {4096}, torch::kLong);
  const Store store = exact();
  const auto y = within(store, [&] { return torch::embedding(table, tokens.view({64, 64})); });
  EXPECT_EQ(store->counts().masks, 0);
  EXPECT_EQ(store->counts().kept, 1);
  const auto z = within(store, [&] { return torch::embedding(table, tokens + 0); });
  EXPECT_EQ(store->counts().masks, 1);
  const auto dy = torch::randn_like(y);
  const auto gradient = [&](const torch::Tensor& of, const torch::Tensor& d) {
    return torch::autograd::grad({of}, {table}, {d})[0];
  };
  EXPECT_TRUE(same_bits(gradient(y, dy), gradient(z, dy.view({4096, 8}))));
}

TEST(ExactCodes, OnePayloadOfIndicesThatAreSavedTwiceAndWrittenToLater) {
  torch::manual_seed(5);
  const auto x = torch::randn({2000, 3});
  const Function twice = [](const torch::Tensor& leaf) {
    const auto order = at::randperm(2000);
    return torch::index_select(leaf, 0, order) + torch::index_select(leaf * 2, 0, order);
  };
  const Store store = exact();
  torch::manual_seed(6);
  const auto leaf = x.clone().requires_grad_();
  const auto y = within(store, [&] { return twice(leaf); });
  EXPECT_EQ(store->counts().payloads, 1);
  const auto ours = torch::autograd::grad({y}, {leaf}, {torch::ones_like(y)}, true);
  const auto again = torch::autograd::grad({y}, {leaf}, {torch::ones_like(y)});
  EXPECT_TRUE(same_bits(ours[0], again[0]));
  EXPECT_TRUE(torch::equal(ours[0], torch::full_like(x, 3)));

  const auto z = within(store, [&] {
    const auto order = at::randperm(2000);
    const auto z = torch::index_select(leaf, 0, order);
    order.add_(1);
    return z;
  });
  try {
    z.sum().backward();
    ADD_FAILURE() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("modified by an inplace operation"),
              std::string::npos);
  }
}

}  // namespace

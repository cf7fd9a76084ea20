// SPDX-License-Identifier: Apache-2.0
/// What autograd saves on a GPU, held exactly or computed again: gradients are those of plain LibTorch
/// on the same GPU.
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/activations/linear_cross_entropy.hpp>
#include <fourfold/activations/offload.hpp>
#include <fourfold/activations/recompute.hpp>
#include <fourfold/report/meter.hpp>
#include "tests/gpu/on_gpu.hpp"
#include "tests/support/within.hpp"

#include <torch/torch.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace fourfold;
using fourfold::tests::same_bits;
using Function = std::function<at::Tensor(const at::Tensor&)>;

class GpuActivations : public tests::OnGpu {
 protected:
  /// Exact ways alone; whatever size.
  static std::shared_ptr<ActivationStore> exact() {
    ActivationOptions options{.min_numel = 1, .min_bytes = 1};
    options.recompute = operator_names<CheapOps>();
    return ActivationStore::make(std::move(options));
  }
  /// dx of `fn` at `x`, with or without a store; the same random numbers either way.
  static at::Tensor gradient(const Function& fn, const at::Tensor& x,
                             const std::shared_ptr<ActivationStore>& store = nullptr) {
    torch::manual_seed(5);
    const auto leaf = x.detach().clone().requires_grad_();
    const auto y = store ? within(store, [&] { return fn(leaf); }) : fn(leaf);
    torch::manual_seed(6);
    return torch::autograd::grad({y}, {leaf}, {torch::randn_like(y)})[0];
  }
};

TEST_F(GpuActivations, ExactWaysAreBitEqual) {
  const auto table = torch::randn({50, 8}, at::kCUDA);
  const std::vector<std::pair<std::string, Function>> functions{
      {"dropout", [](const at::Tensor& x) { return torch::dropout(x * 2, 0.25, true); }},
      {"relu6", [](const at::Tensor& x) { return torch::relu6(x * 2); }},
      {"threshold", [](const at::Tensor& x) { return torch::threshold(x * 2, 0.5, 20); }},
      {"gelu of what relu_ wrote",
       [](const at::Tensor& x) {
         auto y = x * 2;
         return torch::gelu(torch::relu_(y));
       }},
      {"masked_fill", [](const at::Tensor& x) { return x.masked_fill(x > 0.5, 3) * x; }},
      {"max_pool",
       [](const at::Tensor& x) {
         return torch::max_pool2d(x.view({2, 3, 40, 50}) * 2, 2);
       }},
      {"argsort and index_select",
       [](const at::Tensor& x) {
         const auto order = torch::argsort(x.detach());
         return torch::index_select(x * 2, 0, order).square();
       }},
      {"silu of layer_norm",
       [](const at::Tensor& x) {
         return torch::silu(torch::layer_norm(x.view({120, 100}), {100}));
       }},
      {"softmax of a product",
       [](const at::Tensor& x) {
         const auto y = x.view({100, 120});
         return torch::softmax(torch::matmul(y, y.t()), -1);
       }},
  };
  for (const auto& [name, fn] : functions) {
    const auto x = torch::randn({12000}, at::kCUDA);
    EXPECT_TRUE(same_bits(gradient(fn, x), gradient(fn, x, exact()))) << name;
  }
}

TEST_F(GpuActivations, MaskOfDropoutTakesOneBit) {
  const auto store = exact();
  const auto x = torch::randn({1 << 20}, at::kCUDA).requires_grad_();
  const auto y = within(store, [&] { return torch::dropout(x * 2, 0.25, true); });
  EXPECT_EQ(store->counts().masks, 1);
  EXPECT_EQ(store->held_bytes().current, (1 << 20) / 8 + 1);
}

/// What has no code on a GPU stays there as it is; nobody reads it from the host.
TEST_F(GpuActivations, IndicesStayAsTheyAre) {
  const auto store = exact();
  const auto table = torch::randn({50, 8}, at::kCUDA).requires_grad_();
  const auto tokens = torch::randint(50, {4096}, at::TensorOptions(at::kCUDA).dtype(at::kLong));
  const auto y = within(store, [&] { return torch::embedding(table, tokens + 0); });
  EXPECT_EQ(store->counts().masks, 0);
  const auto ours = torch::autograd::grad({y}, {table}, {torch::ones_like(y)})[0];
  const auto rows = torch::bincount(tokens, {}, 50).to(at::kFloat);
  EXPECT_TRUE(ours.equal(rows.unsqueeze(1).expand({50, 8})));  // sums of ones are exact
}

TEST_F(GpuActivations, ACheckpointDrawsTheSameRandomNumbers) {
  const auto weight = torch::randn({64, 64}, at::kCUDA);
  const Function block = [&](const at::Tensor& x) {
    return torch::dropout(torch::gelu(torch::matmul(x.view({-1, 64}), weight)), 0.3, true);
  };
  const Function plain = [&](const at::Tensor& x) { return block(block(x)); };
  const Function again = [&](const at::Tensor& x) {
    return checkpoint(block, checkpoint(block, x));
  };
  const auto x = torch::randn({128 * 64}, at::kCUDA);
  EXPECT_TRUE(same_bits(gradient(plain, x), gradient(again, x)));
}

/// In double, where rounding is far below what a wrong formula would be off by.
TEST_F(GpuActivations, LinearCrossEntropyIsTheCrossEntropyOfTheProduct) {
  const auto options = at::TensorOptions(at::kCUDA).dtype(at::kDouble);
  for (const double smoothing : {0.0, 0.1}) {
    std::vector<at::Tensor> leaves{torch::randn({70, 32}, options),
                                   torch::randn({101, 32}, options), torch::randn({101}, options)};
    for (at::Tensor& leaf : leaves) leaf.requires_grad_();
    auto target = torch::randint(101, {70}, at::TensorOptions(at::kCUDA).dtype(at::kLong));
    target[3] = -100;
    LinearCrossEntropyOptions ours{.bias = leaves[2], .rows = 16};
    ours.loss.label_smoothing(smoothing);
    const auto loss = linear_cross_entropy(leaves[0], leaves[1], target, ours);
    const auto plain = torch::nn::functional::cross_entropy(
        torch::linear(leaves[0], leaves[1], leaves[2]), target,
        torch::nn::functional::CrossEntropyFuncOptions().label_smoothing(smoothing));
    EXPECT_NEAR(loss.item<double>(), plain.item<double>(), 1e-12 * plain.item<double>());
    const auto a = torch::autograd::grad({loss}, leaves),
               b = torch::autograd::grad({plain}, leaves);
    for (std::size_t i = 0; i < a.size(); ++i)
      EXPECT_LE((a[i] - b[i]).abs().max().item<double>(), 1e-12 * b[i].abs().max().item<double>());
  }
}

/// Memory that is given back is written to anew at once, while copies run beside.
TEST_F(GpuActivations, OffloadedValuesLeaveTheGpuAndComeBack) {
  constexpr std::int64_t kValues = 1 << 20, kBytes = 4 * kValues;
  fourfold::detail::HostOffloader offloader(4 * kBytes);
  std::vector<at::Tensor> expected;
  std::vector<std::shared_ptr<fourfold::detail::HostPiece>> pieces;
  const Meter meter;
  for (int i = 0; i < 32; ++i) {
    auto values = torch::randn({kValues}, at::kCUDA);
    expected.push_back(values.cpu());
    pieces.push_back(offloader.put(values));
    values.reset();
    torch::full({kValues}, i, at::kCUDA).mul_(2);
  }
  EXPECT_LE(meter.bytes(at::kCUDA).current, 5 * kBytes);
  EXPECT_EQ(offloader.counts().written, 30);
  for (int i = 31; i >= 0; --i) {
    const auto again = pieces[i]->get();
    torch::full({kValues}, i, at::kCUDA).mul_(2);
    EXPECT_TRUE(same_bits(again, expected[i])) << i;
    pieces[i].reset();
  }
  EXPECT_GT(offloader.counts().read_ahead, 20);
}

/// One payload, and what it decodes to, are read on the stream of each node that saved the tensor.
TEST_F(GpuActivations, APayloadIsReadOnAnotherStream) {
  const c10::impl::VirtualGuardImpl gpu(at::kCUDA);
  const at::Device here(at::kCUDA, gpu.getDevice().index());
  ActivationOptions options{.min_numel = 1, .min_bytes = 1};
  Activations<Int8>::configure(options);
  const auto leaf = torch::randn({512, 512}, at::kCUDA).requires_grad_();
  const auto first = torch::randn({512, 512}, at::kCUDA).requires_grad_();
  const auto second = torch::randn({512, 512}, at::kCUDA).requires_grad_();
  const auto run = [&](bool two_streams) {
    const auto store = ActivationStore::make(options);
    return within(store, [&] {
      const auto x = leaf * 2;
      const auto a = torch::matmul(x, first);
      const c10::Stream before = gpu.getStream(here);
      if (two_streams) {
        const c10::Stream other = gpu.getStreamFromGlobalPool(here);
        c10::Event made(at::kCUDA);
        made.record(before), made.block(other);
        gpu.exchangeStream(other);
      }
      const auto b = torch::matmul(x, second);
      if (two_streams) {
        c10::Event made(at::kCUDA);
        made.record(gpu.getStream(here)), made.block(before);
        gpu.exchangeStream(before);
      }
      return torch::autograd::grad({(a + b).square().mean()}, {first, second});
    });
  };
  for (int times = 0; times < 20; ++times) {
    const auto one = run(false), two = run(true);
    EXPECT_TRUE(same_bits(one[0], two[0]));
    EXPECT_TRUE(same_bits(one[1], two[1]));
  }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
/// Which nodes are offered packed tensors, by the names that LibTorch gives their types.
#include <fourfold/torch/autocast.hpp>
#include <fourfold/torch/packed_nodes.hpp>
#include <fourfold/torch/saved_tensors.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>

namespace {

namespace door = fourfold::door;
using torch::Tensor;

/// Gives what it was given, and counts in which way it was asked for.
struct Asked final : door::SavedTensors {
  struct One final : door::Saved {
    One(const Tensor& t, Asked& a) : tensor(t), asked(a) {}
    Tensor unpack() override { return ++asked.plain, tensor; }
    Tensor unpack_packed() override { return ++asked.packed, tensor; }
    const Tensor tensor;
    Asked& asked;
  };
  std::shared_ptr<door::Saved> pack(const Tensor& tensor) override {
    return std::make_shared<One>(tensor, *this);
  }
  int plain = 0, packed = 0;
};

struct Op {
  const char* name;
  Tensor (*run)(const Tensor& x);
};

/// How the nodes of `op` asked, under `backward`.
std::pair<int, int> asked(const Op& op, const std::function<void(const Tensor&)>& backward) {
  const auto packer = std::make_shared<Asked>();
  const Tensor x = torch::randn({4, 8}).requires_grad_();
  Tensor y;
  {
    const door::SavedTensorsScope scope(packer);
    y = op.run(x);
  }
  backward(y);
  return {packer->plain, packer->packed};
}

const std::vector<Op>& offered() {
  static const std::vector<Op> all{
      {"mm", [](const Tensor& x) { return x.mm(x.t()); }},
      {"addmm", [](const Tensor& x) { return torch::addmm(torch::ones({4}), x, x.t()); }},
      {"gelu", [](const Tensor& x) { return torch::gelu(x); }},
      {"silu", [](const Tensor& x) { return torch::silu(x); }},
      {"relu", [](const Tensor& x) { return torch::relu(x); }},
      {"threshold", [](const Tensor& x) { return torch::threshold(x, 0.5, 0); }},
      {"layer_norm", [](const Tensor& x) { return torch::layer_norm(x, {8}); }},
      {"softmax", [](const Tensor& x) { return torch::softmax(x, -1); }},
      {"log_softmax", [](const Tensor& x) { return torch::log_softmax(x, -1); }},
  };
  return all;
}

TEST(PackedNodes, AreLibTorchsOwnWithAKernelOfOurs) {
  for (const Op& op : offered()) {
    SCOPED_TRACE(op.name);
    const auto [plain, packed] =
        asked(op, [](const Tensor& y) { y.backward(torch::ones_like(y)); });
    EXPECT_EQ(plain, 0);
    EXPECT_GT(packed, 0);
  }
}

TEST(PackedNodes, WhereAGraphOfBackwardIsMadeNoneIs) {
  for (const Op& op : offered()) {
    SCOPED_TRACE(op.name);
    const auto [plain, packed] = asked(op, [](const Tensor& y) {
      y.backward(torch::ones_like(y), /*retain_graph=*/true, /*create_graph=*/true);
    });
    EXPECT_GT(plain, 0);
    EXPECT_EQ(packed, 0);
  }
}

TEST(PackedNodes, UnderAutocastNoneIs) {
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto [plain, packed] =
      asked(offered()[2], [](const Tensor& y) { y.backward(torch::ones_like(y)); });
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_GT(plain, 0);
  EXPECT_EQ(packed, 0);
}

struct Squared : torch::autograd::Function<Squared> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return x * x;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    return {gradients[0] * 2 * context->get_saved_variables()[0]};
  }
};

TEST(PackedNodes, OtherNodesAndCustomFunctionsAreNot) {
  const std::vector<Op> others{
      {"exp", [](const Tensor& x) { return x.exp(); }},
      {"mul", [](const Tensor& x) { return x * x; }},
      {"convolution",
       [](const Tensor& x) {
         return torch::conv1d(x.view({1, 4, 8}), torch::ones({2, 4, 3}));
       }},
      {"custom", [](const Tensor& x) { return Squared::apply(x); }},
  };
  for (const Op& op : others) {
    SCOPED_TRACE(op.name);
    const auto [plain, packed] =
        asked(op, [](const Tensor& y) { y.backward(torch::ones_like(y)); });
    EXPECT_GT(plain, 0);
    EXPECT_EQ(packed, 0);
  }
}

TEST(PackedNodes, OutsideOfBackwardThereIsNone) { EXPECT_FALSE(door::node_takes_packed()); }

}  // namespace

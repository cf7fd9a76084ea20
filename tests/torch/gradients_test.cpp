// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/torch/gradients.hpp>

#include <memory>
#include <string>
#include <vector>

namespace {

using fourfold::Place;
using fourfold::door::after_gradients;
using fourfold::door::GradientHooks;
using testing::ElementsAre;
using testing::HasSubstr;

at::Tensor leaf(std::int64_t n) { return torch::ones({n}, torch::requires_grad()); }

/// A hook of somebody else's, as Python would set one.
struct Foreign final : torch::autograd::PostAccumulateGradHook {
  explicit Foreign(std::vector<std::string>& log, std::string name = "foreign")
      : log(log), name(std::move(name)) {}
  void operator()(const at::Tensor&) override { log.push_back(name); }
  std::vector<std::string>& log;
  std::string name;
};

TEST(Gradients, EachLeafIsSeenOnceItsGradientIsComplete) {
  const auto a = leaf(2), b = leaf(2);
  std::vector<double> seen;
  const auto hooks = after_gradients(
      {a, b}, [&](const at::Tensor& one) { seen.push_back(one.grad().sum().item<double>()); });
  EXPECT_EQ(hooks.size(), 2u);
  (a * 2 + a * 3).sum().backward();  // two uses, one accumulation
  EXPECT_THAT(seen, ElementsAre(10.0));
  (a * b).sum().backward();  // the second of a's, the first of b's
  EXPECT_THAT(seen, testing::UnorderedElementsAre(10.0, 12.0, 2.0));
}

TEST(Gradients, RemovedByTheGuardByHandAndByAssignment) {
  const auto a = leaf(1);
  int calls = 0;
  const auto count = [&](const at::Tensor&) { ++calls; };
  {
    const auto hooks = after_gradients({a}, count);
    a.sum().backward();
  }
  a.sum().backward();
  EXPECT_EQ(calls, 1);
  auto hooks = after_gradients({a}, count);
  hooks = after_gradients({a}, count);
  a.sum().backward();
  EXPECT_EQ(calls, 2);
  GradientHooks moved = std::move(hooks);
  a.sum().backward();
  EXPECT_EQ(calls, 3);
  moved.remove();
  moved.remove();
  a.sum().backward();
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(torch::autograd::impl::post_acc_grad_hooks(a), nullptr);
}

TEST(Gradients, AHookThatStoodThereIsCalledFirstAndComesBack) {
  const auto a = leaf(1);
  std::vector<std::string> log;
  torch::autograd::impl::set_post_acc_grad_hooks(a, std::make_unique<Foreign>(log));
  auto first = after_gradients({a}, [&](const at::Tensor&) { log.push_back("first"); });
  auto second = after_gradients({a}, [&](const at::Tensor&) { log.push_back("second"); });
  a.sum().backward();
  EXPECT_THAT(log, ElementsAre("foreign", "first", "second"));
  log.clear();
  first.remove();
  a.sum().backward();
  EXPECT_THAT(log, ElementsAre("foreign", "second"));
  log.clear();
  second.remove();
  EXPECT_NE(dynamic_cast<Foreign*>(torch::autograd::impl::post_acc_grad_hooks(a).get()), nullptr);
  a.sum().backward();
  EXPECT_THAT(log, ElementsAre("foreign"));
}

TEST(Gradients, ASlotThatOthersHaveTakenSinceIsTheirs) {
  const auto a = leaf(1);
  std::vector<std::string> log;
  auto hooks = after_gradients({a}, [&](const at::Tensor&) { log.push_back("ours"); });
  torch::autograd::impl::set_post_acc_grad_hooks(a, std::make_unique<Foreign>(log, "theirs"));
  hooks.remove();
  a.sum().backward();
  EXPECT_THAT(log, ElementsAre("theirs"));
}

TEST(Gradients, ATiedParameterIsHookedOnce) {
  const auto a = leaf(3);
  const at::Tensor alias = a;
  int calls = 0;
  const auto hooks = after_gradients({a, alias, at::Tensor()}, [&](const at::Tensor&) { ++calls; });
  EXPECT_EQ(hooks.size(), 1u);
  (a + alias).sum().backward();
  EXPECT_EQ(calls, 1);
}

TEST(Gradients, AHookMayTakeTheGradientAwayAndRemoveItself) {
  const auto a = leaf(1);
  GradientHooks self;
  int calls = 0, later = 0;
  self = after_gradients({a}, [&](const at::Tensor& one) {
    one.mutable_grad().reset();
    self.remove();
    ++calls;
  });
  const auto other = after_gradients({a}, [&](const at::Tensor& one) {
    EXPECT_FALSE(one.grad().defined());
    ++later;
  });
  a.sum().backward();
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(later, 1);
  EXPECT_FALSE(a.grad().defined());
  auto alone = leaf(1);
  GradientHooks last;
  last =
      after_gradients({alone}, [&](const at::Tensor&) { last.remove(); });  // takes its chain along
  alone.sum().backward();
  alone.sum().backward();
  EXPECT_EQ(alone.grad().item<float>(), 2.0F);
}

TEST(Gradients, LeavesAndHooksMayDieInAnyOrder) {
  auto a = leaf(1);
  const c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl> weak(a.getIntrusivePtr());
  auto marker = std::make_shared<int>(0);
  auto hooks = after_gradients({a}, [marker](const at::Tensor&) {});
  a.sum().backward();
  a.reset();
  EXPECT_TRUE(weak.expired()) << "the hooks held the leaf";
  hooks.remove();
  EXPECT_EQ(marker.use_count(), 1) << "somebody still holds the function";
}

TEST(Gradients, ALeafUnfrozenLaterIsHooked) {
  auto frozen = torch::ones({2});
  int calls = 0;
  const auto hooks = after_gradients({frozen}, [&](const at::Tensor&) { ++calls; });
  frozen.requires_grad_(true);
  frozen.sum().backward();
  EXPECT_EQ(calls, 1);
}

TEST(Gradients, ATensorThatIsNoLeafIsAnErrorAndNothingIsHooked) {
  const auto a = leaf(2);
  const auto result = a * 2;
  try {
    (void)after_gradients({a, result}, [](const at::Tensor&) {});
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("tensor 1 of sizes [2] is no leaf"));
    EXPECT_THAT(error.what(), HasSubstr("pass parameters"));
  }
  EXPECT_EQ(torch::autograd::impl::post_acc_grad_hooks(a), nullptr);
  EXPECT_THROW((void)after_gradients({a}, {}), c10::Error);
}

TEST(Gradients, AreCountedToTheirPlaceAsTheyAppear) {
  fourfold::door::install_allocator();
  const auto gradient_bytes = [] {
    return fourfold::door::counters().read().now[static_cast<std::size_t>(Place::kGradients)];
  };
  const std::int64_t before = gradient_bytes();
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(64, 256), torch::nn::GELU(),
                              torch::nn::Linear(256, 10));
  std::int64_t parameters = 0;
  for (const auto& parameter : model->parameters()) parameters += parameter.numel() * 4;
  const auto x = torch::randn({8, 64});
  const auto hooks = fourfold::door::retag_gradients(model->parameters());
  for (int step = 0; step < 2; ++step) {  // made, then accumulated in place
    model->forward(x).sum().backward();
    EXPECT_EQ(gradient_bytes() - before, parameters);
  }
  model->zero_grad(/*set_to_none=*/true);
  EXPECT_EQ(gradient_bytes(), before);
}

/// The hook changes nothing: gradients are stolen, not copied, with it as without.
TEST(Gradients, CostNoCopy) {
  fourfold::door::install_allocator();
  const auto total = [](bool hooked) {
    const auto a = torch::ones({1000}, torch::requires_grad());
    const auto hooks = hooked ? fourfold::door::retag_gradients({a}) : GradientHooks();
    const std::int64_t before = fourfold::door::counters().read().all.total;
    (a * 2).sum().backward();
    return fourfold::door::counters().read().all.total - before;
  };
  EXPECT_EQ(total(true), total(false));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/torch/autocast.hpp>
#include <fourfold/torch/saved_tensors.hpp>

#include "tests/support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <regex>
#include <thread>

namespace {
namespace door = fourfold::door;
using ::testing::HasSubstr;
using ::testing::Not;

/// Holds clones (or references), counts, and remembers weakly what lives.
struct Counting : door::SavedTensors {
  struct Held : door::Saved {
    at::Tensor copy;
    std::shared_ptr<int> unpacked;
    at::Tensor unpack() override {
      EXPECT_FALSE(at::GradMode::is_enabled());
      EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
      ++*unpacked;
      return copy;
    }
  };
  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    EXPECT_FALSE(tensor.requires_grad());
    EXPECT_FALSE(at::GradMode::is_enabled());
    EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
    tensors.push_back({tensor.scalar_type(), tensor.sizes().vec(), tensor.layout()});
    ++packed;
    if (by_reference) return door::saved_reference(tensor);
    auto held = std::make_shared<Held>();
    held->copy = tensor.clone(), held->unpacked = unpacked;
    live.push_back(held);
    return held;
  }
  int alive() const {
    int n = 0;
    for (const auto& held : live) n += !held.expired();
    return n;
  }
  struct Look {
    at::ScalarType dtype;
    std::vector<std::int64_t> sizes;
    at::Layout layout;
  };
  bool by_reference = false;
  int packed = 0;
  std::shared_ptr<int> unpacked = std::make_shared<int>(0);
  std::vector<Look> tensors;
  std::vector<std::weak_ptr<Held>> live;
};

TEST(SavedTensors, GoToThePackerAndComeBack) {
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3, 4}).requires_grad_();
  at::Tensor y;
  {
    const door::SavedTensorsScope scope(packer);
    y = (x * x).sum();
    EXPECT_EQ(scope.packed(), 2);
    EXPECT_EQ(scope.passed(), 0);
  }
  EXPECT_EQ(packer->packed, 2);
  y.backward();
  EXPECT_EQ(*packer->unpacked, 2);
  EXPECT_TRUE(torch::equal(x.grad(), 2 * x.detach()));
  EXPECT_EQ(packer->alive(), 0);
}

TEST(SavedTensors, ThePackerGoesWithTheScopeAndThePayloadsWithTheGraph) {
  auto packer = std::make_shared<Counting>();
  std::weak_ptr<Counting> weak = packer;
  at::Tensor x = torch::randn({3}).requires_grad_();
  at::Tensor y;
  {
    const door::SavedTensorsScope scope(packer);
    y = x.exp();  // saves its own output: a cycle, were it not detached
    EXPECT_EQ(packer->alive(), 1);
  }
  auto live = packer->live;
  packer.reset();
  EXPECT_TRUE(weak.expired());
  EXPECT_FALSE(live[0].expired());
  y = at::Tensor();
  EXPECT_TRUE(live[0].expired());
}

TEST(SavedTensors, TheInnermostScopeWins) {
  auto outer = std::make_shared<Counting>(), inner = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3}).requires_grad_();
  const door::SavedTensorsScope a(outer);
  {
    const door::SavedTensorsScope b(inner);
    EXPECT_EQ(door::current_saved_tensors(), inner);
    x.exp();
  }
  EXPECT_EQ(door::current_saved_tensors(), outer);
  x.exp();
  EXPECT_EQ(outer->packed, 1);
  EXPECT_EQ(inner->packed, 1);
}

TEST(SavedTensors, PassThroughInBackwardAndWithoutGradients) {
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3}).requires_grad_();
  const door::SavedTensorsScope scope(packer);
  {
    const at::NoGradGuard no_grad;
    EXPECT_EQ(door::active_saved_tensors(), nullptr);
    EXPECT_EQ(door::current_saved_tensors(), packer);
    x.exp();
  }
  EXPECT_EQ(packer->packed, 0);
  at::Tensor y = x.exp().sum();
  EXPECT_EQ(packer->packed, 1);
  auto grad = torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true)[0];
  EXPECT_EQ(packer->packed, 1);  // what double backward needs is LibTorch's
  EXPECT_GT(scope.passed(), 0);
  grad.sum().backward();
  EXPECT_TRUE(torch::equal(x.grad(), x.detach().exp()));
}

TEST(SavedTensors, AScopeMayAskForBackwardToo) {
  struct Probe : torch::autograd::Function<Probe> {
    static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x,
                              std::int64_t which) {
      static_cast<void>(which);
      return x.clone();
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                   torch::autograd::variable_list grads) {
      auto packer = std::make_shared<Counting>();
      const at::AutoGradMode grad(true);
      at::Tensor z = torch::randn({2}).requires_grad_();
      {
        const door::SavedTensorsScope scope(packer);
        z.exp();
      }
      EXPECT_EQ(packer->packed, 0);
      {
        const door::SavedTensorsScope scope(packer, /*in_backward=*/true);
        const door::SavedTensorsScope again(packer, /*in_backward=*/true);
        z.exp();
      }
      EXPECT_EQ(packer->packed, 1);
      return {grads[0], at::Tensor()};
    }
  };
  at::Tensor x = torch::randn({3}).requires_grad_();
  Probe::apply(x, 1).sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

TEST(SavedTensors, UnpackAsOftenAsAsked) {
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3}, at::kDouble).requires_grad_();
  at::Tensor y;
  {
    const door::SavedTensorsScope scope(packer);
    y = (x * x * x).sum();
  }
  y.backward({}, /*retain_graph=*/true);
  const at::Tensor first = x.grad().clone();
  x.mutable_grad() = at::Tensor();
  auto grad = torch::autograd::grad({y}, {x}, {}, true, true)[0];
  EXPECT_TRUE(torch::equal(grad.detach(), first));
  grad.sum().backward();
  EXPECT_TRUE(torch::allclose(x.grad(), 6 * x.detach()));
}

TEST(SavedTensors, BackwardOnAnotherThreadAfterTheirThreadIsGone) {
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3}).requires_grad_();
  at::Tensor y;
  std::thread([&] {
    const door::SavedTensorsScope scope(packer);
    y = x.exp().sum();
  }).join();
  std::thread([&] { y.backward(); }).join();
  EXPECT_EQ(*packer->unpacked, 1);
  EXPECT_TRUE(torch::equal(x.grad(), x.detach().exp()));
}

TEST(SavedTensors, OtherThreadsSeeNothingAndAreCounted) {
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3}).requires_grad_();
  const door::SavedTensorsScope scope(packer);
  const std::int64_t before = door::tensors_saved_outside_scopes();
  std::thread([&] {
    EXPECT_EQ(door::current_saved_tensors(), nullptr);
    x.exp();
  }).join();
  EXPECT_EQ(packer->packed, 0);
  EXPECT_EQ(door::tensors_saved_outside_scopes(), before + 1);
}

// The first trap of anchors' table: LibTorch checks no version where there are hooks.
TEST(SavedTensors, WritingInPlaceAfterSavingIsLibTorchsError) {
  const auto run = [](const std::shared_ptr<door::SavedTensors>& packer, bool output) {
    std::optional<door::SavedTensorsScope> scope;
    if (packer) scope.emplace(packer);
    at::Tensor x = torch::randn({2, 3}).requires_grad_();
    at::Tensor h = x * 1.0;
    at::Tensor y = output ? h.exp() : h * h;
    (output ? y : h).add_(1);
    return message_of([&] { y.sum().backward(); });
  };
  // LibTorch names who wrote where an input was saved, we name who made it; versions of LibTorch
  // name nodes and end differently.
  const auto words = [](const std::string& text) {
    static const std::regex node("output 0 of [A-Za-z0-9]+");
    return std::regex_replace(text.substr(0, text.find(", with torch.autograd")), node,
                              "output 0 of a node");
  };
  for (bool output : {false, true}) {
    auto references = std::make_shared<Counting>();
    references->by_reference = true;
    const std::string plain = words(run(nullptr, output));
    EXPECT_THAT(
        plain,
        HasSubstr(
            "modified by an inplace operation: [CPUFloatType [2, 3]], which is output 0 of "));
    EXPECT_THAT(plain, HasSubstr(" is at version 1; expected version 0 instead. Hint: "));
    EXPECT_EQ(words(run(std::make_shared<Counting>(), output)), plain);  // copies too
    EXPECT_EQ(words(run(references, output)), plain);
  }
}

TEST(SavedTensors, WhatPlainLibTorchAllowsIsAllowed) {
  const auto run = [](bool packed) {
    std::optional<door::SavedTensorsScope> scope;
    if (packed) scope.emplace(std::make_shared<Counting>());
    torch::manual_seed(3);
    at::Tensor x = torch::randn({4, 4}).requires_grad_();
    at::Tensor h = x * 2;
    h.relu_();                            // saves its result, written before
    h = h + at::dropout(h, 0.5, true);    // residual
    h.add_(1);                            // add saved nothing
    at::Tensor t = h.t().slice(0, 1, 3);  // a view, strided
    (t.matmul(h) * t.sigmoid()).sum().backward();
    return x.grad();
  };
  EXPECT_TRUE(torch::equal(run(false), run(true)));
}

TEST(SavedTensors, ReferencesCompareTheirVersion) {
  at::Tensor x = torch::zeros({2});
  auto saved = door::saved_reference(x);
  EXPECT_TRUE(saved->unpack().is_same(saved->unpack()));
  EXPECT_EQ(saved->unpack().data_ptr(), x.data_ptr());
  x.add_(1);
  EXPECT_THAT(
      message_of([&] { saved->unpack(); }),
      HasSubstr("one of the variables needed for gradient computation has been modified by an "
                "inplace operation: [CPUFloatType [2]] is at version 1; expected version 0"));
  EXPECT_FALSE(door::saved_reference(at::Tensor())->unpack().defined());
  at::Tensor inference;
  {
    const c10::InferenceMode mode;
    inference = torch::ones({2});
  }
  EXPECT_TRUE(torch::equal(door::saved_reference(inference)->unpack(), torch::ones({2})));
}

TEST(SavedTensors, KeepNoGraph) {
  at::Tensor x = torch::randn({2}).requires_grad_();
  at::Tensor h = x.exp();
  EXPECT_FALSE(door::saved_reference(h)->unpack().requires_grad());
}

TEST(SavedTensors, OfEveryKind) {
  auto packer = std::make_shared<Counting>();
  packer->by_reference = true;  // clone() has no kernel for some
  std::vector<at::Tensor> leaves;
  const auto leaf = [&](at::Tensor t) { return leaves.emplace_back(t.requires_grad_()); };
  const auto model = [&] {
    leaves.clear();
    torch::manual_seed(0);
    at::Tensor loss =
        at::embedding(leaf(torch::randn({5, 3})), torch::tensor({1, 2, 1})).sum();  // integer
    loss =
        loss +
        at::where(torch::tensor({true, false}), leaf(torch::randn({2})), torch::zeros({2})).sum();
    loss = loss + at::view_as_real(leaf(torch::randn({3}, at::kComplexFloat)).square()).sum();
    loss = loss + leaf(torch::tensor(2.0)).exp();          // zero-dimensional
    loss = loss + leaf(torch::randn({0, 3})).exp().sum();  // empty
    const at::Tensor sparse = torch::eye(3).to_sparse();
    loss = loss + at::mm(sparse, leaf(torch::randn({3, 2}))).sum();
    loss = loss + (leaf(torch::randn({4})) * 3.0).sum();  // a wrapped number
    loss.backward();
    std::vector<at::Tensor> grads;
    for (const auto& t : leaves) grads.push_back(t.grad());
    return grads;
  };
  const auto plain = model();
  std::vector<at::Tensor> packed;
  {
    const door::SavedTensorsScope scope(packer);
    packed = model();
  }
  ASSERT_EQ(plain.size(), packed.size());
  for (std::size_t i = 0; i < plain.size(); ++i)
    EXPECT_TRUE(torch::equal(plain[i], packed[i])) << i;
  const auto met = [&](auto&& demand) {
    return std::any_of(packer->tensors.begin(), packer->tensors.end(), demand);
  };
  EXPECT_TRUE(met([](const auto& look) { return look.dtype == at::kLong; }));
  EXPECT_TRUE(met([](const auto& look) { return look.dtype == at::kBool; }));
  EXPECT_TRUE(met([](const auto& look) { return look.dtype == at::kComplexFloat; }));
  EXPECT_TRUE(met([](const auto& look) { return look.layout == at::kSparse; }));
  EXPECT_TRUE(met([](const auto& look) { return look.sizes.empty(); }));
  EXPECT_TRUE(met([](const auto& look) { return look.sizes == std::vector<std::int64_t>{0, 3}; }));
}

TEST(SavedTensors, OnTheMetaDeviceAndQuantised) {
  auto packer = std::make_shared<Counting>();
  packer->by_reference = true;
  const door::SavedTensorsScope scope(packer);
  at::Tensor x = torch::empty({2, 3}, at::kMeta).requires_grad_();
  x.exp().sum().backward();
  EXPECT_EQ(x.grad().sizes(), x.sizes());
  EXPECT_GE(packer->packed, 1);
  const at::Tensor q = at::quantize_per_tensor(torch::ones({2}), 0.5, 0, at::kQInt8);
  EXPECT_EQ(door::detail::pack_with(*packer, q)->unpack().scalar_type(), at::kQInt8);
}

TEST(SavedTensors, InferenceTensorsAreRefusedInLibTorchsWords) {
  at::Tensor inference;
  {
    const c10::InferenceMode mode;
    inference = torch::ones({2});
  }
  at::Tensor x = torch::randn({2}).requires_grad_();
  auto packer = std::make_shared<Counting>();
  const door::SavedTensorsScope scope(packer);
  EXPECT_THAT(message_of([&] { x* inference; }),
              HasSubstr("Inference tensors cannot be saved for backward"));
  EXPECT_EQ(door::active_saved_tensors(), packer);
}

// The second trap: an operator's buffer is saved before the operator fills it (rrelu's noise).
TEST(SavedTensors, ReferencesSeeWhatIsFilledAfterSaving) {
  const auto run = [](bool packed) {
    auto packer = std::make_shared<Counting>();
    packer->by_reference = true;
    std::optional<door::SavedTensorsScope> scope;
    if (packed) scope.emplace(packer);
    torch::manual_seed(5);
    at::Tensor x = torch::randn({50}).requires_grad_();
    at::rrelu(x, 0.1, 0.4, /*training=*/true).sum().backward();
    return x.grad();
  };
  EXPECT_TRUE(torch::equal(run(false), run(true)));
}

TEST(SavedTensors, AutocastDoesNotReachThePacker) {
  auto packer = std::make_shared<Counting>();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::Tensor x = torch::randn({3, 3}).requires_grad_();
  {
    const door::SavedTensorsScope scope(packer);
    x.exp().sum().backward();  // Counting looks
  }
  EXPECT_TRUE(at::autocast::is_autocast_enabled(at::kCPU));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(*packer->unpacked, 1);
}

TEST(SavedTensors, AScopeIsEnteredOnce) {
  auto packer = std::make_shared<Counting>();
  const door::SavedTensorsScope scope(packer);
  EXPECT_THAT(message_of([&] { const door::SavedTensorsScope again(packer); }),
              HasSubstr("is open on this thread already"));
  EXPECT_EQ(door::current_saved_tensors(), packer);
  EXPECT_THAT(message_of([&] { const door::SavedTensorsScope none(nullptr); }),
              HasSubstr("got no packer"));
}

/// What was warned of while it lives.
struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override { text += warning.msg() + "\n"; }
  std::string text;
  c10::WarningUtils::WarningHandlerGuard guard{this};
};

TEST(SavedTensors, AScopeLeftOutOfOrderGoesAlone) {
  auto a = std::make_shared<Counting>(), b = std::make_shared<Counting>();
  Warnings warnings;
  auto outer = std::make_unique<door::SavedTensorsScope>(a);
  auto inner = std::make_unique<door::SavedTensorsScope>(b);
  outer.reset();
  EXPECT_THAT(warnings.text, HasSubstr("left before a scope that was entered inside it"));
  EXPECT_EQ(door::current_saved_tensors(), b);
  inner.reset();
  EXPECT_EQ(door::current_saved_tensors(), nullptr);
}

TEST(SavedTensors, AScopeLeftOnAnotherThreadGoesToo) {
  auto a = std::make_shared<Counting>(), b = std::make_shared<Counting>();
  auto outer = std::make_unique<door::SavedTensorsScope>(a);
  std::string text;
  std::thread([&, left = std::make_unique<door::SavedTensorsScope>(b).release()] {
    Warnings warnings;
    delete left;
    text = warnings.text;
  }).join();
  EXPECT_THAT(text, HasSubstr("left on another thread than it was entered on"));
  EXPECT_EQ(door::current_saved_tensors(), a);
  std::thread([&] {
    Warnings quiet;
    outer.reset();
  }).join();
  EXPECT_EQ(door::current_saved_tensors(), nullptr);
  at::Tensor x = torch::randn({2}).requires_grad_();
  x.exp();
  EXPECT_EQ(a->packed + b->packed, 0);
}

TEST(SavedTensors, AScopeMayOutliveItsThread) {
  auto packer = std::make_shared<Counting>();
  std::unique_ptr<door::SavedTensorsScope> scope;
  std::thread([&] { scope = std::make_unique<door::SavedTensorsScope>(packer); }).join();
  Warnings warnings;
  scope.reset();
  EXPECT_EQ(packer.use_count(), 1);
}

TEST(SavedTensors, APackerThatThrowsLeavesNothing) {
  struct Throwing : door::SavedTensors {
    std::shared_ptr<door::Saved> pack(const at::Tensor&) override { TORCH_CHECK(false, "no room"); }
  };
  struct Null : door::SavedTensors {
    std::shared_ptr<door::Saved> pack(const at::Tensor&) override { return nullptr; }
  };
  at::Tensor x = torch::randn({2}).requires_grad_();
  EXPECT_THAT(message_of([&] {
                const door::SavedTensorsScope scope(std::make_shared<Throwing>());
                x.exp();
              }),
              HasSubstr("no room"));
  EXPECT_THAT(message_of([&] {
                const door::SavedTensorsScope scope(std::make_shared<Null>());
                x.exp();
              }),
              HasSubstr("returned null from pack()"));
  EXPECT_EQ(door::current_saved_tensors(), nullptr);
  x.exp().sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

TEST(SavedTensors, ReentrantBackwardWorks) {
  struct Inner : torch::autograd::Function<Inner> {
    static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
      ctx->save_for_backward({x});
      return x.clone();
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   torch::autograd::variable_list grads) {
      const at::AutoGradMode grad(true);
      at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_();
      at::Tensor again = ctx->get_saved_variables()[0];  // read twice
      EXPECT_TRUE(torch::equal(x, again));
      x.exp().sum().backward();
      return {grads[0] * x.grad()};
    }
  };
  auto packer = std::make_shared<Counting>();
  at::Tensor x = torch::randn({3}).requires_grad_();
  const door::SavedTensorsScope scope(packer);
  Inner::apply(x).sum().backward();
  EXPECT_TRUE(torch::equal(x.grad(), x.detach().exp()));
  EXPECT_EQ(packer->packed, 1);
}

// One test per assumption about LibTorch.
TEST(SavedTensorsEngine, IsTheDefaultEngineOnceInstalled) {
  auto& engine = door::detail::saved_tensors_engine();
  EXPECT_EQ(&torch::autograd::Engine::get_default_engine(), &engine);
  EXPECT_EQ(&door::detail::saved_tensors_engine(), &engine);
  EXPECT_NE(&torch::autograd::Engine::get_base_engine(), &engine);
  EXPECT_EQ(engine.abi(), door::detail::kSavedTensorsAbi);
}

TEST(SavedTensorsEngine, RefusesAnotherAbiNamingBoth) {
  door::detail::saved_tensors_engine();
  EXPECT_THAT(
      message_of([] { door::detail::installed_saved_tensors_engine<99>(); }),
      HasSubstr("saved tensors have door ABI " + std::to_string(door::detail::kSavedTensorsAbi) +
                " where installed and 99 here"));
}

struct ForeignEngine : torch::autograd::Engine {
  static torch::autograd::Engine& get() {
    static auto* engine = new ForeignEngine;
    return *engine;
  }
};

TEST(SavedTensorsEngine, RefusesAnotherEngineByName) {
  static torch::autograd::Engine* ours = &door::detail::saved_tensors_engine();
  torch::autograd::set_default_engine_stub(&ForeignEngine::get);
  const std::string message =
      message_of([] { const door::SavedTensorsScope scope(std::make_shared<Counting>()); });
  EXPECT_EQ(door::current_saved_tensors(), nullptr);
  torch::autograd::set_default_engine_stub([]() -> torch::autograd::Engine& { return *ours; });
  EXPECT_THAT(message, HasSubstr("another engine is installed in this process: "));
  EXPECT_THAT(message, HasSubstr("ForeignEngine"));
  EXPECT_THAT(message, HasSubstr("PythonEngine"));
}

TEST(SavedTensorsEngine, VersionsAreThoseOfTheCounter) {
  at::Tensor x = torch::zeros({2});
  const c10::VariableVersion counter = torch::autograd::impl::version_counter(x);
  x.detach().add_(1);
  EXPECT_EQ(counter.current_version(), 1u);
  const std::weak_ptr<int> none;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage = x.storage().getWeakStorageImpl();
  x = at::Tensor();
  EXPECT_TRUE(storage.expired());  // the counter keeps no storage
}

TEST(SavedTensorsEngine, GraphTasksHaveNumbers) {
  EXPECT_EQ(torch::autograd::get_current_graph_task_id(), -1);
  at::Tensor x = torch::randn({2}).requires_grad_();
  std::vector<int> tasks;
  at::Tensor y = x * 1;
  y.register_hook(
      [&](const at::Tensor&) { tasks.push_back(torch::autograd::get_current_graph_task_id()); });
  y.sum().backward({}, true);
  y.sum().backward();
  ASSERT_EQ(tasks.size(), 2u);
  EXPECT_GE(tasks[0], 0);
  EXPECT_NE(tasks[0], tasks[1]);
}

TEST(SavedTensors, ParametersAreLeavesThatAskForGradientsAndViewsOfThem) {
  const at::Tensor leaf = torch::randn({4, 2}).requires_grad_(), buffer = torch::randn({4, 2});
  EXPECT_TRUE(door::is_parameter(leaf));
  EXPECT_TRUE(door::is_parameter(leaf.t()));
  EXPECT_TRUE(door::is_parameter(leaf.t()[0]));
  EXPECT_FALSE(door::is_parameter(leaf * 1));
  EXPECT_FALSE(door::is_parameter((leaf * 1).t()));
  EXPECT_FALSE(door::is_parameter(leaf.detach()));
  EXPECT_FALSE(door::is_parameter(buffer));
  EXPECT_FALSE(door::is_parameter(buffer.t()));
}

}  // namespace

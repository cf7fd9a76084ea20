// SPDX-License-Identifier: Apache-2.0
#include <fourfold/torch/operators.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace door = fourfold::door;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

struct Log final : door::OperatorObserver {
  bool before(const c10::OperatorHandle& op, const c10::Stack& stack) override {
    EXPECT_GE(stack.size(), op.schema().arguments().size());
    lines.push_back("> " + op.schema().name());
    return wants_after;
  }
  void after(const c10::OperatorHandle& op, const c10::Stack& stack) override {
    EXPECT_GE(stack.size(), op.schema().returns().size());
    lines.push_back("< " + op.schema().name());
  }
  void failed() noexcept override { lines.emplace_back("failed"); }
  void backward_began() noexcept override { ++backwards; }

  std::vector<std::string> lines;
  bool wants_after = true;
  int backwards = 0;
};

bool key_is_on() { return c10::impl::tls_is_dispatch_key_included(door::kOperatorsKey); }

std::string error_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(Operators, ToldWithinTheScopeAlone) {
  const auto x = torch::ones({2, 2});
  Log log;
  {
    const door::OperatorsScope scope(log);
    EXPECT_TRUE(key_is_on());
    EXPECT_EQ(door::current_operator_observer(), &log);
    static_cast<void>(torch::gelu(x));
  }
  static_cast<void>(torch::relu(x));
  EXPECT_THAT(log.lines, ElementsAre("> aten::gelu", "< aten::gelu"));
  EXPECT_FALSE(key_is_on());
  EXPECT_EQ(door::current_operator_observer(), nullptr);
}

TEST(Operators, CompositeOperatorsNestAndDetailsBelowAutogradAreNotTold) {
  const auto x = torch::ones({2, 2}), w = torch::ones({2});
  Log log;
  const door::OperatorsScope scope(log);
  static_cast<void>(at::layer_norm(x, {2}, w));
  EXPECT_THAT(log.lines, ElementsAre("> aten::layer_norm", "> aten::native_layer_norm",
                                     "< aten::native_layer_norm", "< aten::layer_norm"));
}

TEST(Operators, ResultsAreThoseOfThePlainCall) {
  const auto x = torch::randn({3, 5}).requires_grad_();
  const auto plain = torch::softmax(torch::nn::functional::gelu(x.matmul(x.t())), -1);
  Log log;
  const door::OperatorsScope scope(log);
  EXPECT_TRUE(
      torch::equal(plain, torch::softmax(torch::nn::functional::gelu(x.matmul(x.t())), -1)));
}

TEST(Operators, NoAfterWhereNoneIsWanted) {
  Log log;
  log.wants_after = false;
  const door::OperatorsScope scope(log);
  static_cast<void>(torch::ones({2}) + 1);
  EXPECT_THAT(log.lines, Contains("> aten::add"));
  EXPECT_THAT(log.lines, Not(Contains("< aten::add")));
}

TEST(Operators, AnOperatorThatThrowsIsToldAsFailed) {
  const auto a = torch::ones({2, 3}), b = torch::ones({2, 3});
  Log log;
  const door::OperatorsScope scope(log);
  EXPECT_THROW(static_cast<void>(torch::mm(a, b)), c10::Error);
  EXPECT_THAT(log.lines, ElementsAre("> aten::mm", "failed"));
}

TEST(Operators, BackwardPassesThroughUnlessAskedFor) {
  for (const bool in_backward : {false, true}) {
    const auto x = torch::ones({4}).requires_grad_();
    Log log;
    auto loss = (x * x).sum();
    const door::OperatorsScope scope(log, in_backward);
    loss.backward();
    EXPECT_TRUE(torch::equal(x.grad(), torch::full({4}, 2.0)));
    if (in_backward) {
      EXPECT_THAT(log.lines, Contains("> aten::mul"));
    } else {
      EXPECT_THAT(log.lines, Not(Contains("> aten::mul")));
    }
    EXPECT_EQ(log.backwards > 0, !in_backward);
  }
}

TEST(Operators, OtherThreadsAndInferenceModeAreNotTold) {
  const auto x = torch::ones({2});
  Log log;
  const door::OperatorsScope scope(log);
  const at::ThreadLocalState state;
  std::thread([&] {
    const at::ThreadLocalStateGuard guard(state);  // as LibTorch does for threads of its own
    EXPECT_TRUE(key_is_on());
    EXPECT_TRUE(torch::equal(torch::relu(x), x));
  }).join();
  {
    const c10::InferenceMode inference;
    static_cast<void>(torch::relu(x));
  }
  EXPECT_THAT(log.lines, IsEmpty());
}

TEST(Operators, InnermostIsToldAndPauseHides) {
  const auto x = torch::ones({2});
  Log outer, inner;
  const door::OperatorsScope outer_scope(outer);
  {
    const door::OperatorsScope inner_scope(inner);
    static_cast<void>(torch::relu(x));
    const door::OperatorsPause pause;
    static_cast<void>(torch::relu(x));
  }
  EXPECT_THAT(outer.lines, IsEmpty());
  EXPECT_EQ(inner.lines.size(), 2U);
  static_cast<void>(torch::relu(x));
  EXPECT_EQ(outer.lines.size(), 2U);
}

TEST(Operators, ScopesMayBeLeftInAnyOrderAndOnAnotherThread) {
  const auto x = torch::ones({2});
  Log a, b;
  auto first = std::make_unique<door::OperatorsScope>(a);
  auto second = std::make_unique<door::OperatorsScope>(b);
  first.reset();
  static_cast<void>(torch::relu(x));
  EXPECT_EQ(b.lines.size(), 2U);
  std::thread([&] { second.reset(); }).join();
  static_cast<void>(torch::relu(x));
  EXPECT_EQ(b.lines.size(), 2U);
  EXPECT_EQ(door::current_operator_observer(), nullptr);
  { const door::OperatorsScope third(a); }
  EXPECT_FALSE(key_is_on());
}

struct StateOfTwoVersions {
  static constexpr std::uint32_t kAbi = 1;
  static constexpr const char* kName = "test";
  int value = 7;
};
struct NewerState {
  static constexpr std::uint32_t kAbi = 2;
  static constexpr const char* kName = "test";
  int value = 8;
};

TEST(DoorState, OneInTheProcess) {
  door::door_state<StateOfTwoVersions>().value = 9;
  EXPECT_EQ(door::door_state<StateOfTwoVersions>().value, 9);
  EXPECT_EQ(&door::door_state<StateOfTwoVersions>(), door::door_slot<StateOfTwoVersions>().state);
}

TEST(DoorState, AnotherAbiIsRefusedNamingBoth) {
  door::DoorSlot slot;
  EXPECT_EQ(door::state_in<StateOfTwoVersions>(slot).value, 7);
  const std::string error = error_of([&] { door::state_in<NewerState>(slot); });
  EXPECT_THAT(error, HasSubstr("the test door of this process was opened by a part of the program "
                               "with ABI 1, and this part was built with ABI 2"));
  EXPECT_EQ(door::state_in<StateOfTwoVersions>(slot).value, 7);
  delete static_cast<StateOfTwoVersions*>(slot.state);
}

}  // namespace

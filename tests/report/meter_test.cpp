// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <fourfold/report/meter.hpp>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern char** environ;

namespace {

using fourfold::Ledger;
using fourfold::Meter;
using fourfold::PeakBytes;
using fourfold::Place;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;

torch::nn::Sequential small_model() {
  torch::manual_seed(0);
  return torch::nn::Sequential(torch::nn::Linear(100, 300), torch::nn::ReLU(),
                               torch::nn::Linear(300, 10));
}

std::int64_t of(const fourfold::door::Places& places, Place place) {
  return places[static_cast<std::size_t>(place)];
}

struct Delta {
  std::int64_t current, weights, step_peak, step_current;
  friend bool operator==(const Delta&, const Delta&) = default;
};

/// What a meter sees of a model and of a step; `early`: made before the model, or after it.
Delta measure(bool early) {
  if (!early) c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
  const PeakBytes before = fourfold::door::counters().read().all;
  const std::int64_t weights = of(fourfold::door::counters().read().now, Place::kWeights);
  if (early) (void)Meter();  // a meter may die, counting goes on
  auto model = small_model();
  const Meter meter;
  EXPECT_EQ(meter.adopt(model->parameters(), Place::kWeights), 4);
  Delta out{};
  out.current = meter.bytes().current - before.current;
  out.weights = meter.bytes(Place::kWeights).current - weights;
  meter.restart_peak();
  model->forward(torch::ones({16, 100})).sum().backward();
  out.step_peak = meter.bytes().peak - before.current;
  out.step_current = meter.bytes().current - before.current;
  return out;
}

TEST(Meter, MadeLateAgreesWithMadeEarly) {
  const Delta early = measure(true);
  const std::int64_t parameters = 4 * (100 * 300 + 300 + 300 * 10 + 10);
  EXPECT_EQ(early.current, parameters);
  EXPECT_EQ(early.weights, parameters);
  EXPECT_EQ(early.step_current, 2 * parameters);  // gradients beside
  EXPECT_GT(early.step_peak, early.step_current);
  EXPECT_TRUE(measure(false) == early);
}

TEST(Meter, AdoptsOnceAndTellsWhatItCounts) {
  const Meter meter;
  const std::int64_t before = meter.bytes(Place::kOptimizer).current;
  const auto a = torch::ones({100});
  const std::vector<at::Tensor> tensors{a, a.view({10, 10}), at::Tensor(), torch::empty({0}),
                                        torch::empty({3}, torch::kMeta)};
  EXPECT_EQ(meter.adopt(tensors, Place::kOptimizer), 2);
  EXPECT_EQ(meter.bytes(Place::kOptimizer).current - before, 400);
}

TEST(Meter, LedgerAddsUp) {
  const Meter meter;
  meter.restart_peak();
  {
    const fourfold::PlaceGuard guard(Place::kActivations);
    (void)torch::empty({1 << 20});
  }
  const auto kept = torch::empty({1000});
  const Ledger ledger = meter.ledger();
  std::int64_t now = 0, at_peak = 0;
  for (const auto& place : ledger.places) now += place.now, at_peak += place.at_peak;
  EXPECT_EQ(now, ledger.bytes.current);
  EXPECT_EQ(at_peak, ledger.bytes.peak);
  EXPECT_GE(ledger[Place::kActivations].at_peak, 4 * kMiB);
  EXPECT_GE(ledger[Place::kActivations].own_peak, ledger[Place::kActivations].at_peak);
  EXPECT_EQ(ledger[Place::kActivations].own_peak, meter.bytes(Place::kActivations).peak);
}

TEST(Meter, ReadsWhatTheSystemSays) {
  const std::int64_t before = Meter::resident();
  ASSERT_GT(before, kMiB);
  std::vector<char> touched(64 * kMiB, 1);
  EXPECT_GE(Meter::resident(), before + 60 * kMiB) << touched[kMiB];
  EXPECT_GE(Meter::resident_peak(), Meter::resident());
  touched = {};
  if (!Meter::restart_resident_peak()) GTEST_SKIP() << "the system forbids clear_refs";
  EXPECT_LE(Meter::resident_peak(), Meter::resident() + 16 * kMiB);
}

TEST(Meter, CudaIsZeroWhereThereIsNone) {
  const Meter meter;
  if (c10::impl::hasDeviceGuardImpl(at::kCUDA)) GTEST_SKIP() << "there may be one";
  EXPECT_EQ(meter.bytes(at::Device(at::kCUDA, 0)).peak, 0);
  EXPECT_EQ(meter.bytes(at::kCUDA).total, 0);
  EXPECT_EQ(meter.bytes(at::kCPU).total, meter.bytes().total);
  EXPECT_TRUE(meter.ledger().cuda.empty());
}

// Resident memory belongs to a process: these run in one of their own, re-executed, because a fork
// after a parallel region hangs in LibTorch.
constexpr const char* kChild = "FOURFOLD_METER_CHILD";

/// Runs the calling test alone in a new process; its exit status, 0 if it passed.
int run_in_child() {
  const auto* const info = testing::UnitTest::GetInstance()->current_test_info();
  const std::string test = std::string(info->test_suite_name()) + "." + info->name();
  std::string program = "/proc/self/exe", filter = "--gtest_filter=" + test;
  std::string asked = std::string(kChild) + "=1";
  std::vector<char*> arguments{program.data(), filter.data(), nullptr}, environment{asked.data()};
  for (char** entry = environ; *entry; ++entry)
    if (std::strncmp(*entry, "GTEST_", 6) != 0) environment.push_back(*entry);  // shards, outputs
  environment.push_back(nullptr);
  pid_t child = 0;
  int status = -1;
  if (posix_spawn(&child, program.c_str(), nullptr, nullptr, arguments.data(),
                  environment.data()) != 0)
    return -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -2;
}

TEST(Meter, ResidentMemoryReturnsWhenBlocksDo) {
#if defined(FOURFOLD_MALLOC_ALL_BLOCKS)
  GTEST_SKIP() << "AddressSanitizer holds freed memory back";
#endif
  if (!std::getenv(kChild)) {
    EXPECT_EQ(run_in_child(), 0);
    return;
  }
  at::set_num_threads(1);
  const Meter meter;
  (void)torch::ones({1000}).sum();  // what LibTorch needs for itself
  const std::int64_t before = Meter::resident();
  std::vector<at::Tensor> pieces;
  std::int64_t total = 0;
  for (int i = 0; total < 1024 * kMiB; ++i) {
    const std::int64_t bytes = (i % 4 == 0 ? 20 : i % 4) * kMiB + 4096 * i;
    pieces.push_back(torch::full({bytes}, 1, torch::kByte));
    total += bytes;
  }
  EXPECT_GE(Meter::resident(), before + total);
  // Every second piece first: ranges come back in holes.
  for (std::size_t i = 0; i < pieces.size(); i += 2) pieces[i].reset();
  std::int64_t left = 0;
  for (const auto& piece : pieces) left += piece.defined() ? piece.numel() : 0;
  // The allowance, a header's page a piece, and 8 MiB for code and heap touched since.
  const auto bound = static_cast<std::int64_t>(fourfold::door::ArenaLimits().allowance) + 8 * kMiB;
  EXPECT_LE(Meter::resident(), before + left + bound);
  pieces.clear();
  EXPECT_LE(Meter::resident(), before + bound);
  Meter::release_free_blocks();
  EXPECT_LE(Meter::resident(), before + 8 * kMiB);
}

TEST(Meter, ResidentPeakFollowsTheCount) {
#if defined(FOURFOLD_MALLOC_ALL_BLOCKS)
  GTEST_SKIP() << "AddressSanitizer holds freed memory back";
#endif
  if (!std::getenv(kChild)) {
    EXPECT_EQ(run_in_child(), 0);
    return;
  }
  at::set_num_threads(1);
  const Meter meter;
  const std::int64_t before = Meter::resident_peak();
  torch::manual_seed(0);
  torch::nn::Sequential model;
  for (int i = 0; i < 6; ++i) {
    model->push_back(torch::nn::Linear(512, 512));
    model->push_back(torch::nn::GELU());
    model->push_back(torch::nn::LayerNorm(torch::nn::LayerNormOptions({512})));
  }
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-3));
  const auto x = torch::randn({2048, 512});
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    model->forward(x).square().mean().backward();
    optimizer.step();
  }
  EXPECT_GT(meter.bytes().peak, 100 * kMiB);
  EXPECT_LE(Meter::resident_peak(), meter.bytes().peak + before + 100'000'000);
}

}  // namespace

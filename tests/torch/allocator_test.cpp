// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <torch/torch.h>
#include <fourfold/torch/allocator.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace {

using fourfold::Place;
using fourfold::PlaceGuard;
using fourfold::door::BlockArena;
using fourfold::door::ByteCount;
using fourfold::door::ByteCounters;
using fourfold::door::counters;
using fourfold::door::Places;
using testing::HasSubstr;

std::int64_t sum(const Places& places) {
  return std::accumulate(places.begin(), places.end(), std::int64_t{0});
}
std::int64_t of(const Places& places, Place place) {
  return places[static_cast<std::size_t>(place)];
}
at::Tensor floats(std::int64_t n) { return torch::empty({n}, torch::kFloat); }

/// Each test sees differences: other tests of this binary may hold tensors of their own.
class Allocator : public testing::Test {
 protected:
  void SetUp() override {
    fourfold::door::install_allocator();
    counters().restart_peak();
    before_ = counters().read();
  }
  [[nodiscard]] std::int64_t current() const {
    return counters().read().all.current - before_.all.current;
  }
  [[nodiscard]] std::int64_t now(Place place) const {
    return of(counters().read().now, place) - of(before_.now, place);
  }
  ByteCount before_;
};

TEST_F(Allocator, CountsTheBytesOfATensorExactly) {
  for (const std::int64_t n : {1, 3, 16, 1000, 16383, 16384, 16385, 1 << 20}) {
    auto tensor = floats(n);
    EXPECT_EQ(current(), 4 * n);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) % 64, 0u) << n;
    std::memset(tensor.data_ptr(), 0xFF, tensor.nbytes());
    tensor.reset();
    EXPECT_EQ(current(), 0) << n;
  }
}

TEST_F(Allocator, PeakTotalAndCurrentAreThoseOfTheTrace) {
  auto a = floats(1000);
  auto b = floats(500'000);
  b.reset();
  auto c = floats(2000);
  const ByteCount count = counters().read();
  EXPECT_EQ(count.all.current - before_.all.current, 12'000);
  EXPECT_EQ(count.all.peak - before_.all.current, 2'004'000);
  EXPECT_EQ(count.all.total - before_.all.total, 2'012'000);
  EXPECT_EQ(count.blocks - before_.blocks, 3);
  counters().restart_peak();
  EXPECT_EQ(counters().read().all.peak, count.all.current);
}

TEST_F(Allocator, PlacesAddUpToThePeakAtItsInstant) {
  const auto place_tensor = [](Place place, std::int64_t n) {
    const PlaceGuard guard(place);
    return floats(n);
  };
  auto weights = place_tensor(Place::kWeights, 30'000);
  auto activations = place_tensor(Place::kActivations, 100'000);
  const std::int64_t peak = before_.all.current + 4 * 130'000;  // here
  activations.reset();
  auto gradients = place_tensor(Place::kGradients, 50'000);  // its own peak, below the overall one
  const ByteCount count = counters().read();
  EXPECT_EQ(count.all.peak, peak);
  EXPECT_EQ(sum(count.at_peak), count.all.peak);
  EXPECT_EQ(sum(count.now), count.all.current);
  EXPECT_EQ(sum(count.total), count.all.total);
  EXPECT_EQ(of(count.at_peak, Place::kActivations) - of(before_.now, Place::kActivations), 400'000);
  EXPECT_EQ(of(count.at_peak, Place::kGradients), of(before_.now, Place::kGradients));
  EXPECT_EQ(of(count.own_peak, Place::kGradients) - of(before_.now, Place::kGradients), 200'000);
}

TEST_F(Allocator, RetagMovesALiveBlock) {
  auto tensor = floats(10'000);
  EXPECT_EQ(now(Place::kOther), 40'000);
  EXPECT_TRUE(fourfold::door::retag(tensor, Place::kWeights));
  EXPECT_TRUE(fourfold::door::retag(tensor.view({100, 100}).t(), Place::kWeights));  // same storage
  EXPECT_EQ(now(Place::kOther), 0);
  EXPECT_EQ(now(Place::kWeights), 40'000);
  EXPECT_EQ(current(), 40'000);
  const ByteCount count = counters().read();  // still at the peak: it knows the new place
  EXPECT_EQ(of(count.at_peak, Place::kWeights) - of(before_.now, Place::kWeights), 40'000);
  EXPECT_EQ(sum(count.at_peak), count.all.peak);
  tensor.reset();
  EXPECT_EQ(now(Place::kWeights), 0);
}

TEST_F(Allocator, RetagLeavesAloneWhatItDoesNotCount) {
  std::vector<float> mine(100);
  EXPECT_FALSE(fourfold::door::retag(torch::from_blob(mine.data(), {100}), Place::kWeights));
  EXPECT_FALSE(fourfold::door::retag(at::Tensor(), Place::kWeights));
  EXPECT_FALSE(fourfold::door::retag(floats(0), Place::kWeights));
  EXPECT_FALSE(fourfold::door::retag(torch::empty({3}, torch::kMeta), Place::kWeights));
  EXPECT_EQ(now(Place::kWeights), 0);
}

TEST_F(Allocator, RetagsIndicesAndValuesOfASparseTensor) {
  const auto sparse =
      torch::sparse_coo_tensor(torch::tensor({{0, 2, 5}}), torch::ones({3, 7}), {9, 7});
  EXPECT_TRUE(fourfold::door::retag(sparse, Place::kGradients));
  EXPECT_EQ(now(Place::kGradients), 3 * 8 + 21 * 4);
}

TEST_F(Allocator, ZeroBytesAreANullPointerAndNoBlock) {
  auto& allocator = fourfold::door::counting_allocator();
  const c10::DataPtr block = allocator.allocate(0);
  EXPECT_EQ(block.get(), nullptr);
  EXPECT_EQ(block.device(), c10::Device(c10::kCPU));
  EXPECT_EQ(counters().read().blocks, before_.blocks);
  void* const raw = allocator.raw_allocate(0);
  allocator.raw_deallocate(raw);
  EXPECT_EQ(floats(0).sum().item<float>(), 0.0F);
}

TEST_F(Allocator, RawAllocateKeepsThePromiseOfTheInterface) {
  auto& allocator = fourfold::door::counting_allocator();
  for (const std::size_t bytes : {std::size_t{100}, std::size_t{1} << 20}) {
    void* const raw = allocator.raw_allocate(bytes);  // aborts unless context equals data
    EXPECT_EQ(current(), static_cast<std::int64_t>(bytes));
    const c10::DataPtr copy = allocator.clone(raw, bytes);
    EXPECT_TRUE(allocator.is_simple_data_ptr(copy));
    EXPECT_EQ(std::memcmp(raw, copy.get(), bytes), 0);
    allocator.raw_deallocate(raw);
  }
}

TEST_F(Allocator, InstalledTwiceIsInstalledOnce) {
  const auto* const first = c10::GetCPUAllocator();
  EXPECT_EQ(&fourfold::door::install_allocator(), first);
  EXPECT_EQ(c10::GetCPUAllocator(), first);
  EXPECT_TRUE(fourfold::door::allocator_installed());
}

TEST_F(Allocator, BlocksOfTheAllocatorBeforeLiveOn) {
  c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
  auto before = torch::ones({1000});
  fourfold::door::install_allocator();
  auto after = torch::ones({1000});
  EXPECT_EQ(current(), 4000);
  EXPECT_EQ((before + after).sum().item<float>(), 2000.0F);
  before.reset();
  EXPECT_EQ(current(), 4000);
}

TEST_F(Allocator, TooMuchIsAnErrorInLibTorchsWordsAndBreaksNothing) {
#if defined(FOURFOLD_MALLOC_ALL_BLOCKS)
  GTEST_SKIP() << "AddressSanitizer ends the process, unless told allocator_may_return_null=1";
#endif
  auto kept = torch::ones({1000});
  const auto message = [](std::int64_t bytes) -> std::string {
    try {
      (void)torch::empty({bytes}, torch::kByte);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  for (const std::int64_t bytes : {std::int64_t{1} << 46, std::int64_t{1} << 62, INT64_MAX}) {
    EXPECT_THAT(message(bytes),
                HasSubstr("DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                          std::to_string(bytes) + " bytes. Error code 12"));
    EXPECT_THAT(message(bytes), HasSubstr("bytes live in CPU tensors (counted by fourfold)"));
  }
  EXPECT_THROW((void)fourfold::door::counting_allocator().allocate(SIZE_MAX - 3), c10::Error);
  EXPECT_EQ(current(), 4000);
  EXPECT_EQ(fourfold::door::counting_allocator().arena().used() % BlockArena::page(), 0u);
  EXPECT_EQ((kept + torch::ones({1000})).sum().item<float>(), 2000.0F);
}

TEST_F(Allocator, BlocksFreedOnAnotherThreadLeaveTheirOwnPlace) {
  at::Tensor small, large;
  std::thread([&] {
    const PlaceGuard guard(Place::kOptimizer);
    small = floats(10), large = floats(1 << 20);
  }).join();
  EXPECT_EQ(now(Place::kOptimizer), 40 + (4 << 20));
  std::thread([&] {
    const PlaceGuard guard(Place::kGradients);
    small.reset(), large.reset();
  }).join();
  EXPECT_EQ(now(Place::kOptimizer), 0);
  EXPECT_EQ(now(Place::kGradients), 0);
}

TEST_F(Allocator, ManyThreadsAddUp) {
  constexpr int kThreads = 4, kRounds = 400;
  std::vector<std::thread> threads;
  std::vector<at::Tensor> kept(kThreads);
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      const PlaceGuard guard(static_cast<Place>(t + 1));
      std::vector<at::Tensor> held(8);
      for (int round = 0; round < kRounds; ++round) {
        auto& slot = held[static_cast<std::size_t>(round) % held.size()];
        slot = floats(round % 5 == 0 ? 30'000 + 100 * round : 10 + round);
        // Nobody else has been handed these bytes.
        std::memset(slot.data_ptr(), t + 1, slot.nbytes());
        const auto* bytes = static_cast<const unsigned char*>(slot.data_ptr());
        ASSERT_TRUE(std::all_of(bytes, bytes + slot.nbytes(),
                                [t](unsigned char byte) { return byte == t + 1; }));
        if (round % 7 == 0) fourfold::door::retag(slot, Place::kOther);
      }
      kept[static_cast<std::size_t>(t)] = floats(1000);
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(current(), kThreads * 4000);
  const ByteCount count = counters().read();
  EXPECT_EQ(sum(count.at_peak), count.all.peak);
  EXPECT_EQ(sum(count.now), count.all.current);
  EXPECT_EQ(count.blocks - before_.blocks, kThreads * (kRounds + 1));
  EXPECT_GE(count.all.peak, count.all.current);
}

TEST_F(Allocator, LetsTheProfilerSeeItsBlocks) {
  struct Report : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, std::int64_t bytes, std::size_t, std::size_t,
                           c10::Device) override {
      bytes > 0 ? taken += bytes : freed -= bytes;
    }
    bool memoryProfilingEnabled() const override { return true; }
    std::int64_t taken = 0, freed = 0;
  };
  const auto report = std::make_shared<Report>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, report);
    (void)floats(1000);
  }
  EXPECT_EQ(report->taken, 4000);
  EXPECT_EQ(report->freed, 4000);
}

TEST_F(Allocator, AWriteBeforeTheBlockIsNamed) {
#if defined(FOURFOLD_MALLOC_ALL_BLOCKS)
  GTEST_SKIP() << "AddressSanitizer finds it first";
#endif
  auto& allocator = fourfold::door::counting_allocator();
  char* const raw = static_cast<char*>(allocator.raw_allocate(1 << 20));
  std::array<char, 64> header{};
  std::memcpy(header.data(), raw - 64, 64);
  std::memset(raw - 64, 0, 64);
  try {
    allocator.raw_deallocate(raw);
    ADD_FAILURE() << "no error";
  } catch (const c10::Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("has lost its header: something wrote before it"));
  }
  std::memcpy(raw - 64, header.data(), 64);
  allocator.raw_deallocate(raw);
  EXPECT_EQ(current(), 0);
}

/// Counted by construction: what is adopted counts as if it had been allocated then.
TEST_F(Allocator, AdoptedStoragesAreFollowedUntilTheyDie) {
  c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
  auto old = torch::ones({100, 100});
  fourfold::door::install_allocator();
  EXPECT_TRUE(fourfold::door::adopt(old, Place::kWeights));
  EXPECT_TRUE(fourfold::door::adopt(old.t(), Place::kWeights));  // one storage counts once
  EXPECT_EQ(current(), 40'000);
  EXPECT_EQ(now(Place::kWeights), 40'000);
  EXPECT_TRUE(fourfold::door::retag(old, Place::kOptimizer));
  EXPECT_EQ(now(Place::kOptimizer), 40'000);
  const std::int64_t peak = counters().read().all.peak;
  old.reset();  // nobody tells us,
  auto fresh = floats(10'000);
  EXPECT_EQ(counters().read().all.peak, peak);  // and yet no peak counts the dead beside the living
  EXPECT_EQ(current(), 40'000);
  EXPECT_EQ(now(Place::kOptimizer), 0);
}

TEST_F(Allocator, AdoptsOnlyMemoryOfTheCpu) {
  EXPECT_FALSE(fourfold::door::adopt(torch::empty({3}, torch::kMeta), Place::kWeights));
  EXPECT_FALSE(fourfold::door::adopt(floats(0), Place::kWeights));
  EXPECT_FALSE(fourfold::door::adopt(at::Tensor(), Place::kWeights));
  std::vector<float> mine(100);
  auto blob = torch::from_blob(mine.data(), {100});
  EXPECT_TRUE(fourfold::door::adopt(blob, Place::kWeights));
  EXPECT_EQ(now(Place::kWeights), 400);
  blob.reset();
  EXPECT_EQ(now(Place::kWeights), 0);
}

// ---- the arena, apart from the allocator -------------------------------------------------------

constexpr std::size_t kMiB = std::size_t{1} << 20;

/// The process's resident bytes within [start, start + size).
std::size_t resident(void* start, std::size_t size) {
  std::vector<unsigned char> pages(size / BlockArena::page());
  if (mincore(start, size, pages.data()) != 0) return 0;  // ENOMEM: not mapped any more
  std::size_t count = 0;
  for (const unsigned char page : pages) count += page & 1;
  return count * BlockArena::page();
}

TEST(BlockArenaRules, SplitsAndJoinsWhatItKeeps) {
  BlockArena arena;
  char* const whole = static_cast<char*>(arena.take(8 * kMiB));
  arena.give(whole, 8 * kMiB);
  EXPECT_EQ(arena.kept(), 8 * kMiB);
  EXPECT_EQ(arena.take(3 * kMiB), whole);
  EXPECT_EQ(arena.take(1 * kMiB), whole + 3 * kMiB);
  EXPECT_EQ(arena.take(4 * kMiB), whole + 4 * kMiB);
  EXPECT_EQ(arena.kept(), 0u);
  arena.give(whole, 3 * kMiB);  // in the order that joins to the left, to the right,
  arena.give(whole + 4 * kMiB, 4 * kMiB);
  arena.give(whole + 3 * kMiB, 1 * kMiB);  // and on both sides
  EXPECT_EQ(arena.take(8 * kMiB), whole);
  arena.give(whole, 8 * kMiB);
  arena.release();
  EXPECT_EQ(arena.kept(), 0u);
  EXPECT_EQ(arena.used(), 0u);
}

TEST(BlockArenaRules, TakesTheTightestFit) {
  BlockArena arena;
  // Cut from one range, so that what lies between them is known: wherever the system maps a block of
  // its own, it may touch another.
  char* const whole = static_cast<char*>(arena.take(10 * kMiB));
  arena.give(whole, 10 * kMiB);
  char* const wide = static_cast<char*>(arena.take(5 * kMiB));
  char* const between = static_cast<char*>(arena.take(1 * kMiB));
  char* const tight = static_cast<char*>(arena.take(3 * kMiB));
  char* const last = static_cast<char*>(arena.take(1 * kMiB));
  arena.give(wide, 5 * kMiB);
  arena.give(tight, 3 * kMiB);
  EXPECT_EQ(arena.take(3 * kMiB), tight);
  arena.give(tight, 3 * kMiB), arena.give(between, kMiB), arena.give(last, kMiB);
  EXPECT_EQ(arena.kept(), 10 * kMiB);
  arena.release();
}

TEST(BlockArenaRules, KeepsNoMoreThanItsAllowance) {
  BlockArena arena({.allowance = 8 * kMiB, .slack = 0, .earns = false});
  std::vector<void*> blocks;
  for (int i = 0; i < 16; ++i) blocks.push_back(arena.take(2 * kMiB));
  for (void* block : blocks) {
    std::memset(block, 1, 2 * kMiB);
    arena.give(block, 2 * kMiB);
    EXPECT_LE(arena.kept(), 8 * kMiB);
  }
  EXPECT_EQ(arena.kept(), 8 * kMiB);
  std::size_t still = 0;
  for (void* block : blocks) still += resident(block, 2 * kMiB);
  EXPECT_LE(still, 8 * kMiB);
  void* const large =
      arena.take(16 * kMiB);  // larger than all that may be kept: goes straight back
  arena.give(large, 16 * kMiB);
  EXPECT_LE(arena.kept(), 8 * kMiB);
  arena.release();
}

TEST_F(Allocator, AWatchHasAPeakOfItsOwn) {
  fourfold::door::PeakWatch outer, inner;
  counters().watch(outer);
  const std::int64_t start = counters().read().all.current;
  auto large = floats(1 << 20);
  large.reset();
  counters().watch(inner);
  counters().restart_peak();  // of everybody's meter, not of a watch
  auto small = floats(1 << 10);
  EXPECT_EQ(counters().read(inner).all.peak, start + (4 << 10));
  EXPECT_EQ(counters().read(outer).all.peak, start + (4 << 20));
  EXPECT_EQ(counters().read(outer).all.peak, start + (4 << 10)) << "it starts again when it is read";
  EXPECT_EQ(counters().read(outer).all.current, start + (4 << 10));
  counters().end_watch(outer);
  large = floats(1 << 20);
  EXPECT_EQ(counters().read(inner).all.peak, start + (4 << 10) + (4 << 20));
  counters().end_watch(inner);
  counters().end_watch(inner);  // once is enough
}

TEST(BlockArenaRules, AtThePeakKeepsNoMoreThanTheSlack) {
  BlockArena arena({.allowance = 64 * kMiB, .slack = 2 * kMiB, .earns = true});
  std::vector<void*> small;
  for (int i = 0; i < 32; ++i) small.push_back(arena.take(kMiB));
  for (int i = 0; i < 32; i += 2) arena.give(small[static_cast<std::size_t>(i)], kMiB);  // holes
  EXPECT_EQ(arena.kept(), 16 * kMiB);
  void* const large = arena.take(16 * kMiB);  // fits in no hole
  EXPECT_EQ(arena.used(), 32 * kMiB);
  EXPECT_LE(arena.used() + arena.kept(), arena.most_used() + 2 * kMiB);
  arena.give(large, 16 * kMiB);
  for (int i = 1; i < 32; i += 2) arena.give(small[static_cast<std::size_t>(i)], kMiB);
  arena.release();
}

TEST(BlockArenaRules, EarnsAWorkingSetAndLosesItWhenNobodyTouchesIt) {
  BlockArena arena({.allowance = 8 * kMiB, .slack = 2 * kMiB, .earns = true});
  const auto step = [&arena](int blocks) {
    std::vector<void*> live;
    for (int i = 0; i < blocks; ++i) live.push_back(arena.take(2 * kMiB));
    for (void* block : live) arena.give(block, 2 * kMiB);
  };
  step(32);
  EXPECT_EQ(arena.kept(), 8 * kMiB) << "nothing is earned by one use";
  step(32);
  EXPECT_EQ(arena.kept(), 64 * kMiB)
      << "what was given back and asked for again is kept from now on";
  for (int i = 0; i < 100; ++i) step(4);  // 800 MiB go by, more than two windows of 2 x 64
  EXPECT_LE(arena.kept(), 16 * kMiB);
  EXPECT_GE(arena.kept(), 8 * kMiB);
  step(32), step(32);
  arena.release();
  EXPECT_EQ(arena.allowance(), 8 * kMiB);
  EXPECT_EQ(arena.kept(), 0u);
}

TEST(BlockArenaRules, NoMemoryIsANullPointerGivesBackWhatIsKeptAndRaisesNothing) {
  BlockArena arena;
  void* const block = arena.take(4 * kMiB);
  arena.give(block, 4 * kMiB);
  EXPECT_EQ(arena.take(std::size_t{1} << 47), nullptr);
  EXPECT_EQ(arena.kept(), 0u);
  EXPECT_EQ(arena.used(), 0u);
  EXPECT_EQ(arena.most_used(), 4 * kMiB);
}

TEST(BlockArenaRules, NewLimitsHoldAtOnce) {
  BlockArena arena;
  void* const block = arena.take(8 * kMiB);
  arena.give(block, 8 * kMiB);
  arena.limit({.allowance = 2 * kMiB});
  EXPECT_EQ(arena.kept(), 2 * kMiB);
  EXPECT_EQ(arena.allowance(), 2 * kMiB);
  arena.release();
}

}  // namespace

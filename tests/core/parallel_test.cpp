// SPDX-License-Identifier: Apache-2.0
#include <fourfold/core/parallel.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

class Parallel : public ::testing::Test {
 protected:
  void SetUp() override { at::set_num_threads(2); }
  void TearDown() override { at::set_num_threads(before_); }
  int before_ = at::get_num_threads();
};

TEST_F(Parallel, EveryIndexOnce) {
  for (std::int64_t n : {0, 1, 2, 7, 1000})
    for (std::int64_t grain : {1, 3, 999, 5000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n) + 1);
      fourfold::parallel_for(5, 5 + n, grain, [&](std::int64_t first, std::int64_t last) {
        EXPECT_LT(first, last);
        for (std::int64_t i = first; i < last; ++i) ++seen[static_cast<std::size_t>(i - 5)];
      });
      for (std::int64_t i = 0; i < n; ++i) EXPECT_EQ(seen[static_cast<std::size_t>(i)], 1) << i;
      EXPECT_EQ(seen[static_cast<std::size_t>(n)], 0);
    }
}

TEST_F(Parallel, RunsOnLibTorchsThreads) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::set<int> numbers;
  fourfold::parallel_for(0, 1000, 1, [&](std::int64_t, std::int64_t) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
    numbers.insert(at::get_thread_num());
  });
  EXPECT_EQ(threads.size(), 2u);
  EXPECT_EQ(numbers, (std::set<int>{0, 1}));
}

TEST_F(Parallel, OneThreadWhenThereIsLittleOrOneIsAskedFor) {
  const auto pieces = [](std::int64_t n, std::int64_t grain) {
    std::atomic<int> count{0};
    fourfold::parallel_for(0, n, grain, [&](std::int64_t, std::int64_t) { ++count; });
    return count.load();
  };
  EXPECT_EQ(pieces(100, 100), 1);
  at::set_num_threads(1);
  EXPECT_EQ(pieces(1000, 1), 1);
}

TEST_F(Parallel, InsideAnotherLoopStaysOnItsThread) {
  std::atomic<int> pieces{0}, elsewhere{0};
  fourfold::parallel_for(0, 2, 1, [&](std::int64_t, std::int64_t) {
    const auto here = std::this_thread::get_id();
    fourfold::parallel_for(0, 1000, 1, [&](std::int64_t, std::int64_t) {
      ++pieces;
      if (std::this_thread::get_id() != here) ++elsewhere;
    });
  });
  EXPECT_EQ(pieces, 2);
  EXPECT_EQ(elsewhere, 0);
}

TEST_F(Parallel, AnExceptionReachesTheCaller) {
  for (std::int64_t bad : {0, 999})
    EXPECT_THROW(fourfold::parallel_for(0, 1000, 1,
                                        [&](std::int64_t first, std::int64_t last) {
                                          if (first <= bad && bad < last)
                                            throw std::runtime_error("x");
                                        }),
                 std::runtime_error);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <fourfold/core/pointer_map.hpp>

#include <cstdint>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

namespace fourfold {
namespace {

TEST(PointerMap, AgreesWithTheStandardMap) {
  std::vector<char> memory(4096);
  std::mt19937 random(7);
  PointerMap<std::int64_t> map;
  std::unordered_map<const void*, std::int64_t> expected;
  for (std::int64_t i = 0; i < 50000; ++i) {
    const void* const key = &memory[random() % memory.size()];
    switch (random() % 5) {
      case 0: map.erase(key), expected.erase(key); break;
      case 1: map[key] += i, expected[key] += i; break;
      case 2: map.put(key, i), expected.insert_or_assign(key, i); break;
      case 3:
        if (i % 100 == 0) {
          map.erase_if([](std::int64_t value) { return value % 3 == 0; });
          std::erase_if(expected, [](const auto& one) { return one.second % 3 == 0; });
        }
        break;
      default: {
        const std::int64_t* const found = std::as_const(map).find(key);
        ASSERT_EQ(found != nullptr, expected.contains(key));
        if (found != nullptr) {
          ASSERT_EQ(*found, expected.at(key));
        }
      }
    }
    ASSERT_EQ(map.size(), expected.size());
  }
  std::int64_t sum = 0, count = 0, expected_sum = 0;
  map.for_each([&](std::int64_t value) { sum += value, ++count; });
  for (const auto& [key, value] : expected) expected_sum += value;
  EXPECT_EQ(sum, expected_sum);
  EXPECT_EQ(static_cast<std::size_t>(count), expected.size());
}

TEST(PointerMap, ValuesStayWhereTheyAreAndGoWithTheMap) {
  std::vector<char> memory(1000);
  const auto counted = std::make_shared<int>(1);
  {
    PointerMap<std::shared_ptr<int>> map;
    std::shared_ptr<int>& first = map.put(&memory[0], counted);
    for (const char& one : memory) map.put(&one, counted);
    EXPECT_EQ(&first, map.find(&memory[0]));
    EXPECT_EQ(counted.use_count(), 1001);
    map.erase(&memory[5]);
    map.erase(&memory[5]);
    EXPECT_EQ(counted.use_count(), 1000);
    map.clear();
    EXPECT_TRUE(map.empty());
    EXPECT_EQ(map.find(&memory[0]), nullptr);
    EXPECT_EQ(counted.use_count(), 1);
    map[&memory[7]] = counted;
    EXPECT_EQ(map.size(), 1u);
  }
  EXPECT_EQ(counted.use_count(), 1);
}

}  // namespace
}  // namespace fourfold

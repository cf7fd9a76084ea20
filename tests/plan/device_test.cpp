// SPDX-License-Identifier: Apache-2.0
// What the machine, or a control group, has left; and how a plan reacts to it.
#include <fourfold/pipeline.hpp>
#include <fourfold/plan/budget.hpp>
#include <fourfold/plan/device.hpp>

#include "../support/files.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace {

using namespace fourfold::literals;
using fourfold::plan::DeviceMemory;
using fourfold::plan::machine_memory;
using ::testing::HasSubstr;
namespace nn = torch::nn;

/// The system's files, made up.
struct Root : Directory {
  void write(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path + file).parent_path());
    std::ofstream(path + file) << text;
  }
};

TEST(Device, IsTheMachineWhereNoGroupLimitsIt) {
  const Root root;
  EXPECT_EQ(machine_memory(root.path).total, 0) << "nothing is known";
  root.write("/proc/meminfo",
             "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\n");
  EXPECT_EQ(machine_memory(root.path).total, 1000 << 10);
  EXPECT_EQ(machine_memory(root.path).used, 600 << 10);
  root.write("/proc/self/cgroup", "0::/user/job\n");
  root.write("/sys/fs/cgroup/user/job/memory.max", "max\n");
  root.write("/sys/fs/cgroup/user/job/memory.current", "5000\n");
  EXPECT_EQ(machine_memory(root.path).total, 1000 << 10);
}

TEST(Device, IsTheGroupThatLeavesLeast) {
  const Root root;
  root.write("/proc/meminfo", "MemTotal:  1000 kB\nMemAvailable:  900 kB\n");
  root.write("/proc/self/cgroup", "0::/user/job\n");
  root.write("/sys/fs/cgroup/user/job/memory.max", "500000\n");
  root.write("/sys/fs/cgroup/user/job/memory.current", "300000\n");
  root.write("/sys/fs/cgroup/user/job/memory.stat",
             "anon 1\ninactive_file 60000\nactive_file 40000\n");
  EXPECT_EQ(machine_memory(root.path).total, 500000);
  EXPECT_EQ(machine_memory(root.path).used, 200000) << "clean pages of files would be given up";
  root.write("/sys/fs/cgroup/user/memory.max", "600000\n");  // what it is in has less left
  root.write("/sys/fs/cgroup/user/memory.current", "550000\n");
  EXPECT_EQ(machine_memory(root.path).total, 600000);
  EXPECT_EQ(machine_memory(root.path).used, 550000);
}

TEST(Device, KnowsGroupsOfTheFirstVersion) {
  const Root root;
  root.write("/proc/meminfo", "MemTotal:  1000 kB\nMemAvailable:  900 kB\n");
  root.write("/proc/self/cgroup", "9:name=systemd:/\n4:memory:/job\n1:cpu:/\n");
  root.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  root.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "123456\n");
  EXPECT_EQ(machine_memory(root.path).total, 1000 << 10) << "no limit";
  root.write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "400000\n");
  root.write("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", "300000\n");
  root.write("/sys/fs/cgroup/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 9\n");
  EXPECT_EQ(machine_memory(root.path).total, 400000);
  EXPECT_EQ(machine_memory(root.path).used, 300000 - 9);
}

TEST(Device, ThisMachineHasSome) {
  const DeviceMemory memory = machine_memory();
  EXPECT_GT(memory.total, 64_MiB);
  EXPECT_GT(memory.used, 0);
  EXPECT_LE(memory.used, memory.total);
}

std::int64_t reading = 0;  // what all users of the made-up device hold

TEST(Device, ThePlanMovesWithAReading) {
  using Planned =
      fourfold::CompressionPipeline<fourfold::Activations<fourfold::Int4>,
                                    fourfold::Recompute<fourfold::CheapOps>, fourfold::Budget<>>;
  torch::manual_seed(0);
  nn::Sequential net;
  for (int i = 0; i < 8; ++i) {
    net->push_back(nn::Linear(128, 128));
    net->push_back(nn::GELU());
  }
  const auto x = torch::randn({1024, 128});
  constexpr std::int64_t kDevice = 1_GiB;
  Planned pipeline(
      *net, {.budget = 512_MiB, .device_bytes = kDevice, .device_used = [] { return reading; }});
  const auto step = [&] {
    for (const at::Tensor& parameter : pipeline.parameters())
      parameter.mutable_grad() = at::Tensor();
    pipeline.forward([&] { return net->forward(x).square().mean(); }).backward();
    return pipeline.plan();
  };
  reading = kDevice / 2;
  for (int i = 0; i < 3; ++i) step();
  const auto calm = step();
  EXPECT_EQ(calm.notches, 0);
  EXPECT_EQ(calm.ms, 0) << "everything is kept";
  reading = kDevice * 9 / 10;  // above the high-water mark of 80 %, whatever this process does
  std::int64_t before = calm.last.peak;
  for (int i = 0; i < 30; ++i) {
    const auto plan = step();
    EXPECT_LE(plan.last.peak, before + before / 50) << i;
    before = plan.last.peak;
    EXPECT_LE(plan.notches, 19) << "no further than there are plans";
  }
  const auto pressed = step();
  EXPECT_EQ(pressed.notches, 19);
  EXPECT_LT(pressed.last.peak, calm.last.peak * 7 / 10);
  std::ostringstream text;
  text << pressed;
  EXPECT_THAT(text.str(), HasSubstr("the device is full: 19 plans below what the budget allows"));
  reading = kDevice * 75 / 100 - pressed.last.peak;  // between the two marks: it stays
  step(), step();
  EXPECT_EQ(step().notches, 19);
  reading = kDevice / 10;
  for (int i = 0; i < 19; ++i) step();
  step();
  const auto after = step();
  EXPECT_EQ(after.notches, 0);
  EXPECT_EQ(after.last.peak, calm.last.peak) << "they have gone";
}

TEST(Device, NobodyIsWatchedWithoutAMark) {
  using Exact = fourfold::CompressionPipeline<fourfold::Recompute<>, fourfold::Budget<>>;
  nn::Sequential net(nn::Linear(64, 64), nn::GELU(), nn::Linear(64, 64));
  reading = 1_GiB;
  Exact pipeline(*net, {.budget = 512_MiB,
                        .high_water = 0,
                        .low_water = 0,
                        .device_bytes = 1_GiB,
                        .device_used = [] { return reading; }});
  for (int i = 0; i < 4; ++i)
    pipeline.forward([&] { return net->forward(torch::ones({512, 64})).sum(); }).backward();
  EXPECT_EQ(pipeline.plan().notches, 0);
}

}  // namespace

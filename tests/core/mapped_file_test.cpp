// SPDX-License-Identifier: Apache-2.0
#include <fourfold/core/mapped_file.hpp>

#include "../support/files.hpp"
#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/report/meter.hpp>

#include <fstream>
#include <optional>
#include <string>
#include <vector>

namespace {

using fourfold::MappedFile;
using fourfold::MappedFileOptions;
using ::testing::HasSubstr;

/// Bytes of files and of memory that the process has in memory.
std::int64_t resident() {
  std::ifstream statm("/proc/self/statm");
  std::int64_t pages = 0;
  statm >> pages >> pages;
  return pages * ::sysconf(_SC_PAGESIZE);
}

TEST(MappedFile, ValuesAreTheSameAndMayBeWritten) {
  MappedFile file;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kByte, at::kShort}) {
    const at::Tensor values = torch::randint(0, 100, {300, 301}).to(dtype);
    at::Tensor held = file.hold(values);
    ASSERT_NE(held.const_data_ptr(), values.const_data_ptr());
    EXPECT_TRUE(torch::equal(held, values)) << dtype;
    held.add_(1);
    file.done_with(held);
    EXPECT_TRUE(torch::equal(held, values + 1)) << dtype;
    file.drop_cache(), file.will_need(held), file.need(held);
    EXPECT_TRUE(torch::equal(held, values + 1)) << dtype;
    EXPECT_TRUE(file.hold(held).is_same(held));
  }
}

TEST(MappedFile, TensorsMayOutliveItAndTheirRoomIsUsedAgain) {
  std::optional<MappedFile> file(std::in_place);
  at::Tensor a = file->hold(torch::ones({1 << 16}));
  const at::Tensor b = file->hold(torch::full({1 << 16}, 2.0F));
  EXPECT_EQ(file->held_bytes(), 2 << 18);
  a = at::Tensor();
  EXPECT_EQ(file->held_bytes(), 1 << 18);
  a = file->hold(torch::full({1 << 16}, 3.0F));
  file.reset();
  EXPECT_TRUE(b.eq(2).all().item<bool>());
  EXPECT_TRUE(a.eq(3).all().item<bool>());
}

TEST(MappedFile, NeitherCountedNorResident) {
  constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  const fourfold::Meter meter;
  MappedFile file;
  const std::int64_t before = resident();
  const std::int64_t counted = meter.bytes().current;
  const at::Tensor held = file.hold(torch::ones({kBytes}, torch::kByte));
  EXPECT_EQ(meter.bytes().current, counted);
  EXPECT_GT(resident(), before + kBytes / 2);
  file.done_with(held);
  EXPECT_LT(resident(), before + kBytes / 8);
  EXPECT_EQ(held.sum().item<std::int64_t>(), kBytes);
}

TEST(MappedFile, WhatIsNotItsOwnIsLeftAlone) {
  MappedFile file;
  const at::Tensor small = torch::ones({100}), strided = torch::ones({400, 400}).t();
  const at::Tensor large = torch::ones({1 << 20});
  EXPECT_TRUE(file.hold(small).is_same(small));
  EXPECT_TRUE(file.hold(strided).is_same(strided));
  file.done_with(small), file.done_with(large), file.will_need(large), file.need(large);
  EXPECT_TRUE(large.eq(1).all().item<bool>());
  EXPECT_EQ(file.held_bytes(), 0);
}

TEST(MappedFile, WhereTheDiskIsFullTensorsStayInMemory) {
  MappedFile file;
  std::vector<at::Tensor> held, values;
  testing::internal::CaptureStderr();
  {
    const FileLimit limit(5 << 18);
    for (int i = 0; i < 8; ++i) {
      values.push_back(torch::full({1 << 16}, i));
      held.push_back(file.hold(values.back().to(torch::kFloat)));
      EXPECT_TRUE(held.back().eq(i).all().item<bool>());
    }
  }
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              HasSubstr("cannot hold 262144 bytes in a file in"));
  EXPECT_EQ(file.held_bytes(), 5 << 18);
}

TEST(MappedFile, BadOptionsAreNamed) {
  EXPECT_THAT(
      message_of([] { MappedFile({.directory = "/no/such/place"}); }),
      HasSubstr("fourfold::MappedFile: cannot make a file in '/no/such/place': No such file "
                "or directory; name a directory that this process may write to, on a disk, "
                "in MappedFileOptions::directory"));
  EXPECT_THAT(message_of([] { MappedFile({.min_bytes = -1}); }),
              HasSubstr("got min_bytes = -1; give 0 or more"));
}

}  // namespace

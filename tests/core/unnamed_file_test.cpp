// SPDX-License-Identifier: Apache-2.0
#include <fourfold/core/unnamed_file.hpp>

#include "../support/files.hpp"
#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <filesystem>
#include <string>

namespace {

using fourfold::detail::UnnamedFile;
using ::testing::HasSubstr;

TEST(UnnamedFile, RoomIsUsedAgain) {
  UnnamedFile file("", "who", "option");
  EXPECT_EQ(file.allocate(10), 0);
  EXPECT_EQ(file.allocate(20), 10);
  EXPECT_EQ(file.allocate(30), 30);
  file.free(10, 20);
  EXPECT_EQ(file.allocate(25), 60);  // no gap is wide enough
  EXPECT_EQ(file.allocate(5), 10);
  EXPECT_EQ(file.allocate(15), 15);
  file.free(0, 10), file.free(15, 15), file.free(10, 5);  // one gap of 30
  EXPECT_EQ(file.allocate(30), 0);
  file.free(60, 25), file.free(0, 30);
  EXPECT_EQ(file.size(), 60);
  file.free(30, 30);
  EXPECT_EQ(file.size(), 0);
}

TEST(UnnamedFile, LeavesNothingInItsDirectory) {
  const Directory directory;
  UnnamedFile file(directory.path, "who", "option");
  EXPECT_EQ(file.write("abc", 3, 5), 0);
  EXPECT_TRUE(std::filesystem::is_empty(directory.path));
  char back[3];
  EXPECT_EQ(file.read(back, 3, 5), 0);
  EXPECT_EQ(std::string(back, 3), "abc");
  EXPECT_NE(file.read(back, 3, 6), 0);  // beyond its end
}

TEST(UnnamedFile, ADirectoryThatCannotBeWrittenToIsRefused) {
  EXPECT_THAT(
      message_of([] { const UnnamedFile file("/no/such/place", "Somebody", "Options::d"); }),
      HasSubstr("Somebody: cannot make a file in '/no/such/place': No such file or "
                "directory; name a directory that this process may write to, on a disk, in "
                "Options::d"));
}

TEST(UnnamedFile, WhatIsWrittenThroughAMappingIsRead) {
  UnnamedFile file("", "who", "option");
  ASSERT_EQ(file.reserve(3 << 12, 0), 0);
  auto* const at = static_cast<char*>(file.map(1 << 12, 1 << 12));
  ASSERT_NE(at, nullptr);
  EXPECT_EQ(at[5], 0);
  at[5] = 'x';
  char back = 0;
  EXPECT_EQ(file.read(&back, 1, (1 << 12) + 5), 0);
  EXPECT_EQ(back, 'x');
  file.drop_cache();
  EXPECT_EQ(at[5], 'x');
  ::munmap(at, 1 << 12);
}

TEST(UnnamedFile, RoomThatThereIsNotIsNotReserved) {
  UnnamedFile file("", "who", "option");
  const FileLimit limit(1 << 14);
  EXPECT_EQ(file.reserve(1 << 14, 0), 0);
  EXPECT_EQ(file.reserve(1 << 14, 1 << 14), EFBIG);
  EXPECT_EQ(file.reserve(std::int64_t{1} << 60, 0), EFBIG);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/core/unnamed_file.hpp>

#include "../support/files.hpp"
#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <vector>

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

/// The disk's blocks behind the only file without a name that this process has in `directory`.
std::int64_t bytes_on_disk(const std::string& directory) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    const auto target = std::filesystem::read_symlink(entry.path(), error).string();
    struct ::stat status;
    if (target.starts_with(directory) && ::stat(entry.path().c_str(), &status) == 0)
      return status.st_blocks * 512;
  }
  return -1;
}

TEST(UnnamedFile, ALargeStepsRoomGoesWithTheNextOne) {
  const Directory directory;
  UnnamedFile file(directory.path, "who", "option");
  const std::vector<char> values(1 << 20, 'x');
  const auto step = [&](std::int64_t pieces) {
    for (std::int64_t i = 0; i < pieces; ++i)
      EXPECT_EQ(file.write(values.data(), 1 << 20, file.allocate(1 << 20)), 0);
    const std::int64_t most = bytes_on_disk(directory.path);
    for (std::int64_t i = pieces; i-- > 0;) file.free(i << 20, 1 << 20);
    return most;
  };
  EXPECT_GE(step(8), 8 << 20);
  EXPECT_GE(bytes_on_disk(directory.path), 8 << 20) << "kept for a step that is like it";
  EXPECT_GE(step(8), 8 << 20);
  step(2);
  EXPECT_LE(bytes_on_disk(directory.path), 3 << 20);
  EXPECT_GE(step(5), 5 << 20);
  step(0);
  EXPECT_LE(bytes_on_disk(directory.path), 6 << 20);
}

TEST(UnnamedFile, ADirectoryThatIsMemoryIsKnown) {
  EXPECT_FALSE(UnnamedFile(std::filesystem::current_path(), "who", "option").in_memory());
  struct ::statfs system;
  if (::statfs("/dev/shm", &system) != 0 || system.f_type != TMPFS_MAGIC)
    GTEST_SKIP() << "/dev/shm is no tmpfs here";
  EXPECT_TRUE(UnnamedFile("/dev/shm", "who", "option").in_memory());
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

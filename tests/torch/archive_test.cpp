// SPDX-License-Identifier: Apache-2.0
#include <fourfold/torch/archive.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

namespace {

using fourfold::door::ArchiveReader;
using testing::ElementsAre, testing::HasSubstr;

std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}
torch::serialize::InputArchive archive_of(const torch::serialize::OutputArchive& written) {
  std::stringstream file;
  const_cast<torch::serialize::OutputArchive&>(written).save_to(file);
  torch::serialize::InputArchive archive;
  archive.load_from(file);
  return archive;
}

TEST(ArchiveReader, GivesWhatWasWritten) {
  torch::serialize::OutputArchive written;
  written.write("version", std::int64_t{2});
  written.write("number", 0x1.23456789abcdep-7);
  written.write("truth", true);
  written.write("text", std::string("words"));
  written.write("whole", std::vector<std::int64_t>{3, -1});
  written.write("numbers", std::vector<double>{0.1, -0.0});
  torch::serialize::OutputArchive inner(written.compilation_unit());
  inner.write("number", 5.0);
  written.write("part", inner);
  auto archive = archive_of(written);
  const ArchiveReader file(archive, "the file");
  file.read_version("version", 2, "numbers");
  EXPECT_EQ(file.read_int("version"), 2);
  EXPECT_EQ(file.read_double("number"), 0x1.23456789abcdep-7);
  EXPECT_TRUE(file.read_bool("truth"));
  EXPECT_EQ(file.read_string("text"), "words");
  EXPECT_THAT(file.read_ints("whole"), ElementsAre(3, -1));
  EXPECT_THAT(file.read_doubles("numbers"), ElementsAre(0.1, -0.0));
  torch::serialize::InputArchive part;
  file.read_part("part", part);
  EXPECT_EQ(ArchiveReader(part, "the part").read_double("number"), 5);
}
TEST(ArchiveReader, NamesWhatIsMissingOrOfAnotherType) {
  torch::serialize::OutputArchive written;
  written.write("version", std::int64_t{3});
  written.write("numbers", std::vector<double>{1, NAN});
  written.write("tensor", torch::ones({2}));
  auto archive = archive_of(written);
  const ArchiveReader file(archive, "the file");
  EXPECT_THAT(
      message([&] { (void)file.read_int("step"); }),
      HasSubstr("the file has no 'step': it is damaged, or was written by another program"));
  EXPECT_THAT(message([&] { (void)file.read_double("version"); }),
              HasSubstr("'version' in the file is Int and not a number: the file is damaged"));
  EXPECT_THAT(message([&] { (void)file.read_string("tensor"); }),
              HasSubstr("'tensor' in the file is Tensor and not a text"));
  EXPECT_THAT(message([&] { (void)file.read_doubles("numbers"); }),
              HasSubstr("'numbers' in the file holds nan: the file is damaged; save it again"));
  torch::serialize::InputArchive part;
  EXPECT_THAT(message([&] { file.read_part("part", part); }),
              HasSubstr("the file has no 'part': it is damaged or cut off; save it again"));
  EXPECT_THAT(message([&] { file.read_version("version", 2, "numbers"); }),
              HasSubstr("the file has format version 3, and this fourfold reads versions 1 to 2"));
  EXPECT_THAT(message([&] { file.read_version("numbers", 2, "states of a thing"); }),
              HasSubstr("the archive does not hold states of a thing; give it the archive that"));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/save.hpp>
#include <tests/optim/rule_checks.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sys/wait.h>
#include <unistd.h>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace {

using fourfold::Int8;
using fourfold::optim::AdamWOf;
using testing::HasSubstr;

class SaveOptimizer : public OneThread {
 protected:
  void SetUp() override {
    OneThread::SetUp();
    std::filesystem::create_directory(folder_);
    p_.mutable_grad() = torch::ones_like(p_);
    optimizer_.step();
  }
  void TearDown() override {
    std::filesystem::remove_all(folder_);
    OneThread::TearDown();
  }
  static std::string bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  std::string folder_ =
      (std::filesystem::temp_directory_path() / ("fourfold_save_" + std::to_string(::getpid())))
          .string();
  std::string path_ = folder_ + "/optimizer.4f";
  at::Tensor p_ = torch::randn({300, 200}).requires_grad_();
  AdamWOf<Int8> optimizer_{{p_}};
};

TEST_F(SaveOptimizer, AFileLoads) {
  fourfold::optim::save(optimizer_, path_);
  AdamWOf<Int8> again({p_});
  fourfold::optim::load(again, path_);
  EXPECT_EQ(again.state_bytes(), optimizer_.state_bytes());
  torch::load(again, path_);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1);
}
TEST_F(SaveOptimizer, DamagedAndMissingFilesAreNamed) {
  EXPECT_THAT(message_of([&] { fourfold::optim::load(optimizer_, path_); }),
              HasSubstr("optim::load cannot open"));
  EXPECT_THAT(message_of([&] { fourfold::optim::save(optimizer_, folder_ + "/none/x"); }),
              HasSubstr("does its folder exist, and may it be written?"));
  fourfold::optim::save(optimizer_, path_);
  const std::string whole = bytes(path_);
  std::ofstream(path_, std::ios::binary) << whole.substr(0, whole.size() / 2);
  EXPECT_THAT(message_of([&] { fourfold::optim::load(optimizer_, path_); }),
              HasSubstr("is no file of an optimizer, or is damaged"));
}
/// A process that does nothing but save, killed at some moment of it: what stands there is whole.
TEST_F(SaveOptimizer, AKilledSaveLeavesAWholeFile) {
  fourfold::optim::save(optimizer_, path_);
  const std::string whole = bytes(path_);
  for (int round = 0; round < 8; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0)
      for (;;) fourfold::optim::save(optimizer_, path_);
    ::usleep(static_cast<useconds_t>(3000 + 1700 * round));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    EXPECT_EQ(bytes(path_), whole);
    AdamWOf<Int8> again({p_});
    fourfold::optim::load(again, path_);
  }
}

}  // namespace

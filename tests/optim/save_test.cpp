// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/factored.hpp>
#include <fourfold/optim/offload.hpp>
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
  AdamWOf<Int8> on_file({p_}, 1e-3, {.offload = fourfold::on_file()});
  on_file.step();
  for (AdamWOf<Int8>* optimizer : {&optimizer_, &on_file}) {
    fourfold::optim::save(*optimizer, path_);
    const std::string whole = bytes(path_);
    for (int round = 0; round < 8; ++round) {
      const pid_t child = ::fork();
      ASSERT_GE(child, 0);
      if (child == 0)
        for (;;) fourfold::optim::save(*optimizer, path_);
      ::usleep(static_cast<useconds_t>(3000 + 1700 * round));
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
      EXPECT_EQ(bytes(path_), whole);
      AdamWOf<Int8> again({p_});
      fourfold::optim::load(again, path_);
    }
  }
}

/// Half of the steps in a process that ends, the others in this one, whose seed is another.
template <class Optimizer>
void expect_training_to_go_on_elsewhere(const std::string& path, at::ScalarType dtype,
                                        const fourfold::optim::StateOptions& states) {
  const auto train = [](Optimizer& optimizer, const at::Tensor& p, int from, int to) {
    for (int step = from; step < to; ++step) {
      p.mutable_grad() = oracle::gradient(p, step);
      optimizer.step();
    }
  };
  torch::manual_seed(1);
  at::Tensor whole = oracle::start({300, 301}, dtype).requires_grad_();
  at::Tensor parted = oracle::start({300, 301}, dtype).requires_grad_();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    Optimizer first({parted}, 1e-2, states);
    train(first, parted, 1, 5);
    fourfold::optim::save(first, path);
    torch::save(parted, path + ".weights");
    ::_exit(0);
  }
  Optimizer one({whole}, 1e-2);
  train(one, whole, 1, 9);
  int status = -1;
  ::waitpid(child, &status, 0);
  ASSERT_EQ(status, 0);
  torch::manual_seed(2);
  at::Tensor weights;
  torch::load(weights, path + ".weights");
  parted.detach().copy_(weights);
  Optimizer second({parted}, 0.5, states);
  fourfold::optim::load(second, path);
  train(second, parted, 5, 9);
  EXPECT_TRUE(parted.equal(whole));
}
/// With every codec of moments, and of what is kept of bf16 weights.
TEST_F(SaveOptimizer, AnotherProcessGoesOnBitForBit) {
  using fourfold::Int4;
  using namespace fourfold::optim;
  for (const StateOptions& states :
       {StateOptions{}, StateOptions{.offload = fourfold::on_file()}}) {
    const auto expect = [&]<class... Optimizers>(at::ScalarType dtype) {
      (expect_training_to_go_on_elsewhere<Optimizers>(path_, dtype, states), ...);
    };
    expect.operator()<AdamWOf<Fp32>, AdamWOf<BFloat16>, AdamWOf<Int8>, AdamWOf<Int4>,
                      AdamW<Normal4, Factored>>(at::kFloat);
    expect.operator()<AdamWOf<Int8, RoundNearest>, AdamWOf<Int4, RoundStochastic>,
                      AdamWOf<Fp32, ErrorCorrection<8>>, AdamWOf<Int4, ErrorCorrection<16>>,
                      AdamWOf<BFloat16, Kahan>, AdamWOf<Int8, Fp32>>(at::kBFloat16);
  }
}

/// Noise goes by the parameters too, and so by the optimizer; the file has it.
TEST_F(SaveOptimizer, TwoOptimizersShareNoNoise) {
  const auto weights_after = [](double start) {
    at::Tensor p = torch::full({4096}, start, at::kBFloat16).requires_grad_();
    fourfold::optim::AdamWOf<fourfold::optim::Fp32, fourfold::optim::RoundStochastic> optimizer(
        {p}, torch::optim::AdamWOptions(1e-4).weight_decay(0));
    p.mutable_grad() = torch::ones_like(p);
    optimizer.step();
    return p.detach().sub(start).ne(0);  // which were rounded away
  };
  const at::Tensor one = weights_after(1), other = weights_after(1 + 0x1p-7),
                   again = weights_after(1);
  EXPECT_TRUE(one.equal(again));
  // Each moves with a probability of about 1e-4 / 2^-8 and 1e-4 / 2^-7, of 4096 values.
  EXPECT_GT(one.sum().item<std::int64_t>(), 20);
  EXPECT_GT(other.sum().item<std::int64_t>(), 10);
  // By the same noise those that move in the larger step would be a part of those of the other.
  EXPECT_FALSE(one.logical_and(other).equal(other));
}

}  // namespace

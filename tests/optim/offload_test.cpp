// SPDX-License-Identifier: Apache-2.0
#include <fourfold/gradients/release.hpp>
#include <fourfold/optim/factored.hpp>
#include <fourfold/optim/offload.hpp>
#include <fourfold/optim/optimizer_states.hpp>
#include <fourfold/report/meter.hpp>
#include <tests/optim/rule_checks.hpp>

#include "../support/files.hpp"
#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <memory>
#include <sstream>
#include <type_traits>
#include <vector>

namespace {

using fourfold::Int4, fourfold::Int8;
using fourfold::MappedFile;
using fourfold::on_file;
using fourfold::Place;
namespace optim = fourfold::optim;
using optim::AdamWOf;
using testing::HasSubstr;

/// Two matrices whose states go to the file, two vectors whose states stay.
std::vector<at::Tensor> start(at::ScalarType dtype) {
  std::vector<at::Tensor> all;
  for (const auto& sizes :
       std::vector<std::vector<std::int64_t>>{{500, 301}, {301}, {300, 401}, {10}})
    all.push_back(oracle::start(sizes, dtype).requires_grad_());
  return all;
}
template <class Optimizer>
void train(Optimizer& optimizer, std::vector<at::Tensor>& all, int from, int to) {
  for (int step = from; step < to; ++step) {
    for (at::Tensor& p : all) p.mutable_grad() = oracle::gradient(p, step);
    optimizer.step();
  }
}
void expect_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(a[i].equal(b[i])) << i;
}
template <class Optimizer>
std::string file_of(const Optimizer& optimizer) {
  std::stringstream file;
  torch::save(optimizer, file);
  return file.str();
}

template <class Optimizer>
class StatesOnFile : public OneThread {
 public:
  /// Masters keep something of 16-bit weights.
  static constexpr at::ScalarType kDtype =
      optim::kKeepsError<typename Optimizer::State::MasterCodec> ? at::kBFloat16 : at::kFloat;
};
using Int8First = optim::StatesOf<Int8>::First;
using Cells = testing::Types<AdamWOf<Int8>, AdamWOf<optim::Fp32>, AdamWOf<Int4, optim::Kahan>,
                             optim::AdamW<Int8First, optim::Factored>>;
TYPED_TEST_SUITE(StatesOnFile, Cells);

TYPED_TEST(StatesOnFile, AreTheBitsOfStatesInMemory) {
  auto in_memory = start(this->kDtype), on_disk = start(this->kDtype);
  const auto file = std::make_shared<MappedFile>(fourfold::MappedFileOptions{.min_bytes = 1});
  TypeParam one(in_memory, 1e-2), other(on_disk, 1e-2, {.offload = file});
  train(one, in_memory, 1, 6), train(other, on_disk, 1, 6);
  expect_equal(in_memory, on_disk);
  EXPECT_GE(file->held_bytes(), other.state_bytes());  // whole pages
  EXPECT_EQ(other.state_bytes(), one.state_bytes());
}

/// From either to either, in one file of one format.
TYPED_TEST(StatesOnFile, AreSavedAndLoadedAsEver) {
  for (const bool saved_on_disk : {false, true})
    for (const bool loaded_on_disk : {false, true}) {
      auto whole = start(this->kDtype), parted = start(this->kDtype);
      const auto where = [](bool on_disk) {
        return optim::StateOptions{.offload = on_disk ? on_file() : nullptr};
      };
      TypeParam one(whole, 1e-2), first(parted, 1e-2, where(saved_on_disk));
      TypeParam second(parted, 1e-2, where(loaded_on_disk));
      train(one, whole, 1, 7);
      train(first, parted, 1, 4);
      std::stringstream file(file_of(first));
      torch::load(second, file);
      train(second, parted, 4, 7);
      expect_equal(whole, parted);
      EXPECT_EQ(file_of(second).size(), file_of(one).size());
    }
}

class OnFile : public OneThread {};

TEST_F(OnFile, CountedBytesFallByTheStates) {
  const fourfold::Meter meter;
  const auto counted = [&](const optim::StateOptions& states) {
    auto all = start(at::kFloat);
    const std::int64_t before = meter.bytes(Place::kOptimizer).current;
    AdamWOf<Int8> optimizer(all, 1e-2, states);
    train(optimizer, all, 1, 3);
    return meter.bytes(Place::kOptimizer).current - before;
  };
  const std::int64_t vectors = 2 * 4 * (301 + 10);  // in fp32
  const std::int64_t codes = 2 * (500 * 301 + 300 * 401);
  const std::int64_t scales = 2 * 4 * (1176 + 940);  // of 128 values each; below min_bytes
  EXPECT_EQ(counted({}), vectors + codes + scales);
  EXPECT_EQ(counted({.offload = on_file()}), vectors + scales);
}

TEST_F(OnFile, ReleasedParametersStepTheSame) {
  const auto after = [](const optim::StateOptions& states) {
    torch::manual_seed(3);
    torch::nn::Sequential net(torch::nn::Linear(300, 400), torch::nn::Tanh(),
                              torch::nn::Linear(400, 300));
    AdamWOf<Int8> optimizer(net->parameters(), 1e-2, states);
    const fourfold::GradientRelease release(optimizer);
    for (int step = 0; step < 4; ++step)
      net->forward(torch::randn({8, 300})).square().mean().backward();
    return net->parameters();
  };
  expect_equal(after({}), after({.offload = on_file()}));
}

TEST_F(OnFile, AFullDiskCostsNoStep) {
  auto in_memory = start(at::kFloat), on_disk = start(at::kFloat);
  const auto file = std::make_shared<MappedFile>();
  AdamWOf<Int8> one(in_memory, 1e-2), other(on_disk, 1e-2, {.offload = file});
  testing::internal::CaptureStderr();
  {
    const FileLimit limit(200000);
    train(one, in_memory, 1, 3), train(other, on_disk, 1, 3);
  }
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              HasSubstr("what does not fit stays in memory"));
  expect_equal(in_memory, on_disk);
  EXPECT_GT(file->held_bytes(), 0);
  EXPECT_LT(file->held_bytes(), 200000);
}

TEST_F(OnFile, IsAPlaceOfAPolicy) {
  using Here = fourfold::OptimizerStates<Int8>;
  using There = fourfold::OptimizerStates<Int8, optim::RoundNearest, fourfold::OnFile<>>;
  static_assert(std::is_same_v<Here::Optimizer, AdamWOf<Int8>>);
  static_assert(std::is_base_of_v<AdamWOf<Int8>, There::Optimizer>);
  auto in_memory = start(at::kFloat), on_disk = start(at::kFloat);
  Here::Optimizer one(in_memory, 1e-2);
  There::Optimizer other(on_disk, 1e-2);
  train(one, in_memory, 1, 4), train(other, on_disk, 1, 4);
  expect_equal(in_memory, on_disk);
  struct Nowhere {
    static fourfold::MappedFileOptions options() { return {.directory = "/no/such/place"}; }
  };
  EXPECT_THAT(
      message_of([&] { fourfold::OnFile<Nowhere>::Holding<AdamWOf<Int8>> never(in_memory, 1e-2); }),
      HasSubstr("cannot make a file in '/no/such/place'"));
}

/// A GPU's part, played by the CPU: every parameter is elsewhere.
class Elsewhere final : public fourfold::HostMemory {
  bool is_elsewhere(const at::Tensor&) const override { return true; }
};
TYPED_TEST(StatesOnFile, AreSteppedByWayOfCopies) {
  auto here = start(this->kDtype), there = start(this->kDtype);
  TypeParam one(here, 1e-2), other(there, 1e-2, {.offload = std::make_shared<Elsewhere>()});
  const std::int64_t version = there[0]._version();
  train(one, here, 1, 4), train(other, there, 1, 4);
  expect_equal(here, there);
  EXPECT_GT(there[0]._version(), version);
  there[0].mutable_grad() = at::Tensor();  // passed over
  there[1].mutable_grad() = oracle::gradient(there[1], 9).to_sparse();
  here[0].mutable_grad() = at::Tensor(), here[1].mutable_grad() = oracle::gradient(here[1], 9);
  one.step(), other.step();
  expect_equal(here, there);
}
TEST_F(OnFile, CopiesThatAreStaleAreMadeAgain) {
  Elsewhere holder;
  const at::Tensor p = torch::ones({5}).requires_grad_();
  p.mutable_grad() = torch::ones({5});
  holder.will_copy(p);
  p.mutable_grad().mul_(2);
  EXPECT_TRUE(holder.copies(p).second.eq(2).all().item<bool>());
  holder.will_copy(p);
  p.mutable_grad() = torch::full({5}, 3.0F);
  EXPECT_TRUE(holder.copies(p).second.eq(3).all().item<bool>());
  holder.will_copy(p), holder.will_copy(p);
  {
    const torch::NoGradGuard no_grad;
    p.fill_(7);
  }
  const auto [values, gradient] = holder.copies(p);
  EXPECT_TRUE(values.eq(7).all().item<bool>());
  EXPECT_NE(values.const_data_ptr(), p.const_data_ptr());
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// A plan that is no plan of ours: the seam is open.
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/recompute.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

using fourfold::ActivationOptions, fourfold::ActivationStore, fourfold::Activations,
    fourfold::CheapOps, fourfold::Int4, fourfold::Int8, fourfold::SavedPlan, fourfold::SavedStorage,
    fourfold::StoredAs, fourfold::StoredWatch;
namespace door = fourfold::door;
namespace nn = torch::nn;

struct Watch final : StoredWatch {
  struct Seen {
    std::vector<StoredAs> held;
    std::int64_t bytes = 0;
    int decoding = 0, decoded = 0, released = 0;
  };
  void held(std::uint32_t item, StoredAs kind, std::int64_t bytes, std::int64_t) override {
    seen[item].held.push_back(kind), seen[item].bytes += bytes;
  }
  void decoding(std::uint32_t item) noexcept override { ++seen[item].decoding; }
  void decoded(std::uint32_t item, const c10::Storage& dense) noexcept override {
    ++seen[item].decoded;
    EXPECT_GT(dense.nbytes(), 0u);
  }
  void released(std::uint32_t item) noexcept override { ++seen[item].released; }
  std::map<std::uint32_t, Seen> seen;
};

/// Holds everything in one way, and writes down what it was asked.
struct OneWay final : SavedPlan {
  explicit OneWay(Choice one) : choice(std::move(one)) { choice.watch = watch; }
  void forward_began(std::uint64_t) override { ++began; }
  void forward_ended(std::uint64_t) noexcept override { ++ended; }
  Choice choose(const SavedStorage& storage) override {
    asked.push_back(std::string(storage.producer) + " for " + std::string(storage.saver));
    operations.push_back(storage.operation);
    choice.item = static_cast<std::uint32_t>(asked.size() - 1);
    return choice;
  }
  Choice choice;
  std::shared_ptr<Watch> watch = std::make_shared<Watch>();
  std::vector<std::string> asked;
  std::vector<std::uint64_t> operations;
  int began = 0, ended = 0;
};

struct Ran {
  std::shared_ptr<OneWay> plan;
  std::vector<torch::Tensor> gradients;
};

Ran run(std::shared_ptr<OneWay> plan) {
  torch::manual_seed(0);
  nn::Sequential net(nn::Linear(64, 128), nn::GELU(), nn::Linear(128, 128), nn::ReLU(),
                     nn::Linear(128, 8));
  const auto x = torch::randn({64, 64});
  ActivationOptions options;
  Activations<Int4>::configure(options);
  options.recompute = fourfold::operator_names<CheapOps>();
  options.plan = plan;
  const auto store = ActivationStore::make(std::move(options));
  torch::Tensor loss;
  {
    const door::SavedTensorsScope scope(store);
    const auto active = store->activate();
    loss = net->forward(x).square().sum();
  }
  loss.backward();
  Ran out{plan, {}};
  for (const auto& parameter : net->parameters()) out.gradients.push_back(parameter.grad());
  return out;
}

const std::vector<std::string> kSmallest{"aten::addmm for aten::gelu", "aten::gelu for aten::addmm",
                                         "aten::relu for aten::relu", "aten::relu for aten::addmm"};

TEST(SavedPlan, IsAskedOnceForAStorageAndToldWhatBecomesOfIt) {
  const Ran small = run(std::make_shared<OneWay>(SavedPlan::Choice{}));
  EXPECT_EQ(small.plan->asked, kSmallest);
  EXPECT_EQ(small.plan->began, 1);
  EXPECT_EQ(small.plan->ended, 1);
  const auto& seen = small.plan->watch->seen;
  ASSERT_EQ(seen.size(), 4u);
  const std::vector<StoredAs> kinds{StoredAs::kPacked, StoredAs::kRebuilt, StoredAs::kMask,
                                    StoredAs::kPacked};
  for (const auto& [item, one] : seen) {
    EXPECT_EQ(one.held, std::vector{kinds[item]}) << item;
    EXPECT_EQ(one.released, 1) << item;
    EXPECT_EQ(one.decoding, one.decoded) << item;
    EXPECT_GE(one.decoded, 1) << item;
  }
}

TEST(SavedPlan, WhatIsKeptIsPlainLibTorchsToTheBit) {
  torch::manual_seed(0);
  const Ran kept = run(std::make_shared<OneWay>(SavedPlan::Choice{.keep = true}));
  // Relu's result is kept when relu saves it: nobody asks for the linear after it.
  EXPECT_EQ(kept.plan->asked, (std::vector{kSmallest[0], kSmallest[1], kSmallest[2]}));
  for (const auto& [item, one] : kept.plan->watch->seen) {
    EXPECT_EQ(one.held, std::vector{StoredAs::kKept});
    EXPECT_EQ(one.released, 1);
    EXPECT_EQ(one.decoded, 0);
  }
  torch::manual_seed(0);
  nn::Sequential net(nn::Linear(64, 128), nn::GELU(), nn::Linear(128, 128), nn::ReLU(),
                     nn::Linear(128, 8));
  net->forward(torch::randn({64, 64})).square().sum().backward();
  for (std::size_t i = 0; i < kept.gradients.size(); ++i)
    EXPECT_TRUE(torch::equal(kept.gradients[i], net->parameters()[i].grad())) << i;
}

TEST(SavedPlan, AnotherCodecAndTheSameOperators) {
  const Ran four = run(std::make_shared<OneWay>(SavedPlan::Choice{}));
  const Ran eight =
      run(std::make_shared<OneWay>(SavedPlan::Choice{.pack = fourfold::pack_with<Int8>}));
  EXPECT_EQ(four.plan->asked, eight.plan->asked);
  EXPECT_EQ(four.plan->operations, eight.plan->operations) << "however storages are held";
  EXPECT_GT(eight.plan->watch->seen[0].bytes, 3 * four.plan->watch->seen[0].bytes / 2);
}

TEST(SavedPlan, AnErrorOfThePlanEndsTheForwardAndNothingStays) {
  struct Refuses final : SavedPlan {
    void forward_began(std::uint64_t) override {}
    void forward_ended(std::uint64_t) noexcept override {}
    Choice choose(const SavedStorage&) override { TORCH_CHECK(false, "not today"); }
  };
  ActivationOptions options;
  Activations<Int4>::configure(options);
  options.plan = std::make_shared<Refuses>();
  const auto store = ActivationStore::make(std::move(options));
  const auto x = torch::randn({64, 64}).requires_grad_();
  {
    const door::SavedTensorsScope scope(store);
    const auto active = store->activate();
    EXPECT_THROW(torch::gelu(x * 1), c10::Error);
  }
  EXPECT_EQ(store->held_bytes().current, 0);
  torch::gelu(x * 1).sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

}  // namespace

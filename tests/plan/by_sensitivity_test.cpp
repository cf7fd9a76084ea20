// SPDX-License-Identifier: Apache-2.0
// What the formula says of each saved storage's rounding, against what rounding it does.
#include <fourfold/activations/recompute.hpp>
#include <fourfold/optim/optimizer_states.hpp>
#include <fourfold/pipeline.hpp>
#include <fourfold/plan/budget.hpp>
#include <fourfold/plan/by_sensitivity.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/message_of.hpp"

namespace {

using fourfold::ActivationOptions, fourfold::ActivationsBySensitivity, fourfold::ActivationStore,
    fourfold::Blocks, fourfold::Budget, fourfold::CheapOps, fourfold::CompressionPipeline,
    fourfold::Int2, fourfold::Int4, fourfold::Int8, fourfold::Recompute, fourfold::SavedPlan,
    fourfold::SavedStorage, fourfold::StoredAs, fourfold::StoredWatch;
using fourfold::plan::BitOptions, fourfold::plan::BitPlanner, fourfold::plan::BitReport,
    fourfold::plan::kBits;
using namespace fourfold::literals;
namespace door = fourfold::door;
namespace nn = torch::nn;
using ::testing::HasSubstr;

const BitPlanner::Packs kPacks{fourfold::pack_with<Int8>, fourfold::pack_with<Int4>,
                               fourfold::pack_with<Int2>};

/// A model, its loss on some batch, and of its products with a weight how unevenly dy^2 lies.
struct Net {
  std::vector<torch::Tensor> parameters;
  std::function<torch::Tensor()> loss;
};

std::vector<torch::Tensor> gradients(const Net& net,
                                     const std::shared_ptr<ActivationStore>& store) {
  for (const torch::Tensor& parameter : net.parameters) parameter.mutable_grad() = torch::Tensor();
  torch::Tensor loss;
  if (store == nullptr) {
    loss = net.loss();
  } else {
    const door::SavedTensorsScope scope(store);
    const auto active = store->activate();
    loss = net.loss();
  }
  loss.backward();
  std::vector<torch::Tensor> out;
  for (const torch::Tensor& parameter : net.parameters)
    out.push_back(parameter.grad().to(torch::kDouble).flatten());
  return out;
}

double squared_distance(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]).square().sum().item<double>();
  return sum;
}

std::shared_ptr<ActivationStore> store_of(std::shared_ptr<SavedPlan> plan) {
  ActivationOptions options;
  fourfold::Activations<Int4>::configure(options);
  options.recompute = fourfold::operator_names<CheapOps>();
  options.plan = std::move(plan);
  return ActivationStore::make(std::move(options));
}

/// Rounds one storage, to so many bits, and keeps what else would be rounded.
struct OneAt final : SavedPlan {
  struct Kinds final : StoredWatch {
    void held(std::uint32_t item, StoredAs kind, std::int64_t, std::int64_t) override {
      if (packed.size() <= item) packed.resize(item + 1);
      packed[item] = kind == StoredAs::kPacked;
    }
    void decoding(std::uint32_t) noexcept override {}
    void decoded(std::uint32_t, const c10::Storage&) noexcept override {}
    void released(std::uint32_t) noexcept override {}
    std::vector<bool> packed;
  };
  void forward_began(std::uint64_t) override { next = 0; }
  void forward_ended(std::uint64_t) noexcept override {}
  Choice choose(const SavedStorage& storage) override {
    const std::uint32_t item = next++;
    if (!known) {
      if (sensitive.size() <= item) sensitive.resize(item + 1);
      sensitive[item] = storage.sensitive;
      return {.watch = kinds, .item = item};
    }
    const bool packed = item < kinds->packed.size() && kinds->packed[item];
    return {.keep = packed && item != chosen, .pack = kPacks[level], .even_sensitive = true};
  }
  /// What is rounded, in order, without what is multiplied with another activation.
  std::vector<std::uint32_t> items(const Net& net) {
    static_cast<void>(gradients(net, store_of(std::shared_ptr<SavedPlan>(this, [](auto*) {}))));
    known = true;
    std::vector<std::uint32_t> out;
    for (std::uint32_t i = 0; i < kinds->packed.size(); ++i)
      if (kinds->packed[i] && !sensitive[i]) out.push_back(i);
    return out;
  }
  std::shared_ptr<Kinds> kinds = std::make_shared<Kinds>();
  std::vector<bool> sensitive;
  bool known = false;
  std::uint32_t next = 0, chosen = ~0u;
  std::size_t level = 0;
};

struct Mean {
  double value = 0, error = 0;  ///< its standard error
};

/// What rounding a storage to bits adds: mean of |g - exact g|^2 over so many draws.
Mean added_variance(const Net& net, const std::shared_ptr<OneAt>& plan, std::uint32_t item,
                    std::size_t level, int draws) {
  const auto store = store_of(plan);  // its forwards are numbered, and each draws anew
  plan->chosen = ~0u;
  const auto exact = gradients(net, store);
  plan->chosen = item, plan->level = level;
  double sum = 0, squares = 0;
  for (int i = 0; i < draws; ++i) {
    const double one = squared_distance(gradients(net, store), exact);
    sum += one, squares += one * one;
  }
  const double mean = sum / draws, spread = std::max(0.0, squares / draws - mean * mean);
  return {mean, std::sqrt(spread / (draws - 1))};
}

/// GACT's (arXiv:2206.11357): from three gradients, here at the fewest bits and at 8.
double gact_sensitivity(const Net& net, const std::shared_ptr<OneAt>& plan, std::uint32_t item) {
  const auto store = store_of(plan);
  plan->chosen = item, plan->level = 2;
  const auto g0 = gradients(net, store), g1 = gradients(net, store);
  plan->level = 0;
  const auto g2 = gradients(net, store);
  return std::max(
      {squared_distance(g0, g1), squared_distance(g0, g2), 2 * squared_distance(g1, g2)});
}

BitReport studied(const Net& net, BitOptions options = {.first = 2}) {
  const auto planner = std::make_shared<BitPlanner>(options, kPacks);
  planner->follow(net.parameters);
  const auto store = store_of(planner);
  for (int i = 0; i <= options.first; ++i) static_cast<void>(gradients(net, store));
  return planner->report();
}

/// x of each product, then its y, whose gradient is asked for.
struct Products {
  std::vector<torch::Tensor> x, y;
};

struct Oracle {
  Net net;
  std::function<torch::Tensor(Products*)> run;
};

Oracle mlp() {
  torch::manual_seed(0);
  nn::Sequential layers(nn::Linear(64, 64), nn::Linear(64, 32), nn::Linear(32, 64));
  const auto x = torch::randn({64, 64}), target = torch::randn({64, 64});
  auto run = [=](Products* seen) mutable {
    auto h = x * 1;
    for (std::size_t i = 0; i < 3; ++i) {
      if (seen != nullptr) seen->x.push_back(h);
      h = layers[i]->as<nn::Linear>()->forward(h);
      if (seen != nullptr) h.retain_grad(), seen->y.push_back(h);
      if (i < 2) h = torch::relu(h);
    }
    return (h * target).mean();  // nothing is rounded but what the products saved
  };
  return {{layers->parameters(), [=]() mutable { return run(nullptr); }}, run};
}

Oracle convolutions() {
  torch::manual_seed(1);
  const auto conv = [](int in, int out) {
    return nn::Conv2d(nn::Conv2dOptions(in, out, 3).padding(1));
  };
  nn::Sequential layers(conv(4, 8), conv(8, 8), conv(8, 4));
  const auto x = torch::randn({8, 4, 8, 8}), target = torch::randn({8, 4, 8, 8});
  auto run = [=](Products* seen) mutable {
    auto h = x * 1;
    for (std::size_t i = 0; i < 3; ++i) {
      if (seen != nullptr) seen->x.push_back(h);
      h = layers[i]->as<nn::Conv2d>()->forward(h);
      if (seen != nullptr) h.retain_grad(), seen->y.push_back(h);
      if (i < 2) h = torch::relu(h);
    }
    return (h * target).mean();  // nothing is rounded but what the products saved
  };
  return {{layers->parameters(), [=]() mutable { return run(nullptr); }}, run};
}

/// How far sum of v_i w_i may be from what the formula says, which has the mean of w in the place of
/// each w_i, the sum of dy^2 over the places where x_i was used: least and most of w over that mean.
std::pair<double, double> extremes(const torch::Tensor& x, const torch::Tensor& y) {
  const auto squares = y.grad().square().to(torch::kDouble);
  if (x.dim() == 2) {
    const auto w = squares.sum(1);
    return {(w.min() / w.mean()).item<double>(), (w.max() / w.mean()).item<double>()};
  }
  const auto w = at::conv_transpose2d(squares.sum(1, true),
                                      torch::ones({1, 1, 3, 3}, torch::kDouble), {}, 1, 1);
  const double mean = squares.sum().item<double>() * 9 / static_cast<double>(w.numel());
  return {w.min().item<double>() / mean, w.max().item<double>() / mean};
}

TEST(BySensitivity, TheFormulaIsTheVarianceThatRoundingAdds) {
  for (const bool images : {false, true}) {
    const Oracle oracle = images ? convolutions() : mlp();
    Products seen;
    oracle.run(&seen).backward();
    const BitReport report = studied(oracle.net);
    const auto plan = std::make_shared<OneAt>();
    const auto items = plan->items(oracle.net);
    ASSERT_EQ(items.size(), 3u);
    ASSERT_EQ(report.rows.size(), 3u);
    for (std::size_t i = 0; i < 3; ++i)
      for (std::size_t level = 0; level < kBits.size(); ++level) {
        const auto [least, most] = extremes(seen.x[i], seen.y[i]);
        const Mean measured = added_variance(oracle.net, plan, items[i], level, 48);
        // The report's noise is one draw of the rounding of n values. Of error e = s (r - p), r = 1
        // with probability p, e^4 is at most s^2 e^2, and with p spread evenly E e^2 = s^2 / 6: a
        // relative spread of sqrt((6 - 1) / n) at most.
        const double n = static_cast<double>(std::min<std::int64_t>(report.rows[i].values, 4096));
        const double draw = 4 * std::sqrt(5 / n);
        const double formula = report.rows[i].variance[level];
        EXPECT_GE(measured.value + 4 * measured.error, least * formula * (1 - draw))
            << images << i << level;
        EXPECT_LE(measured.value - 4 * measured.error, most * formula * (1 + draw))
            << images << i << level;
        // Where v and dy^2 are not correlated it is the mean of w itself that counts.
        EXPECT_NEAR(measured.value / formula, 1, 0.5) << images << i << level;
      }
  }
}

/// One head of attention between normalisations, then gelu: nearly all that a transformer has.
Net attention() {
  torch::manual_seed(2);
  auto norm1 = nn::LayerNorm(nn::LayerNormOptions({32}));
  auto norm2 = nn::LayerNorm(nn::LayerNormOptions({32}));
  auto qkv = nn::Linear(32, 96), out = nn::Linear(32, 32), up = nn::Linear(32, 128),
       down = nn::Linear(128, 32);
  const auto x = torch::randn({8, 16, 32}), target = torch::randn({8, 16, 32});
  Net net;
  for (const auto& module : std::vector<std::shared_ptr<nn::Module>>{
           norm1.ptr(), norm2.ptr(), qkv.ptr(), out.ptr(), up.ptr(), down.ptr()})
    for (const auto& parameter : module->parameters()) net.parameters.push_back(parameter);
  net.loss = [=]() mutable {
    auto h = x * 1;
    const auto parts = qkv(norm1(h)).view({8, 16, 3, 32}).unbind(2);
    h = h + out(at::scaled_dot_product_attention(parts[0], parts[1], parts[2]));
    h = h + down(torch::gelu(up(norm2(h))));
    return (h - target).square().mean();
  };
  return net;
}

TEST(BySensitivity, RanksStoragesAsGactsMeasurementDoes) {
  const Net net = attention();
  const BitReport report = studied(net);
  const auto plan = std::make_shared<OneAt>();
  const auto items = plan->items(net);
  ASSERT_EQ(items.size(), report.rows.size());
  ASSERT_GE(items.size(), 4u);
  std::vector<double> formula, measured, gact;
  for (std::size_t i = 0; i < items.size(); ++i) {
    formula.push_back(report.rows[i].variance[2]);
    measured.push_back(added_variance(net, plan, items[i], 2, 32).value);
    gact.push_back(gact_sensitivity(net, plan, items[i]));
    std::printf("%-24s for %-28s formula %.3g measured %.3g GACT %.3g\n",
                report.rows[i].producer.c_str(), report.rows[i].saver.c_str(), formula[i],
                measured[i], gact[i]);
    // Three gradients: |g0 - g1|^2 alone is twice the variance in the mean.
    EXPECT_GT(gact[i], 0.5 * measured[i]);
    EXPECT_LT(gact[i], 8 * measured[i]);
  }
  // What differs by more than the formula may be wrong is ranked as it is measured.
  constexpr double kWrong = 2;
  for (std::size_t i = 0; i < items.size(); ++i) {
    EXPECT_GT(measured[i], formula[i] / kWrong) << i;
    EXPECT_LT(measured[i], formula[i] * kWrong) << i;
  }
}

/// Batches of its own, from a fixed seed, and steps of SGD.
struct Training {
  explicit Training(std::uint64_t seed = 3) {
    torch::manual_seed(seed);
    layers = nn::Sequential(nn::Linear(32, 64), nn::GELU(), nn::Linear(64, 64), nn::ReLU(),
                            nn::Linear(64, 8));
    generator = torch::make_generator<torch::CPUGeneratorImpl>(seed);
  }
  std::pair<torch::Tensor, torch::Tensor> batch() {
    const auto x = torch::randn({64, 32}, generator);
    return {x, (x.narrow(1, 0, 8) * 2).sin()};
  }
  torch::Tensor loss(const torch::Tensor& x, const torch::Tensor& y) {
    return (layers->forward(x * 1) - y).square().mean();
  }
  nn::Sequential layers{nullptr};
  torch::Generator generator;
};

template <class Pipeline>
std::pair<std::vector<int>, std::vector<torch::Tensor>> trained(int steps) {
  Training task;
  Pipeline pipeline(*task.layers);
  torch::optim::SGD optimizer(task.layers->parameters(), 0.05);
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const auto [x, y] = task.batch();
    pipeline.forward([&, x = x, y = y] { return task.loss(x, y); }).backward();
    optimizer.step();
  }
  std::vector<int> bits;
  for (const auto& row : pipeline.bits().rows) bits.push_back(row.bits);
  std::vector<torch::Tensor> weights;
  for (const auto& parameter : task.layers->parameters())
    weights.push_back(parameter.detach().clone());
  return {bits, weights};
}

TEST(BySensitivity, ARunRepeatsToTheBitOnAnyNumberOfThreads) {
  using Pipeline = CompressionPipeline<ActivationsBySensitivity<4, 10, 5>, Recompute<>>;
  const int before = torch::get_num_threads();
  const auto one = trained<Pipeline>(25);
  torch::set_num_threads(1);
  const auto other = trained<Pipeline>(25);
  torch::set_num_threads(before);
  EXPECT_FALSE(one.first.empty());
  EXPECT_EQ(one.first, other.first);
  for (std::size_t i = 0; i < one.second.size(); ++i)
    EXPECT_TRUE(torch::equal(one.second[i], other.second[i]));
}

TEST(BySensitivity, TheGuardHoldsWhenMeasured) {
  // Added variance of all storages together, by draws; the gradients' own, by batches.
  for (const double limit : {0.1, 0.01}) {
    Training task;
    const auto planner =
        std::make_shared<BitPlanner>(BitOptions{.bits = 2, .most_variance = limit}, kPacks);
    const std::vector<torch::Tensor> parameters = task.layers->parameters();
    planner->follow(parameters);
    const auto store = store_of(planner);
    Net net{parameters, {}};
    for (int i = 0; i < 11; ++i) {
      const auto [x, y] = task.batch();
      net.loss = [&task, x = x, y = y] { return task.loss(x, y); };
      static_cast<void>(gradients(net, store));
    }
    const BitReport report = planner->report();
    ASSERT_FALSE(report.rows.empty());
    EXPECT_LE(report.share, limit);
    EXPECT_TRUE(report.guarded);
    EXPECT_GT(report.bits, 2);
    std::vector<double> mean(parameters.size()), square(parameters.size()),
        added(parameters.size());
    std::vector<torch::Tensor> sum, squares;
    constexpr int kBatches = 80;
    for (int i = 0; i < kBatches; ++i) {
      const auto [x, y] = task.batch();
      net.loss = [&task, x = x, y = y] { return task.loss(x, y); };
      const auto exact = gradients(net, nullptr), rounded = gradients(net, store);
      for (std::size_t p = 0; p < parameters.size(); ++p) {
        if (i == 0) sum.push_back(exact[p] * 0), squares.push_back(exact[p] * 0);
        sum[p] += exact[p], squares[p] += exact[p].square();
        added[p] += squared_distance({rounded[p]}, {exact[p]}) / kBatches;
      }
    }
    double own = 0, all = 0;
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      const double variance =
          (squares[p] / kBatches - (sum[p] / kBatches).square()).sum().item<double>() * kBatches /
          (kBatches - 1);
      own += variance, all += added[p];
      // Of 19 batches' worth, by the averages' weights, of a sample: within a factor of 2.
      EXPECT_LT(added[p], 2 * limit * variance) << "limit " << limit << ", parameter " << p;
    }
    std::printf("limit %.2f: %.2f bits, predicted %.4f, measured %.4f\n", limit, report.bits,
                report.whole_share, all / own);
    EXPECT_LT(all, limit * own);
  }
}

TEST(BySensitivity, BitsFollowTheAverageAndTheReportSaysWhatTheyAdd) {
  using Four = CompressionPipeline<ActivationsBySensitivity<4, 1000>, Recompute<>>;
  Training task;
  Four pipeline(*task.layers);
  const auto step = [&] {
    const auto [x, y] = task.batch();
    pipeline.forward([&, x = x, y = y] { return task.loss(x, y); }).backward();
  };
  for (int i = 0; i < 10; ++i) step();
  EXPECT_TRUE(pipeline.bits().rows.empty());
  step();
  const BitReport report = pipeline.bits();
  EXPECT_EQ(report.forward, 10u);
  EXPECT_FALSE(report.rows.empty());
  EXPECT_LE(report.bits, 4);
  EXPECT_GT(report.share, 0);
  std::ostringstream out;
  out << pipeline.report();
  EXPECT_THAT(out.str(), HasSubstr("bits a value on average (4.00 asked for)"));
  EXPECT_THAT(out.str(), HasSubstr("to the gradients' variance"));
  out.str("");
  out << report;
  EXPECT_THAT(out.str(), HasSubstr("aten::addmm for aten::gelu"));
  using None = CompressionPipeline<ActivationsBySensitivity<2, 0, 5>, Recompute<>>;
  Training other;
  None strict(*other.layers);
  for (int i = 0; i < 12; ++i) {
    const auto [x, y] = other.batch();
    strict.forward([&, x = x, y = y] { return other.loss(x, y); }).backward();
  }
  EXPECT_TRUE(strict.bits().guarded);
  EXPECT_EQ(strict.bits().bits, 8);
  EXPECT_THAT(
      strict.explain() +
          [&] {
            std::ostringstream text;
            text << strict.report();
            return text.str();
          }(),
      HasSubstr("with fewer bits it would be above the limit of 0.0 %"));
}

TEST(BySensitivity, ShapesThatChangeAndForwardsWithoutBackwardAreNoTrouble) {
  using Pipeline = CompressionPipeline<ActivationsBySensitivity<4, 10, 3>, Recompute<>>;
  Training task;
  Pipeline pipeline(*task.layers);
  for (int i = 0; i < 30; ++i) {
    const auto [x, y] = task.batch();
    const std::int64_t rows = 64 - i % 4;
    auto loss = pipeline.forward(
        [&, x = x, y = y] { return task.loss(x.narrow(0, 0, rows), y.narrow(0, 0, rows)); });
    if (i % 5 != 4) loss.backward();
    if (i % 7 == 6) {
      EXPECT_THROW(static_cast<void>(pipeline.forward([&]() -> torch::Tensor {
                     auto h = task.layers->forward(x * 1);
                     TORCH_CHECK(false, "in the middle of forward");
                     return h;
                   })),
                   c10::Error);
    }
  }
  EXPECT_FALSE(pipeline.bits().rows.empty());
}

TEST(BySensitivity, AStudiedForwardWithoutBackwardIsFollowedByAnother) {
  using Pipeline = CompressionPipeline<ActivationsBySensitivity<4, 10, 6>, Recompute<>>;
  Training task;
  Pipeline pipeline(*task.layers);
  for (int i = 1; i <= 17; ++i) {  // the tenth is studied, and the sixteenth
    const auto [x, y] = task.batch();
    const auto loss = pipeline.forward([&, x = x, y = y] { return task.loss(x, y); });
    if (i != 10) loss.backward();
    EXPECT_EQ(pipeline.bits().rows.empty(), i < 17) << i;
  }
  EXPECT_EQ(pipeline.bits().forward, 16u);
}

TEST(BySensitivity, InputsOfBlocksAreChosenForAndAGraphOutlivesItsPipeline) {
  using Pipeline = CompressionPipeline<ActivationsBySensitivity<4, 100, 5>, Recompute<>, Blocks<>>;
  Training task;
  torch::Tensor loss;
  {
    Pipeline pipeline(*task.layers);
    for (int i = 0; i < 12; ++i) {
      const auto [x, y] = task.batch();
      pipeline.forward([&, x = x, y = y] { return task.loss(x, y); }).backward();
    }
    const BitReport report = pipeline.bits();
    ASSERT_FALSE(report.rows.empty());
    EXPECT_TRUE(std::any_of(report.rows.begin(), report.rows.end(),
                            [](const auto& row) { return row.saver.empty(); }));
    EXPECT_LE(report.bits, 4);
    const auto [x, y] = task.batch();
    loss = pipeline.forward([&, x = x, y = y] { return task.loss(x, y); });
  }
  loss.backward();
}

TEST(BySensitivity, ABudgetBesideItIsRefused) {
  using Pipeline = CompressionPipeline<ActivationsBySensitivity<4>, Recompute<>, Budget<>>;
  Training task;
  EXPECT_THAT(
      message_of([&] { Pipeline(*task.layers, {.budget = 512_MiB}); }),
      HasSubstr("ActivationsBySensitivity chooses each storage's bits, and so does a budget"));
  Pipeline pipeline(*task.layers);  // without one it is what it is
  const auto [x, y] = task.batch();
  pipeline.forward([&, x = x, y = y] { return task.loss(x, y); }).backward();
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/offload.hpp>
#include <fourfold/activations/recompute.hpp>
#include <fourfold/pipeline.hpp>
#include <fourfold/report/meter.hpp>

#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using fourfold::ActivationOptions, fourfold::Activations, fourfold::ActivationStore,
    fourfold::CheapOps, fourfold::CompressionPipeline, fourfold::Int4, fourfold::Meter,
    fourfold::Offload, fourfold::OffloadOptions, fourfold::Recompute;
using fourfold::detail::FileOffloading;
using ::testing::HasSubstr;
namespace door = fourfold::door;
namespace nn = torch::nn;

constexpr std::int64_t kFlight = 1 << 18;

struct Small {
  static OffloadOptions options() { return {.bytes_in_flight = kFlight, .min_bytes = 1 << 14}; }
};
using Exactly = CompressionPipeline<Offload<Small>>;
using WithRecompute = CompressionPipeline<Recompute<CheapOps>, Offload<Small>>;
using WithCodes = CompressionPipeline<Activations<Int4>, Offload<Small>>;
using CodesAlone = CompressionPipeline<Activations<Int4>>;

nn::Sequential net() {
  torch::manual_seed(0);
  nn::Sequential layers;
  layers->push_back(nn::Linear(64, 256));
  for (int i = 0; i < 6; ++i) {
    layers->push_back(nn::LayerNorm(nn::LayerNormOptions({256})));
    layers->push_back(nn::Linear(256, 256));
    layers->push_back(nn::GELU());
    layers->push_back(nn::Dropout(0.1));
    layers->push_back(nn::ReLU(nn::ReLUOptions(true)));
  }
  layers->push_back(nn::Linear(256, 10));
  return layers;
}

struct Trained {
  std::vector<float> losses;
  std::vector<torch::Tensor> parameters;
};
template <class Pipeline>
Trained train(int steps = 4) {
  auto model = net();
  Pipeline pipeline(*model);
  const auto x = torch::randn({512, 64});
  const auto target = torch::randint(10, {512}, torch::kLong);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
  Trained out;
  for (int step = 0; step < steps; ++step) {
    optimizer->zero_grad();
    const auto loss =
        pipeline.forward([&] { return torch::cross_entropy_loss(model->forward(x), target); });
    loss.backward();
    optimizer->step();
    out.losses.push_back(loss.template item<float>());
  }
  for (const auto& parameter : model->parameters()) out.parameters.push_back(parameter.detach());
  return out;
}
void expect_equal(const Trained& a, const Trained& b) {
  EXPECT_EQ(a.losses, b.losses);
  for (std::size_t i = 0; i < a.parameters.size(); ++i)
    EXPECT_TRUE(torch::equal(a.parameters[i], b.parameters[i])) << i;
}

template <class Fn>
auto within(const std::shared_ptr<ActivationStore>& store, Fn&& fn) {
  const door::SavedTensorsScope scope(store);
  const std::shared_ptr<void> active = store->activate();
  return fn();
}
struct Stored {
  std::shared_ptr<FileOffloading> file;
  std::shared_ptr<ActivationStore> store;
};
Stored offloading(std::int64_t flight = 0, ActivationOptions options = {}) {
  auto file = std::make_shared<FileOffloading>(
      OffloadOptions{.bytes_in_flight = flight, .min_bytes = 1 << 12});
  options.offload = file;
  return {file, ActivationStore::make(std::move(options))};
}

TEST(Offload, LossesAndParametersAreThoseOfPlainTraining) {
  const Trained plain = train<CompressionPipeline<>>();
  expect_equal(train<Exactly>(), plain);
  expect_equal(train<WithRecompute>(), plain);
}

TEST(Offload, CodesInAFileAreTheSameCodes) {
  expect_equal(train<WithCodes>(), train<CodesAlone>());
}

TEST(Offload, SavedBytesLeaveMemory) {
  const auto x = torch::randn({2048, 64});
  const auto after_forward = [&](auto pipeline_of) {
    auto model = net();
    auto pipeline = pipeline_of(*model);
    const Meter meter;
    const std::int64_t before = meter.bytes().current;
    const auto loss = pipeline.forward([&] { return model->forward(x).square().mean(); });
    return meter.bytes().current - before;
  };
  const std::int64_t plain =
      after_forward([](nn::SequentialImpl& m) { return CompressionPipeline<>(m); });
  const std::int64_t ours = after_forward([](nn::SequentialImpl& m) { return Exactly(m); });
  EXPECT_GT(plain, std::int64_t{30} << 20);
  // What waits, dropout's masks as bits, layer_norm's statistics, and the loss's own.
  EXPECT_LE(ours, kFlight + 6 * 2048 * (256 / 8 + 2 * 4) + (1 << 18));
}

TEST(Offload, ReportsWhatItDoes) {
  const auto [file, store] = offloading();
  const auto x = torch::randn({64, 64}).requires_grad_();
  const auto y = within(store, [&] { return (x * 2).tanh().exp(); });
  EXPECT_EQ(store->counts().offloaded, 2);
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_EQ(file->counts().written, 2);
  EXPECT_THAT(store->explain(), HasSubstr("2 offloaded"));
  y.sum().backward();
  EXPECT_EQ(file->counts().read, 2);
}

TEST(Offload, WhatIsSmallOrHeldByOthersStays) {
  const auto [file, store] = offloading();
  const auto constant = torch::randn({64, 64});
  const auto weight = torch::randn({64, 64}).requires_grad_();
  const auto y = within(
      store, [&] { return (weight * constant).sum() + (weight * 1).slice(0, 0, 2).exp().sum(); });
  EXPECT_EQ(store->counts().offloaded, 0);
  EXPECT_EQ(file->counts().written, 0);
}

TEST(Offload, OneFileForOneStorageWhateverTheViews) {
  const auto [file, store] = offloading();
  const auto leaf = torch::randn({64, 192}).requires_grad_();
  const auto run = [&](const torch::Tensor& of) {
    const auto parts = (of * 1).chunk(3, 1);
    return (parts[0].t().matmul(parts[1]) * parts[2]).square().sum();
  };
  const auto ours = within(store, [&] { return run(leaf); });
  EXPECT_EQ(file->counts().written, 3);  // q, k and v once; the product; the square's input
  const auto gradient = torch::autograd::grad({ours}, {leaf})[0];
  EXPECT_TRUE(torch::equal(gradient, torch::autograd::grad({run(leaf)}, {leaf})[0]));
}

TEST(Offload, TwiceBackwardDoubleBackwardAndAnotherThread) {
  for (const std::int64_t flight : {std::int64_t{0}, std::int64_t{1} << 30}) {
    const auto [file, store] = offloading(flight);
    const auto leaf = torch::randn({64, 64}).requires_grad_();
    const auto run = [&] { return (leaf * 1).exp().tanh().sum(); };
    const auto y = within(store, run);
    const auto expected = torch::autograd::grad({run()}, {leaf}, {}, true, true)[0];
    for (int i = 0; i < 2; ++i)
      EXPECT_TRUE(torch::equal(torch::autograd::grad({y}, {leaf}, {}, true)[0], expected));
    torch::Tensor elsewhere;
    std::thread([&] { elsewhere = torch::autograd::grad({y}, {leaf}, {}, true)[0]; }).join();
    EXPECT_TRUE(torch::equal(elsewhere, expected));
    const auto first = torch::autograd::grad({y}, {leaf}, {}, true, true)[0];
    EXPECT_TRUE(torch::equal(torch::autograd::grad({first.sum()}, {leaf})[0],
                             torch::autograd::grad({expected.sum()}, {leaf})[0]));
  }
}

TEST(Offload, WhatIsWrittenToAfterwardsIsLibTorchsErrorOrAsItWas) {
  for (const std::int64_t flight : {std::int64_t{0}, std::int64_t{1} << 30}) {
    const auto [file, store] =
        offloading(flight, {.recompute = fourfold::operator_names<CheapOps>()});
    const auto leaf = torch::randn({64, 64}).requires_grad_();
    const auto wrong = within(store, [&] {
      const auto x = leaf * 1;
      const auto y = x.exp();
      y.add_(1);
      return y.sum();
    });
    EXPECT_THAT(message_of([&] { wrong.backward(); }),
                HasSubstr("modified by an inplace operation"));
    // gelu saves x, tanh its own result of it; x changes in the scope, after both.
    const auto run = [&] {
      const auto x = leaf * 1;
      const auto z = at::silu(x).tanh();  // silu's result is not saved, tanh's is
      const auto s = x.sigmoid();         // of x, computed again
      auto w = s * 2;
      return (z.detach() * w).sum();
    };
    EXPECT_TRUE(torch::equal(torch::autograd::grad({within(store, run)}, {leaf})[0],
                             torch::autograd::grad({run()}, {leaf})[0]));
  }
}

TEST(Offload, APipelineThatGoesBetweenForwardAndBackward) {
  const auto x = torch::randn({512, 64});
  auto model = net();
  model->eval();
  auto plain = model->forward(x).square().mean();
  plain.backward();
  std::vector<torch::Tensor> expected;
  for (auto& parameter : model->parameters()) {
    expected.push_back(parameter.grad().clone());
    parameter.mutable_grad() = torch::Tensor();
  }
  auto pipeline = std::make_optional<Exactly>(*model);
  const auto loss = pipeline->forward([&] { return model->forward(x).square().mean(); });
  pipeline.reset();
  loss.backward();
  const auto parameters = model->parameters();
  for (std::size_t i = 0; i < parameters.size(); ++i)
    EXPECT_TRUE(torch::equal(parameters[i].grad(), expected[i]));
}

TEST(Offload, AFullDiskCostsNoStep) {
  const Trained plain = train<CompressionPipeline<>>(2);
  ::rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  ::rlimit limit = before;
  limit.rlim_cur = 3 << 20;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const Trained ours = train<Exactly>(2);
  ::setrlimit(RLIMIT_FSIZE, &before);
  expect_equal(ours, plain);
}

/// A gradient that never comes.
struct Fails : torch::autograd::Function<Fails> {
  static torch::Tensor forward(torch::autograd::AutogradContext*, torch::Tensor x) { return x; }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list) {
    TORCH_CHECK(false, "in backward");
    return {};
  }
};
/// Pieces whose reading ahead is under way live until it is done.
void expect_all_freed(const FileOffloading& file) {
  for (int i = 0; i < 1000 && file.counts().file_bytes > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_EQ(file.counts().file_bytes, 0);
  EXPECT_EQ(file.counts().waiting_bytes, 0);
}

TEST(Offload, AnErrorInForwardOrBackwardFreesAllAndTheNextStepWorks) {
  for (const std::int64_t flight : {std::int64_t{0}, kFlight, std::int64_t{1} << 30}) {
    const auto [file, store] = offloading(flight);
    auto model = net();
    model->eval();
    const auto x = torch::randn({512, 64});
    const auto gradient = [&](const auto& run) {
      model->zero_grad();
      run().backward();
      return model->parameters()[0].grad().clone();
    };
    const auto loss = [&] { return model->forward(x).square().mean(); };
    const auto expected = gradient(loss);
    model->zero_grad();
    const Meter meter;
    const std::int64_t before = meter.bytes().current;
    const auto clean = [&] {
      expect_all_freed(*file);
      model->zero_grad();
      EXPECT_EQ(store->held_bytes().current, 0);
      EXPECT_EQ(meter.bytes().current, before);
    };
    EXPECT_THAT(message_of([&] {
                  within(store, [&] {
                    const auto kept = loss();
                    TORCH_CHECK(false, "in the middle of forward");
                    return kept;
                  });
                }),
                HasSubstr("in the middle of forward"));
    clean();
    {
      // Half of it is read back when the error comes.
      const auto y = within(store, [&] {
        const auto first = model->forward(x);
        return model->forward(Fails::apply(first.mean() + x)).square().mean();
      });
      EXPECT_THAT(message_of([&] { y.backward(); }), HasSubstr("in backward"));
    }
    clean();
    EXPECT_TRUE(torch::equal(gradient([&] { return within(store, loss); }), expected));
    clean();
  }
}

TEST(Offload, NotANumberComesBackAsItWas) {
  const auto [file, store] = offloading();
  auto x = torch::randn({64, 64});
  x[3][5] = std::numeric_limits<float>::quiet_NaN();
  x[7][1] = std::numeric_limits<float>::infinity();
  const auto leaf = x.requires_grad_();
  const auto run = [&] { return (leaf * 1).tanh().exp().sum(); };
  const auto ours = torch::autograd::grad({within(store, run)}, {leaf})[0];
  EXPECT_EQ(file->counts().written, 2);
  EXPECT_TRUE(torch::equal(ours.isnan(), torch::autograd::grad({run()}, {leaf})[0].isnan()));
  EXPECT_TRUE(
      torch::equal(ours.nan_to_num(), torch::autograd::grad({run()}, {leaf})[0].nan_to_num()));
}

TEST(Offload, ShapesThatChangeEachStep) {
  const auto [file, store] = offloading(kFlight);
  auto model = net();
  model->eval();
  for (int step = 0; step < 12; ++step) {
    const auto x = torch::randn({64 * (1 + (5 * step) % 11), 64});
    const auto gradient = [&](const torch::Tensor& loss) {
      return torch::autograd::grad({loss}, {model->parameters()[0]})[0];
    };
    const auto run = [&] { return model->forward(x).square().mean(); };
    EXPECT_TRUE(torch::equal(gradient(within(store, run)), gradient(run()))) << step;
  }
  expect_all_freed(*file);
}

struct InMemory {
  static OffloadOptions options() { return {.directory = "/dev/shm", .min_bytes = 1 << 14}; }
};
TEST(Offload, ADirectoryThatIsMemoryIsToldInTheReport) {
  struct ::statfs system;
  if (::statfs("/dev/shm", &system) != 0 || system.f_type != TMPFS_MAGIC)
    GTEST_SKIP() << "/dev/shm is no tmpfs here";
  auto model = net();
  const auto words = [](const auto& pipeline) {
    std::ostringstream text;
    text << pipeline.report();
    return text.str();
  };
  EXPECT_THAT(
      words(CompressionPipeline<Offload<InMemory>>(*model)),
      HasSubstr("Offload<>: '/dev/shm' is memory itself (tmpfs), so what is offloaded there "
                "saves none and is not counted; name a directory on a disk"));
  if (::statfs(std::filesystem::temp_directory_path().c_str(), &system) == 0 &&
      system.f_type != TMPFS_MAGIC) {
    EXPECT_THAT(words(Exactly(*model)), ::testing::Not(HasSubstr("tmpfs")));
  }
}

struct Nowhere {
  static OffloadOptions options() { return {.directory = "/no/such/place"}; }
};
TEST(Offload, ADirectoryThatIsNotThereIsRefusedBeforeTheModelChanges) {
  auto model = net();
  const auto before = model->parameters()[0].clone();
  using Refused = CompressionPipeline<fourfold::Blocks<>, Offload<Nowhere>>;
  EXPECT_THAT(message_of([&] { const Refused pipeline(*model); }),
              HasSubstr("fourfold::Offload: cannot make a file in '/no/such/place'"));
  EXPECT_TRUE(torch::equal(model->parameters()[0], before));
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/weights/exponential_moving_average.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/core/mapped_file.hpp>
#include <fourfold/weights/compress_weights.hpp>
#include "tests/reference/ema.hpp"
#include "tests/support/message_of.hpp"

#include <cstring>
#include <sstream>

namespace {

using fourfold::ExponentialMovingAverage, fourfold::Int4, fourfold::Int8, fourfold::OnDevice,
    fourfold::OnHost;
using testing::HasSubstr;

void assign(const torch::Tensor& weight, const torch::Tensor& values) {
  const torch::NoGradGuard no_grad;
  weight.copy_(values);
}

template <class C>
class PlainAverages : public testing::Test {};
using Plain = testing::Types<OnDevice, OnHost, Int8>;  // small tensors are held plain by Int8 too
TYPED_TEST_SUITE(PlainAverages, Plain);

TYPED_TEST(PlainAverages, ArePythonsToTheBit) {
  for (const double decay : {0.999, 0.9, 0.25, 1.0, 0.0}) {
    torch::nn::Linear model(torch::nn::LinearOptions(6, 1).bias(false));
    ExponentialMovingAverage<TypeParam> average(model, {.decay = decay});
    int step = 0;
    for (const EmaStep& expected : kEmaSteps) {
      if (expected.decay != decay) continue;
      for (; step < expected.updates; average.update()) {
        ++step;
        assign(model->weight,
               (torch::arange(6).to(torch::kFloat) * (step % 5) / 8 - step / 4.0F).view({1, 6}));
      }
      const auto now = average.averages().at(0).second;
      std::array<std::uint32_t, 6> bits{};
      std::memcpy(bits.data(), now.template const_data_ptr<float>(), sizeof bits);
      EXPECT_EQ(bits, expected.average) << decay << " after " << step;
    }
    EXPECT_EQ(average.n_averaged(), 30);
  }
}

/// Codes against the definition in double. A rounding errs by a step at most, and its mean is zero:
/// the average of averages over many values is exact but for the standard error. Errors of steps
/// before decay with the average, so that their variance is below s^2 / 4 / (1 - decay^2) each.
TEST(ExponentialMovingAverage, CodesFollowTheDefinition) {
  torch::manual_seed(0);
  constexpr double kDecay = 0.9;
  const auto model = torch::nn::Linear(torch::nn::LinearOptions(256, 256).bias(false));
  ExponentialMovingAverage<Int8> average(model, {.decay = kDecay});
  auto exact = torch::Tensor();
  for (int step = 0; step < 50; ++step) {
    assign(model->weight, torch::randn({256, 256}) + 0.1 * step);
    average.update();
    const auto now = model->weight.detach().to(torch::kDouble);
    exact = step == 0 ? now : kDecay * exact + (1 - kDecay) * now;
  }
  const auto error = average.averages().at(0).second.to(torch::kDouble) - exact;
  const double range = (exact.max() - exact.min()).item<double>();
  const double step = range * (1 + 0x1p-6) / 255;  // of the widest group, at most
  const double deviation = step / 2 / std::sqrt(1 - kDecay * kDecay);
  EXPECT_LE(error.square().mean().sqrt().item<double>(), deviation);
  EXPECT_LE(std::abs(error.mean().item<double>()), 4 * deviation / 256);
  EXPECT_EQ(average.nbytes(), 65536 * 8.25 / 8);
}

/// Nearest rounding would stand still: each update moves the average by a 40th of a code.
TEST(ExponentialMovingAverage, CodesDoNotFreeze) {
  const auto model = torch::nn::Linear(torch::nn::LinearOptions(256, 256).bias(false));
  ExponentialMovingAverage<Int8> average(model, {.decay = 0.999});
  auto start = torch::zeros({256, 256});
  start.select(1, 0).fill_(-1), start.select(1, 128).fill_(-1), start.select(1, 1).fill_(1),
      start.select(1, 129).fill_(1);
  assign(model->weight, start);
  average.update();
  assign(model->weight, start + 0.2);
  for (int i = 0; i < 200; ++i) average.update();
  const double expected = 0.2 * (1 - std::pow(0.999, 200));
  const auto moved = average.averages().at(0).second - start;
  // 65536 values, each with a deviation of sqrt(s d / 2), s = 2.2 / 255 and d = 0.2 at most.
  EXPECT_NEAR(moved.mean().item<double>(), expected, 4 * std::sqrt(2.2 / 255 * 0.2 / 2) / 256);
}

TEST(ExponentialMovingAverage, EveryCountsOneOfSoMany) {
  torch::nn::Linear one(6, 1), other(6, 1);
  assign(other->weight, one->weight), assign(other->bias, one->bias);
  ExponentialMovingAverage<OnDevice> often(one, {.decay = 0.81}),
      rarely(other, {.decay = 0.9, .every = 2});
  for (int i = 0; i < 6; ++i) {
    rarely.update();
    if (i % 2 == 0) often.update();
    assign(one->weight, one->weight + 1), assign(other->weight, other->weight + 1);
  }
  EXPECT_EQ(rarely.n_averaged(), 3);
  EXPECT_TRUE(torch::allclose(often.averages()[0].second, rarely.averages()[0].second));
}

TEST(ExponentialMovingAverage, AppliedForAWhileAndForGood) {
  torch::manual_seed(1);
  torch::nn::Sequential model(torch::nn::Linear(100, 100), torch::nn::Linear(100, 3));
  ExponentialMovingAverage<Int8> average(model, {.decay = 0.5});
  average.update();
  for (auto& p : model->parameters()) assign(p, p + 1);
  average.update();
  const auto before = model->parameters()[0].detach().clone();
  const auto version = model->parameters()[0]._version();
  {
    const auto averaged = average.applied();
    EXPECT_NEAR((before - model->parameters()[0]).mean().item<double>(), 0.5, 1e-3);
    EXPECT_TRUE(model->parameters()[0].equal(average.averages()[0].second));
    EXPECT_TRUE(model->parameters()[0].requires_grad());
  }
  EXPECT_TRUE(model->parameters()[0].equal(before));
  EXPECT_GT(model->parameters()[0]._version(), version) << "autograd must notice";
  try {
    const auto averaged = average.applied();
    throw std::runtime_error("in validation");
  } catch (const std::runtime_error&) {
  }
  EXPECT_TRUE(model->parameters()[0].equal(before));
  average.copy_to_model();
  EXPECT_TRUE(model->parameters()[0].equal(average.averages()[0].second));
}

TEST(ExponentialMovingAverage, TiedPackedAndBuffers) {
  struct Tied : torch::nn::Module {
    Tied() {
      weight = register_parameter("weight", torch::ones({8}));
      register_parameter("alias", weight);
      norm = register_module("norm", torch::nn::BatchNorm1d(8));
      packed = register_module("packed", torch::nn::Linear(64, 64));
      fourfold::compress_weights<Int8>(packed);
    }
    torch::Tensor weight;
    torch::nn::BatchNorm1d norm{nullptr};
    torch::nn::Linear packed{nullptr};
  } model;
  ExponentialMovingAverage<OnDevice> average(model, {.decay = 0.5, .use_buffers = true});
  average.update();
  assign(model.norm->running_mean, torch::full({8}, 2.0F));
  model.norm->num_batches_tracked.fill_(7);
  average.update();
  std::vector<std::string> names;
  for (const auto& [name, value] : average.averages()) {
    names.push_back(name);
    if (name == "norm.running_mean") {
      EXPECT_TRUE(value.equal(torch::ones({8})));
    }
    if (name == "norm.num_batches_tracked") {
      EXPECT_EQ(value.item<std::int64_t>(), 7);
    }
  }
  EXPECT_THAT(names, testing::Contains("weight"));
  EXPECT_THAT(names, testing::Not(testing::Contains("alias")));
  EXPECT_THAT(names, testing::Not(testing::Contains("packed.weight")));
}

TEST(ExponentialMovingAverage, LowTypesAndLayoutsComeBackAsTheyAre) {
  torch::nn::Conv2d model(torch::nn::Conv2dOptions(16, 32, 3));
  model->to(torch::kBFloat16);
  assign(model->weight, torch::randn({32, 16, 3, 3}));
  model->weight.set_data(model->weight.contiguous(torch::MemoryFormat::ChannelsLast));
  ExponentialMovingAverage<Int8> average(model, {});
  average.update();
  const auto value = average.averages()[0].second;
  EXPECT_EQ(value.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(value.strides(), model->weight.strides());
  EXPECT_LE((value - model->weight).to(torch::kFloat).abs().max().item<float>(),
            8.0 / 255 + 4 * 0x1p-8);
}

/// What `to` says to what `from` saves.
template <class From, class To>
std::string error_of_loading(From& from, To& to) {
  std::stringstream file;
  torch::serialize::OutputArchive out;
  from.save(out);
  out.save_to(file);
  torch::serialize::InputArchive in;
  in.load_from(file);
  return message_of([&] { to.load(in); });
}

// A thousandth of the way is less than bf16 resolves: the average itself is fp32.
TEST(ExponentialMovingAverage, OfBf16WeightsMovesByLessThanTheirRounding) {
  torch::nn::Linear model(4, 4);
  model->to(torch::kBFloat16);
  assign(model->weight, torch::zeros({4, 4}));
  ExponentialMovingAverage<fourfold::OnHost> average(model, {.decay = 0.999});
  average.update();
  assign(model->weight, torch::ones({4, 4}));
  for (int i = 0; i < 1000; ++i) average.update();
  const auto value = average.averages()[0].second;
  EXPECT_EQ(value.scalar_type(), torch::kBFloat16);
  EXPECT_NEAR(value[0][0].item<double>(), 1 - std::pow(0.999, 1000), 0x1p-8);
}

TEST(ExponentialMovingAverage, CodesKnowTheirMemoryFormat) {
  torch::nn::Conv2d model(torch::nn::Conv2dOptions(16, 32, 3));
  ExponentialMovingAverage<Int8> average(model);
  average.update();
  torch::nn::Conv2d last(torch::nn::Conv2dOptions(16, 32, 3));
  last->weight.set_data(last->weight.contiguous(torch::MemoryFormat::ChannelsLast));
  ExponentialMovingAverage<Int8> other(last);
  EXPECT_THAT(error_of_loading(average, other),
              HasSubstr("; give the model that format before it is averaged"));
  model->weight.set_data(model->weight.contiguous(torch::MemoryFormat::ChannelsLast));
  EXPECT_THAT(message_of([&] { average.update(); }), HasSubstr("make another after the move"));
}

TEST(ExponentialMovingAverage, ThreadsDoNotMatterAndRunsRepeat) {
  const int threads = torch::get_num_threads();
  std::vector<torch::Tensor> seen;
  for (const int use : {1, 2}) {
    torch::set_num_threads(use);
    torch::manual_seed(3);
    torch::nn::Linear model(300, 300);
    ExponentialMovingAverage<Int4> average(model);
    for (int i = 0; i < 5; ++i) {
      average.update();
      assign(model->weight, torch::randn({300, 300}));
    }
    seen.push_back(average.averages()[0].second);
  }
  torch::set_num_threads(threads);
  EXPECT_TRUE(seen[0].equal(seen[1]));
}

TEST(ExponentialMovingAverage, MistakesAreNamed) {
  torch::nn::Linear model(4, 4);
  EXPECT_THAT(
      message_of([&] { ExponentialMovingAverage<Int8>(model, {.decay = 1.5}); }),
      HasSubstr("Invalid decay value 1.5 provided. Please provide a value in [0,1] range."));
  EXPECT_THAT(message_of([&] { ExponentialMovingAverage<Int8>(model, {.every = 0}); }),
              HasSubstr("every is 0; give how many updates count as one, 1 or more"));
  torch::nn::ReLU empty;
  EXPECT_THAT(message_of([&] { ExponentialMovingAverage<Int8> average(empty); }),
              HasSubstr("the module has no parameters to average; hand over the module"));
  const ExponentialMovingAverage<Int8> average(model);
  EXPECT_THAT(
      message_of([&] { average.copy_to_model(); }),
      HasSubstr("copy_to_model() was called before the first update(): there is no average"));
  EXPECT_THAT(message_of([&] { (void)average.applied(); }), HasSubstr("applied() was called"));
  EXPECT_THAT(message_of([&] { (void)average.averages(); }), HasSubstr("averages() was called"));
}

template <class C>
class SavedAverages : public testing::Test {};
using Kinds = testing::Types<OnDevice, OnHost, Int8, Int4>;
TYPED_TEST_SUITE(SavedAverages, Kinds);

/// Saved in the middle and loaded into a new one, it goes on bit for bit.
TYPED_TEST(SavedAverages, GoOnAsIfNothingHadHappened) {
  torch::manual_seed(3);
  torch::nn::Linear model(96, 64);
  const auto move = [&] { assign(model->weight, torch::randn_like(model->weight)); };
  const fourfold::ExponentialMovingAverageOptions options{.decay = 0.9, .every = 2};
  ExponentialMovingAverage<TypeParam> average(model, options);
  for (int i = 0; i < 5; ++i) move(), average.update();
  std::stringstream file;
  torch::serialize::OutputArchive out;
  average.save(out);
  out.save_to(file);
  torch::manual_seed(4);  // another seed of its own, which the file's replaces
  ExponentialMovingAverage<TypeParam> again(model, options);
  torch::serialize::InputArchive in;
  in.load_from(file);
  again.load(in);
  EXPECT_EQ(again.n_averaged(), average.n_averaged());
  EXPECT_EQ(again.nbytes(), average.nbytes());
  for (int i = 0; i < 5; ++i) move(), average.update(), again.update();
  for (std::size_t i = 0; i < 2; ++i)
    EXPECT_TRUE(again.averages()[i].second.equal(average.averages()[i].second));
}
TEST(SavedAveragesErrors, WhatDoesNotFitIsNamedAndChangesNothing) {
  torch::nn::Linear model(96, 64), other(96, 48);
  ExponentialMovingAverage<Int8> average(model), smaller(other);
  ExponentialMovingAverage<Int4> coarser(model);
  ExponentialMovingAverage<Int8> plain(model, {.min_packed_elements = 1 << 20});
  torch::serialize::OutputArchive none;
  EXPECT_THAT(message_of([&] { average.save(none); }),
              HasSubstr("save() was called before the first"));
  average.update(), smaller.update();
  const auto before = smaller.averages()[0].second;
  EXPECT_THAT(error_of_loading(average, smaller), HasSubstr("it is damaged, or of another model"));
  EXPECT_TRUE(smaller.averages()[0].second.equal(before));
  EXPECT_THAT(error_of_loading(average, coarser),
              HasSubstr("; load it into an ExponentialMovingAverage<" + Int8::name() + ">"));
  EXPECT_THAT(error_of_loading(average, plain),
              HasSubstr("make it with the min_packed_elements that it was"));
  torch::nn::Sequential nested{torch::nn::Linear(96, 64)};
  ExponentialMovingAverage<Int8> named(nested);
  EXPECT_THAT(error_of_loading(average, named),
              HasSubstr("has 'weight' where this model has '0.weight'"));
  torch::serialize::OutputArchive empty;
  std::stringstream file;
  empty.save_to(file);
  torch::serialize::InputArchive in;
  in.load_from(file);
  EXPECT_THAT(message_of([&] { average.load(in); }),
              HasSubstr("the archive does not hold an ExponentialMovingAverage"));
}

/// Averages in a memory-mapped file: the same bits, uncounted, saved as ever.
template <class C>
void expect_averages_on_file() {
  torch::manual_seed(0);
  const torch::nn::Linear model(400, 300);
  const auto file = std::make_shared<fourfold::MappedFile>();
  ExponentialMovingAverage<C> one(*model), other(*model, {.offload = file});
  ExponentialMovingAverage<C> third(*model, {.offload = file});
  const auto update = [&](auto&... averages) {
    assign(model->weight, torch::randn({300, 400}));
    (averages.update(), ...);
  };
  for (int step = 0; step < 3; ++step) update(one, other);
  EXPECT_GE(file->held_bytes(), 300 * 400);
  EXPECT_EQ(one.nbytes(), other.nbytes());
  EXPECT_EQ(error_of_loading(other, third), "no error");
  EXPECT_GE(file->held_bytes(), 2 * 300 * 400);
  update(one, other, third);
  for (const auto& average : {other.averages(), third.averages()})
    for (std::size_t i = 0; i < average.size(); ++i)
      EXPECT_TRUE(average[i].second.equal(one.averages()[i].second)) << i;
}
TEST(ExponentialMovingAverage, MayBeHeldInAFile) {
  expect_averages_on_file<Int8>();
  expect_averages_on_file<OnHost>();
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adamw.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>

namespace {

using fourfold::Companded, fourfold::Softsign, fourfold::Sqrt, fourfold::Int8;
using fourfold::optim::AdamWOf, fourfold::optim::Fp32;
using testing::HasSubstr;
using torch::optim::AdamWOptions;
using Packed8 = AdamWOf<Int8>;

std::vector<torch::Tensor> parameters() {
  torch::manual_seed(0);
  return {
      torch::randn({100, 70}).requires_grad_(), torch::randn({70}).requires_grad_(),
      torch::randn({8, 16, 3, 17}).contiguous(torch::MemoryFormat::ChannelsLast).requires_grad_(),
      torch::randn({3}).requires_grad_()};  // never has a gradient
}
void train(torch::optim::Optimizer& optimizer, std::vector<torch::Tensor>& all, int from, int to) {
  for (int step = from; step < to; ++step) {
    const auto generator =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(step));
    for (std::size_t i = 0; i < 3; ++i)
      all[i].mutable_grad() = torch::randn(all[i].sizes(), generator);
    optimizer.step();
  }
}
std::string saved(const torch::optim::Optimizer& optimizer) {
  std::ostringstream out;
  torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  archive.save_to(out);
  return out.str();
}
void load(torch::optim::Optimizer& optimizer, const std::string& bytes) {
  std::istringstream in(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(in);
  optimizer.load(archive);
}
std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

template <class Optimizer>
void expect_resumed_training_to_be_bit_equal() {
  auto whole = parameters(), parted = parameters();
  torch::manual_seed(11);
  Optimizer one({whole[0], whole[1], whole[2], whole[3]}, AdamWOptions(1e-2));
  Optimizer first({parted[0], parted[1], parted[2], parted[3]}, AdamWOptions(1e-2));
  train(one, whole, 0, 10);
  train(first, parted, 0, 5);
  static_cast<AdamWOptions&>(first.param_groups()[0].options()).lr(1e-2);
  const std::string bytes = saved(first);

  torch::manual_seed(12);  // another process, another seed: the file has the noise's
  Optimizer second({parted[0], parted[1], parted[2], parted[3]}, AdamWOptions(0.5));
  load(second, bytes);
  EXPECT_EQ(static_cast<AdamWOptions&>(second.param_groups()[0].options()).lr(), 1e-2);
  EXPECT_EQ(second.state_bytes(), first.state_bytes());
  train(second, parted, 5, 10);
  for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(parted[i].equal(whole[i])) << i;
}

TEST(AdamWArchive, TrainingGoesOnBitForBit) {
  expect_resumed_training_to_be_bit_equal<Packed8>();
  expect_resumed_training_to_be_bit_equal<AdamWOf<Fp32>>();
  expect_resumed_training_to_be_bit_equal<fourfold::optim::AdamW<Companded<8, Softsign>, Fp32>>();
}

TEST(AdamWArchive, TorchSaveAndLoadWork) {
  auto all = parameters();
  Packed8 optimizer(all, AdamWOptions(1e-2));
  train(optimizer, all, 0, 2);
  std::stringstream file;
  torch::save(optimizer, file);
  Packed8 again(all, AdamWOptions(1e-2));
  torch::load(again, file);
  EXPECT_EQ(saved(again).size(), saved(optimizer).size());
  EXPECT_EQ(again.state_bytes(), optimizer.state_bytes());
}

TEST(AdamWArchive, PlainStatesLoadIntoCodes) {
  auto all = parameters();
  AdamWOf<Fp32> plain(all, AdamWOptions(1e-2));
  train(plain, all, 0, 2);
  Packed8 packed(all, AdamWOptions(1e-2));
  load(packed, saved(plain));
  EXPECT_EQ(packed.state_bytes(), 2 * (7000 + 4 * 55) + 2 * 4 * 70 + 2 * (6528 + 4 * 51));

  // And back: what the codes stand for, which coding once more changes by rounding of scales alone.
  AdamWOf<Fp32> again(all, AdamWOptions(1e-2)), third(all, AdamWOptions(1e-2));
  load(again, saved(packed));
  EXPECT_EQ(again.state_bytes(), plain.state_bytes());
  Packed8 twice(all, AdamWOptions(1e-2));
  load(twice, saved(again));
  EXPECT_EQ(twice.state_bytes(), packed.state_bytes());
  load(third, saved(twice));
  auto mine = parameters(), others = parameters();
  AdamWOf<Fp32> one(mine, AdamWOptions(1e-2)), two(others, AdamWOptions(1e-2));
  load(one, saved(again)), load(two, saved(third));
  train(one, mine, 2, 3), train(two, others, 2, 3);
  for (std::size_t i = 0; i < mine.size(); ++i)
    EXPECT_TRUE(torch::allclose(mine[i], others[i], 0x1p-23, 1e-2 * 0x1p-20)) << i;
}

/// A file written by hand: version 1 as its description has it, for one small parameter.
std::string written_by_hand(std::int64_t version, const std::string& codec) {
  using torch::serialize::OutputArchive, c10::IValue;
  OutputArchive archive, group, options, one, first, second;
  archive.write("fourfold_optimizer", IValue(version));
  archive.write("rule", IValue(std::string("AdamW")));
  archive.write("first", IValue(codec));
  archive.write("second", IValue(codec));
  archive.write("seed", IValue(std::int64_t{7}));
  archive.write("groups", IValue(std::int64_t{1}));
  AdamWOptions(1e-2).serialize(options);
  group.write("options", options);
  group.write("parameters", IValue(std::int64_t{1}));
  one.write("sizes", IValue(std::vector<std::int64_t>{3}));
  one.write("strides", IValue(std::vector<std::int64_t>{1}));
  one.write("step", IValue(std::int64_t{2}));
  one.write("state", IValue(true));
  first.write("packed", IValue(false)), second.write("packed", IValue(false));
  first.write("0", torch::tensor({1.0F, -2.0F, 0.5F}), /*is_buffer=*/true);
  second.write("0", torch::tensor({4.0F, 9.0F, 0.25F}), /*is_buffer=*/true);
  one.write("first", first), one.write("second", second);
  group.write("parameter0", one);
  archive.write("group0", group);
  std::ostringstream out;
  archive.save_to(out);
  return out.str();
}
TEST(AdamWArchive, VersionOneIsRead) {
  auto p = torch::zeros({3}).requires_grad_();
  Packed8 optimizer({p}, AdamWOptions(1));
  load(optimizer, written_by_hand(1, "Companded8Softsign"));
  p.mutable_grad() = torch::zeros({3});
  optimizer.step();  // the third: m decays to 0.9 m, v to 0.999 v
  const auto m = 0.9 * torch::tensor({1.0, -2.0, 0.5}, torch::kDouble);
  const auto v = 0.999 * torch::tensor({4.0, 9.0, 0.25}, torch::kDouble);
  const auto wanted =
      -1e-2 * (m / (1 - std::pow(0.9, 3))) / ((v / (1 - std::pow(0.999, 3))).sqrt() + 1e-8);
  EXPECT_TRUE(torch::allclose(p.detach().to(torch::kDouble), wanted, 1e-6, 0)) << p;
}
TEST(AdamWArchive, ACodecThatNoLongerExistsIsNamed) {
  auto p = torch::zeros({3}).requires_grad_();
  Packed8 optimizer({p}, AdamWOptions(1));
  EXPECT_THAT(message([&] { load(optimizer, written_by_hand(1, "Dynamic8")); }),
              HasSubstr("saved in the code 'Dynamic8', which this fourfold does not know"));
}

TEST(AdamWArchive, WhatDoesNotFitIsNamedAndChangesNothing) {
  auto all = parameters();
  Packed8 optimizer(all, AdamWOptions(1e-2));
  train(optimizer, all, 0, 2);
  const std::string before = saved(optimizer);
  const auto refused = [&](torch::serialize::OutputArchive& archive) {
    std::ostringstream out;
    archive.save_to(out);
    const std::string words = message([&] { load(optimizer, out.str()); });
    EXPECT_EQ(saved(optimizer), before);
    return words;
  };

  torch::serialize::OutputArchive foreign;
  torch::optim::AdamW(all, AdamWOptions(1e-2)).save(foreign);
  EXPECT_THAT(refused(foreign), HasSubstr("does not hold states of a fourfold optimizer"));

  torch::serialize::OutputArchive newer;
  newer.write("fourfold_optimizer", c10::IValue(std::int64_t{3}));
  EXPECT_THAT(refused(newer),
              HasSubstr("has format version 3, and this fourfold reads versions 1 to 2"));

  torch::serialize::OutputArchive cut;
  cut.write("fourfold_optimizer", c10::IValue(std::int64_t{1}));
  cut.write("rule", c10::IValue(std::string("AdamW")));
  EXPECT_THAT(refused(cut), HasSubstr("has no 'first': it is damaged"));

  torch::serialize::OutputArchive fewer;
  Packed8({all[0]}, AdamWOptions(1e-2)).save(fewer);
  EXPECT_THAT(refused(fewer), HasSubstr("has 1 parameters, and that of this optimizer 4"));

  torch::serialize::OutputArchive groups;
  Packed8 two({all[0]}, AdamWOptions(1e-2));
  two.add_param_group(torch::optim::OptimizerParamGroup({all[1]}));
  two.save(groups);
  EXPECT_THAT(refused(groups), HasSubstr("holds 2 parameter groups, and this optimizer has 1"));

  auto others = parameters();
  others[1] = torch::randn({71}).requires_grad_();
  torch::serialize::OutputArchive shapes;
  Packed8(others, AdamWOptions(1e-2)).save(shapes);
  EXPECT_THAT(refused(shapes), HasSubstr("parameter 1 of group 0 is [70], and in this file [71]"));

  others = parameters();
  others[2] = others[2].detach().contiguous().requires_grad_();
  torch::serialize::OutputArchive order;
  Packed8 contiguous(others, AdamWOptions(1e-2));
  train(contiguous, others, 0, 1);
  contiguous.save(order);
  EXPECT_THAT(refused(order), HasSubstr("bring it into the memory format that it was saved in"));

  EXPECT_NE(message([&] { load(optimizer, before.substr(0, before.size() / 2)); }), "no error");
  EXPECT_EQ(saved(optimizer), before);
}

}  // namespace

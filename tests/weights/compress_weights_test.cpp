// SPDX-License-Identifier: Apache-2.0
#include <fourfold/weights/compress_weights.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/codec/nf4.hpp>

#include "tests/weights/packed_modules.hpp"

#include <limits>

namespace fourfold::tests {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

template <class C>
class PackedModule : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }
  static at::Tensor values(at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble); }
};
using Formats = testing::Types<Int8, Int4, Nf4, LowRank<4>>;
TYPED_TEST_SUITE(PackedModule, Formats);

TYPED_TEST(PackedModule, Linear) {
  torch::nn::Linear module(33, 17);
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({5, 33}));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({2, 3, 33}));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({33}));
  torch::nn::Linear no_bias(torch::nn::LinearOptions(33, 17).bias(false));
  expect_as_decompressed<TypeParam>(
      no_bias, [&](const at::Tensor& x) { return no_bias(x); }, this->values({5, 33}));
}

TYPED_TEST(PackedModule, Conv1d) {
  torch::nn::Conv1d module(torch::nn::Conv1dOptions(6, 9, 5).stride(2).padding(3).dilation(2));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({2, 6, 20}));
}

TYPED_TEST(PackedModule, Conv2d) {
  torch::nn::Conv2d module(torch::nn::Conv2dOptions(6, 9, {3, 5}).stride({2, 3}).padding({1, 0}));
  const auto forward = [&](const at::Tensor& x) { return module(x); };
  expect_as_decompressed<TypeParam>(module, forward, this->values({2, 6, 8, 12}));
  expect_as_decompressed<TypeParam>(module, forward, this->values({6, 9, 11}));  // without a batch
}

TYPED_TEST(PackedModule, Conv2dOfGroupsAndOfPaddingSame) {
  torch::nn::Conv2d grouped(torch::nn::Conv2dOptions(6, 12, 3).groups(3));
  expect_as_decompressed<TypeParam>(
      grouped, [&](const at::Tensor& x) { return grouped(x); }, this->values({2, 6, 8, 7}));
  torch::nn::Conv2d same(torch::nn::Conv2dOptions(6, 12, 3).padding(torch::kSame).bias(false));
  expect_as_decompressed<TypeParam>(
      same, [&](const at::Tensor& x) { return same(x); }, this->values({2, 6, 8, 7}));
}

TYPED_TEST(PackedModule, Conv3d) {
  torch::nn::Conv3d module(torch::nn::Conv3dOptions(5, 6, 3).stride(2).padding(1));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({2, 5, 6, 5, 7}));
}

TYPED_TEST(PackedModule, ConvTranspose1d) {
  torch::nn::ConvTranspose1d module(
      torch::nn::ConvTranspose1dOptions(6, 5, 4).stride(3).padding(1).output_padding(2));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({2, 6, 7}));
}

TYPED_TEST(PackedModule, ConvTranspose2d) {
  torch::nn::ConvTranspose2d module(torch::nn::ConvTranspose2dOptions(8, 6, 3).stride(2).groups(2));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({2, 8, 5, 4}));
}

TYPED_TEST(PackedModule, ConvTranspose3d) {
  torch::nn::ConvTranspose3d module(
      torch::nn::ConvTranspose3dOptions(5, 4, 3).stride(2).padding(1));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({2, 5, 3, 4, 3}));
}

TYPED_TEST(PackedModule, Embedding) {
  torch::nn::Embedding module(torch::nn::EmbeddingOptions(50, 12).padding_idx(3));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, torch::randint(50, {4, 7}));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x.to(torch::kInt)); },
      torch::randint(50, {0}));
}

TYPED_TEST(PackedModule, EmbeddingBag) {
  torch::nn::EmbeddingBag module(torch::nn::EmbeddingBagOptions(50, 12).mode(torch::kSum));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, torch::randint(50, {4, 7}));
}

TYPED_TEST(PackedModule, MultiheadAttention) {
  torch::nn::MultiheadAttention module(32, 4);
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return std::get<0>(module(x, x, x)); },
      this->values({7, 3, 32}));
  // Keys that are not the queries: rows of in_proj_weight are cut out.
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return std::get<0>(module(x, x.flip(0), x * 2)); },
      this->values({7, 3, 32}));
}

TYPED_TEST(PackedModule, TransformerEncoder) {
  torch::nn::TransformerEncoder module(
      torch::nn::TransformerEncoderLayer(
          torch::nn::TransformerEncoderLayerOptions(16, 2).dim_feedforward(40).dropout(0)),
      2);
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module(x); }, this->values({6, 2, 16}));
}

TYPED_TEST(PackedModule, LSTM) {
  torch::nn::LSTM module(torch::nn::LSTMOptions(12, 20).num_layers(2).bidirectional(true));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return std::get<0>(module(x)); },
      this->values({5, 3, 12}));
}

TYPED_TEST(PackedModule, GRU) {
  torch::nn::GRU module(torch::nn::GRUOptions(12, 20).num_layers(2).batch_first(true));
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return std::get<0>(module(x)); },
      this->values({5, 3, 12}));
}

/// What a user writes by hand: a raw parameter, used by operators that have no kernel of ours too.
struct HandWritten : torch::nn::Module {
  HandWritten() {
    matrix = register_parameter("matrix", torch::randn({24, 24}));
    batch = register_parameter("batch", torch::randn({4, 24, 8}));
    scale = register_parameter("scale", torch::randn({24}));
  }
  at::Tensor forward(const at::Tensor& x) {  // (4, 6, 24)
    const at::Tensor a = torch::einsum("bik,kj->bij", {x, matrix}) * scale;
    const at::Tensor b = torch::matmul(matrix, a.transpose(1, 2)).transpose(1, 2);
    const at::Tensor c = torch::bmm(b, batch).matmul(batch.transpose(1, 2));
    return c + matrix.tanh().sum() + torch::cat({matrix, matrix.t()}).norm() + matrix[2];
  }
  at::Tensor matrix, batch, scale;
};

TYPED_TEST(PackedModule, AModuleWrittenByHand) {
  auto module = std::make_shared<HandWritten>();
  expect_as_decompressed<TypeParam>(
      module, [&](const at::Tensor& x) { return module->forward(x); }, this->values({4, 6, 24}));
}

class CompressWeights : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }
};

TEST_F(CompressWeights, ReadsAConvolutionTileByTile) {
  // Rows of 3200 values: 81 of them make a tile, so 200 take three; and with two groups four.
  for (const std::int64_t groups : {1, 2}) {
    torch::nn::Conv1d module(torch::nn::Conv1dOptions(640 * groups, 200, 5).groups(groups));
    static_assert(door::kConvolutionTile / 3200 < 100);
    expect_as_decompressed<Int8>(
        module, [&](const at::Tensor& x) { return module(x); },
        torch::randn({1, 640 * groups, 7}, torch::kDouble));
    torch::nn::ConvTranspose1d turned(
        torch::nn::ConvTranspose1dOptions(200, 640 * groups, 5).groups(groups));
    expect_as_decompressed<Int8>(
        turned, [&](const at::Tensor& x) { return turned(x); },
        torch::randn({1, 200, 5}, torch::kDouble));
  }
  torch::nn::Conv1d wide(
      torch::nn::Conv1dOptions(400 * 256, 400, 5).groups(400));  // tiles of groups
  expect_as_decompressed<Int8>(
      wide, [&](const at::Tensor& x) { return wide(x); },
      torch::randn({1, 400 * 256, 6}, torch::kDouble));
}

TEST_F(CompressWeights, SaysWhatItDid) {
  torch::nn::Sequential model(torch::nn::Linear(128, 64), torch::nn::ReLU(),
                              torch::nn::Linear(64, 8));
  const CompressedWeights done = compress_weights<Int8>(model);  // the second has only 512 values
  EXPECT_THAT(done.names, ElementsAre("0.weight"));
  EXPECT_EQ(done.values, 8192);
  EXPECT_EQ(done.bytes_before, 4 * 8192);
  EXPECT_EQ(done.bytes_after, 8192 + 4 * 8192 / 128);
  EXPECT_GT(done.ratio(), 3.8);
}

TEST_F(CompressWeights, TakesAModuleHowevItIsHandedOver) {
  torch::nn::Linear holder(64, 64);
  EXPECT_EQ(compress_weights<Int8>(holder).names.size(), 1);
  torch::nn::Linear impl(64, 64);
  EXPECT_EQ(compress_weights<Int8>(*impl).names.size(), 1);
  torch::nn::Sequential sequential(torch::nn::Linear(64, 64));
  EXPECT_EQ(compress_weights<Int8>(sequential).names.size(), 1);
  const auto pointer = std::make_shared<HandWritten>();
  EXPECT_EQ(compress_weights<Int8>(pointer, every_matrix).names.size(), 2);
  std::shared_ptr<torch::nn::Module> base = torch::nn::Linear(64, 64).ptr();
  EXPECT_EQ(compress_weights<Int8>(base).names.size(), 1);
}

TEST_F(CompressWeights, ReachesEveryAlias) {
  torch::nn::Linear model(64, 64);
  const at::Tensor own = model->weight, listed = model->parameters()[0];
  compress_weights<Int8>(model);
  EXPECT_TRUE(door::is_packed(own) && door::is_packed(listed) && door::is_packed(model->weight));
  {
    torch::NoGradGuard no_grad;
    own.mul_(0.5);
  }
  EXPECT_TRUE(torch::equal(decompress(model->weight), decompress(own)));
  EXPECT_TRUE(model->weight.is_same(own));
}

/// A language model's head that shares its table.
struct TiedHead : torch::nn::LinearImpl {
  explicit TiedHead(const at::Tensor& table)
      : LinearImpl(torch::nn::LinearOptions(table.size(1), table.size(0)).bias(false)) {
    weight = table;
    parameters_["weight"] = table;
  }
};
struct Tied : torch::nn::Module {
  Tied() {
    table = register_module("table", torch::nn::Embedding(40, 16));
    head = register_module("head", std::make_shared<TiedHead>(table->weight));
  }
  torch::nn::Embedding table{nullptr};
  std::shared_ptr<TiedHead> head;
};

TEST_F(CompressWeights, PacksATiedParameterOnce) {
  Tied model;
  ASSERT_TRUE(model.head->weight.is_same(model.table->weight));
  const CompressedWeights done = compress_weights<Int8>(model, every_matrix);
  EXPECT_THAT(done.names, ElementsAre("table.weight"));
  EXPECT_EQ(done.bytes_before, 40 * 16 * 4);
  {
    torch::NoGradGuard no_grad;
    model.head->weight.fill_(1);
  }
  EXPECT_TRUE(torch::equal(model.table(torch::tensor({3})), torch::ones({1, 16})));
}

struct Views : torch::nn::Module {
  Views() {
    flat = torch::randn({3, 64, 8});
    whole = register_parameter("whole", flat[0].clone());
    turned = register_parameter("turned", whole.detach().t());
    same = register_parameter("same", whole.detach());
    second = register_parameter("second", flat[1]);
    third = register_parameter("third", flat[2][0]);  // one dimension: stays
  }
  at::Tensor flat, whole, turned, same, second, third;
};

TEST_F(CompressWeights, KeepsViewsOfOneStorageTied) {
  Views model;
  const at::Tensor before = model.third.detach().clone();
  const CompressedWeights done = compress_weights<Int8>(model, every_matrix);
  EXPECT_THAT(done.names, ElementsAre("whole", "second"));
  {
    torch::NoGradGuard no_grad;
    model.whole.select(0, 5).fill_(2);
  }
  EXPECT_TRUE(torch::equal(decompress(model.turned), decompress(model.whole).t()));
  EXPECT_TRUE(torch::equal(decompress(model.same), decompress(model.whole)));
  EXPECT_TRUE(torch::equal(model.third, before));
  EXPECT_FALSE(model.third.is_alias_of(model.flat));  // or the whole flat buffer would stay
  decompress(model);
  EXPECT_TRUE(model.turned.is_alias_of(model.whole));
  EXPECT_TRUE(torch::equal(model.turned, model.whole.t()));
}

TEST_F(CompressWeights, RefusesTiesThatWouldComeApart) {
  Views model;
  const auto message = message_of([&] {
    compress_weights<Int8>(
        model, [](const std::string& name, const at::Tensor&) { return name == "turned"; });
  });
  EXPECT_THAT(message, AllOf(HasSubstr("'turned' shares values with 'whole'"),
                             HasSubstr("choose both or neither")));
  EXPECT_FALSE(door::is_packed(model.turned));
}

TEST_F(CompressWeights, RefusesAnEmptyModule) {
  torch::nn::ReLU relu;
  EXPECT_THAT(message_of([&] { compress_weights<Int8>(relu); }),
              AllOf(HasSubstr("compress_weights<Int8>"), HasSubstr("no parameters")));
  torch::nn::Linear holder{nullptr};
  EXPECT_THAT(message_of([&] { compress_weights<Int8>(holder); }),
              HasSubstr("empty module holder"));
  std::shared_ptr<torch::nn::Module> null;
  EXPECT_THAT(message_of([&] { compress_weights<Int8>(null); }), HasSubstr("null pointer"));
}

TEST_F(CompressWeights, RefusesAFilterThatChoosesNothing) {
  torch::nn::Linear small(8, 8);
  EXPECT_THAT(message_of([&] { compress_weights<Int8>(small); }),
              AllOf(HasSubstr("chose none of the 2 parameters"), HasSubstr("4096"),
                    HasSubstr("pass a filter")));
}

struct Odd : torch::nn::Module {
  explicit Odd(at::Tensor odd) {
    good = register_parameter("good", torch::randn({8, 8}));
    bad = register_parameter("bad", std::move(odd), /*requires_grad=*/false);
  }
  at::Tensor good, bad;
};

TEST_F(CompressWeights, RefusesIntegersAndComplexNumbersByName) {
  for (const at::ScalarType dtype : {at::kInt, at::kBool, at::kComplexFloat}) {
    Odd model(torch::zeros({8, 8}, dtype));
    const at::Tensor before = model.good.detach().clone();
    EXPECT_THAT(message_of([&] { compress_weights<Int8>(model, every_matrix); }),
                AllOf(HasSubstr("parameter 'bad' is " + std::string(c10::toString(dtype))),
                      HasSubstr("leave it out")));
    EXPECT_FALSE(door::is_packed(model.good));
    EXPECT_TRUE(model.good.requires_grad());
    EXPECT_TRUE(torch::equal(model.good, before));
  }
}

TEST_F(CompressWeights, RefusesNaNAndInfinityByName) {
  for (const double value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    at::Tensor odd = torch::randn({8, 8});
    odd[3][2] = value;
    Odd model(odd);
    EXPECT_THAT(message_of([&] { compress_weights<Int4>(model, every_matrix); }),
                AllOf(HasSubstr("parameter 'bad' (sizes [8, 8])"), HasSubstr("26"),
                      HasSubstr("left as it was")));
    EXPECT_FALSE(door::is_packed(model.good));
    EXPECT_TRUE(model.good.requires_grad());
  }
}

TEST_F(CompressWeights, RefusesToPackTwice) {
  torch::nn::Linear model(64, 64);
  compress_weights<Int8>(model);
  const auto codes = door::payload_of(model->weight);
  EXPECT_THAT(
      message_of([&] { compress_weights<Int4>(model); }),
      AllOf(HasSubstr("'weight' is packed already (Int8)"), HasSubstr("fourfold::decompress")));
  EXPECT_EQ(door::payload_of(model->weight), codes);
}

TEST_F(CompressWeights, RefusesARankAboveTheMatrix) {
  torch::nn::Sequential model(torch::nn::Linear(64, 64), torch::nn::Linear(64, 6));
  EXPECT_THAT(message_of([&] { compress_weights<LowRank<8>>(model, every_matrix); }),
              AllOf(HasSubstr("'1.weight'"), HasSubstr("rank"), HasSubstr("6"),
                    HasSubstr("left as it was")));
  EXPECT_FALSE(door::is_packed(model->parameters()[0]));
}

TEST_F(CompressWeights, RefusesAParameterThatIsComputed) {
  Odd model(torch::randn({8, 8}));
  model.bad.set_data(torch::randn({8, 8}));
  at::Tensor computed = torch::randn({8, 8}, torch::requires_grad()) * 2;
  struct Computed : torch::nn::Module {
    explicit Computed(const at::Tensor& t) { parameters_.insert("computed", t); }
  } computing(computed);
  EXPECT_THAT(message_of([&] { compress_weights<Int8>(computing, every_matrix); }),
              HasSubstr("'computed' is computed by autograd"));
}

TEST_F(CompressWeights, AGraphThatSavedTheWeightSaysThatItChanged) {
  torch::nn::Linear model(64, 64);
  const at::Tensor x = torch::randn({2, 64}, torch::requires_grad());
  const at::Tensor loss = model(x).sum();
  compress_weights<Int8>(model);
  EXPECT_THAT(message_of([&] { loss.backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST_F(CompressWeights, MovesAndCopiesAsTheModuleDoes) {
  torch::nn::Sequential model(torch::nn::Linear(64, 64));
  compress_weights<Int8>(model);
  auto& linear = *model[0]->as<torch::nn::Linear>();
  const at::Tensor values = decompress(linear.weight);

  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  auto& copied = *copy->ptr(0)->as<torch::nn::Linear>();
  EXPECT_TRUE(door::is_packed(copied.weight));
  EXPECT_FALSE(copied.weight.requires_grad());
  EXPECT_TRUE(copied.bias.requires_grad());
  {
    torch::NoGradGuard no_grad;
    copied.weight.zero_();
  }
  EXPECT_TRUE(torch::equal(decompress(linear.weight), values));

  model->to(torch::kBFloat16);
  EXPECT_TRUE(door::is_packed(linear.weight));
  EXPECT_EQ(linear.weight.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::equal(decompress(linear.weight), values.to(torch::kBFloat16)));
  model->to(torch::kDouble);  // the codes never changed
  EXPECT_TRUE(torch::equal(decompress(linear.weight), values.to(torch::kDouble)));
  model->to(torch::kFloat);
  model->to(torch::kCPU);
  EXPECT_TRUE(torch::equal(decompress(linear.weight), values));

  const auto names = model->named_parameters().keys();
  EXPECT_THAT(names, ElementsAre("0.weight", "0.bias"));
  linear.bias.mutable_grad() = torch::ones({64});
  model->zero_grad();
  EXPECT_FALSE(linear.weight.grad().defined());
  EXPECT_FALSE(linear.bias.grad().defined());
  EXPECT_EQ(linear.weight.detach().sizes(), linear.weight.sizes());
  EXPECT_TRUE(door::is_packed(linear.weight.detach()));
}

TEST_F(CompressWeights, DecompressGivesBackWhatWasTrainable) {
  torch::nn::Linear model(64, 64);
  torch::nn::Embedding frozen(64, 64);
  frozen->weight.set_requires_grad(false);
  compress_weights<Int8>(model);
  compress_weights<Int8>(frozen);
  decompress(model), decompress(frozen);
  EXPECT_TRUE(model->weight.requires_grad());
  EXPECT_FALSE(frozen->weight.requires_grad());
  decompress(model);  // nothing to do
}

TEST_F(CompressWeights, TorchLoadWritesThrough) {
  torch::nn::Linear model(64, 64), other(64, 64), larger(64, 65);
  std::stringstream file, wrong;
  torch::save(other, file);
  torch::save(larger, wrong);
  compress_weights<Int8>(model);
  torch::load(model, file);
  EXPECT_TRUE(door::is_packed(model->weight));
  EXPECT_TRUE(torch::equal(model->bias, other->bias));
  EXPECT_TRUE(torch::equal(decompress(model->weight),
                           make_payload<Int8>(other->weight.detach())->decompress()));
  EXPECT_THAT(message_of([&] { torch::load(model, wrong); }),
              HasSubstr("of sizes [64, 64] the sizes [65, 64]"));
}

TEST_F(CompressWeights, TorchSaveSaysWhatToDo) {
  torch::nn::Linear model(64, 64);
  compress_weights<Int8>(model);
  std::stringstream file;
  EXPECT_THAT(
      message_of([&] { torch::save(model, file); }),
      AllOf(HasSubstr("Int8"), HasSubstr("fourfold::save"), HasSubstr("fourfold::decompress")));
}

// The factors' gradients through what LibTorch calls are those of the product written out, up to the
// order of sums of at most 64 * 9 terms.
TEST_F(CompressWeights, FactorsGetTheGradientsOfTheirProduct) {
  const auto expect = [](auto module, const at::Tensor& x, const auto& plain) {
    compress_weights<LowRank<4>>(module, every_matrix);
    const std::vector<at::Tensor> trained = factors(module);
    ASSERT_EQ(trained.size(), 2);
    module->forward(x).sin().sum().backward();
    const at::Tensor left = trained[0].detach().clone().requires_grad_();
    const at::Tensor right = trained[1].detach().clone().requires_grad_();
    plain(left.mm(right).view(module->weight.sizes())).sin().sum().backward();
    EXPECT_TRUE(at::allclose(trained[0].grad(), left.grad(), 1e-4, 1e-4)) << module->name();
    EXPECT_TRUE(at::allclose(trained[1].grad(), right.grad(), 1e-4, 1e-4)) << module->name();
  };
  torch::nn::Linear linear(32, 24);
  const at::Tensor rows = torch::randn({16, 32});
  expect(linear, rows, [&](const at::Tensor& w) { return at::linear(rows, w, linear->bias); });
  torch::nn::Conv2d conv(torch::nn::Conv2dOptions(6, 8, 3).padding(1));
  const at::Tensor images = torch::randn({2, 6, 9, 9});
  expect(conv, images,
         [&](const at::Tensor& w) { return at::conv2d(images, w, conv->bias, 1, 1); });
  torch::nn::Embedding table(40, 16);
  const at::Tensor indices = torch::randint(40, {3, 7}, torch::kLong);
  expect(table, indices, [&](const at::Tensor& w) { return at::embedding(w, indices); });
}

TEST_F(CompressWeights, TiedParametersInAnotherMemoryFormatStayTied) {
  torch::nn::Conv2d a(torch::nn::Conv2dOptions(8, 8, 3)), b(torch::nn::Conv2dOptions(8, 8, 3));
  a->weight.set_data(a->weight.contiguous(at::MemoryFormat::ChannelsLast));
  b->weight.set_data(a->weight);
  torch::nn::Sequential model(a, b);
  const at::Tensor plain = a->weight.detach().clone();
  compress_weights<Int8>(model, every_matrix);
  EXPECT_TRUE(torch::equal(decompress(a->weight), decompress(b->weight)));
  EXPECT_TRUE(((decompress(b->weight) - plain).abs() <= Int8{}.error_bound(plain)).all().item<bool>());
}

TEST_F(CompressWeights, WhatStaysAndIsTiedStaysTied) {
  torch::nn::Linear model(64, 64), other(64, 64);
  const at::Tensor flat = torch::randn({64 * 64 + 64});
  model->weight.set_data(flat.narrow(0, 0, 64 * 64).view({64, 64}));
  model->bias.set_data(flat.narrow(0, 64 * 64, 64));
  other->bias.set_data(flat.narrow(0, 64 * 64, 64));
  torch::nn::Sequential both(model, other);
  compress_weights<Int8>(both, every_matrix);
  EXPECT_TRUE(model->bias.is_alias_of(other->bias));
  EXPECT_TRUE(torch::equal(model->bias, flat.narrow(0, 64 * 64, 64)));
  EXPECT_EQ(model->bias.storage().nbytes(), 64 * sizeof(float));
}

TEST_F(CompressWeights, AFrozenParametersFactorsAreFrozen) {
  torch::nn::Linear model(64, 64);
  model->weight.set_requires_grad(false);
  compress_weights<LowRank<4>>(model, every_matrix);
  for (const at::Tensor& factor : factors(model)) EXPECT_FALSE(factor.requires_grad());
}

// What Module::to does when it moves a module.
TEST_F(CompressWeights, AMovedModuleKeepsTheFactorsThatAnOptimizerHolds) {
  torch::nn::Linear model(64, 64);
  compress_weights<LowRank<4>>(model, every_matrix);
  const std::vector<at::Tensor> before = factors(model);
  const at::Tensor values = decompress(model->weight);
  model->weight.set_data(model->weight.clone());
  const std::vector<at::Tensor> after = factors(model);
  ASSERT_EQ(after.size(), 2);
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(after[i].unsafeGetTensorImpl(), before[i].unsafeGetTensorImpl());
    EXPECT_TRUE(after[i].requires_grad());
  }
  EXPECT_TRUE(torch::equal(decompress(model->weight), values));
}

TEST_F(CompressWeights, AFactorisedTablesPaddingGetsNoGradient) {
  torch::nn::Embedding table(torch::nn::EmbeddingOptions(40, 16).padding_idx(3));
  compress_weights<LowRank<4>>(table, every_matrix);
  table->forward(torch::tensor({3, 5, 3})).sum().backward();
  const at::Tensor gradient = factors(table)[0].grad();
  EXPECT_EQ(gradient[3].abs().max().item<float>(), 0);
  EXPECT_GT(gradient[5].abs().max().item<float>(), 0);
}

TEST_F(CompressWeights, ProductsOnTheLeftAreContiguousAndSparseOnesWork) {
  torch::nn::Linear model(64, 64);
  compress_weights<Int8>(model, every_matrix);
  const at::Tensor x = torch::randn({64, 3});
  EXPECT_TRUE(torch::mm(model->weight, x).is_contiguous());
  const at::Tensor sparse = torch::eye(64).to_sparse();
  EXPECT_TRUE(torch::equal(torch::mm(sparse, model->weight), decompress(model->weight)));
}

TEST_F(CompressWeights, FactorsAreTrained) {
  torch::nn::Sequential model(torch::nn::Linear(32, 32), torch::nn::Tanh(),
                              torch::nn::Linear(32, 32));
  compress_weights<LowRank<4>>(model, every_matrix);
  std::vector<at::Tensor> trained = factors(model);
  ASSERT_EQ(trained.size(), 4);
  for (const at::Tensor& factor : trained) EXPECT_TRUE(factor.is_leaf() && factor.requires_grad());
  EXPECT_EQ(trained[0].sizes(), (at::IntArrayRef{32, 4}));
  EXPECT_EQ(trained[1].sizes(), (at::IntArrayRef{4, 32}));
  torch::optim::Adam optimizer(trained, torch::optim::AdamOptions(1e-2));
  const at::Tensor x = torch::randn({64, 32}), y = torch::randn({64, 4}).mm(torch::randn({4, 32}));
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = torch::mse_loss(model->forward(x), y);
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.8 * first);
  const at::Tensor product = trained[0].detach().mm(trained[1].detach());
  EXPECT_TRUE(torch::equal(decompress(model->parameters()[0]), product.view({32, 32})));

  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  const std::vector<at::Tensor> copied = factors(copy);
  ASSERT_EQ(copied.size(), 4);
  EXPECT_TRUE(copied[0].is_leaf() && copied[0].requires_grad());
  EXPECT_TRUE(torch::equal(copied[0], trained[0]));
  EXPECT_FALSE(copied[0].is_alias_of(trained[0]));
}

TEST_F(CompressWeights, WritesIntoAFactorisedParameterReachTheFactors) {
  torch::nn::Linear model(32, 32);
  compress_weights<LowRank<4>>(model, every_matrix);
  const std::vector<at::Tensor> before = factors(model);
  const at::Tensor wanted = torch::randn({32, 2}).mm(torch::randn({2, 32}));  // of rank 2
  {
    torch::NoGradGuard no_grad;
    model->weight.copy_(wanted);
  }
  EXPECT_TRUE(factors(model)[0].is_same(before[0]));
  const at::Tensor error = (before[0].mm(before[1]) - wanted).abs();
  EXPECT_TRUE((error <= LowRank<4>{}.error_bound(wanted)).all().item<bool>());
  model->weight.requires_grad_(false);  // of a factorised one: of its factors
  EXPECT_FALSE(before[0].requires_grad());
}

}  // namespace
}  // namespace fourfold::tests

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/weights/save.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <fourfold/codec/low_rank.hpp>

#include "tests/weights/packed_modules.hpp"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace fourfold::tests {
namespace {

using testing::AllOf;
using testing::HasSubstr;

torch::nn::Sequential make_model(std::int64_t width = 24) {
  return torch::nn::Sequential(torch::nn::Linear(16, width), torch::nn::BatchNorm1d(width),
                               torch::nn::Linear(width, 16));
}

/// Bits of every parameter and buffer, packed or not.
std::vector<at::Tensor> values_of(torch::nn::Sequential& model) {
  std::vector<at::Tensor> values;
  for (const auto& [name, tensor] : parameters_of(model, "test"))
    values.push_back(decompress(tensor).detach().clone());
  for (const auto& [name, tensor] : buffers_of(model, "test")) values.push_back(tensor.clone());
  return values;
}

bool equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  bool same = a.size() == b.size();
  for (std::size_t i = 0; same && i < a.size(); ++i) same = torch::equal(a[i], b[i]);
  return same;
}

class SaveAndLoad : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }

  static std::string saved(torch::nn::Sequential& model) {
    std::ostringstream out;
    save(model, out);
    return out.str();
  }
  static void load_text(torch::nn::Sequential& model, const std::string& text) {
    std::istringstream in(text);
    load(model, in);
  }
  /// The message of loading `text`, which must leave the model as it was.
  static std::string refusal(torch::nn::Sequential& model, const std::string& text) {
    const std::vector<at::Tensor> before = values_of(model);
    const std::string message = message_of([&] { load_text(model, text); });
    EXPECT_TRUE(equal(values_of(model), before));
    return message;
  }
};

TEST_F(SaveAndLoad, APlainModelBecomesThePackedOne) {
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<Int4>(model, every_matrix);
  model->forward(torch::randn({8, 16}));  // moves the running mean
  load_text(other, saved(model));
  EXPECT_TRUE(equal(values_of(model), values_of(other)));
  EXPECT_TRUE(door::is_packed(other->parameters()[0]));
  EXPECT_FALSE(other->parameters()[0].requires_grad());
  model->eval(), other->eval();
  const at::Tensor x = torch::randn({3, 16});
  EXPECT_TRUE(torch::equal(model->forward(x), other->forward(x)));
  decompress(other);
  EXPECT_TRUE(other->parameters()[0].requires_grad());
}

TEST_F(SaveAndLoad, APackedModelTakesOtherCodes) {
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<Nf4>(model, every_matrix);
  compress_weights<Nf4>(other, every_matrix);
  const at::Tensor alias = other->parameters()[0].t();
  load_text(other, saved(model));
  EXPECT_TRUE(equal(values_of(model), values_of(other)));
  EXPECT_TRUE(torch::equal(decompress(alias), decompress(model->parameters()[0]).t()));
}

TEST_F(SaveAndLoad, AModelWithNothingPackedIsSavedToo) {
  torch::nn::Sequential model = make_model(), other = make_model();
  load_text(other, saved(model));
  EXPECT_TRUE(equal(values_of(model), values_of(other)));
  EXPECT_TRUE(other->parameters()[0].requires_grad());
}

TEST_F(SaveAndLoad, HoldsCodesAndNotValues) {
  torch::nn::Sequential model(torch::nn::Linear(256, 256));
  const std::size_t plain = saved(model).size();
  compress_weights<Int4>(model);
  EXPECT_LT(saved(model).size(), plain / 6);  // 4.5 bits for 32, a bias and names
}

TEST_F(SaveAndLoad, KeepsTheDtype) {
  torch::nn::Sequential model = make_model(), other = make_model();
  model->to(torch::kBFloat16);
  compress_weights<Int8>(model, every_matrix);
  const std::string text = saved(model);
  EXPECT_THAT(refusal(other, text),
              AllOf(HasSubstr("BFloat16 there and Float here"), HasSubstr("to(dtype)")));
  other->to(torch::kBFloat16);
  load_text(other, text);
  EXPECT_TRUE(equal(values_of(model), values_of(other)));
}

TEST_F(SaveAndLoad, FactorsAreTrainableAgainAndStayTheOptimizers) {
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<LowRank<4>>(model, every_matrix);
  const std::string text = saved(model);
  load_text(other, text);
  ASSERT_EQ(factors(other).size(), 4);
  EXPECT_TRUE(factors(other)[0].requires_grad() && factors(other)[0].is_leaf());
  EXPECT_TRUE(torch::equal(factors(other)[1], factors(model)[1]));
  const at::Tensor known = factors(other)[0];
  {
    torch::NoGradGuard no_grad;
    known.zero_();
  }
  load_text(other, text);  // into a packed one: the same leaves, other values
  EXPECT_TRUE(factors(other)[0].is_same(known));
  EXPECT_TRUE(torch::equal(known, factors(model)[0]));
}

struct TwoNames : torch::nn::Module {
  TwoNames() {
    first = register_parameter("first", torch::randn({8, 8}));
    turned = register_parameter("turned", first.detach().t());
    parameters_.insert("again", first);
  }
  at::Tensor first, turned;
};

TEST_F(SaveAndLoad, KeepsTies) {
  TwoNames model, other;
  compress_weights<Int8>(model, every_matrix);
  std::stringstream file;
  save(model, file);
  load(other, file);
  EXPECT_TRUE(torch::equal(decompress(other.first), decompress(model.first)));
  {
    torch::NoGradGuard no_grad;
    other.first.select(0, 1).fill_(3);
  }
  EXPECT_TRUE(torch::equal(decompress(other.turned), decompress(other.first).t()));
}

TEST_F(SaveAndLoad, RefusesAnotherModel) {
  torch::nn::Sequential model = make_model(), wider = make_model(32);
  torch::nn::Sequential longer = make_model();
  longer->push_back(torch::nn::Linear(16, 2));
  compress_weights<Int8>(model, every_matrix);
  const std::string text = saved(model);
  EXPECT_THAT(refusal(wider, text),
              AllOf(HasSubstr("another model"),
                    HasSubstr("'0.weight' has sizes [24, 16] there and [32, 16] here"),
                    HasSubstr("left as it was")));
  EXPECT_THAT(refusal(longer, text),
              AllOf(HasSubstr("another model"), HasSubstr("it has no parameter '3.")));
  EXPECT_THAT(refusal(model, saved(longer)), HasSubstr("it has parameter '3."));
}

TEST_F(SaveAndLoad, RefusesAnotherCodec) {
  torch::nn::Sequential model = make_model(), other = make_model(), plain = make_model();
  compress_weights<Int8>(model, every_matrix);
  compress_weights<Int4>(other, every_matrix);
  EXPECT_THAT(refusal(other, saved(model)),
              AllOf(HasSubstr("'0.weight' is packed by Int8 there and by Int4 here"),
                    HasSubstr("fourfold::decompress")));
  EXPECT_THAT(refusal(other, saved(plain)), AllOf(HasSubstr("plain there and packed here (Int4)"),
                                                  HasSubstr("fourfold::decompress")));
}

TEST_F(SaveAndLoad, RefusesACodecThatItDoesNotKnow) {
  torch::nn::Sequential model = make_model();
  compress_weights<Int8>(model, every_matrix);
  detail::SavedModel kept = detail::gather(parameters_of(model, "test"), buffers_of(model, "test"));
  kept.payloads[0].codec = "Int3";
  std::ostringstream out;
  detail::write_model(out, kept);
  torch::nn::Sequential other = make_model();
  EXPECT_THAT(refusal(other, out.str()),
              AllOf(HasSubstr("packed by Int3"), HasSubstr("fourfold::load<C>")));
  kept.payloads[0].codec = "Int4";  // known, but these are not its codes
  std::ostringstream wrong;
  detail::write_model(wrong, kept);
  EXPECT_THAT(refusal(other, wrong.str()),
              HasSubstr("has not the codes that its sizes [24, 16] need"));
}

TEST_F(SaveAndLoad, RefusesATruncatedFileWhereverItIsCut) {
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<Int8>(model, every_matrix);
  const std::string text = saved(model);
  for (std::size_t cut = 0; cut < text.size(); cut += cut < 64 ? 1 : 97)
    EXPECT_THAT(refusal(other, text.substr(0, cut)),
                testing::AnyOf(HasSubstr("is damaged"), HasSubstr("not a file of fourfold::save")))
        << cut;
}

TEST_F(SaveAndLoad, RefusesADamagedFileWhereverItIsDamaged) {
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<Int8>(model, every_matrix);
  const std::string text = saved(model);
  for (std::size_t at = 12; at < text.size(); at += at < 400 ? 3 : 61) {
    std::string damaged = text;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x41);
    EXPECT_THAT(refusal(other, damaged), HasSubstr("fourfold::load: the stream is")) << at;
  }
}

TEST_F(SaveAndLoad, RefusesANewerVersionAndAForeignFile) {
  torch::nn::Sequential model = make_model();
  std::string text = saved(model);
  const std::uint32_t newer = detail::kSaveVersion + 1;
  std::memcpy(text.data() + 8, &newer, sizeof newer);
  EXPECT_THAT(refusal(model, text),
              AllOf(HasSubstr("has version 2"), HasSubstr("reads versions 1 to 1"),
                    HasSubstr("newer fourfold")));
  EXPECT_THAT(refusal(model, "PK\x03\x04 of torch::save"),
              AllOf(HasSubstr("not a file of fourfold::save"), HasSubstr("torch::load")));
}

/// A stream that cannot seek, as a pipe.
struct Pipe : std::streambuf {
  explicit Pipe(std::string text) : text_(std::move(text)) {
    setg(text_.data(), text_.data(), text_.data() + text_.size());
  }
  std::string text_;
};

TEST_F(SaveAndLoad, ReadsAPipe) {
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<Int8>(model, every_matrix);
  const std::string text = saved(model);
  Pipe pipe(text), cut(text.substr(0, text.size() / 2)), stub(text.substr(0, 4));
  std::istream in(&pipe), short_in(&cut), shortest_in(&stub);
  load(other, in);
  EXPECT_TRUE(equal(values_of(model), values_of(other)));
  EXPECT_THAT(message_of([&] { load(other, short_in); }), HasSubstr("it ends too early"));
  EXPECT_THAT(message_of([&] { load(other, shortest_in); }), HasSubstr("it ends too early"));
}

TEST_F(SaveAndLoad, WritesAFileWholeOrNotAtAll) {
  const auto folder = std::filesystem::path(testing::TempDir()) / "fourfold_save_test";
  std::filesystem::create_directories(folder);
  const auto path = folder / "model.4f";
  torch::nn::Sequential model = make_model(), other = make_model();
  compress_weights<Int8>(model, every_matrix);
  save(model, path);
  save(model, path);  // over the first
  EXPECT_FALSE(std::filesystem::exists(path.string() + ".partial"));
  load(other, path.string());
  EXPECT_TRUE(equal(values_of(model), values_of(other)));
  EXPECT_THAT(message_of([&] { save(model, folder / "no" / "such" / "model.4f"); }),
              AllOf(HasSubstr("cannot write"), HasSubstr("folder")));
  EXPECT_THAT(message_of([&] { load(other, folder / "missing.4f"); }),
              AllOf(HasSubstr("cannot open"), HasSubstr("missing.4f")));
  EXPECT_THAT(message_of([&] { save(model, folder); }), HasSubstr("fourfold::save"));
  EXPECT_FALSE(std::filesystem::exists(folder.string() + ".partial"));
  // A link stays one; a file of the user's with a name like ours is not touched.
  std::filesystem::create_symlink(path, folder / "link");
  std::ofstream(path.string() + ".partial") << "mine";
  save(model, (folder / "link").string());
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link"));
  EXPECT_EQ(std::filesystem::file_size(path.string() + ".partial"), 4);
  load(model, path.string());
  std::ofstream(path, std::ios::app) << "more";
  EXPECT_THAT(message_of([&] { load(model, path.string()); }), HasSubstr("goes on after its last"));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace fourfold::tests

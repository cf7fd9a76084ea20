// SPDX-License-Identifier: Apache-2.0
/// A trained model held in fewer bytes for inference: bytes and output error of each format.
///   compress_pretrained                 trains a small classifier for a few seconds
///   compress_pretrained MODEL.pt        loads it in place of training (made by torch::save)
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/weights/compress_weights.hpp>
#include <fourfold/weights/save.hpp>

#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <string>

namespace {

/// A user's own module: nothing in it knows of fourfold.
struct ClassifierImpl : torch::nn::Cloneable<ClassifierImpl> {
  ClassifierImpl() { reset(); }
  void reset() override {
    convolution = register_module("convolution",
                                  torch::nn::Conv1d(torch::nn::Conv1dOptions(8, 64, 9).padding(4)));
    recurrent = register_module("recurrent",
                                torch::nn::GRU(torch::nn::GRUOptions(64, 128).batch_first(true)));
    hidden = register_module("hidden", torch::nn::Linear(128, 512));
    head = register_module("head", torch::nn::Linear(512, 10));
  }
  at::Tensor forward(const at::Tensor& x) {  // (batch, 8, 32) -> (batch, 10)
    const at::Tensor seen = torch::gelu(convolution(x)).transpose(1, 2);
    return head(torch::gelu(hidden(std::get<0>(recurrent(seen)).mean(1))));
  }
  torch::nn::Conv1d convolution{nullptr};
  torch::nn::GRU recurrent{nullptr};
  torch::nn::Linear hidden{nullptr}, head{nullptr};
};
TORCH_MODULE(Classifier);

struct Batch {
  at::Tensor data, target;
};

/// Ten waveforms under noise; the label says which.
Batch make_batch(std::int64_t size) {
  const at::Tensor target = torch::randint(10, {size});
  const at::Tensor time = torch::linspace(0, 6.28, 32).view({1, 1, 32});
  const at::Tensor channel = torch::arange(1, 9).view({1, 8, 1});
  const at::Tensor wave = torch::sin(time * (target.view({-1, 1, 1}) + 1) + channel);
  return {wave + 0.8 * torch::randn({size, 8, 32}), target};
}

void train(Classifier& model) {
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(2e-3));
  for (int step = 0; step < 50; ++step) {
    const Batch batch = make_batch(32);
    optimizer.zero_grad();
    torch::nn::functional::cross_entropy(model(batch.data), batch.target).backward();
    optimizer.step();
  }
}

/// Bytes of all parameters as they are held now.
std::int64_t bytes_of(Classifier& model) {
  std::int64_t bytes = 0;
  for (const at::Tensor& parameter : model->parameters()) {
    const auto payload = fourfold::door::payload_of(parameter);
    bytes += payload ? payload->nbytes() : static_cast<std::int64_t>(parameter.nbytes());
  }
  return bytes;
}

void print_row(const std::string& name, Classifier& model, const Batch& test,
               const at::Tensor& plain, std::int64_t plain_bytes) {
  const at::Tensor output = model(test.data);
  const double error = ((output - plain).norm() / plain.norm()).item<double>();
  const double right = output.argmax(1).eq(test.target).to(torch::kDouble).mean().item<double>();
  const auto bytes = static_cast<double>(bytes_of(model));
  std::printf("| %-9s | %9.1f | %6.3f | %12.5f | %8.1f %% |\n", name.c_str(), bytes / 1024,
              bytes / static_cast<double>(plain_bytes), error, 100 * right);
}

template <class Codec>
void compare(Classifier& trained, const Batch& test, const at::Tensor& plain) {
  Classifier model(std::dynamic_pointer_cast<ClassifierImpl>(trained->clone()));
  fourfold::compress_weights<Codec>(model);  // the one line that is ours
  print_row(Codec::name(), model, test, plain, bytes_of(trained));
}

}  // namespace

int main(int argc, char** argv) {
  torch::manual_seed(0);
  Classifier model;
  if (argc > 1)
    torch::load(model, argv[1]);
  else
    train(model);
  model->eval();
  const torch::NoGradGuard no_grad;
  const Batch test = make_batch(512);
  const at::Tensor plain = model(test.data);
  std::printf(
      "| held as   | KiB       | ratio  | output error | accuracy   |\n|---|---|---|---|---|\n");
  print_row("fp32", model, test, plain, bytes_of(model));
  compare<fourfold::Int8>(model, test, plain);
  compare<fourfold::Int4>(model, test, plain);
  compare<fourfold::Nf4>(model, test, plain);
  compare<fourfold::LowRank<8>>(model, test, plain);

  fourfold::compress_weights<fourfold::Int4>(model);
  const auto path = std::filesystem::temp_directory_path() / "compress_pretrained.4f";
  fourfold::save(model, path);
  Classifier again;
  fourfold::load(again, path);
  again->eval();
  std::printf("\nInt4 on disk: %.1f KiB; loaded again, its outputs are %s\n",
              static_cast<double>(std::filesystem::file_size(path)) / 1024,
              torch::equal(model(test.data), again(test.data)) ? "equal" : "different");
  std::filesystem::remove(path);
}

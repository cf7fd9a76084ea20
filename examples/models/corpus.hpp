// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Text as bytes, split into a part to train on and a part held out.
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace models {

/// One file's bytes, or, of a folder, its headers' in the order of their paths, `limit` at most.
inline std::string read_text(const std::filesystem::path& path, std::size_t limit = 8u << 20) {
  namespace fs = std::filesystem;
  TORCH_CHECK(fs::exists(path), "the corpus ", path.string(),
              " does not exist; give --data a text file or a folder of headers");
  std::vector<fs::path> files{path};
  if (fs::is_directory(path)) {
    files.clear();
    for (const auto& entry : fs::recursive_directory_iterator(path))
      if (entry.is_regular_file() && entry.path().extension() == ".h")
        files.push_back(entry.path());
    std::sort(files.begin(), files.end());
  }
  std::string text;
  for (const auto& file : files) {
    if (text.size() >= limit) break;
    std::ifstream in(file, std::ios::binary);
    TORCH_CHECK(in, "the corpus file ", file.string(), " cannot be read");
    text.append(std::istreambuf_iterator<char>(in), {});
  }
  text.resize(std::min(text.size(), limit));
  return text;
}

/// Batches of `batch` windows of `context` bytes, and of the same shifted by one as targets.
class Corpus {
 public:
  Corpus(const std::filesystem::path& path, std::int64_t batch, std::int64_t context)
      : batch_(batch), context_(context) {
    const std::string text = read_text(path);
    const std::int64_t n = static_cast<std::int64_t>(text.size());
    const std::int64_t held_out = std::max(n / 20, batch * (context + 1));
    TORCH_CHECK(n >= 2 * held_out, "the corpus ", path.string(), " holds ", n, " bytes, but ",
                batch, " windows of ", context, " bytes to train on and as many to validate need ",
                2 * held_out, "; give a longer text or a smaller --batch or --context");
    bytes_ = torch::empty({n}, torch::kByte);
    std::memcpy(bytes_.data_ptr<std::uint8_t>(), text.data(), text.size());
    train_ = n - held_out;
  }

  /// (batch, context) inputs and targets, int64. The same generator state draws the same batch.
  std::pair<torch::Tensor, torch::Tensor> train_batch(std::mt19937_64& generator) const {
    return batch_at(0, train_, generator);
  }
  std::pair<torch::Tensor, torch::Tensor> validation_batch(std::mt19937_64& generator) const {
    return batch_at(train_, bytes_.numel(), generator);
  }

 private:
  std::pair<torch::Tensor, torch::Tensor> batch_at(std::int64_t begin, std::int64_t end,
                                                   std::mt19937_64& generator) const {
    const auto span = static_cast<std::uint64_t>(end - begin - context_);
    auto windows = torch::empty({batch_, context_ + 1}, torch::kLong);
    for (std::int64_t i = 0; i < batch_; ++i) {
      const auto start = begin + static_cast<std::int64_t>(generator() % span);
      windows[i].copy_(bytes_.slice(0, start, start + context_ + 1));
    }
    return {windows.slice(1, 0, context_).contiguous(), windows.slice(1, 1).contiguous()};
  }

  std::int64_t batch_, context_, train_ = 0;
  torch::Tensor bytes_;
};

}  // namespace models

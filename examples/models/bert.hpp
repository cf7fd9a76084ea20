// SPDX-License-Identifier: Apache-2.0
#pragma once
/// BERT's encoder (Devlin et al., arXiv 1810.04805), as a Sequential of LibTorch's layers.
#include <torch/nn.h>

#include <cstdint>

namespace models {

struct BertOptions {
  std::int64_t width = 1024, heads = 16, layers = 24;  ///< BERT-large's
  double dropout = 0.1;
};

/// (tokens, batch, width) -> the same.
inline torch::nn::Sequential bert(const BertOptions& options = {}) {
  const auto layer = torch::nn::TransformerEncoderLayerOptions(options.width, options.heads)
                         .dim_feedforward(4 * options.width)
                         .dropout(options.dropout)
                         .activation(torch::kGELU);
  torch::nn::Sequential model;
  for (std::int64_t i = 0; i < options.layers; ++i)
    model->push_back(torch::nn::TransformerEncoderLayer(layer));
  return model;
}

}  // namespace models

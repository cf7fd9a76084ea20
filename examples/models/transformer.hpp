// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A causal transformer as a LibTorch user would write it: pre-norm blocks, fused attention, a
/// linear head. All that it knows of fourfold is block(), which names what a pipeline may recompute
/// and is a plain call under any other, and linear_cross_entropy() in loss(). examples/train_lm and bench/train_step share it.
#include <fourfold/activations/blocks.hpp>
#include <fourfold/activations/linear_cross_entropy.hpp>

#include <torch/nn.h>

#include <cstdint>
#include <tuple>

namespace models {

struct TransformerOptions {
  std::int64_t vocabulary = 256;
  std::int64_t width = 256;
  std::int64_t layers = 6;
  std::int64_t heads = 8;
  std::int64_t context = 512;
  double dropout = 0.0;
};

/// (batch, tokens, width) -> the same.
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const TransformerOptions& options)
      : heads_(options.heads), width_(options.width), dropout_(options.dropout) {
    using torch::nn::LayerNorm, torch::nn::LayerNormOptions, torch::nn::Linear;
    norm1_ = register_module("norm1", LayerNorm(LayerNormOptions({width_})));
    qkv_ = register_module("qkv", Linear(width_, 3 * width_));
    projection_ = register_module("projection", Linear(width_, width_));
    norm2_ = register_module("norm2", LayerNorm(LayerNormOptions({width_})));
    up_ = register_module("up", Linear(width_, 4 * width_));
    down_ = register_module("down", Linear(4 * width_, width_));
  }

  torch::Tensor forward(torch::Tensor x) {
    x = x + drop(attention(norm1_(x)));
    return x + drop(down_(torch::gelu(up_(norm2_(x)))));
  }

 private:
  torch::Tensor attention(const torch::Tensor& x) {
    const auto batch = x.size(0), tokens = x.size(1);
    auto heads = qkv_(x).view({batch, tokens, 3, heads_, width_ / heads_}).permute({2, 0, 3, 1, 4});
    auto mixed = torch::scaled_dot_product_attention(heads[0], heads[1], heads[2], /*attn_mask=*/{},
                                                     /*dropout_p=*/0.0, /*is_causal=*/true);
    return projection_(mixed.transpose(1, 2).reshape({batch, tokens, width_}));
  }
  torch::Tensor drop(const torch::Tensor& x) const {
    return dropout_ > 0 ? torch::dropout(x, dropout_, is_training()) : x;
  }

  std::int64_t heads_, width_;
  double dropout_;
  torch::nn::LayerNorm norm1_{nullptr}, norm2_{nullptr};
  torch::nn::Linear qkv_{nullptr}, projection_{nullptr}, up_{nullptr}, down_{nullptr};
};
TORCH_MODULE(Block);

/// (batch, tokens) of int64 -> logits (batch, tokens, vocabulary).
class TransformerImpl : public torch::nn::Module {
 public:
  explicit TransformerImpl(const TransformerOptions& options) {
    using torch::nn::Embedding, torch::nn::LayerNorm, torch::nn::LayerNormOptions,
        torch::nn::Linear;
    token_ = register_module("token", Embedding(options.vocabulary, options.width));
    position_ = register_module("position", Embedding(options.context, options.width));
    blocks_ = register_module("blocks", torch::nn::ModuleList());
    for (std::int64_t i = 0; i < options.layers; ++i) blocks_->push_back(Block(options));
    norm_ = register_module("norm", LayerNorm(LayerNormOptions({options.width})));
    head_ = register_module("head", Linear(options.width, options.vocabulary));
    torch::NoGradGuard no_grad;
    token_->weight.normal_(0.0, 0.02);
    position_->weight.normal_(0.0, 0.02);
  }

  torch::Tensor forward(const torch::Tensor& tokens) { return head_(hidden(tokens)); }

  /// Cross entropy of the logits, which exist for a few rows at a time. target: (batch, tokens).
  torch::Tensor loss(const torch::Tensor& tokens, const torch::Tensor& target) {
    return fourfold::linear_cross_entropy(hidden(tokens), head_->weight, target,
                                          {.bias = head_->bias});
  }

 private:
  torch::Tensor hidden(const torch::Tensor& tokens) {
    auto x = token_(tokens) + position_(torch::arange(tokens.size(1), tokens.options()));
    for (const auto& child : *blocks_) {
      x = fourfold::block(std::static_pointer_cast<BlockImpl>(child), x);
    }
    return norm_(x);
  }

  torch::nn::Embedding token_{nullptr}, position_{nullptr};
  torch::nn::ModuleList blocks_{nullptr};
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear head_{nullptr};
};
TORCH_MODULE(Transformer);

}  // namespace models

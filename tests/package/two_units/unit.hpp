// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What link_a.cpp and link_b.cpp do alike: each is a translation unit that includes all of fourfold and
/// trains one step. Linked into one program, or each into a shared library with hidden visibility, they
/// must share one engine and one registration of every door, or the second one to start throws.
#include <fourfold/fourfold.hpp>

#include <ATen/Context.h>  // manual_seed
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

/// The loss after one step that a pipeline took; the same steps for every unit.
template <class Pipeline>
double loss_after_a_step() {
  namespace nn = torch::nn;
  at::manual_seed(0);
  nn::Sequential model(nn::Linear(64, 256), nn::LayerNorm(nn::LayerNormOptions({256})), nn::GELU(),
                       nn::Linear(256, 64));
  Pipeline pipeline(*model);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
  const at::Tensor input = at::randn({128, 64});
  const auto loss_of = [&] {
    return pipeline.forward([&] { return (model->forward(input) - input).square().mean(); });
  };
  auto loss = loss_of();
  loss.backward();
  optimizer->step();
  return loss_of().template item<double>();
}

extern "C" [[gnu::visibility("default")]] double unit_a();
extern "C" [[gnu::visibility("default")]] double unit_b();

/// Codes that one unit packs and the other reads.
extern "C" [[gnu::visibility("default")]] at::Tensor* packed_by_a();
extern "C" [[gnu::visibility("default")]] bool read_by_b(at::Tensor* packed);

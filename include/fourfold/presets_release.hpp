// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Presets that compute in bf16 and step inside backward, where no two gradients need exist at once:
///   auto pipeline  = fourfold::BalancedRelease(*model);
///   auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));   // kept; not stepped
///   for (...) pipeline.forward([&] { return criterion(model->forward(x), y); }).backward();
/// What a program must know of released gradients stands in gradients/release.hpp. step() is an error.
#include <fourfold/gradients/release.hpp>
#include <fourfold/precision.hpp>
#include <fourfold/presets.hpp>

namespace fourfold::inline v0 {

/// Balanced in bf16, released, every second block computed again. Weights are fp32 in two halves, of
/// which bf16 products read one: 6.06 bytes a parameter, of plain's 16.
using BalancedRelease =
    CompressionPipeline<Precision<BFloat16, ProductWeights>, Activations<Int4>, Recompute<CheapOps>,
                        Blocks<2>, OptimizerStates<Int8, optim::ErrorCorrection<16>>, Release>;

/// Smallest with bf16 weights, rounded stochastically, and 4-bit moments, released: 3.06 bytes.
using SmallestRelease =
    CompressionPipeline<Precision<BFloat16, AllWeights>, Activations<Int4>, Recompute<CheapOps>,
                        Blocks<>, OptimizerStates<Int4, optim::RoundStochastic>, Release>;

/// The same with 24 bits of each weight: 4.06 bytes.
using SmallestRelease24 =
    CompressionPipeline<Precision<BFloat16, AllWeights>, Activations<Int4>, Recompute<CheapOps>,
                        Blocks<>, OptimizerStates<Int4, optim::ErrorCorrection<8>>, Release>;

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Compositions with a name.
#include <fourfold/codec/group_int.hpp>
#include <fourfold/pipeline.hpp>

namespace fourfold::inline v0 {

/// Losses and gradients bit for bit as without it.
using Exact = CompressionPipeline<Recompute<CheapOps>>;

/// fp32 weights, 8-bit moments, 4-bit activations.
using Balanced = CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, OptimizerStates<Int8>>;

/// Balanced with recomputed blocks, whose inputs are held packed. Blocks are the children of a
/// Sequential, or what a model's forward names by fourfold::block().
using Smallest =
    CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, Blocks<>, OptimizerStates<Int8>>;

}  // namespace fourfold::inline v0

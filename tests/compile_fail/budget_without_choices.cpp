// SPDX-License-Identifier: Apache-2.0
#include <fourfold/fourfold.hpp>
#include <fourfold/plan/budget.hpp>

#include <torch/nn.h>

using fourfold::Budget, fourfold::CompressionPipeline, fourfold::Recompute;
#ifdef MISUSE
using Pipeline = CompressionPipeline<Budget<>>;
// EXPECT: Budget<> chooses among what other policies do: add Activations<...> (packed),
#else
using Pipeline = CompressionPipeline<Recompute<>, Budget<>>;
#endif

Pipeline within(torch::nn::Linear& model) { return Pipeline(model, {.budget = 1 << 28}); }

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/fourfold.hpp>
#include <fourfold/plan/budget.hpp>

#include <torch/nn.h>

using fourfold::Activations, fourfold::Budget, fourfold::CompressionPipeline, fourfold::Int4;
#ifdef MISUSE
using Pipeline = CompressionPipeline<Activations<Int4>>;
// EXPECT: a budget needs the policy Budget<>: include <fourfold/plan/budget.hpp> and name it among
#else
using Pipeline = CompressionPipeline<Activations<Int4>, Budget<>>;
#endif

Pipeline within(torch::nn::Linear& model) { return Pipeline(model, {.budget = 1 << 28}); }

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a CompressionPipeline is composed of: types that answer one question each, found by role.
#include <concepts>
#include <string_view>

namespace fourfold::inline v0 {

enum class Role {
  kWeights,
  kActivations,
  kRecompute,
  kBlocks,
  kOffload,
  kOptimizerStates,
  kGradients,
  kRelease,
  kPrecision,
  kBudget,
};

constexpr std::string_view name(Role role) {
  switch (role) {
    case Role::kWeights: return "Weights";
    case Role::kActivations: return "Activations";
    case Role::kRecompute: return "Recompute";
    case Role::kBlocks: return "Blocks";
    case Role::kOffload: return "Offload";
    case Role::kOptimizerStates: return "OptimizerStates";
    case Role::kBudget: return "Budget";
    case Role::kGradients: return "Gradients";
    case Role::kRelease: return "Release";
    case Role::kPrecision: return "Precision";
  }
  return "?";
}

template <class P>
concept Policy = requires {
  { P::role } -> std::convertible_to<Role>;
};

}  // namespace fourfold::inline v0

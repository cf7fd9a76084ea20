// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Recompute<CheapOps>: results of operators that are quicker to run again than to keep.
///
/// A saved tensor that such an operator made is not held, if all that the operator read is held
/// anyway (the input of gelu, silu or layer_norm is, by its own backward), is small, or can be
/// computed again in the same way. In backward the operator runs again on the same values: losses
/// and gradients are equal to the bit. With Activations<Codec> beside it, it runs on what the codec
/// gives back.
///
/// In-place forms of these operators (relu_, add_ after a batch norm) run again in the same way, on a
/// copy of their own. At most `recompute_depth` operators run one after the other for one tensor.
///
/// An input that is written to in place inside the scope is no trouble: what depends on it is
/// computed before. Outside of the scope that is LibTorch's error at backward. A result that the
/// program writes to by a raw pointer (data_ptr, accessor) cannot be seen: keep such operators out.
#include <fourfold/core/policy.hpp>

#include <array>
#include <concepts>
#include <string_view>
#include <vector>

namespace fourfold::inline v0 {

/// Elementwise operators, activation functions, normalisations, casts and copies: names as in the
/// dispatcher, all overloads ("aten::" may be left out). An operator that draws random numbers is
/// never run again, whatever a list says; dropout is the product with its mask. A batch norm is run
/// again in training alone, and its running statistics are updated once.
struct CheapOps {
  static constexpr auto kOperators = std::to_array<std::string_view>({
      // clang-format off
      "gelu", "relu", "relu6", "silu", "sigmoid", "tanh", "elu", "mish", "leaky_relu", "softplus",
      "hardtanh", "hardswish", "hardsigmoid",
      "native_layer_norm", "rms_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm",
      "add", "sub", "rsub", "mul", "div", "neg", "abs", "square",
      "clamp", "clamp_min", "clamp_max", "masked_fill", "where", "_to_copy", "clone",
      // clang-format on
  });
};

/// A type with `static constexpr` names of operators: a user's own may add or leave out.
template <class Ops>
concept OperatorList = requires {
  { *std::begin(Ops::kOperators) } -> std::convertible_to<std::string_view>;
};

template <OperatorList Ops = CheapOps>
struct Recompute {
  static constexpr Role role = Role::kRecompute;
  using Operators = Ops;
};

/// As ActivationOptions::recompute wants it.
template <OperatorList Ops>
[[nodiscard]] std::vector<std::string_view> operator_names() {
  return {std::begin(Ops::kOperators), std::end(Ops::kOperators)};
}

static_assert(OperatorList<CheapOps> && Policy<Recompute<CheapOps>>,
              "Recompute must stay a policy");

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The policy for the first of the four places: parameters held packed.
///   CompressionPipeline<Weights<Int8>>                    // every matrix of a model, frozen
///   CompressionPipeline<Weights<LowRank<64>>>             // its factors are trained in its place
///   CompressionPipeline<Weights<Int4, MyFilter>>          // any ParameterFilter of the user's
#include <ATen/core/Tensor.h>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/policy.hpp>

#include <concepts>
#include <cstdint>
#include <string>

namespace fourfold::inline v0 {

/// Says which parameters of a module are meant: name as in named_parameters(), and the tensor.
template <class F>
concept ParameterFilter = requires(const F& filter, const std::string& name,
                                   const at::Tensor& parameter) {
  { filter(name, parameter) } -> std::convertible_to<bool>;
};

/// Floating matrices, convolutions and tables of 4096 values or more: biases, norms and what is too
/// small to matter stay as they are.
struct AllMatrices {
  static constexpr std::int64_t kFewest = 4096;
  bool operator()(const std::string&, const at::Tensor& parameter) const {
    return parameter.is_floating_point() && parameter.dim() >= 2 && parameter.numel() >= kFewest;
  }
};
static_assert(ParameterFilter<AllMatrices>, "AllMatrices must stay a ParameterFilter");

template <Codec C, ParameterFilter Filter = AllMatrices>
struct Weights {
  static constexpr Role role = Role::kWeights;
  using Format = C;
  using Chosen = Filter;
};

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What rounding does to a tensor's values, tried on some of them: the codec itself says, whatever
/// its groups and however its ranges lie, in place of a bound from the range ((max - min)^2 / 4 for
/// each value in ActNN, which stochastic rounding reaches half-way between two codes alone).
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <fourfold/activations/saved_plan.hpp>  // PackFunction
#include <fourfold/plan/bit_assignment.hpp>
#include <fourfold/plan/detail/spread_runs.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace fourfold::inline v0::plan {

/// Means over values.
struct RoundingNoise {
  std::int64_t numel = 0;  ///< of the whole tensor; 0: no codec takes it
  double power = 0;        ///< of the values about their mean
  double square = 0;       ///< of their squares
  AtBits noise{};          ///< of the squared error

  /// Noise as a share of what the values tell.
  [[nodiscard]] double share(std::size_t level) const {
    return power > 0 ? noise[level] / power : 0;
  }
};

/// Of a few of the values (detail/spread_runs.hpp). `packs`: the codecs, as kBits orders them.
template <class = void>
RoundingNoise rounding_noise(const at::Tensor& values,
                             const std::array<PackFunction, kBits.size()>& packs, Key key) {
  RoundingNoise out;
  const at::ScalarType dtype = values.scalar_type();
  if (values.numel() == 0 || (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf))
    return out;
  const at::NoGradGuard no_grad;
  const at::Tensor all = values.detach();
  const at::Tensor some = detail::spread_runs(
      all.is_non_overlapping_and_dense() ? all.as_strided({all.numel()}, {1}) : all.reshape({-1}));
  const at::Tensor exact = some.to(at::kDouble);
  const double mean = exact.mean().template item<double>();
  out.square = exact.square().mean().template item<double>();
  out.power = std::max(0.0, out.square - mean * mean);
  for (std::size_t i = 0; i < packs.size(); ++i)
    out.noise[i] = packs[i](some, key)
                       ->decompress()
                       .to(at::kDouble)
                       .sub(exact)
                       .square()
                       .mean()
                       .template item<double>();
  if (out.square * 0 == 0) out.numel = values.numel();  // finite
  return out;
}

}  // namespace fourfold::inline v0::plan

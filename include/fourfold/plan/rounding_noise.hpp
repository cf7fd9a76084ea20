// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What rounding does to a tensor's values, tried on some of them: the codec itself says, whatever
/// its groups and however its ranges lie, in place of a bound from the range ((max - min)^2 / 4 for
/// each value in ActNN, which stochastic rounding reaches half-way between two codes alone).
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <fourfold/activations/saved_plan.hpp>  // PackFunction
#include <fourfold/plan/bit_assignment.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

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

/// Of 16 runs of 256 values, evenly spread; of all of them if there are no more. `packs`: the codecs,
/// as kBits orders them.
template <class = void>
RoundingNoise rounding_noise(const at::Tensor& values,
                             const std::array<PackFunction, kBits.size()>& packs, Key key) {
  constexpr std::int64_t kRuns = 16, kRun = 256;
  RoundingNoise out;
  const at::ScalarType dtype = values.scalar_type();
  if (values.numel() == 0 || (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf))
    return out;
  const at::NoGradGuard no_grad;
  at::Tensor flat = values.detach();
  flat = flat.is_non_overlapping_and_dense() ? flat.as_strided({flat.numel()}, {1})
                                             : flat.reshape({-1});
  if (flat.numel() > kRuns * kRun) {
    std::vector<at::Tensor> runs;
    for (std::int64_t i = 0; i < kRuns; ++i)
      runs.push_back(flat.narrow(0, (flat.numel() - kRun) * i / (kRuns - 1), kRun));
    flat = at::cat(runs);
  }
  const at::Tensor exact = flat.to(at::kDouble);
  const double mean = exact.mean().template item<double>();
  out.square = exact.square().mean().template item<double>();
  out.power = std::max(0.0, out.square - mean * mean);
  for (std::size_t i = 0; i < packs.size(); ++i)
    out.noise[i] = packs[i](flat, key)
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

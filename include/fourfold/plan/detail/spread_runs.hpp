// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A few of a tensor's values, from all over it: what codecs are tried on.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include <cstdint>
#include <vector>

namespace fourfold::inline v0::plan::detail {

/// Of `flat`, (numel), 16 runs of 256 values, evenly spread; all of it if there are no more.
template <class = void>
at::Tensor spread_runs(const at::Tensor& flat) {
  constexpr std::int64_t kRuns = 16, kRun = 256;
  if (flat.numel() <= kRuns * kRun) return flat.contiguous();
  std::vector<at::Tensor> runs;
  for (std::int64_t i = 0; i < kRuns; ++i)
    runs.push_back(flat.narrow(0, (flat.numel() - kRun) * i / (kRuns - 1), kRun));
  return at::cat(runs);
}

}  // namespace fourfold::inline v0::plan::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What codecs would make of a tensor, tried on some of its values: 16 runs of 256, evenly spread.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/item.h>
#include <fourfold/plan/record.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0::plan::detail {

template <class = void>
class BasicSample {
 public:
  /// Into `out.rungs` and `out.finest`; leaves them empty where no codec can hold such values.
  void take(const at::Tensor& values, const Means& means, std::size_t number, StorageRecord& out) {
    const at::ScalarType dtype = values.scalar_type();
    if ((means.rungs.empty() && means.sensitive == nullptr) || values.numel() == 0 ||
        (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf))
      return;
    const at::Tensor some = some_of(values);
    const at::Tensor exact = some.to(at::kDouble);
    const double power = exact.square().sum().item<double>();
    const auto estimate = [&](PackFunction pack) {
      const auto begin = std::chrono::steady_clock::now();
      const auto payload = pack(some, Key{.storage = number});
      const at::Tensor again = payload->decompress();
      ms_ += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
                 .count();
      bytes_ += static_cast<double>(some.nbytes());
      const double error = again.to(at::kDouble).sub(exact).square().sum().item<double>();
      return RungEstimate{.bytes_per_value = static_cast<double>(payload->nbytes()) /
                                             static_cast<double>(some.numel()),
                          .noise = power > 0 && error <= power ? error / power
                                   : error > 0                 ? 1.0
                                                               : 0.0};
    };
    for (const Rung& rung : means.rungs) out.rungs.push_back(estimate(rung.pack));
    if (means.sensitive != nullptr) out.finest = estimate(means.sensitive);
  }
  /// To pack and unpack; 0 before anything was.
  [[nodiscard]] double ms_per_byte() const { return bytes_ > 0 ? ms_ / bytes_ : 0; }

 private:
  static constexpr std::int64_t kRuns = 16, kRun = 256;

  [[nodiscard]] static at::Tensor some_of(const at::Tensor& values) {
    at::Tensor flat = values;
    if (values.is_non_overlapping_and_dense()) {
      flat = values.as_strided({values.numel()}, {1});
    } else {
      while (flat.dim() > 1) flat = flat.select(0, flat.size(0) / 2);
    }
    std::vector<at::Tensor> runs;
    const std::int64_t run = std::min(kRun, flat.numel());
    const std::int64_t count = std::min(kRuns, flat.numel() / run);
    for (std::int64_t i = 0; i < count; ++i)
      runs.push_back(
          flat.narrow(0, (flat.numel() - run) * i / std::max<std::int64_t>(count - 1, 1), run));
    return at::cat(runs);
  }

  double ms_ = 0, bytes_ = 0;
};
using Sample = BasicSample<>;

}  // namespace fourfold::inline v0::plan::detail

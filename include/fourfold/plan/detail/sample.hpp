// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What codecs would make of a tensor, tried on a few of its values.
#include <ATen/core/Tensor.h>
#include <ATen/ops/item.h>
#include <fourfold/plan/detail/spread_runs.hpp>
#include <fourfold/plan/record.hpp>

#include <chrono>
#include <cstddef>

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
    const at::Tensor some = spread_runs(flat(values));
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
  /// (numel), without a copy: of what is not dense, one row.
  [[nodiscard]] static at::Tensor flat(const at::Tensor& values) {
    if (values.is_non_overlapping_and_dense()) return values.as_strided({values.numel()}, {1});
    at::Tensor row = values;
    while (row.dim() > 1) row = row.select(0, row.size(0) / 2);
    return row;
  }

  double ms_ = 0, bytes_ = 0;
};
using Sample = BasicSample<>;

}  // namespace fourfold::inline v0::plan::detail

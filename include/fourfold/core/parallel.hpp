// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A loop over [begin, end) on LibTorch's threads.
#include <ATen/Parallel.h>

#include <cstdint>

namespace fourfold::inline v0 {

/// Calls f(first, last) on disjoint pieces of at least `grain` that together are [begin, end).
template <class F>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const F& f) {
  at::parallel_for(begin, end, grain, f);
}

}  // namespace fourfold::inline v0

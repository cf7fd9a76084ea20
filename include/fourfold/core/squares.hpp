// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Sums of squares that are the same to the last bit with any instructions: squares of fp32 values
/// are exact in double, and sixteen sums run side by side.
#include <fourfold/core/isa.hpp>
#include <fourfold/core/vectorised.hpp>

#include <cstdint>

namespace fourfold::inline v0 {
namespace detail {

inline constexpr std::int64_t kSquareLanes = 16;

struct AddSquaresToLanes {
  FOURFOLD_LOOP static void run(double* __restrict lanes, const float* __restrict x,
                                std::int64_t n) {
    double sums[kSquareLanes];
    for (std::int64_t j = 0; j < kSquareLanes; ++j) sums[j] = lanes[j];
    std::int64_t i = 0;
    for (; i + kSquareLanes <= n; i += kSquareLanes)
      for (std::int64_t j = 0; j < kSquareLanes; ++j) sums[j] += double{x[i + j]} * x[i + j];
    for (std::int64_t j = 0; i < n; ++i, ++j) sums[j] += double{x[i]} * x[i];
    for (std::int64_t j = 0; j < kSquareLanes; ++j) lanes[j] = sums[j];
  }
};

/// lanes[i % 16] += x[i]^2 for i in [0, n).
template <class = void>
void add_squares(double* lanes, const float* x, std::int64_t n, Isa isa) {
  run_vectorised<AddSquaresToLanes>(isa, lanes, x, n);
}

}  // namespace detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// bf16, fp16 and fp32 into each other, many at a time.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <fourfold/core/vectorised.hpp>
#include <fourfold/optim/detail/master_code.hpp>

#include <cstdint>

namespace fourfold::inline v0 {
namespace optim::detail {

using fourfold::detail::for_each_value;
using fourfold::detail::run_vectorised;

FOURFOLD_LOOP float widened(c10::BFloat16 x) { return from_bfloat16(x.x); }
FOURFOLD_LOOP float widened(c10::Half x) { return static_cast<float>(x); }
FOURFOLD_LOOP void narrow(float x, c10::BFloat16& out) { out.x = to_bfloat16(x); }
FOURFOLD_LOOP void narrow(float x, c10::Half& out) { out = static_cast<c10::Half>(x); }

/// fp32 of bf16 or fp16.
struct Widen {
  template <class T>
  FOURFOLD_LOOP static void run(float* __restrict out, const T* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = widened(x[i]); });
  }
};
/// bf16 or fp16, rounded to nearest.
struct Narrow {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict out, const float* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { narrow(x[i], out[i]); });
  }
};
struct Negate {
  template <class T>
  FOURFOLD_LOOP static void run(T* __restrict out, const T* __restrict x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = -x[i]; });
  }
};
struct NegateInPlace {
  FOURFOLD_LOOP static void run(float* x, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { x[i] = -x[i]; });
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// master_codec.hpp in loops over n values: decode gives what a step sees, encode takes what it made.
#include <fourfold/optim/detail/convert.hpp>
#include <fourfold/optim/master_codec.hpp>

#include <cstdint>
#include <type_traits>

namespace fourfold::inline v0 {
namespace optim::detail {

template <class C>
struct MasterLoops;

template <int Bits>
struct MasterLoops<ErrorCorrection<Bits>> {
  using Error = std::conditional_t<Bits == 8, std::int8_t, std::int16_t>;
  struct Decode {
    FOURFOLD_LOOP static void run(float* __restrict out, const c10::BFloat16* __restrict w,
                                  const Error* __restrict e, std::int64_t n) {
      for_each_value(n,
                     [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = with_error(w[i].x, e[i]); });
    }
  };
  struct Encode {
    FOURFOLD_LOOP static void run(c10::BFloat16* __restrict w, Error* __restrict e,
                                  const float* __restrict x, std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { split(x[i], w[i].x, e[i]); });
    }
  };
};

template <>
struct MasterLoops<Kahan> {
  using Error = c10::BFloat16;
  struct Decode {
    template <class T>
    FOURFOLD_LOOP static void run(float* __restrict out, const T* __restrict w,
                                  const Error* __restrict e, std::int64_t n) {
      for_each_value(
          n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i] = widened(w[i]) + widened(e[i]); });
    }
  };
  struct Encode {
    template <class T>
    FOURFOLD_LOOP static void run(T* __restrict w, Error* __restrict e, const float* __restrict x,
                                  std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        narrow(x[i], w[i]);
        narrow(kahan_error(x[i], widened(w[i])), e[i]);
      });
    }
  };
};

/// A weight that is not its master's rounding was set by somebody else, and counts.
template <>
struct MasterLoops<Fp32> {
  using Error = float;
  struct Decode {
    template <class T>
    FOURFOLD_LOOP static void run(float* __restrict out, const T* __restrict w,
                                  const Error* __restrict e, std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        T rounded;
        narrow(e[i], rounded);
        out[i] = rounded.x == w[i].x ? e[i] : widened(w[i]);
      });
    }
  };
  struct Encode {
    template <class T>
    FOURFOLD_LOOP static void run(T* __restrict w, Error* __restrict e, const float* __restrict x,
                                  std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        narrow(x[i], w[i]);
        e[i] = x[i];
      });
    }
  };
};

/// By the 16 random bits of each value.
struct RoundByRandom {
  FOURFOLD_LOOP static void run(c10::BFloat16* __restrict out, const float* __restrict x,
                                const std::uint16_t* __restrict random, std::int64_t n) {
    for_each_value(
        n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { out[i].x = to_bfloat16(x[i], random[i]); });
  }
  FOURFOLD_LOOP static void run(c10::Half* __restrict out, const float* __restrict x,
                                const std::uint16_t* __restrict random, std::int64_t n) {
    const auto widen = [](std::uint16_t bits) FOURFOLD_LOOP_BODY {
      return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
    };
    for (std::int64_t i = 0; i < n; ++i)
      out[i].x = to_half(x[i], static_cast<c10::Half>(x[i]).x, random[i], widen);
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// master_codec.hpp in loops over n values: decode gives what a step sees, encode takes what it made.
#include <fourfold/optim/detail/convert.hpp>
#include <fourfold/optim/master_codec.hpp>

#include <cmath>

namespace fourfold::inline v0 {
namespace optim::detail {

template <class C>
struct MasterLoops;

template <>
struct MasterLoops<ErrorCorrection<16>> {
  using Error = std::int16_t;
  struct Decode {
    FOURFOLD_LOOP static void run(float* __restrict out, const c10::BFloat16* __restrict w,
                                  const Error* __restrict e, std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        out[i] = std::bit_cast<float>((std::uint32_t{w[i].x} << 16) +
                                      static_cast<std::uint32_t>(std::int32_t{e[i]}));
      });
    }
  };
  struct Encode {
    FOURFOLD_LOOP static void run(c10::BFloat16* __restrict w, Error* __restrict e,
                                  const float* __restrict x, std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        const std::uint32_t bits = bits_of(x[i]), upper = (bits + 0x8000u) >> 16;
        w[i].x = static_cast<std::uint16_t>(upper);
        e[i] = static_cast<Error>(bits - (upper << 16));
      });
    }
  };
};

template <>
struct MasterLoops<ErrorCorrection<8>> {
  using Error = std::int8_t;
  struct Decode {
    FOURFOLD_LOOP static void run(float* __restrict out, const c10::BFloat16* __restrict w,
                                  const Error* __restrict e, std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        out[i] = std::bit_cast<float>(
            ((std::uint32_t{w[i].x} << 8) + static_cast<std::uint32_t>(std::int32_t{e[i]})) << 8);
      });
    }
  };
  struct Encode {
    FOURFOLD_LOOP static void run(c10::BFloat16* __restrict w, Error* __restrict e,
                                  const float* __restrict x, std::int64_t n) {
      for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
        const std::uint32_t bits = bits_of(x[i]);
        const std::uint32_t rounded = (bits + 0x7Fu + ((bits >> 8) & 1u)) >> 8;
        const std::uint32_t upper = (rounded + 0x80u) >> 8;
        w[i].x = static_cast<std::uint16_t>(upper);
        e[i] = static_cast<Error>(rounded - (upper << 8));
      });
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
        const float lost = x[i] - widened(w[i]);
        narrow(std::fabs(lost) <= 3.0e38F ? lost : 0.0F, e[i]);  // infinities have none
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

/// By the 16 random bits of each value. bf16 drops 16 bits, which is one addition; fp16 goes to the
/// neighbour on x's side of the nearest with the probability of x's share of the way.
struct RoundByRandom {
  FOURFOLD_LOOP static void run(c10::BFloat16* __restrict out, const float* __restrict x,
                                const std::uint16_t* __restrict random, std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      const std::uint32_t bits = bits_of(x[i]);
      const std::uint32_t added = bits == 0x7FC00000u ? 0u : random[i];
      out[i].x = static_cast<std::uint16_t>((bits + added) >> 16);
    });
  }
  FOURFOLD_LOOP static void run(c10::Half* __restrict out, const float* __restrict x,
                                const std::uint16_t* __restrict random, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const auto nearest = static_cast<c10::Half>(x[i]);
      const float lost = x[i] - static_cast<float>(nearest);
      out[i] = nearest;
      if (!(std::fabs(lost) > 0) || !std::isfinite(lost)) continue;
      const bool outwards = (lost > 0) == (static_cast<float>(nearest) > 0);
      c10::Half other;
      if (static_cast<float>(nearest) == 0)
        other = c10::Half(lost > 0 ? 0x0001 : 0x8001, c10::Half::from_bits());
      else
        other = c10::Half(static_cast<std::uint16_t>(outwards ? nearest.x + 1 : nearest.x - 1),
                          c10::Half::from_bits());
      const float gap = std::fabs(static_cast<float>(other) - static_cast<float>(nearest));
      const float u = (static_cast<float>(random[i]) + 0.5F) * (1.0F / 65536.0F);
      if (std::isfinite(gap) && u * gap < std::fabs(lost)) out[i] = other;
    }
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

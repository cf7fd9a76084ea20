// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's step by an elementwise rule: weights, gradient and moments are read, decoded,
/// updated, encoded and written in one pass. A thread takes eight values; sixteen lanes find the
/// scale of a group of 128, eight that of a block of 64. Bytes a value with 8-bit moments and fp32
/// weights: 4 + 4 + 2 read, 4 + 2 written, scales aside: memory bound.
#include <fourfold/codec/companded_code.hpp>
#include <fourfold/codec/nf4_code.hpp>
#include <fourfold/core/random.hpp>
#include <fourfold/cuda/kernels.hpp>
#include <fourfold/optim/detail/log_levels.hpp>
#include <fourfold/optim/detail/master_code.hpp>
#include <fourfold/optim/detail/update_code.hpp>

#include "launch.cuh"

namespace fourfold::cuda {

namespace steps = fourfold::optim::detail;

/// Eight values as a GPU moves them at once, where they lie on such a boundary.
template <class T>
struct alignas(sizeof(T) * 8 < 16 ? sizeof(T) * 8 : 16) Eight {
  T values[8];
};
/// Values [at, at + count) of `from`, which is aligned or not for all threads alike; then zeros.
template <class T>
__device__ inline void read8(T (&out)[8], const T* from, std::int64_t at, int count, bool aligned) {
  Eight<T> eight{};
  if (aligned && count == 8) {
    eight = *reinterpret_cast<const Eight<T>*>(from + at);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) eight.values[i] = from[at + i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = eight.values[i];
}
template <class T>
__device__ inline void write8(T* to, const T (&x)[8], std::int64_t at, int count, bool aligned) {
  if (aligned && count == 8) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.values[i] = x[i];
    *reinterpret_cast<Eight<T>*>(to + at) = eight;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[at + i] = x[i];
  }
}

/// 16 random bits for each of eight values, from a multiple of 8 on.
struct Random8 {
  std::array<std::uint32_t, 4> words;
  __device__ std::uint32_t bits(int i) const { return words[i / 2] >> (16 * (i % 2)) & 0xFFFFu; }
  __device__ float uniform(int i) const { return uniform16(bits(i)); }
};
struct Noise {
  PhiloxStream stream;
  bool stochastic;
  __device__ Random8 at(std::int64_t index) const {
    return {philox(stream, static_cast<std::uint64_t>(index) / 8)};
  }
};

/// The largest bits of `lanes` neighbouring lanes, in each of them. All lanes of a warp call it.
__device__ inline std::uint32_t largest_of(std::uint32_t bits, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const std::uint32_t other = __shfl_xor_sync(kFullWarp, bits, step, lanes);
    bits = other > bits ? other : bits;
  }
  return bits;
}

// Moments: load() gives eight values, zeros beyond the last; store() takes them back. All threads of
// a warp call both, those beyond the last value too.

struct NoMoment {
  __device__ void load(float (&x)[8], std::int64_t, int) const {
    for (float& value : x) value = 0;
  }
  __device__ void store(const float (&)[8], std::int64_t, int) const {}
};

struct PlainMoment {
  float* values;  // (n)
  __device__ void load(float (&x)[8], std::int64_t at, int count) const {
    read8(x, values, at, count, true);
  }
  __device__ void store(const float (&x)[8], std::int64_t at, int count) const {
    write8(values, x, at, count, true);
  }
};

struct Bf16Moment {
  std::uint16_t* values;  // (n)
  Noise noise;
  __device__ void load(float (&x)[8], std::int64_t at, int count) const {
    std::uint16_t bits[8];
    read8(bits, values, at, count, true);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = steps::from_bfloat16(bits[i]);
  }
  __device__ void store(const float (&x)[8], std::int64_t at, int count) const {
    std::uint16_t bits[8];
    const Random8 random = noise.stochastic ? noise.at(at) : Random8{};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bits[i] =
          noise.stochastic ? steps::to_bfloat16(x[i], random.bits(i)) : steps::to_bfloat16(x[i]);
    write8(values, bits, at, count, true);
  }
};

template <class Curve>
struct CompandedMoment {
  using Code = std::conditional_t<std::is_same_v<Curve, Sqrt>, std::uint8_t, std::int8_t>;
  Code* codes;    // (n)
  float* scales;  // (ceil(n / 128))
  Noise noise;

  __device__ void load(float (&x)[8], std::int64_t at, int count) const {
    Code code[8];
    read8(code, codes, at, count, true);
    const float scale = count > 0 ? scales[at / companded::kGroup] : 0.0F;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = companded::decode(Curve{}, code[i], scale);
  }
  __device__ void store(const float (&x)[8], std::int64_t at, int count) const {
    std::uint32_t largest = 0;  // by bits: NaN above infinity, and below zero above both for Sqrt
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      std::uint32_t bits = std::bit_cast<std::uint32_t>(i < count ? x[i] + 0.0F : 0.0F);
      if constexpr (std::is_same_v<Curve, Softsign>) bits &= 0x7FFFFFFFu;
      largest = bits > largest ? bits : largest;
    }
    largest = largest_of(largest, companded::kGroup / 8);
    if (count == 0) return;
    const float scale =
        largest >= 0x7F800000u ? NAN : companded::scale_of(Curve{}, std::bit_cast<float>(largest));
    if (at % companded::kGroup == 0) scales[at / companded::kGroup] = scale;
    const float factor = std::is_same_v<Curve, Sqrt> ? 1.0F / scale : scale;
    const Random8 random = noise.stochastic ? noise.at(at) : Random8{};
    Code code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      code[i] = scale > 0 ? companded::encode_state(Curve{}, x[i], factor,
                                                    noise.stochastic ? random.uniform(i) : 0.5F)
                          : Code{0};
    write8(codes, code, at, count, true);
  }
};

/// A code of 4 bits on Levels; the last block is coded to its end, its missing values as zeros.
template <class Levels>
struct Levels4Moment {
  static constexpr int kBlock = 64;
  struct Tables {
    std::array<float, 16> levels = Levels::kLevels, midpoints = Levels::kMidpoints,
                          inner = Levels::kInner, gaps = Levels::kGaps;
  };
  std::uint32_t* codes;   // (8 * blocks), eight codes each, lowest bits first
  std::uint16_t* scales;  // (blocks), bf16
  std::int64_t blocks;
  Noise noise;

  __device__ void load(float (&x)[8], std::int64_t at, int count) const {
    static constexpr Tables kTables;
    const std::uint32_t code = count > 0 ? codes[at / 8] : 0u;
    const float scale = count > 0 ? steps::from_bfloat16(scales[at / kBlock]) : 0.0F;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = kTables.levels[code >> (4 * i) & 15u] * scale;
  }
  __device__ void store(const float (&x)[8], std::int64_t at, int count) const {
    static constexpr Tables kTables;
    std::uint32_t bits = 0;  // infinity and NaN above all numbers
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t one = std::bit_cast<std::uint32_t>(i < count ? x[i] : 0.0F) & 0x7FFFFFFFu;
      bits = one > bits ? one : bits;
    }
    bits = largest_of(bits, kBlock / 8);
    if (at / kBlock >= blocks) return;
    const float largest = std::bit_cast<float>(bits);
    const std::uint16_t up = steps::scale_up(bits >= 0x7F800000u        ? NAN
                                             : largest < nf4::kSmallest ? 0.0F
                                                                        : largest);
    if (at % kBlock == 0) scales[at / kBlock] = up;
    const float scale = steps::from_bfloat16(up);
    const Random8 random = noise.stochastic ? noise.at(at) : Random8{};
    std::uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float share = (i < count ? x[i] : 0.0F) / scale;
      int code = nf4::kZeroCode;
      if (scale > 0 && noise.stochastic) {
        code = nf4::count_below(kTables.inner, share);
        code += share - kTables.levels[code] > random.uniform(i) * kTables.gaps[code] ? 1 : 0;
      } else if (scale > 0) {
        code = nf4::count_below(kTables.midpoints, share);
      }
      word |= static_cast<std::uint32_t>(code) << (4 * i);
    }
    codes[at / 8] = word;
  }
};

/// Weights and their gradient. `aligned`: each thread's eight of both lie where they move at once.
struct StepWeights {
  enum Master { kNearest, kStochastic, kError8, kError16, kKahan, kCopy };
  FourfoldDtype dtype;
  std::int32_t master;
  void* weights;         // (n)
  const void* gradient;  // (n)
  void* error;           // (n), of the master codec
  bool aligned, negate;
  PhiloxStream noise;

  template <class E>
  __device__ E* errors() const {
    return static_cast<E*>(error);
  }

  /// fp32 of bf16's or fp16's bits.
  template <class T>
  struct Widen {
    __device__ float operator()(std::uint16_t bits) const { return to_float(T{bits}); }
  };

  template <class T>
  __device__ void load16(float (&p)[8], float (&g)[8], std::int64_t at, int count) const {
    constexpr Widen<T> widen;
    std::uint16_t w[8], slope[8];
    read8(w, static_cast<const std::uint16_t*>(weights), at, count, aligned);
    read8(slope, static_cast<const std::uint16_t*>(gradient), at, count, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = widen(w[i]), g[i] = widen(slope[i]);
    if (master == kError8) {
      std::int8_t e[8];
      read8(e, errors<const std::int8_t>(), at, count, true);
#pragma unroll
      for (int i = 0; i < 8; ++i) p[i] = steps::with_error(w[i], e[i]);
    } else if (master == kError16) {
      std::int16_t e[8];
      read8(e, errors<const std::int16_t>(), at, count, true);
#pragma unroll
      for (int i = 0; i < 8; ++i) p[i] = steps::with_error(w[i], e[i]);
    } else if (master == kKahan) {
      std::uint16_t e[8];
      read8(e, errors<const std::uint16_t>(), at, count, true);
#pragma unroll
      for (int i = 0; i < 8; ++i) p[i] = p[i] + steps::from_bfloat16(e[i]);
    } else if (master == kCopy) {  // unless somebody else has set the weight
      float e[8];
      read8(e, errors<const float>(), at, count, true);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (from_float<T>(e[i]).bits == w[i]) p[i] = e[i];
    }
  }
  template <class T>
  __device__ void store16(const float (&p)[8], std::int64_t at, int count) const {
    constexpr Widen<T> widen;
    std::uint16_t w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = from_float<T>(p[i]).bits;
    if (master == kStochastic) {
      const Random8 random = Noise{noise, true}.at(at);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        w[i] = std::is_same_v<T, Bf16> ? steps::to_bfloat16(p[i], random.bits(i))
                                       : steps::to_half(p[i], w[i], random.bits(i), widen);
    } else if (master == kError8) {
      std::int8_t e[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) steps::split(p[i], w[i], e[i]);
      write8(errors<std::int8_t>(), e, at, count, true);
    } else if (master == kError16) {
      std::int16_t e[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) steps::split(p[i], w[i], e[i]);
      write8(errors<std::int16_t>(), e, at, count, true);
    } else if (master == kKahan) {
      std::uint16_t e[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) e[i] = steps::to_bfloat16(steps::kahan_error(p[i], widen(w[i])));
      write8(errors<std::uint16_t>(), e, at, count, true);
    } else if (master == kCopy) {
      write8(errors<float>(), p, at, count, true);
    }
    write8(static_cast<std::uint16_t*>(weights), w, at, count, aligned);
  }

  __device__ void load(float (&p)[8], float (&g)[8], std::int64_t at, int count) const {
    if (dtype == kFourfoldFloat) {
      read8(p, static_cast<const float*>(weights), at, count, aligned);
      read8(g, static_cast<const float*>(gradient), at, count, aligned);
    } else if (dtype == kFourfoldBf16) {
      load16<Bf16>(p, g, at, count);
    } else {
      load16<Half>(p, g, at, count);
    }
    if (negate)
      for (float& slope : g) slope = -slope;
  }
  __device__ void store(const float (&p)[8], std::int64_t at, int count) const {
    if (dtype == kFourfoldFloat)
      write8(static_cast<float*>(weights), p, at, count, aligned);
    else if (dtype == kFourfoldBf16)
      store16<Bf16>(p, at, count);
    else
      store16<Half>(p, at, count);
  }
};

struct AdamWStep {
  steps::AdamWNumbers numbers;
  float weight_decay;  // Adam's
  __device__ void operator()(float& p, float g, float& m, float& v) const {
    if (weight_decay != 0) g = steps::add_weight_decay(g, p, weight_decay);
    steps::update_adamw(p, g, m, v, numbers);
  }
};
template <bool Momentum>
struct SGDStep {
  steps::SGDNumbers<float> numbers;
  bool nesterov;
  __device__ void operator()(float& p, float g, float& m, float&) const {
    steps::update_sgd<Momentum>(p, g, m, nesterov, numbers);
  }
};
struct LionStep {
  steps::LionNumbers<float> numbers;
  __device__ void operator()(float& p, float g, float& m, float&) const {
    steps::update_lion(p, g, m, numbers);
  }
};

template <class Rule, class First, class Second>
__global__ __launch_bounds__(kThreads) void step_kernel(StepWeights weights, Rule rule, First first,
                                                        Second second, std::int64_t n) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * 8;
  for (std::int64_t base = std::int64_t{blockIdx.x} * kThreads * 8; base < n; base += stride) {
    const std::int64_t at = base + std::int64_t{threadIdx.x} * 8, left = n - at;
    const int count = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    float p[8], g[8], m[8], v[8];
    weights.load(p, g, at, count);
    first.load(m, at, count);
    second.load(v, at, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) rule(p[i], g[i], m[i], v[i]);
    weights.store(p, at, count);
    first.store(m, at, count);
    second.store(v, at, count);
  }
}

// From the table's run-time numbers to template arguments.

inline PhiloxStream stream_of(const FourfoldKey& key) {
  return philox_stream({key.seed, key.step, key.forward, key.storage});
}
template <class F>
cudaError_t visit_first(const FourfoldMoment& moment, std::int64_t n, const F& f) {
  const Noise noise{stream_of(moment.key), moment.stochastic};
  switch (moment.code) {
    case 1: return f(PlainMoment{static_cast<float*>(moment.values)});
    case 2: return f(Bf16Moment{static_cast<std::uint16_t*>(moment.values), noise});
    case 3:
      return f(CompandedMoment<Softsign>{static_cast<std::int8_t*>(moment.values),
                                         static_cast<float*>(moment.scales), noise});
    case 5:
      return f(Levels4Moment<nf4::NormalLevels>{static_cast<std::uint32_t*>(moment.values),
                                                static_cast<std::uint16_t*>(moment.scales),
                                                ceil_div(n, 64), noise});
    default: return cudaErrorInvalidValue;
  }
}
template <class F>
cudaError_t visit_second(const FourfoldMoment& moment, std::int64_t n, const F& f) {
  const Noise noise{stream_of(moment.key), moment.stochastic};
  switch (moment.code) {
    case 1: return f(PlainMoment{static_cast<float*>(moment.values)});
    case 2: return f(Bf16Moment{static_cast<std::uint16_t*>(moment.values), noise});
    case 4:
      return f(CompandedMoment<Sqrt>{static_cast<std::uint8_t*>(moment.values),
                                     static_cast<float*>(moment.scales), noise});
    case 6:
      return f(Levels4Moment<steps::LogLevels>{static_cast<std::uint32_t*>(moment.values),
                                               static_cast<std::uint16_t*>(moment.scales),
                                               ceil_div(n, 64), noise});
    default: return cudaErrorInvalidValue;
  }
}

inline cudaError_t step_by_rule(const FourfoldStep& step, cudaStream_t stream) {
  if (step.n == 0) return cudaSuccess;
  const auto misplaced = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16; };
  const StepWeights weights{
      .dtype = step.dtype,
      .master = step.dtype == kFourfoldFloat ? 0 : step.master,
      .weights = step.weights,
      .gradient = step.gradient,
      .error = step.error,
      .aligned = misplaced(step.weights) == 0 && misplaced(step.gradient) == 0,
      .negate = step.maximize,
      .noise = stream_of(step.key)};
  const float* const x = step.numbers;
  const auto run = [&](const auto& rule, const auto& first, const auto& second) {
    return launch(step_kernel<std::decay_t<decltype(rule)>, std::decay_t<decltype(first)>,
                              std::decay_t<decltype(second)>>,
                  blocks_for(step.n, kThreads * 8), kThreads, 0, stream, weights, rule, first,
                  second, step.n);
  };
  const auto with_first = [&](const auto& rule) {
    return visit_first(step.first, step.n,
                       [&](const auto& first) { return run(rule, first, NoMoment{}); });
  };
  const steps::SGDNumbers<float> sgd{x[0], x[1], x[2], x[3], x[4]};
  switch (step.rule) {
    case 0:
      return visit_first(step.first, step.n, [&](const auto& first) {
        return visit_second(step.second, step.n, [&](const auto& second) {
          return run(AdamWStep{{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]}, x[8]}, first,
                     second);
        });
      });
    case 1: return run(SGDStep<false>{sgd, false}, NoMoment{}, NoMoment{});
    case 2:
    case 3: return with_first(SGDStep<true>{sgd, step.rule == 3});
    case 4: return with_first(LionStep{{x[0], x[1], x[2], x[3], x[4], x[5]}});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fourfold::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's step by an elementwise rule: weights, gradient and moments are read, decoded,
/// updated, encoded and written in one pass, eight values a thread. Bytes a value with 8-bit moments
/// and fp32 weights: 4 + 4 + 2 read, 4 + 2 written, scales aside: memory bound.
#include <fourfold/core/random.hpp>
#include <fourfold/cuda/kernels.hpp>
#include <fourfold/optim/detail/master_code.hpp>
#include <fourfold/optim/detail/update_code.hpp>

#include <initializer_list>
#include <type_traits>

#include "launch.cuh"
#include "optimizer_moments.cuh"

namespace fourfold::cuda {

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
  const AnyMoment first(step.first, step.n), second(step.second, step.n);
  const auto is = [](const AnyMoment& moment, std::initializer_list<std::int32_t> codes) {
    for (const std::int32_t code : codes)
      if (moment.code == code) return true;
    return false;
  };
  const auto run = [&](const auto& rule, const auto& m, const auto& v) {
    return launch(step_kernel<std::decay_t<decltype(rule)>, std::decay_t<decltype(m)>,
                              std::decay_t<decltype(v)>>,
                  blocks_for(step.n, kThreads * 8), kThreads, 0, stream, weights, rule, m, v,
                  step.n);
  };
  const auto of_pair = [&]<std::int32_t M, std::int32_t V>(const auto& rule) {
    return run(rule, first.as<MomentOf<M>>(), second.as<MomentOf<V>>());
  };
  const float* const x = step.numbers;
  if (step.rule == 0) {
    const AdamWStep rule{{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]}, x[8]};
    const auto pair = [&](std::int32_t m, std::int32_t v) {
      return first.code == m && second.code == v;
    };
    if (pair(1, 1)) return of_pair.operator()<1, 1>(rule);
    if (pair(2, 2)) return of_pair.operator()<2, 2>(rule);
    if (pair(3, 4)) return of_pair.operator()<3, 4>(rule);
    if (pair(5, 6)) return of_pair.operator()<5, 6>(rule);
    if (!is(first, {1, 2, 3, 5}) || !is(second, {1, 2, 4, 6})) return cudaErrorInvalidValue;
    return run(rule, AnyFirst{first}, AnySecond{second});
  }
  const auto of_first = [&](const auto& rule) {
    switch (first.code) {
      case 1: return of_pair.operator()<1, 0>(rule);
      case 2: return of_pair.operator()<2, 0>(rule);
      case 3: return of_pair.operator()<3, 0>(rule);
      case 5: return of_pair.operator()<5, 0>(rule);
      default: return cudaErrorInvalidValue;
    }
  };
  const steps::SGDNumbers<float> sgd{x[0], x[1], x[2], x[3], x[4]};
  switch (step.rule) {
    case 1: return of_pair.operator()<0, 0>(SGDStep<false>{sgd, false});
    case 2:
    case 3: return of_first(SGDStep<true>{sgd, step.rule == 3});
    case 4: return of_first(LionStep{{x[0], x[1], x[2], x[3], x[4], x[5]}});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fourfold::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// An optimizer's moments in each of its codes, eight values a thread: sixteen lanes find the scale of
/// a group of 128, eight that of a block of 64.
#include <fourfold/codec/companded_code.hpp>
#include <fourfold/codec/nf4_code.hpp>
#include <fourfold/core/random.hpp>
#include <fourfold/cuda/kernels.hpp>
#include <fourfold/optim/detail/log_levels.hpp>
#include <fourfold/optim/detail/master_code.hpp>

#include <array>
#include <tuple>
#include <type_traits>

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

inline PhiloxStream stream_of(const FourfoldKey& key) {
  return philox_stream({key.seed, key.step, key.forward, key.storage});
}

/// A moment by its number in FourfoldMoment, as a kernel's argument.
struct AnyMoment {
  std::int32_t code;
  void* values;
  void* scales;
  std::int64_t n;
  Noise noise;

  AnyMoment(const FourfoldMoment& moment, std::int64_t n_)
      : code(moment.code),
        values(moment.values),
        scales(moment.scales),
        n(n_),
        noise{stream_of(moment.key), moment.stochastic} {}

  template <class M>
  FOURFOLD_HOST_DEVICE M as() const {
    if constexpr (std::is_same_v<M, NoMoment>)
      return {};
    else if constexpr (std::is_same_v<M, PlainMoment>)
      return {static_cast<float*>(values)};
    else if constexpr (std::is_same_v<M, Bf16Moment>)
      return {static_cast<std::uint16_t*>(values), noise};
    else if constexpr (requires { typename M::Code; })
      return {static_cast<typename M::Code*>(values), static_cast<float*>(scales), noise};
    else
      return {static_cast<std::uint32_t*>(values), static_cast<std::uint16_t*>(scales),
              ceil_div(n, M::kBlock), noise};
  }
};

/// The moment of each number, by which a kernel of one pair is found.
template <std::int32_t Code>
using MomentOf = std::tuple_element_t<
    Code,
    std::tuple<NoMoment, PlainMoment, Bf16Moment, CompandedMoment<Softsign>, CompandedMoment<Sqrt>,
               Levels4Moment<nf4::NormalLevels>, Levels4Moment<steps::LogLevels>>>;

/// What is known when the kernel runs: for pairs that have no kernel of their own.
template <std::int32_t... Codes>
struct OneOf {
  AnyMoment moment;
  template <class F>
  __device__ void visit(const F& f) const {
    static_cast<void>(
        ((moment.code == Codes ? (f(moment.as<MomentOf<Codes>>()), true) : false) || ...));
  }
  __device__ void load(float (&x)[8], std::int64_t at, int count) const {
    visit([&](const auto& one) { one.load(x, at, count); });
  }
  __device__ void store(const float (&x)[8], std::int64_t at, int count) const {
    visit([&](const auto& one) { one.store(x, at, count); });
  }
};
using AnyFirst = OneOf<1, 2, 3, 5>;
using AnySecond = OneOf<1, 2, 4, 6>;

}  // namespace fourfold::cuda

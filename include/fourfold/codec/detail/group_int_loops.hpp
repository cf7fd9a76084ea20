// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Group codes of whole tensors on a CPU: one pass over memory, spread over threads, by the vector
/// instructions that the processor has. Each group is read for its range, then again, from L1, for
/// its codes.
#include <fourfold/codec/detail/group_int_avx2.hpp>
#include <fourfold/codec/detail/group_int_avx512.hpp>
#include <fourfold/codec/detail/group_int_scalar.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/parallel.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace fourfold::inline v0::detail {

/// Values a thread takes at least.
inline constexpr std::int64_t kGroupIntGrain = 1 << 15;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// The word of a group, by the instructions of `I`; kNanWord if a value is not finite.
template <Isa I, class T>
std::uint32_t word_of_group(IntFormat f, const T* values, std::int64_t count) {
#if defined(__x86_64__)
  if constexpr (I == Isa::kAvx512) return avx512::word_of(f, values, count);
  if constexpr (I == Isa::kAvx2) return avx2::word_of(f, values, count);
#endif
  return group_word_scalar(f, values, count);
}

/// The group's codes; 0 under kNanWord.
template <Isa I, class T>
void encode_one_group(IntFormat f, std::uint32_t word, const T* values, std::int64_t count,
                      const PhiloxRounds* rounds, std::int64_t first, std::uint8_t* codes) {
  if (word == kNanWord) {
    std::memset(codes, 0, static_cast<std::size_t>(ceil_div(count * f.bits, 8)));
    return;
  }
#if defined(__x86_64__)
  if constexpr (I == Isa::kAvx512)
    avx512::encode_group(f, word, values, count, rounds, first, codes);
  if constexpr (I == Isa::kAvx2) avx2::encode_group(f, word, values, count, rounds, first, codes);
#endif
  if constexpr (I == Isa::kScalar)
    encode_group_scalar(f, word, values, count, rounds, first, codes);
}

/// Codes and words of groups [first, last) of n values. Gives the first group that held a NaN or an
/// infinity, or `last`.
template <Isa I, class T>
std::int64_t encode_groups(IntFormat f, const T* values, std::int64_t n, std::int64_t first,
                           std::int64_t last, const PhiloxRounds* rounds, std::uint8_t* codes,
                           std::uint32_t* words) {
  std::int64_t refused = last, start = first;
#if defined(__x86_64__)
  if constexpr (I == Isa::kAvx512) {
    const std::int64_t whole = f.group % avx512::kTurn == 0 ? std::min(last, n / f.group) : first;
    for (; start + avx512::kTogether <= whole; start += avx512::kTogether) {
      const std::int64_t begin = start * f.group;
      const std::int64_t found = avx512::encode_16(f, values + begin, rounds, begin,
                                                   codes + begin * f.bits / 8, words + start);
      if (found < avx512::kTogether) refused = std::min(refused, start + found);
    }
  }
#endif
  constexpr std::int64_t kTogether = 8;  // words first: their divisions and reductions overlap
  for (; start < last; start += kTogether) {
    const std::int64_t stop = std::min(last, start + kTogether);
    for (std::int64_t g = start; g < stop; ++g) {
      const std::int64_t begin = g * f.group, count = std::min<std::int64_t>(f.group, n - begin);
      words[g] = word_of_group<I>(f, values + begin, count);
      if (words[g] == kNanWord) refused = std::min(refused, g);
    }
    for (std::int64_t g = start; g < stop; ++g) {
      const std::int64_t begin = g * f.group, count = std::min<std::int64_t>(f.group, n - begin);
      prefetch(values + begin, kTogether * f.group, count);
      encode_one_group<I>(f, words[g], values + begin, count, rounds, begin,
                          codes + begin * f.bits / 8);
    }
  }
  return refused;
}

template <Isa I, int Bits, class T>
void decode_groups(IntFormat f, const std::uint8_t* codes, const std::uint32_t* words,
                   std::int64_t begin, std::int64_t end, T* out) {
  std::int64_t g = begin / f.group;
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t group_end = (g + 1) * f.group;
    std::int64_t stop = std::min(end, group_end);
    const std::uint32_t word = words[g];
    if (I == Isa::kScalar || i * Bits % 8 != 0) {  // up to the next whole byte
      if (I != Isa::kScalar) stop = std::min(stop, ceil_div(i * Bits, 8) * 8 / Bits);
      decode_group_scalar(f, word, codes, i, stop, out + (i - begin));
    }
#if defined(__x86_64__)
    else if constexpr (I == Isa::kAvx512)
      avx512::decode_group<Bits>(f, word, codes, i, stop, out + (i - begin));
    else if constexpr (I == Isa::kAvx2)
      avx2::decode_group<Bits>(f, word, codes, i, stop, out + (i - begin));
#endif
    i = stop;
    if (i == group_end) ++g;
  }
}

/// f(std::integral_constant<Isa, I>{}) with I = isa.
template <class F>
decltype(auto) visit_isa(Isa isa, F&& f) {
  switch (isa) {
    case Isa::kAvx512: return f(std::integral_constant<Isa, Isa::kAvx512>{});
    case Isa::kAvx2: return f(std::integral_constant<Isa, Isa::kAvx2>{});
    case Isa::kScalar: break;
  }
  return f(std::integral_constant<Isa, Isa::kScalar>{});
}

/// Values [begin, end), whichever, to out[0 ...].
template <class T>
void decode_values(IntFormat f, const std::uint8_t* codes, const std::uint32_t* words,
                   std::int64_t begin, std::int64_t end, T* out, Isa isa) {
  visit_isa(isa, [&](auto i) {
    if (f.bits == 8) decode_groups<i(), 8>(f, codes, words, begin, end, out);
    if (f.bits == 4) decode_groups<i(), 4>(f, codes, words, begin, end, out);
    if (f.bits == 2) decode_groups<i(), 2>(f, codes, words, begin, end, out);
  });
}

/// encode_groups of all groups, on all threads.
template <class T>
std::int64_t encode_all(IntFormat f, const T* values, std::int64_t n, const PhiloxRounds* rounds,
                        std::uint8_t* codes, std::uint32_t* words, Isa isa) {
  const std::int64_t groups = ceil_div(n, f.group);
  std::atomic<std::int64_t> refused{groups};
  const auto piece = [&](std::int64_t first, std::int64_t last) {
    const std::int64_t found = visit_isa(isa, [&](auto i) {
      return encode_groups<i()>(f, values, n, first, last, rounds, codes, words);
    });
    std::int64_t before = refused.load();
    while (found < last && found < before && !refused.compare_exchange_weak(before, found)) {
    }
  };
  parallel_for(0, groups, std::max<std::int64_t>(1, kGroupIntGrain / f.group), piece);
  return refused;
}

/// All n values.
template <class T>
void decode_all(IntFormat f, const std::uint8_t* codes, const std::uint32_t* words, std::int64_t n,
                T* out, Isa isa) {
  const std::int64_t groups = ceil_div(n, f.group);
  parallel_for(0, groups, std::max<std::int64_t>(1, kGroupIntGrain / f.group),
               [&](std::int64_t first, std::int64_t last) {
                 const std::int64_t begin = first * f.group, end = std::min(n, last * f.group);
                 decode_values(f, codes, words, begin, end, out + begin, isa);
               });
}

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Group codes of whole tensors on a CPU: one pass over memory, spread over threads, by the vector
/// instructions that the processor has. Each group is read for its range, then again, from L1, for
/// its codes.
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

/// Codes and words of groups [first, last) of n values. Gives the first group that held a NaN or an
/// infinity (its word is kNanWord, its codes are 0), or `last`.
template <class T>
std::int64_t encode_groups(IntFormat f, const T* values, std::int64_t n, std::int64_t first,
                           std::int64_t last, const PhiloxStream* stream, std::uint8_t* codes,
                           std::uint32_t* words, [[maybe_unused]] Isa isa) {
  std::int64_t refused = last;
  for (std::int64_t g = first; g < last; ++g) {
    const std::int64_t begin = g * f.group, count = std::min<std::int64_t>(f.group, n - begin);
    std::uint8_t* group_codes = codes + begin * f.bits / 8;
    words[g] = group_word_scalar(f, values + begin, count);
    if (words[g] == kNanWord) {
      std::memset(group_codes, 0, static_cast<std::size_t>(ceil_div(count * f.bits, 8)));
      refused = std::min(refused, g);
      continue;
    }
    encode_group_scalar(f, words[g], values + begin, count, stream, begin, group_codes);
  }
  return refused;
}

/// Values [begin, end), whichever, to out[0 ...].
template <class T>
void decode_values(IntFormat f, const std::uint8_t* codes, const std::uint32_t* words,
                   std::int64_t begin, std::int64_t end, T* out, [[maybe_unused]] Isa isa) {
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t stop = std::min(end, (i / f.group + 1) * f.group);
    decode_group_scalar(f, words[i / f.group], codes, i, stop, out + (i - begin));
    i = stop;
  }
}

/// encode_groups of all groups, on all threads.
template <class T>
std::int64_t encode_all(IntFormat f, const T* values, std::int64_t n, const PhiloxStream* stream,
                        std::uint8_t* codes, std::uint32_t* words, Isa isa) {
  const std::int64_t groups = ceil_div(n, f.group);
  std::atomic<std::int64_t> refused{groups};
  parallel_for(
      0, groups, std::max<std::int64_t>(1, kGroupIntGrain / f.group),
      [&](std::int64_t first, std::int64_t last) {
        const std::int64_t found =
            encode_groups(f, values, n, first, last, stream, codes, words, isa);
        std::int64_t before = refused.load();
        while (found < last && found < before && !refused.compare_exchange_weak(before, found)) {
        }
      });
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

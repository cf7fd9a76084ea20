// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A tensor of two values to bits and back, by the bit patterns of its values: 64 values a turn.
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail {

// U is the unsigned integer of the values' width. Bit i of the result is that of value i.

template <class U>
std::uint64_t equal64_scalar(const U* p, U value) {
  std::uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= std::uint64_t{p[i] == value} << i;
  return bits;
}
template <class U>
void select64_scalar(U* p, std::uint64_t bits, U value) {
  for (int i = 0; i < 64; ++i)
    p[i] = static_cast<U>(value & (U{0} - static_cast<U>(bits >> i & 1)));
}

#if defined(__x86_64__)

template <class U>
FOURFOLD_AVX512 inline std::uint64_t equal64_avx512(const U* p, U value) {
  std::uint64_t bits = 0;
  constexpr int lanes = 64 / sizeof(U);
  for (int i = 0; i < 64; i += lanes) {
    const __m512i v = _mm512_loadu_si512(p + i);
    std::uint64_t part;
    if constexpr (sizeof(U) == 1)
      part = _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(value)));
    else if constexpr (sizeof(U) == 2)
      part = _mm512_cmpeq_epi16_mask(v, _mm512_set1_epi16(static_cast<short>(value)));
    else if constexpr (sizeof(U) == 4)
      part = _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(static_cast<int>(value)));
    else
      part = _mm512_cmpeq_epi64_mask(v, _mm512_set1_epi64(static_cast<long long>(value)));
    bits |= part << i;
  }
  return bits;
}
template <class U>
FOURFOLD_AVX512 inline void select64_avx512(U* p, std::uint64_t bits, U value) {
  constexpr int lanes = 64 / sizeof(U);
  for (int i = 0; i < 64; i += lanes) {
    __m512i v;
    if constexpr (sizeof(U) == 1)
      v = _mm512_maskz_set1_epi8(bits, static_cast<char>(value));
    else if constexpr (sizeof(U) == 2)
      v = _mm512_maskz_set1_epi16(static_cast<__mmask32>(bits >> i), static_cast<short>(value));
    else if constexpr (sizeof(U) == 4)
      v = _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits >> i), static_cast<int>(value));
    else
      v = _mm512_maskz_set1_epi64(static_cast<__mmask8>(bits >> i), static_cast<long long>(value));
    _mm512_storeu_si512(p + i, v);
  }
}

template <class U>
FOURFOLD_AVX2 inline std::uint64_t equal64_avx2(const U* p, U value) {
  std::uint64_t bits = 0;
  constexpr int lanes = 32 / sizeof(U);
  const auto* vectors = reinterpret_cast<const __m256i*>(p);
  for (int i = 0, k = 0; i < 64; i += lanes, ++k) {
    const __m256i v = _mm256_loadu_si256(vectors + k);
    std::uint64_t part;
    if constexpr (sizeof(U) == 1) {
      const __m256i same = _mm256_cmpeq_epi8(v, _mm256_set1_epi8(static_cast<char>(value)));
      part = static_cast<std::uint32_t>(_mm256_movemask_epi8(same));
    } else if constexpr (sizeof(U) == 2) {
      const __m256i same = _mm256_cmpeq_epi16(v, _mm256_set1_epi16(static_cast<short>(value)));
      const __m128i bytes =
          _mm_packs_epi16(_mm256_castsi256_si128(same), _mm256_extracti128_si256(same, 1));
      part = static_cast<std::uint32_t>(_mm_movemask_epi8(bytes));
    } else if constexpr (sizeof(U) == 4) {
      const __m256i same = _mm256_cmpeq_epi32(v, _mm256_set1_epi32(static_cast<int>(value)));
      part = static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same)));
    } else {
      const __m256i same = _mm256_cmpeq_epi64(v, _mm256_set1_epi64x(static_cast<long long>(value)));
      part = static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(same)));
    }
    bits |= part << i;
  }
  return bits;
}
template <class U>
FOURFOLD_AVX2 inline void select64_avx2(U* p, std::uint64_t bits, U value) {
  if constexpr (sizeof(U) == 4) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(value));
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int i = 0; i < 64; i += 8) {
      const __m256i byte = _mm256_set1_epi32(static_cast<int>(bits >> i & 0xFF));
      const __m256i same = _mm256_cmpeq_epi32(_mm256_and_si256(byte, place), place);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), _mm256_and_si256(same, all));
    }
  } else if constexpr (sizeof(U) == 2) {
    const __m256i all = _mm256_set1_epi16(static_cast<short>(value));
    const __m256i place = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                            8192, 16384, static_cast<short>(0x8000));
    for (int i = 0; i < 64; i += 16) {
      const __m256i half = _mm256_set1_epi16(static_cast<short>(bits >> i & 0xFFFF));
      const __m256i same = _mm256_cmpeq_epi16(_mm256_and_si256(half, place), place);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), _mm256_and_si256(same, all));
    }
  } else {
    select64_scalar(p, bits, value);
  }
}
#endif  // __x86_64__

template <class U>
std::uint64_t equal64(const U* p, U value, [[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return equal64_avx512(p, value);
  if (isa == Isa::kAvx2) return equal64_avx2(p, value);
#endif
  return equal64_scalar(p, value);
}
template <class U>
void select64(U* p, std::uint64_t bits, U value, [[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return select64_avx512(p, bits, value);
  if (isa == Isa::kAvx2) return select64_avx2(p, bits, value);
#endif
  select64_scalar(p, bits, value);
}

/// Words that a thread takes at least: 64 values each.
inline constexpr std::int64_t kBitMaskGrain = 1024;

/// The bits of n values that are 0 or one other pattern, which comes back in `other` (0 if there is
/// none). Gives n, or the index of the first value that is a third pattern. One pass: each piece
/// takes the first other pattern that it meets, unless another piece met a different one. Pieces
/// are made by `loop`, which is called as parallel_for.
template <class U, class Loop>
std::int64_t mask_to_bits(const U* values, std::int64_t n, std::uint8_t* bits, U& other, Isa isa,
                          const Loop& loop) {
  std::atomic<U> common{0};
  std::atomic<bool> failed{false};
  const auto piece = [&](std::int64_t first, std::int64_t last) {
    U mine = 0;
    for (std::int64_t word = first; word < last && !failed.load(std::memory_order_relaxed);
         ++word) {
      const std::int64_t begin = 64 * word, count = std::min<std::int64_t>(64, n - begin);
      const U* at = values + begin;
      U tail[64] = {};
      if (count < 64) at = std::copy_n(at, count, tail) - count;
      const std::uint64_t zeros = equal64(at, U{0}, isa);
      if (mine == 0 && ~zeros != 0) {
        mine = *std::find_if(at, at + 64, [](U value) { return value != 0; });
        U known = 0;
        if (!common.compare_exchange_strong(known, mine) && known != mine) failed = true;
      }
      const std::uint64_t ones = mine == 0 ? 0 : equal64(at, mine, isa);
      if ((zeros | ones) != ~std::uint64_t{0}) failed = true;
      std::memcpy(bits + 8 * word, &ones, static_cast<std::size_t>((count + 7) / 8));
    }
  };
  loop(0, (n + 63) / 64, kBitMaskGrain, piece);
  other = common;
  if (!failed) return n;
  U first = 0;  // the same index on any number of threads
  const U* third = std::find_if(values, values + n, [&](U value) {
    if (first == 0) first = value;
    return value != 0 && value != first;
  });
  return third - values;
}

/// Values [begin, end), whichever, to out[0 ...].
template <class U>
void bits_to_mask(const std::uint8_t* bits, std::int64_t begin, std::int64_t end, U other, U* out,
                  Isa isa) {
  std::int64_t i = begin;
  const auto one = [&] {
    out[i - begin] = (bits[i / 8] >> (i % 8) & 1) != 0 ? other : U{0};
    ++i;
  };
  while (i < end && i % 8 != 0) one();
  for (; i + 64 <= end; i += 64) {
    std::uint64_t word;
    std::memcpy(&word, bits + i / 8, 8);
    select64(out + (i - begin), word, other, isa);
  }
  while (i < end) one();
}

}  // namespace fourfold::inline v0::detail

FOURFOLD_INTRINSICS_END

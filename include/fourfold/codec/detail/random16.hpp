// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The random bits of core/random.hpp for many values at once: 16 bits a value, in the order of
/// random_bits16, on every path the same.
#include <fourfold/core/isa.hpp>
#include <fourfold/core/random.hpp>

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fourfold::inline v0 {
namespace detail {

/// Values that share one call: 16 Philox blocks of 8 values.
inline constexpr std::int64_t kRandomTile = 128;

inline void random16_scalar(const PhiloxStream& stream, std::uint64_t block, std::uint16_t* out) {
  for (int i = 0; i < 16; ++i) {
    const std::array<std::uint32_t, 4> words = philox(stream, block + static_cast<unsigned>(i));
    for (int word = 0; word < 4; ++word) {
      out[8 * i + 2 * word] = static_cast<std::uint16_t>(words[static_cast<std::size_t>(word)]);
      out[8 * i + 2 * word + 1] =
          static_cast<std::uint16_t>(words[static_cast<std::size_t>(word)] >> 16);
    }
  }
}

#if defined(__x86_64__)
// Lane 4 * L + j of the counter is block 4 * j + L (AVX2: 2 * j + L): after the transposition of
// the four words the blocks lie in order.

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) inline void random16_avx512(
    const PhiloxStream& stream, std::uint64_t block, std::uint16_t* out) {
  const auto word = [](std::uint64_t x) { return static_cast<int>(static_cast<std::uint32_t>(x)); };
  __m512i c0 =
      _mm512_add_epi32(_mm512_set1_epi32(word(block)),
                       _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i c1 = _mm512_set1_epi32(word(block >> 32));
  __m512i c2 = _mm512_set1_epi32(word(stream.high)),
          c3 = _mm512_set1_epi32(word(stream.high >> 32));
  std::uint32_t k0 = static_cast<std::uint32_t>(stream.key);
  std::uint32_t k1 = static_cast<std::uint32_t>(stream.key >> 32);
  const __m512i first = _mm512_set1_epi64(0xD2511F53), second = _mm512_set1_epi64(0xCD9E8D57);
  for (int round = 0; round < 10; ++round) {
    const __m512i a_even = _mm512_mul_epu32(c0, first), b_even = _mm512_mul_epu32(c2, second);
    const __m512i a_odd = _mm512_mul_epu32(_mm512_srli_epi64(c0, 32), first);
    const __m512i b_odd = _mm512_mul_epu32(_mm512_srli_epi64(c2, 32), second);
    const __m512i a_high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(a_even, 32), a_odd);
    const __m512i b_high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(b_even, 32), b_odd);
    const __m512i a_low = _mm512_mask_blend_epi32(0xAAAA, a_even, _mm512_slli_epi64(a_odd, 32));
    const __m512i b_low = _mm512_mask_blend_epi32(0xAAAA, b_even, _mm512_slli_epi64(b_odd, 32));
    c0 = _mm512_ternarylogic_epi32(b_high, c1, _mm512_set1_epi32(word(k0)), 0x96);  // xor of three
    c2 = _mm512_ternarylogic_epi32(a_high, c3, _mm512_set1_epi32(word(k1)), 0x96);
    c1 = b_low, c3 = a_low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), high01 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c2, c3), high23 = _mm512_unpackhi_epi32(c2, c3);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(out + 64, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(out + 96, _mm512_unpackhi_epi64(high01, high23));
}

__attribute__((target("avx2,fma"))) inline void random16_avx2(const PhiloxStream& stream,
                                                              std::uint64_t block,
                                                              std::uint16_t* out) {
  const auto word = [](std::uint64_t x) { return static_cast<int>(static_cast<std::uint32_t>(x)); };
  const __m256i first = _mm256_set1_epi64x(0xD2511F53), second = _mm256_set1_epi64x(0xCD9E8D57);
  for (unsigned half = 0; half < 2; ++half) {
    __m256i c0 = _mm256_add_epi32(_mm256_set1_epi32(word(block + 8 * half)),
                                  _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    __m256i c1 = _mm256_set1_epi32(word(block >> 32));
    __m256i c2 = _mm256_set1_epi32(word(stream.high));
    __m256i c3 = _mm256_set1_epi32(word(stream.high >> 32));
    std::uint32_t k0 = static_cast<std::uint32_t>(stream.key);
    std::uint32_t k1 = static_cast<std::uint32_t>(stream.key >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i a_even = _mm256_mul_epu32(c0, first), b_even = _mm256_mul_epu32(c2, second);
      const __m256i a_odd = _mm256_mul_epu32(_mm256_srli_epi64(c0, 32), first);
      const __m256i b_odd = _mm256_mul_epu32(_mm256_srli_epi64(c2, 32), second);
      const __m256i a_high = _mm256_blend_epi32(_mm256_srli_epi64(a_even, 32), a_odd, 0xAA);
      const __m256i b_high = _mm256_blend_epi32(_mm256_srli_epi64(b_even, 32), b_odd, 0xAA);
      const __m256i a_low = _mm256_blend_epi32(a_even, _mm256_slli_epi64(a_odd, 32), 0xAA);
      const __m256i b_low = _mm256_blend_epi32(b_even, _mm256_slli_epi64(b_odd, 32), 0xAA);
      c0 = _mm256_xor_si256(_mm256_xor_si256(b_high, c1), _mm256_set1_epi32(word(k0)));
      c2 = _mm256_xor_si256(_mm256_xor_si256(a_high, c3), _mm256_set1_epi32(word(k1)));
      c1 = b_low, c3 = a_low;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const __m256i low01 = _mm256_unpacklo_epi32(c0, c1), high01 = _mm256_unpackhi_epi32(c0, c1);
    const __m256i low23 = _mm256_unpacklo_epi32(c2, c3), high23 = _mm256_unpackhi_epi32(c2, c3);
    auto* to = reinterpret_cast<__m256i*>(out + 64 * half);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low01, low23));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low01, low23));
    _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(high01, high23));
    _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(high01, high23));
  }
}
#endif

/// The bits of values [128 * tile, 128 * tile + 128).
inline void random16(const PhiloxStream& stream, std::int64_t tile, std::uint16_t* out, Isa isa) {
  const std::uint64_t block = static_cast<std::uint64_t>(tile) * 16;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return random16_avx512(stream, block, out);
  if (isa == Isa::kAvx2) return random16_avx2(stream, block, out);
#endif
  static_cast<void>(isa);
  random16_scalar(stream, block, out);
}

}  // namespace detail
}  // namespace fourfold::inline v0
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

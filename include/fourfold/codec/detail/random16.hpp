// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The random bits of core/random.hpp for many values at once: 16 bits a value, in the order of
/// random_bits16, on every path the same.
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/random.hpp>

#include <cstring>

FOURFOLD_INTRINSICS_BEGIN

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
// A 32-bit word stands in the lower half of a 64-bit lane, which is all that the wide
// multiplication reads; what the upper half holds does not matter. Lane 2 * L + j of eight is block
// 4 * j + L (AVX2, of four: 2 * j + L), so that the blocks lie in order once their words are
// interleaved.

inline long long lane(std::uint64_t x) { return static_cast<long long>(x); }

FOURFOLD_AVX512 inline void random16_avx512(const PhiloxStream& stream, std::uint64_t block,
                                            std::uint16_t* out) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i first = _mm512_set1_epi64(0xD2511F53), second = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0[2], c1[2], c2[2], c3[2];
  for (unsigned half = 0; half < 2; ++half) {  // eight blocks each, interleaved to hide latency
    c0[half] = _mm512_add_epi64(_mm512_set1_epi64(lane(block + 8 * half)), order);
    c1[half] = _mm512_srli_epi64(c0[half], 32);
    c2[half] = _mm512_set1_epi64(lane(stream.high)),
    c3[half] = _mm512_set1_epi64(lane(stream.high >> 32));
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(stream.key);
  std::uint32_t k1 = static_cast<std::uint32_t>(stream.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int half = 0; half < 2; ++half) {
      const __m512i a = _mm512_mul_epu32(c0[half], first), b = _mm512_mul_epu32(c2[half], second);
      c0[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1[half], key0, 0x96);  // xor
      c2[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3[half], key1, 0x96);
      c1[half] = b, c3[half] = a;
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  for (int half = 0; half < 2; ++half) {
    const __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c0[half], _mm512_slli_epi64(c1[half], 32));
    const __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c2[half], _mm512_slli_epi64(c3[half], 32));
    _mm512_storeu_si512(out + 64 * half, _mm512_unpacklo_epi64(w01, w23));
    _mm512_storeu_si512(out + 64 * half + 32, _mm512_unpackhi_epi64(w01, w23));
  }
}

FOURFOLD_AVX2 inline void random16_avx2(const PhiloxStream& stream, std::uint64_t block,
                                        std::uint16_t* out) {
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i first = _mm256_set1_epi64x(0xD2511F53), second = _mm256_set1_epi64x(0xCD9E8D57);
  for (unsigned quarter = 0; quarter < 4; ++quarter) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(lane(block + 4 * quarter)), order);
    __m256i c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_set1_epi64x(lane(stream.high));
    __m256i c3 = _mm256_set1_epi64x(lane(stream.high >> 32));
    std::uint32_t k0 = static_cast<std::uint32_t>(stream.key);
    std::uint32_t k1 = static_cast<std::uint32_t>(stream.key >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i a = _mm256_mul_epu32(c0, first), b = _mm256_mul_epu32(c2, second);
      const __m256i with0 = _mm256_xor_si256(c1, _mm256_set1_epi64x(k0));
      const __m256i with1 = _mm256_xor_si256(c3, _mm256_set1_epi64x(k1));
      c0 = _mm256_xor_si256(_mm256_srli_epi64(b, 32), with0);
      c2 = _mm256_xor_si256(_mm256_srli_epi64(a, 32), with1);
      c1 = b, c3 = a;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    auto* to = reinterpret_cast<__m256i*>(out + 32 * quarter);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(w01, w23));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(w01, w23));
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
FOURFOLD_INTRINSICS_END

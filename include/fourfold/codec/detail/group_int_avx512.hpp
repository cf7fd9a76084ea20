// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Group codes with AVX-512: 64 values a turn. Every operation is the scalar truth's own
/// (int_code.hpp), sixteen at once, so the codes are the same.
#if defined(__x86_64__)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <fourfold/codec/detail/group_int_scalar.hpp>
#include <fourfold/codec/detail/group_words_avx512.hpp>
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/intrinsics.hpp>

#include <algorithm>
#include <cstdint>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail::avx512 {

FOURFOLD_AVX512 inline void store(float* p, __mmask16 m, __m512 v) {
  _mm512_mask_storeu_ps(p, m, v);
}
// 16-bit types saturate (store_as). max and min give their second operand where one is NaN.
FOURFOLD_AVX512 inline __m512 saturate(__m512 v, float largest) {
  v = _mm512_max_ps(_mm512_set1_ps(-largest), v);
  return _mm512_min_ps(_mm512_set1_ps(largest), v);
}
FOURFOLD_AVX512 inline void store(c10::Half* p, __mmask16 m, __m512 v) {
  const __m512 in_range = saturate(v, 65504.0F);
  _mm256_mask_storeu_epi16(
      p, m, _mm512_cvtps_ph(in_range, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FOURFOLD_AVX512 inline void store(c10::BFloat16* p, __mmask16 m, __m512 v) {
  const __m512i bits = _mm512_castps_si512(saturate(v, 0x1.FEp127F));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(rounded));
}

/// 16 random bits for each of 64 values, as four vectors of 16 words.
struct Random64 {
  __m512i word0, word1, word2, word3;
};

/// Blocks first ... first + 7 of the stream, one in each 64-bit lane, of which the lower half
/// counts: so one multiplication gives both halves of a product. Lanes hold the blocks in the order
/// that makes the final interleaving come out in order.
FOURFOLD_AVX512 inline Random64 random64(const PhiloxRounds& rounds, std::uint64_t first) {
  const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first)),
                                           _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0 = counter, c1 = _mm512_srli_epi64(counter, 32);
  __m512i c2 = _mm512_set1_epi64(static_cast<long long>(rounds.stream.high));
  __m512i c3 = _mm512_srli_epi64(c2, 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i a = _mm512_mul_epu32(m0, c0), b = _mm512_mul_epu32(m1, c2);
    const __m512i k0 = _mm512_set1_epi64(rounds.key0[round]);
    const __m512i k1 = _mm512_set1_epi64(rounds.key1[round]);
    // Upper halves by a shuffle: shifts would wait for the port that multiplies. 0x96: x ^ y ^ z.
    c0 = _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(b, _MM_PERM_DDBB), c1, k0, 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(a, _MM_PERM_DDBB), c3, k1, 0x96);
    c1 = b, c3 = a;
  }
  const __m512i c01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
  const __m512i c23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
  const __m512i low = _mm512_unpacklo_epi64(c01, c23), high = _mm512_unpackhi_epi64(c01, c23);
  return {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(low)),
          _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(low, 1)),
          _mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)),
          _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1))};
}

struct Encoder {
  __m512 spread, offset, inverse, lowest, highest;
  __m512i zero;
};
FOURFOLD_AVX512 inline Encoder broadcast(const GroupEncoder& e) {
  return {_mm512_set1_ps(e.spread), _mm512_set1_ps(e.offset),  _mm512_set1_ps(e.inverse),
          _mm512_set1_ps(e.lowest), _mm512_set1_ps(e.highest), _mm512_set1_epi32(e.zero)};
}

/// 16 codes (nearest) or 65536 times them (stochastic).
FOURFOLD_AVX512 inline __m512i steps(const Encoder& e, __m512 v) {
  __m512 t = _mm512_mul_ps(_mm512_fmadd_ps(v, e.spread, e.offset), e.inverse);
  t = _mm512_min_ps(_mm512_max_ps(t, e.lowest), e.highest);
  return _mm512_add_epi32(_mm512_cvtps_epi32(t), e.zero);
}

/// 64 codes, one a byte, to 64 * bits / 8 bytes.
FOURFOLD_AVX512 inline void store_codes(int bits, std::uint8_t* out, __m512i codes) {
  if (bits == 8) {
    _mm512_storeu_si512(out, codes);
    return;
  }
  const __m512i pairs =
      _mm512_maddubs_epi16(codes, _mm512_set1_epi16(static_cast<short>(1 | 256 << bits)));
  if (bits == 4) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
  } else {
    const __m512i quads = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 16 << 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(quads));
  }
}

/// 64 codes, one a byte, of the values that the masks name. `block` is the stream's.
template <class T>
FOURFOLD_AVX512 [[gnu::always_inline]] inline __m512i encode_64(const Encoder& e, const T* values,
                                                                __mmask16 m0, __mmask16 m1,
                                                                __mmask16 m2, __mmask16 m3,
                                                                const PhiloxRounds* rounds,
                                                                std::uint64_t block) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i q0 = steps(e, load(values, m0)), q1 = steps(e, load(values + 16, m1));
  __m512i q2 = steps(e, load(values + 32, m2)), q3 = steps(e, load(values + 48, m3));
  if (rounds != nullptr) {
    const Random64 random = random64(*rounds, block);
    q0 = _mm512_srli_epi32(_mm512_add_epi32(q0, random.word0), 16);
    q1 = _mm512_srli_epi32(_mm512_add_epi32(q1, random.word1), 16);
    q2 = _mm512_srli_epi32(_mm512_add_epi32(q2, random.word2), 16);
    q3 = _mm512_srli_epi32(_mm512_add_epi32(q3, random.word3), 16);
  }
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packus_epi32(q0, q1), _mm512_packus_epi32(q2, q3));
  return _mm512_permutexvar_epi32(order, bytes);
}

/// Codes of `count` values of one group, whose first has the index `first` (a multiple of 8).
template <class T>
FOURFOLD_AVX512 inline void encode_group(IntFormat f, std::uint32_t word, const T* values,
                                         std::int64_t count, const PhiloxRounds* rounds,
                                         std::int64_t first, std::uint8_t* codes) {
  const Encoder e = broadcast(group_encoder(f, word, rounds != nullptr));
  const std::uint64_t block = static_cast<std::uint64_t>(first) / 8;
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    store_codes(f.bits, codes + i * f.bits / 8,
                encode_64(e, values + i, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, rounds,
                          block + static_cast<std::uint64_t>(i) / 8));
  if (const std::int64_t left = count - i; left > 0) {
    const __m512i bytes =
        encode_64(e, values + i, lanes(left), lanes(left - 16), lanes(left - 32), lanes(left - 48),
                  rounds, block + static_cast<std::uint64_t>(i) / 8);
    std::uint8_t whole[64];
    store_codes(f.bits, whole, _mm512_maskz_mov_epi8((__mmask64{1} << left) - 1, bytes));
    std::copy_n(whole, (left * f.bits + 7) / 8, codes + i * f.bits / 8);
  }
}

/// Words and codes of sixteen whole groups, whose first value has the index `first`. A group is a
/// multiple of 64 values. Gives the first group with a NaN or an infinity, or 16. While codes are
/// made, which is arithmetic, the values of the next sixteen groups are fetched.
template <class T>
FOURFOLD_AVX512 inline std::int64_t encode_16(IntFormat f, const T* values,
                                              const PhiloxRounds* rounds, std::int64_t first,
                                              std::uint8_t* codes, std::uint32_t* words) {
  Groups16 groups;
  words_of_16(f, values, rounds != nullptr, groups);
  std::copy_n(groups.word, kTogether, words);
  Encoder e = broadcast(group_encoder(f, 0, rounds != nullptr));
  std::uint64_t block = static_cast<std::uint64_t>(first) / 8;
  std::int64_t refused = kTogether;
  for (std::int64_t g = 0; g < kTogether; ++g) {
    e.spread = _mm512_set1_ps(groups.spread[g]), e.offset = _mm512_set1_ps(groups.offset[g]);
    e.inverse = _mm512_set1_ps(groups.inverse[g]);
    const bool finite = groups.word[g] != kNanWord;
    if (!finite) refused = std::min(refused, g);
    for (std::int64_t i = 0; i < f.group; i += kTurn, values += kTurn) {
      prefetch(values, kTogether * f.group, kTurn);
      const __m512i q = encode_64(e, values, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, rounds, block);
      store_codes(f.bits, codes, finite ? q : _mm512_setzero_si512());
      codes += kTurn * f.bits / 8, block += kTurn / 8;
    }
  }
  return refused;
}

/// 16 codes from 2 * bits bytes, one a 32-bit lane; with bits < 8 the lanes above the code's bits
/// hold others.
template <int Bits>
FOURFOLD_AVX512 inline __m512i load_codes(const std::uint8_t* p) {
  if constexpr (Bits == 8) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (Bits == 4) {
    const __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm512_or_si512(pair, _mm512_slli_epi64(pair, 28));
  } else {
    std::uint32_t all;
    __builtin_memcpy(&all, p, 4);
    return _mm512_srlv_epi32(
        _mm512_set1_epi32(static_cast<int>(all)),
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
  }
}

/// Values [begin, end) of one group to out[0 ...]; begin is a multiple of 8 / Bits. Few codes mean
/// a table: all that a group can decode to stands in one register.
template <int Bits, class T>
FOURFOLD_AVX512 inline void decode_group(IntFormat f, std::uint32_t word, const std::uint8_t* codes,
                                         std::int64_t begin, std::int64_t end, T* out) {
  const GroupDecoder d = group_decoder(f, word);
  const __m512 scale = _mm512_set1_ps(d.scale), minimum = _mm512_set1_ps(d.minimum);
  const __m512i zero = _mm512_set1_epi32(d.zero);
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i few = _mm512_and_si512(index, _mm512_set1_epi32((1 << Bits) - 1));
  const __m512 table =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(few, zero)), scale, minimum);
  const auto decode_16 = [&](const std::uint8_t* in) FOURFOLD_AVX512 {
    const __m512i code = load_codes<Bits>(in);
    return Bits == 8
               ? _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero)), scale, minimum)
               : _mm512_permutexvar_ps(code, table);
  };
  const std::uint8_t* in = codes + begin * Bits / 8;
  std::int64_t left = end - begin;
  for (; left >= 16; left -= 16, in += 2 * Bits, out += 16) store(out, 0xFFFF, decode_16(in));
  if (left > 0) {
    std::uint8_t rest[16] = {};
    std::copy_n(in, (left * Bits + 7) / 8, rest);
    store(out, lanes(left), decode_16(rest));
  }
}

}  // namespace fourfold::inline v0::detail::avx512
FOURFOLD_INTRINSICS_END

#endif  // __x86_64__

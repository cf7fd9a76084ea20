// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Group codes with AVX2: 32 values a turn. Every operation is the scalar truth's own
/// (int_code.hpp), eight at once, so the codes are the same.
#if defined(__x86_64__)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <fourfold/codec/detail/group_int_scalar.hpp>
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/random.hpp>

#include <algorithm>
#include <cstdint>

namespace fourfold::inline v0::detail::avx2 {

FOURFOLD_AVX2 inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
FOURFOLD_AVX2 inline __m256 load(const c10::BFloat16* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
FOURFOLD_AVX2 inline __m256 load(const c10::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

FOURFOLD_AVX2 inline void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
// 16-bit types saturate (store_as). max and min give their second operand where one is NaN.
FOURFOLD_AVX2 inline __m256 saturate(__m256 v, float largest) {
  v = _mm256_max_ps(_mm256_set1_ps(-largest), v);
  return _mm256_min_ps(_mm256_set1_ps(largest), v);
}
FOURFOLD_AVX2 inline void store(c10::Half* p, __m256 v) {
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm256_cvtps_ph(saturate(v, 65504.0F), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FOURFOLD_AVX2 inline void store(c10::BFloat16* p, __m256 v) {
  const __m256i bits = _mm256_castps_si256(saturate(v, 0x1.FEp127F));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
}

/// The word of `count` >= 1 values.
template <class T>
FOURFOLD_AVX2 inline std::uint32_t word_of(IntFormat f, const T* values, std::int64_t count) {
  const __m256 zero = _mm256_setzero_ps();
  __m256 lo = _mm256_set1_ps(static_cast<float>(values[0])), hi = lo, poison = zero;
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 v = load(values + i);
    lo = _mm256_min_ps(lo, v), hi = _mm256_max_ps(hi, v);
    poison = _mm256_fmadd_ps(v, zero, poison);
  }
  alignas(32) float los[8], his[8];
  _mm256_store_ps(los, lo), _mm256_store_ps(his, hi);
  bool bad = _mm256_movemask_ps(_mm256_cmp_ps(poison, poison, _CMP_UNORD_Q)) != 0;
  float least = *std::min_element(los, los + 8), most = *std::max_element(his, his + 8);
  for (; i < count; ++i) {
    const float value = static_cast<float>(values[i]);
    least = std::min(least, value), most = std::max(most, value);
    bad = bad || value != value;
  }
  return bad ? kNanWord : group_word(f, least, most);
}

/// 16 random bits for each of 32 values, as four vectors of 8 words.
struct Random32 {
  __m256i word0, word1, word2, word3;
};

/// Blocks first ... first + 3 of the stream, one in each 64-bit lane, of which the lower half
/// counts: so one multiplication gives both halves of a product. Lanes hold the blocks in the order
/// that makes the final interleaving come out in order.
FOURFOLD_AVX2 inline Random32 random32(const PhiloxRounds& rounds, std::uint64_t first) {
  const __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first)),
                                           _mm256_setr_epi64x(0, 2, 1, 3));
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i c0 = counter, c1 = _mm256_srli_epi64(counter, 32);
  __m256i c2 = _mm256_set1_epi64x(static_cast<long long>(rounds.stream.high));
  __m256i c3 = _mm256_srli_epi64(c2, 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i a = _mm256_mul_epu32(m0, c0), b = _mm256_mul_epu32(m1, c2);
    const __m256i k0 = _mm256_set1_epi64x(rounds.key0[round]);
    const __m256i k1 = _mm256_set1_epi64x(rounds.key1[round]);
    c0 = _mm256_xor_si256(_mm256_shuffle_epi32(b, 0xF5), _mm256_xor_si256(c1, k0));
    c2 = _mm256_xor_si256(_mm256_shuffle_epi32(a, 0xF5), _mm256_xor_si256(c3, k1));
    c1 = b, c3 = a;
  }
  const __m256i c01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i c23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const __m256i low = _mm256_unpacklo_epi64(c01, c23), high = _mm256_unpackhi_epi64(c01, c23);
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(low)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(low, 1)),
          _mm256_cvtepu16_epi32(_mm256_castsi256_si128(high)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(high, 1))};
}

struct Encoder {
  __m256 spread, offset, inverse, lowest, highest;
  __m256i zero;
};
FOURFOLD_AVX2 inline Encoder broadcast(const GroupEncoder& e) {
  return {_mm256_set1_ps(e.spread), _mm256_set1_ps(e.offset),  _mm256_set1_ps(e.inverse),
          _mm256_set1_ps(e.lowest), _mm256_set1_ps(e.highest), _mm256_set1_epi32(e.zero)};
}

FOURFOLD_AVX2 inline __m256i steps(const Encoder& e, __m256 v) {
  __m256 t = _mm256_mul_ps(_mm256_fmadd_ps(v, e.spread, e.offset), e.inverse);
  t = _mm256_min_ps(_mm256_max_ps(t, e.lowest), e.highest);
  return _mm256_add_epi32(_mm256_cvtps_epi32(t), e.zero);
}

/// 32 codes, one a byte, to 32 * bits / 8 bytes.
FOURFOLD_AVX2 inline void store_codes(int bits, std::uint8_t* out, __m256i codes) {
  if (bits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
    return;
  }
  const __m256i pairs =
      _mm256_maddubs_epi16(codes, _mm256_set1_epi16(static_cast<short>(1 | 256 << bits)));
  if (bits == 4) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
  } else {
    __m256i bytes = _mm256_madd_epi16(pairs, _mm256_set1_epi32(1 | 16 << 16));
    bytes = _mm256_packus_epi32(bytes, bytes);
    bytes = _mm256_packus_epi16(bytes, bytes);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
  }
}

/// Codes of 32 values, whose first has the index `first` (a multiple of 8).
template <class T>
FOURFOLD_AVX2 inline void encode32(int bits, const Encoder& e, const T* values,
                                   const PhiloxRounds* rounds, std::int64_t first,
                                   std::uint8_t* out) {
  __m256i q0 = steps(e, load(values)), q1 = steps(e, load(values + 8));
  __m256i q2 = steps(e, load(values + 16)), q3 = steps(e, load(values + 24));
  if (rounds != nullptr) {
    const Random32 random = random32(*rounds, static_cast<std::uint64_t>(first) / 8);
    q0 = _mm256_srli_epi32(_mm256_add_epi32(q0, random.word0), 16);
    q1 = _mm256_srli_epi32(_mm256_add_epi32(q1, random.word1), 16);
    q2 = _mm256_srli_epi32(_mm256_add_epi32(q2, random.word2), 16);
    q3 = _mm256_srli_epi32(_mm256_add_epi32(q3, random.word3), 16);
  }
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packus_epi32(q0, q1), _mm256_packus_epi32(q2, q3));
  store_codes(bits, out,
              _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

/// Codes of `count` values of one group, whose first has the index `first` (a multiple of 8).
template <class T>
FOURFOLD_AVX2 inline void encode_group(IntFormat f, std::uint32_t word, const T* values,
                                       std::int64_t count, const PhiloxRounds* rounds,
                                       std::int64_t first, std::uint8_t* codes) {
  const Encoder e = broadcast(group_encoder(f, word, rounds != nullptr));
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    encode32(f.bits, e, values + i, rounds, first + i, codes + i * f.bits / 8);
  if (i < count)
    encode_group_scalar(f, word, values + i, count - i, rounds, first + i, codes + i * f.bits / 8);
}

/// 8 codes from `Bits` bytes, one a lane.
template <int Bits>
FOURFOLD_AVX2 inline __m256i load_codes(const std::uint8_t* p) {
  if constexpr (Bits == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else {
    std::uint32_t all = 0;
    __builtin_memcpy(&all, p, Bits);
    const __m256i place =
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(Bits));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(all)), place),
                            _mm256_set1_epi32((1 << Bits) - 1));
  }
}

/// Values [begin, end) of one group to out[0 ...]; begin is a multiple of 8 / Bits.
template <int Bits, class T>
FOURFOLD_AVX2 inline void decode_group(IntFormat f, std::uint32_t word, const std::uint8_t* codes,
                                       std::int64_t begin, std::int64_t end, T* out) {
  const GroupDecoder d = group_decoder(f, word);
  const __m256 scale = _mm256_set1_ps(d.scale), minimum = _mm256_set1_ps(d.minimum);
  const __m256i zero = _mm256_set1_epi32(d.zero);
  std::int64_t i = begin;
  for (; i + 8 <= end; i += 8, out += 8) {
    const __m256i code = _mm256_sub_epi32(load_codes<Bits>(codes + i * Bits / 8), zero);
    store(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, minimum));
  }
  if (i < end) decode_group_scalar(f, word, codes, i, end, out);
}

}  // namespace fourfold::inline v0::detail::avx2

#endif  // __x86_64__

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// companded_code.hpp for one whole group of 128 values at a time: plain, AVX2, AVX-512, with the
/// same codes on each. Callers pad a tail group with zeros.
#include <fourfold/codec/companded_code.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0 {
namespace companded::detail {

inline constexpr std::uint32_t kInfinityBits = 0x7F800000u;

/// Uniform number of one value: a half for nearest rounding, where there are no random bits.
inline float uniform(const std::uint16_t* random, int i) {
  return random == nullptr ? 0.5F : (static_cast<float>(random[i]) + 0.5F) * (1.0F / 65536.0F);
}

#if defined(__x86_64__)
FOURFOLD_AVX512 inline std::uint32_t largest_bits_avx512(const float* values, bool sign) {
  const __m512i keep = _mm512_set1_epi32(sign ? -1 : 0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < kGroup; i += 16) {
    const __m512 value = _mm512_add_ps(_mm512_loadu_ps(values + i), _mm512_setzero_ps());
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(value), keep));
  }
  return _mm512_reduce_max_epu32(largest);
}

FOURFOLD_AVX2 inline std::uint32_t largest_bits_avx2(const float* values, bool sign) {
  const __m256i keep = _mm256_set1_epi32(sign ? -1 : 0x7FFFFFFF);
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < kGroup; i += 8) {
    const __m256 value = _mm256_add_ps(_mm256_loadu_ps(values + i), _mm256_setzero_ps());
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(value), keep));
  }
  __m128i four =
      _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(four));
}

FOURFOLD_AVX512 inline __m512 uniform_avx512(const std::uint16_t* random, int i) {
  if (random == nullptr) return _mm512_set1_ps(0.5F);
  const __m512i bits =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(random + i)));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(1.0F / 65536.0F),
                         _mm512_set1_ps(0.5F / 65536.0F));  // exact: 17 bits
}

FOURFOLD_AVX2 inline __m256 uniform_avx2(const std::uint16_t* random, int i) {
  if (random == nullptr) return _mm256_set1_ps(0.5F);
  const __m256i bits =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(random + i)));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(bits), _mm256_set1_ps(1.0F / 65536.0F),
                         _mm256_set1_ps(0.5F / 65536.0F));
}

/// Four times eight codes to bytes, in order; Saturate tells signed from unsigned bytes.
template <bool Signed>
FOURFOLD_AVX2 inline __m256i bytes_avx2(const __m256i* codes) {
  const __m256i low = _mm256_packs_epi32(codes[0], codes[1]);
  const __m256i high = _mm256_packs_epi32(codes[2], codes[3]);
  const __m256i bytes = Signed ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <bool State>
FOURFOLD_AVX512 inline void encode_avx512(Softsign, const float* values, std::int8_t* codes,
                                          float scale, const std::uint16_t* random) {
  const __m512 half = _mm512_set1_ps(softsign_half(scale));
  const __m512 whole = _mm512_set1_ps(scale * softsign_half(scale));
  for (int i = 0; i < kGroup; i += 16) {
    const __m512 value = _mm512_loadu_ps(values + i), a = _mm512_abs_ps(value);
    const __m512 q = _mm512_div_ps(_mm512_mul_ps(a, half), _mm512_fmadd_ps(a, half, whole));
    const __m512 k = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_set1_ps(254.0F), q),
                                          _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 gone = _mm512_fmsub_ps(_mm512_set1_ps(254.0F), q, k);
    const __m512 left = _mm512_fnmadd_ps(_mm512_set1_ps(254.0F), q, _mm512_set1_ps(254.0F));
    const __mmask16 up =
        _mm512_cmp_ps_mask(_mm512_mul_ps(gone, _mm512_sub_ps(_mm512_set1_ps(253.0F), k)),
                           _mm512_mul_ps(uniform_avx512(random, i), left), _CMP_GT_OQ);
    __m512i code = _mm512_cvttps_epi32(k);
    code = _mm512_mask_add_epi32(code, up, code, _mm512_set1_epi32(1));
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(value));
    code = _mm512_mask_sub_epi32(code, negative, _mm512_setzero_si512(), code);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
  }
}

template <bool State>
FOURFOLD_AVX2 inline void encode_avx2(Softsign, const float* values, std::int8_t* codes,
                                      float scale, const std::uint16_t* random) {
  const __m256 half = _mm256_set1_ps(softsign_half(scale));
  const __m256 whole = _mm256_set1_ps(scale * softsign_half(scale));
  for (int i = 0; i < kGroup; i += 32) {
    __m256i four[4];
    for (int part = 0; part < 4; ++part) {
      const int at = i + 8 * part;
      const __m256 value = _mm256_loadu_ps(values + at);
      const __m256 a = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value);
      const __m256 q = _mm256_div_ps(_mm256_mul_ps(a, half), _mm256_fmadd_ps(a, half, whole));
      const __m256 k = _mm256_floor_ps(_mm256_mul_ps(_mm256_set1_ps(254.0F), q));
      const __m256 gone = _mm256_fmsub_ps(_mm256_set1_ps(254.0F), q, k);
      const __m256 left = _mm256_fnmadd_ps(_mm256_set1_ps(254.0F), q, _mm256_set1_ps(254.0F));
      const __m256 up = _mm256_cmp_ps(_mm256_mul_ps(gone, _mm256_sub_ps(_mm256_set1_ps(253.0F), k)),
                                      _mm256_mul_ps(uniform_avx2(random, at), left), _CMP_GT_OQ);
      const __m256i code = _mm256_sub_epi32(_mm256_cvttps_epi32(k), _mm256_castps_si256(up));
      const __m256i minus = _mm256_srai_epi32(_mm256_castps_si256(value), 31);  // 0 or -1
      four[part] = _mm256_sub_epi32(_mm256_xor_si256(code, minus), minus);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes_avx2<true>(four));
  }
}

template <bool State>
FOURFOLD_AVX512 inline void encode_avx512(Sqrt, const float* values, std::uint8_t* codes,
                                          float inverse, const std::uint16_t* random) {
  for (int i = 0; i < kGroup; i += 16) {
    const __m512 root = _mm512_sqrt_ps(_mm512_loadu_ps(values + i));
    const __m512 x =
        _mm512_min_ps(_mm512_mul_ps(root, _mm512_set1_ps(inverse)), _mm512_set1_ps(255.0F));
    const __m512 k = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 gone = _mm512_mul_ps(_mm512_sub_ps(x, k), _mm512_add_ps(x, k));
    const __m512 gap = _mm512_fmadd_ps(_mm512_set1_ps(2.0F), k, _mm512_set1_ps(1.0F));
    const __mmask16 up =
        _mm512_cmp_ps_mask(gone, _mm512_mul_ps(uniform_avx512(random, i), gap), _CMP_GT_OQ);
    __m512i code = _mm512_cvttps_epi32(k);
    code = _mm512_mask_add_epi32(code, up, code, _mm512_set1_epi32(1));
    if constexpr (State) {
      const __mmask16 above = _mm512_cmp_ps_mask(root, _mm512_setzero_ps(), _CMP_GT_OQ);
      code = _mm512_mask_max_epi32(code, above, code, _mm512_set1_epi32(1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
  }
}

template <bool State>
FOURFOLD_AVX2 inline void encode_avx2(Sqrt, const float* values, std::uint8_t* codes, float inverse,
                                      const std::uint16_t* random) {
  for (int i = 0; i < kGroup; i += 32) {
    __m256i four[4];
    for (int part = 0; part < 4; ++part) {
      const int at = i + 8 * part;
      const __m256 root = _mm256_sqrt_ps(_mm256_loadu_ps(values + at));
      const __m256 x =
          _mm256_min_ps(_mm256_mul_ps(root, _mm256_set1_ps(inverse)), _mm256_set1_ps(255.0F));
      const __m256 k = _mm256_floor_ps(x);
      const __m256 gone = _mm256_mul_ps(_mm256_sub_ps(x, k), _mm256_add_ps(x, k));
      const __m256 gap = _mm256_fmadd_ps(_mm256_set1_ps(2.0F), k, _mm256_set1_ps(1.0F));
      const __m256 up =
          _mm256_cmp_ps(gone, _mm256_mul_ps(uniform_avx2(random, at), gap), _CMP_GT_OQ);
      four[part] = _mm256_sub_epi32(_mm256_cvttps_epi32(k), _mm256_castps_si256(up));
      if constexpr (State) {
        const __m256 above = _mm256_cmp_ps(root, _mm256_setzero_ps(), _CMP_GT_OQ);
        four[part] =
            _mm256_max_epi32(four[part], _mm256_srli_epi32(_mm256_castps_si256(above), 31));
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes_avx2<false>(four));
  }
}

FOURFOLD_AVX512 inline void decode_avx512(Softsign, const std::int8_t* codes, float scale,
                                          float* out) {
  for (int i = 0; i < kGroup; i += 16) {
    const __m512 k = _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
    const __m512 ratio = _mm512_div_ps(k, _mm512_sub_ps(_mm512_set1_ps(254.0F), _mm512_abs_ps(k)));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_set1_ps(scale), ratio));
  }
}

FOURFOLD_AVX2 inline void decode_avx2(Softsign, const std::int8_t* codes, float scale, float* out) {
  for (int i = 0; i < kGroup; i += 8) {
    const __m256 k = _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i))));
    const __m256 ratio = _mm256_div_ps(
        k, _mm256_sub_ps(_mm256_set1_ps(254.0F), _mm256_andnot_ps(_mm256_set1_ps(-0.0F), k)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_set1_ps(scale), ratio));
  }
}

FOURFOLD_AVX512 inline void decode_avx512(Sqrt, const std::uint8_t* codes, float scale,
                                          float* out) {
  for (int i = 0; i < kGroup; i += 16) {
    const __m512 k = _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
    const __m512 root = _mm512_mul_ps(k, _mm512_set1_ps(scale));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(root, root));
  }
}

FOURFOLD_AVX2 inline void decode_avx2(Sqrt, const std::uint8_t* codes, float scale, float* out) {
  for (int i = 0; i < kGroup; i += 8) {
    const __m256 k = _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i))));
    const __m256 root = _mm256_mul_ps(k, _mm256_set1_ps(scale));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(root, root));
  }
}
#endif

/// Bits of the largest magnitude; above kInfinityBits - 1 where something is not finite. For a
/// curve without sign a negative value shows as a set sign bit (-0 counts as 0).
template <class Curve>
std::uint32_t largest_bits(const float* values, Isa isa) {
  constexpr bool kKeepSign = std::is_same_v<Curve, Sqrt>;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return largest_bits_avx512(values, kKeepSign);
  if (isa == Isa::kAvx2) return largest_bits_avx2(values, kKeepSign);
#endif
  static_cast<void>(isa);
  std::uint32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(values[i] + 0.0F);
    largest = std::max(largest, kKeepSign ? bits : bits & 0x7FFFFFFFu);
  }
  return largest;
}

/// One group: its scale is returned, its codes are written. A group with anything not finite (or,
/// for Sqrt, negative) gets a NaN scale, so that all of it decodes as NaN. State: by
/// encode_state().
template <class Curve, bool State = false, class Code>
float encode_group(const float* values, Code* codes, const std::uint16_t* random, Isa isa) {
  const std::uint32_t bits = largest_bits<Curve>(values, isa);
  const float scale = bits >= kInfinityBits ? std::numeric_limits<float>::quiet_NaN()
                                            : scale_of(Curve{}, std::bit_cast<float>(bits));
  if (!(scale > 0)) {
    std::fill_n(codes, kGroup, Code{0});
    return scale;
  }
  const float factor = std::is_same_v<Curve, Sqrt> ? 1.0F / scale : scale;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512)
    return encode_avx512<State>(Curve{}, values, codes, factor, random), scale;
  if (isa == Isa::kAvx2) return encode_avx2<State>(Curve{}, values, codes, factor, random), scale;
#endif
  for (int i = 0; i < kGroup; ++i)
    codes[i] = State ? encode_state(Curve{}, values[i], factor, uniform(random, i))
                     : encode(Curve{}, values[i], factor, uniform(random, i));
  return scale;
}

template <class Curve, class Code>
void decode_group(const Code* codes, float scale, float* out, Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return decode_avx512(Curve{}, codes, scale, out);
  if (isa == Isa::kAvx2) return decode_avx2(Curve{}, codes, scale, out);
#endif
  static_cast<void>(isa);
  for (int i = 0; i < kGroup; ++i) out[i] = decode(Curve{}, codes[i], scale);
}

}  // namespace companded::detail
}  // namespace fourfold::inline v0
FOURFOLD_INTRINSICS_END

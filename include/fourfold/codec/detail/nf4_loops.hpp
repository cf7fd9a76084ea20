// SPDX-License-Identifier: Apache-2.0
#pragma once
/// nf4_code.hpp for runs of values that share a scale: plain, AVX2, AVX-512, with the same codes on
/// each. `n` is a multiple of 32; callers pad a tail with zeros.
#include <fourfold/codec/nf4_code.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>

#include <algorithm>
#include <bit>
#include <cmath>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0 {
namespace nf4::detail {

/// Squared errors are summed in 16 lanes, value i in lane i % 16, then lane by lane: one order for
/// all.
using Sums = std::array<float, 16>;

#if defined(__x86_64__)
FOURFOLD_AVX512 inline __m512i count_below_avx512(__m512 thresholds, __m512 x) {
  __m512i count = _mm512_setzero_si512();
  for (int step = 8; step > 0; step /= 2) {
    const __m512i probe = _mm512_add_epi32(count, _mm512_set1_epi32(step - 1));
    const __mmask16 above =
        _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(probe, thresholds), _CMP_GT_OQ);
    count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
  }
  return count;
}

template <class L = NormalLevels>
FOURFOLD_AVX512 inline void encode_avx512(const float* values, std::int64_t n, float scale,
                                          const std::uint16_t* random, std::uint8_t* codes) {
  const __m512 levels = _mm512_loadu_ps(L::kLevels.data()), gaps = _mm512_loadu_ps(L::kGaps.data());
  const __m512 thresholds =
      _mm512_loadu_ps(random == nullptr ? L::kMidpoints.data() : L::kInner.data());
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512 x = _mm512_div_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(scale));
    __m512i code = count_below_avx512(thresholds, x);
    if (random != nullptr) {
      const __m512i bits =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(random + i)));
      const __m512 u = _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(1.0F / 65536.0F),
                                       _mm512_set1_ps(0.5F / 65536.0F));
      const __mmask16 up =
          _mm512_cmp_ps_mask(_mm512_sub_ps(x, _mm512_permutexvar_ps(code, levels)),
                             _mm512_mul_ps(u, _mm512_permutexvar_ps(code, gaps)), _CMP_GT_OQ);
      code = _mm512_mask_add_epi32(code, up, code, _mm512_set1_epi32(1));
    }
    const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(code), _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i / 2), _mm_packus_epi16(pairs, pairs));
  }
}

template <class L = NormalLevels>
FOURFOLD_AVX512 inline void decode_avx512(const std::uint8_t* codes, std::int64_t n, float scale,
                                          float* out) {
  const __m512 levels = _mm512_loadu_ps(L::kLevels.data());
  const __m128i low = _mm_set1_epi8(15);
  for (std::int64_t i = 0; i < n; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
    const __m128i even = _mm_and_si128(bytes, low);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
    const __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
    const __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd));
    _mm512_storeu_ps(out + i,
                     _mm512_mul_ps(_mm512_permutexvar_ps(first, levels), _mm512_set1_ps(scale)));
    _mm512_storeu_ps(out + i + 16,
                     _mm512_mul_ps(_mm512_permutexvar_ps(second, levels), _mm512_set1_ps(scale)));
  }
}

FOURFOLD_AVX512 inline Sums squared_error_avx512(const float* values, std::int64_t n, float largest,
                                                 float share) {
  const __m512 levels = _mm512_loadu_ps(kLevels.data()), mid = _mm512_loadu_ps(kMidpoints.data());
  const __m512 inverse = _mm512_set1_ps(1.0F / share);
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512 w = _mm512_div_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(largest));
    const __m512i code = count_below_avx512(mid, _mm512_mul_ps(w, inverse));
    const __m512 error =
        _mm512_fnmadd_ps(_mm512_permutexvar_ps(code, levels), _mm512_set1_ps(share), w);
    sum = _mm512_fmadd_ps(error, error, sum);
  }
  Sums sums;
  _mm512_storeu_ps(sums.data(), sum);
  return sums;
}

/// table[index] of 16 floats.
FOURFOLD_AVX2 inline __m256 look_up_avx2(const std::array<float, 16>& table, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.data()), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.data() + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3
}

FOURFOLD_AVX2 inline __m256i count_below_avx2(const std::array<float, 16>& thresholds, __m256 x) {
  __m256i count = _mm256_setzero_si256();
  for (int step = 8; step > 0; step /= 2) {
    const __m256i probe = _mm256_add_epi32(count, _mm256_set1_epi32(step - 1));
    const __m256 above = _mm256_cmp_ps(x, look_up_avx2(thresholds, probe), _CMP_GT_OQ);
    count = _mm256_add_epi32(count,
                             _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(step)));
  }
  return count;
}

template <class L = NormalLevels>
FOURFOLD_AVX2 inline void encode_avx2(const float* values, std::int64_t n, float scale,
                                      const std::uint16_t* random, std::uint8_t* codes) {
  const std::array<float, 16>& thresholds = random == nullptr ? L::kMidpoints : L::kInner;
  for (std::int64_t i = 0; i < n; i += 32) {
    __m256i four[4];
    for (int part = 0; part < 4; ++part) {
      const std::int64_t at = i + 8 * part;
      const __m256 x = _mm256_div_ps(_mm256_loadu_ps(values + at), _mm256_set1_ps(scale));
      __m256i code = count_below_avx2(thresholds, x);
      if (random != nullptr) {
        const __m256i bits =
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(random + at)));
        const __m256 u = _mm256_fmadd_ps(_mm256_cvtepi32_ps(bits), _mm256_set1_ps(1.0F / 65536.0F),
                                         _mm256_set1_ps(0.5F / 65536.0F));
        const __m256 up = _mm256_cmp_ps(_mm256_sub_ps(x, look_up_avx2(L::kLevels, code)),
                                        _mm256_mul_ps(u, look_up_avx2(L::kGaps, code)), _CMP_GT_OQ);
        code = _mm256_sub_epi32(code, _mm256_castps_si256(up));
      }
      four[part] = code;
    }
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(_mm256_packs_epi32(four[0], four[1]),
                                                        _mm256_packs_epi32(four[2], four[3])),
                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
    const __m128i packed =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / 2), packed);
  }
}

template <class L = NormalLevels>
FOURFOLD_AVX2 inline void decode_avx2(const std::uint8_t* codes, std::int64_t n, float scale,
                                      float* out) {
  const __m128i low = _mm_set1_epi8(15);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
    const __m128i each =
        _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    const __m256i first = _mm256_cvtepu8_epi32(each);
    const __m256i second = _mm256_cvtepu8_epi32(_mm_srli_si128(each, 8));
    _mm256_storeu_ps(out + i,
                     _mm256_mul_ps(look_up_avx2(L::kLevels, first), _mm256_set1_ps(scale)));
    _mm256_storeu_ps(out + i + 8,
                     _mm256_mul_ps(look_up_avx2(L::kLevels, second), _mm256_set1_ps(scale)));
  }
}

FOURFOLD_AVX2 inline Sums squared_error_avx2(const float* values, std::int64_t n, float largest,
                                             float share) {
  const __m256 inverse = _mm256_set1_ps(1.0F / share);
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (std::int64_t i = 0; i < n; i += 8) {
    const __m256 w = _mm256_div_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(largest));
    const __m256i code = count_below_avx2(kMidpoints, _mm256_mul_ps(w, inverse));
    const __m256 error = _mm256_fnmadd_ps(look_up_avx2(kLevels, code), _mm256_set1_ps(share), w);
    sum[i / 8 % 2] = _mm256_fmadd_ps(error, error, sum[i / 8 % 2]);
  }
  Sums sums;
  _mm256_storeu_ps(sums.data(), sum[0]);
  _mm256_storeu_ps(sums.data() + 8, sum[1]);
  return sums;
}

FOURFOLD_AVX512 inline std::uint32_t largest_bits_avx512(const float* values, std::int64_t n) {
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < n; i += 16)
    largest = _mm512_max_epu32(
        largest, _mm512_and_si512(_mm512_loadu_si512(values + i), _mm512_set1_epi32(0x7FFFFFFF)));
  return _mm512_reduce_max_epu32(largest);
}

FOURFOLD_AVX2 inline std::uint32_t largest_bits_avx2(const float* values, std::int64_t n) {
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < n; i += 8)
    largest = _mm256_max_epu32(
        largest, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)),
                                  _mm256_set1_epi32(0x7FFFFFFF)));
  alignas(32) std::array<std::uint32_t, 8> lanes;
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.data()), largest);
  return *std::max_element(lanes.begin(), lanes.end());
}
#endif

/// Largest magnitude of a block; NaN if anything in it is not finite, 0 if all of it is below
/// 2^-126.
inline float largest_magnitude(const float* values, std::int64_t n, Isa isa) {
  std::uint32_t bits = 0;
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) {
    bits = largest_bits_avx512(values, n);
  } else if (isa == Isa::kAvx2) {
    bits = largest_bits_avx2(values, n);
  } else
#endif
  {
    static_cast<void>(isa);
    for (std::int64_t i = 0; i < n; ++i)
      bits = std::max(bits, std::bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu);
  }
  if (bits >= 0x7F800000u) return std::bit_cast<float>(0x7FC00000u);
  const float largest = std::bit_cast<float>(bits);
  return largest < kSmallest ? 0.0F : largest;
}

/// Codes of one block. Without a usable scale (0 or NaN) all codes are that of zero, which decodes
/// to 0 or NaN.
template <class L = NormalLevels>
inline void encode_block(const float* values, std::int64_t n, float scale,
                         const std::uint16_t* random, std::uint8_t* codes, Isa isa) {
  if (!(scale > 0)) {
    std::fill_n(codes, n / 2, static_cast<std::uint8_t>(kZeroCode * 17));
    return;
  }
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return encode_avx512<L>(values, n, scale, random, codes);
  if (isa == Isa::kAvx2) return encode_avx2<L>(values, n, scale, random, codes);
#endif
  static_cast<void>(isa);
  const auto code = [&](std::int64_t i) {
    if (random == nullptr) return encode<L>(values[i], scale);
    return encode<L>(values[i], scale, (static_cast<float>(random[i]) + 0.5F) * (1.0F / 65536.0F));
  };
  for (std::int64_t i = 0; i < n; i += 2)
    codes[i / 2] = static_cast<std::uint8_t>(code(i) | code(i + 1) << 4);
}

template <class L = NormalLevels>
inline void decode_block(const std::uint8_t* codes, std::int64_t n, float scale, float* out,
                         Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return decode_avx512<L>(codes, n, scale, out);
  if (isa == Isa::kAvx2) return decode_avx2<L>(codes, n, scale, out);
#endif
  static_cast<void>(isa);
  for (std::int64_t i = 0; i < n; ++i)
    out[i] = decode<L>(codes[i / 2] >> (4 * (i % 2)) & 15, scale);
}

inline float squared_error(const float* values, std::int64_t n, float largest, float share,
                           Isa isa) {
  Sums sums{};
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) {
    sums = squared_error_avx512(values, n, largest, share);
  } else if (isa == Isa::kAvx2) {
    sums = squared_error_avx2(values, n, largest, share);
  } else
#endif
  {
    static_cast<void>(isa);
    const float inverse = 1.0F / share;
    for (std::int64_t i = 0; i < n; ++i) {
      const float w = values[i] / largest;
      const int code = count_below(kMidpoints, w * inverse);
      const float error = fma(-kLevels[static_cast<std::size_t>(code)], share, w);
      float& sum = sums[static_cast<std::size_t>(i % 16)];
      sum = fma(error, error, sum);
    }
  }
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}

/// The candidate scale with the least squared error; the largest of equals.
inline float search_scale(const float* values, std::int64_t n, float largest, Isa isa) {
  if (!(largest > 0)) return largest;
  float best = candidate(0), least = squared_error(values, n, largest, best, isa);
  for (int i = 1; i < kCandidates; ++i) {
    const float error = squared_error(values, n, largest, candidate(i), isa);
    if (error < least) best = candidate(i), least = error;
  }
  const float scale = largest * best;
  return scale < kSmallest ? largest : scale;
}

}  // namespace nf4::detail
}  // namespace fourfold::inline v0

FOURFOLD_INTRINSICS_END

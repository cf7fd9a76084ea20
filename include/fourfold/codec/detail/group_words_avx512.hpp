// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Ranges and words of groups with AVX-512. Every operation is the scalar truth's own
/// (int_code.hpp), so the words are the same: one group's sixteen values at once, or sixteen
/// groups' words, whose divisions and reductions would cost more than the codes one by one.
#if defined(__x86_64__)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/intrinsics.hpp>

#include <cfloat>
#include <cstdint>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail::avx512 {

/// Which of 16 lanes hold values, if `left` remain.
inline __mmask16 lanes(std::int64_t left) {
  return static_cast<__mmask16>(left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1 << left) - 1);
}

FOURFOLD_AVX512 inline __m512 load(const float* p, __mmask16 m) {
  return _mm512_maskz_loadu_ps(m, p);
}
FOURFOLD_AVX512 inline __m512 load(const c10::BFloat16* p, __mmask16 m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FOURFOLD_AVX512 inline __m512 load(const c10::Half* p, __mmask16 m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

/// The word of `count` >= 1 values.
template <class T>
FOURFOLD_AVX512 inline std::uint32_t word_of(IntFormat f, const T* values, std::int64_t count) {
  const __m512 first = _mm512_set1_ps(static_cast<float>(values[0])), zero = _mm512_setzero_ps();
  __m512 lo = first, hi = first, poison = zero;
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 v = load(values + i, 0xFFFF);
    lo = _mm512_min_ps(lo, v), hi = _mm512_max_ps(hi, v);
    poison = _mm512_fmadd_ps(v, zero, poison);
  }
  if (i < count) {
    const __mmask16 m = lanes(count - i);
    const __m512 v = _mm512_mask_mov_ps(first, m, load(values + i, m));
    lo = _mm512_min_ps(lo, v), hi = _mm512_max_ps(hi, v);
    poison = _mm512_fmadd_ps(v, zero, poison);
  }
  if (_mm512_cmp_ps_mask(poison, poison, _CMP_UNORD_Q) != 0) return kNanWord;
  return group_word(f, _mm512_reduce_min_ps(lo), _mm512_reduce_max_ps(hi));
}

/// Whole groups that are taken together, and the values a turn of the loops over one.
inline constexpr std::int64_t kTogether = 16, kTurn = 64;

/// The words of sixteen groups, and of their encoders what a loop broadcasts.
struct Groups16 {
  alignas(64) std::uint32_t word[kTogether];
  alignas(64) float spread[kTogether], offset[kTogether], inverse[kTogether];
};

template <bool Least>
FOURFOLD_AVX512 inline __m512 extreme(__m512 a, __m512 b) {
  return Least ? _mm512_min_ps(a, b) : _mm512_max_ps(a, b);
}
/// Lane g: the least (or the largest) of the lanes of v[g]. A round joins the halves of two vectors
/// into one, so that sixteen reductions cost fifteen rounds.
template <bool Least>
FOURFOLD_AVX512 inline __m512 extremes(const __m512* v) {
  __m512 quads[4], pairs[2];
  for (int q = 0; q < 4; ++q, v += 4) {
    const __m512 a = extreme<Least>(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = extreme<Least>(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    quads[q] = extreme<Least>(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  for (int p = 0; p < 2; ++p)
    pairs[p] = extreme<Least>(_mm512_shuffle_f32x4(quads[2 * p], quads[2 * p + 1], 0x44),
                              _mm512_shuffle_f32x4(quads[2 * p], quads[2 * p + 1], 0xEE));
  return extreme<Least>(_mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88),
                        _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xDD));
}

/// bf16_down of a finite x that is not -0.
FOURFOLD_AVX512 inline __m512i bf16_down(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 negative = _mm512_movepi32_mask(bits);
  const __m512i away = _mm512_mask_add_epi32(bits, negative, bits, _mm512_set1_epi32(0xFFFF));
  const __m512i lowest = _mm512_set1_epi32(static_cast<int>(0xFF7FFFFFu));
  return _mm512_srli_epi32(_mm512_min_epu32(away, lowest), 16);
}
FOURFOLD_AVX512 inline __m512 negated(__m512 x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0F)); }

/// The scale whose bits, shifted, are `scale`, or its neighbour: the first with which the largest
/// code reaches `largest`, unless that code would overflow.
template <unsigned Shift>
FOURFOLD_AVX512 inline __m512i outward(__m512i scale, __m512 top, __m512 minimum, __m512 largest) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512 end = _mm512_fmadd_ps(top, _mm512_castsi512_ps(_mm512_slli_epi32(scale, Shift)), minimum);
  scale = _mm512_mask_add_epi32(scale, _mm512_cmp_ps_mask(end, largest, _CMP_LT_OQ), scale, one);
  end = _mm512_fmadd_ps(top, _mm512_castsi512_ps(_mm512_slli_epi32(scale, Shift)), minimum);
  const __mmask16 over = _mm512_cmp_ps_mask(end, _mm512_set1_ps(FLT_MAX), _CMP_GT_OQ);
  return _mm512_mask_sub_epi32(scale, over, scale, one);
}

/// group_word of sixteen groups.
FOURFOLD_AVX512 inline __m512i group_words(IntFormat f, __m512 lo, __m512 hi) {
  const __m512 zero = _mm512_setzero_ps(), most = _mm512_set1_ps(FLT_MAX);
  const __m512 top = _mm512_set1_ps(static_cast<float>(levels(f)));
  const __mmask16 finite = _mm512_mask_cmp_ps_mask(
      _mm512_cmp_ps_mask(lo, negated(most), _CMP_GE_OQ), hi, most, _CMP_LE_OQ);
  __m512i words;
  if (f.symmetric) {
    const __m512 largest = _mm512_add_ps(_mm512_max_ps(negated(lo), hi), zero);
    const __m512i scale = _mm512_castps_si512(_mm512_div_ps(largest, top));
    words = outward<0>(scale, top, zero, largest);
  } else {
    const __m512i low = _mm512_slli_epi32(bf16_down(_mm512_add_ps(lo, zero)), 16);
    const __m512 minimum = _mm512_castsi512_ps(low), quarter = _mm512_set1_ps(0.25F);
    hi = _mm512_max_ps(hi, minimum);
    __m512 step = _mm512_div_ps(_mm512_sub_ps(hi, minimum), top);
    const __m512 part = _mm512_sub_ps(_mm512_mul_ps(hi, quarter), _mm512_mul_ps(minimum, quarter));
    step = _mm512_mask_mul_ps(step, _mm512_cmp_ps_mask(step, most, _CMP_GT_OQ),
                              _mm512_div_ps(part, top), _mm512_set1_ps(4.0F));
    __m512i scale = _mm512_xor_si512(bf16_down(negated(step)), _mm512_set1_epi32(0x8000));
    words = _mm512_or_si512(low, outward<16>(scale, top, minimum, hi));
  }
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(kNanWord), finite, words);
}

/// The words of sixteen whole groups, which follow one another, and their encoders'
/// (group_encoder) numbers. A group is a multiple of 16 values.
template <class T>
FOURFOLD_AVX512 inline void words_of_16(IntFormat f, const T* values, bool stochastic,
                                        Groups16& out) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 los[kTogether], his[kTogether];
  __mmask16 bad = 0;
  for (int g = 0; g < kTogether; ++g, values += f.group) {
    __m512 lo = load(values, 0xFFFF), hi = lo, poison = _mm512_mul_ps(lo, zero);
    for (int i = 16; i < f.group; i += 16) {
      const __m512 v = load(values + i, 0xFFFF);
      lo = _mm512_min_ps(lo, v), hi = _mm512_max_ps(hi, v);
      poison = _mm512_fmadd_ps(v, zero, poison);
    }
    los[g] = lo, his[g] = hi;
    const bool nan = _mm512_cmp_ps_mask(poison, poison, _CMP_UNORD_Q) != 0;
    bad = static_cast<__mmask16>(bad | nan << g);
  }
  __m512i words = group_words(f, extremes<true>(los), extremes<false>(his));
  words = _mm512_mask_mov_epi32(words, bad, _mm512_set1_epi32(static_cast<int>(kNanWord)));
  _mm512_store_si512(out.word, words);

  const __m512 scale = _mm512_castsi512_ps(f.symmetric ? words : _mm512_slli_epi32(words, 16));
  const __m512i high = _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
  const __m512 minimum = f.symmetric ? zero : _mm512_castsi512_ps(high);
  const __mmask16 some = _mm512_cmp_ps_mask(scale, zero, _CMP_GT_OQ);
  const __mmask16 large = _mm512_cmp_ps_mask(scale, _mm512_set1_ps(0x1p100F), _CMP_GT_OQ);
  const __mmask16 small =
      _mm512_mask_cmp_ps_mask(some, scale, _mm512_set1_ps(0x1p-60F), _CMP_LT_OQ);
  __m512 spread = _mm512_mask_mov_ps(_mm512_set1_ps(1), large, _mm512_set1_ps(0.25F));
  spread = _mm512_mask_mov_ps(spread, small, _mm512_set1_ps(0x1p64F));
  const __m512 reciprocal = _mm512_div_ps(_mm512_set1_ps(1), _mm512_mul_ps(scale, spread));
  _mm512_store_ps(out.spread, spread);
  _mm512_store_ps(out.offset, _mm512_mul_ps(negated(minimum), spread));
  _mm512_store_ps(out.inverse, _mm512_maskz_mul_ps(some, reciprocal,
                                                   _mm512_set1_ps(stochastic ? 65536.0F : 1.0F)));
}

}  // namespace fourfold::inline v0::detail::avx512
FOURFOLD_INTRINSICS_END

#endif  // __x86_64__

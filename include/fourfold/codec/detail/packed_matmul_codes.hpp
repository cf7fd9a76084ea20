// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The packed product for few rows of x, straight from integer group codes (int_code.hpp): a block
/// of 64 values is decoded into four registers and used from there. Values are those of decode(),
/// bit for bit; only the order of the sums is this file's own.
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/intrinsics.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/payload.hpp>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

FOURFOLD_INTRINSICS_BEGIN

namespace fourfold::inline v0::detail::packed {

inline constexpr std::int64_t kCodeBlock = 64;     // values decoded at once; they share a word
inline constexpr std::int64_t kCodesAhead = 4096;  // bytes ahead that are fetched

/// The codes of an (n, k) matrix whose rows are whole blocks.
struct GroupCodes {
  IntFormat format;
  const std::uint8_t* codes = nullptr;
  const std::uint32_t* words = nullptr;
  std::int64_t columns = 0;
};

/// What a payload holds, if it is a kind that is read directly on this machine.
template <class = void>
std::optional<GroupCodes> group_codes(Isa isa, const Payload& weight) {
  const std::int64_t columns = weight.sizes()[1];
  if (isa != Isa::kAvx512 || columns % kCodeBlock != 0) return std::nullopt;
  std::optional<GroupCodes> found;
  const auto look_for = [&]<class C>(std::type_identity<C>) {
    static_assert(C::kFormat.group % kCodeBlock == 0, "a block must not cross groups");
    if (const auto* payload = dynamic_cast<const CodecPayload<C>*>(&weight))
      found = {C::kFormat, payload->buffers()[0].template const_data_ptr<std::uint8_t>(),
               group_words(payload->buffers()[1]), columns};
    return found.has_value();
  };
  look_for(std::type_identity<Int4>{}) || look_for(std::type_identity<Int8>{}) ||
      look_for(std::type_identity<Int4Symmetric>{}) ||
      look_for(std::type_identity<Int8Symmetric>{});
  return found;
}

#if defined(__x86_64__)

/// Values [at, at + 64) of the matrix. 16 levels are a table in one register.
template <int Bits>
FOURFOLD_AVX512 inline void decode_block(const GroupCodes& matrix, std::int64_t at, __m512* out) {
  const GroupDecoder d = group_decoder(matrix.format, matrix.words[at / matrix.format.group]);
  const __m512 scale = _mm512_set1_ps(d.scale), minimum = _mm512_set1_ps(d.minimum);
  const __m512i zero = _mm512_set1_epi32(d.zero);
  const std::uint8_t* codes = matrix.codes + at * Bits / 8;
  // Four rows are read side by side, which hides from the processor that memory is read in order.
  __builtin_prefetch(codes + kCodesAhead);
  if constexpr (Bits == 8) __builtin_prefetch(codes + kCodesAhead + 32);
  if constexpr (Bits == 8) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i code =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
      out[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero)), scale, minimum);
    }
  } else {
    const __m512i levels = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 table =
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(levels, zero)), scale, minimum);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i pair =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
      // The lookup reads 4 bits of each 32: low nibbles stay, high ones move to the upper halves.
      out[i] = _mm512_permutexvar_ps(_mm512_or_si512(pair, _mm512_slli_epi64(pair, 28)), table);
    }
  }
}

/// sums (Rows, 4) = x (Rows, k) times rows [first, first + count) of the matrix, transposed; count
/// <= 4.
template <int Bits, int Rows>
FOURFOLD_AVX512 void dot_codes_avx512(const GroupCodes& matrix, std::int64_t first,
                                      std::int64_t count, const float* x, float* sums) {
  const std::int64_t k = matrix.columns;
  __m512 sum[4][Rows];
  for (auto& row : sum)
    for (__m512& one : row) one = _mm512_setzero_ps();
  for (std::int64_t at = 0; at < k; at += kCodeBlock)
#pragma GCC unroll 4
    for (std::int64_t j = 0; j < 4; ++j) {
      __m512 w[4];
      decode_block<Bits>(matrix, (first + std::min(j, count - 1)) * k + at, w);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          sum[j][i] = _mm512_fmadd_ps(_mm512_loadu_ps(x + i * k + at + 16 * v), w[v], sum[j][i]);
    }
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < Rows; ++i) sums[i * 4 + j] = _mm512_reduce_add_ps(sum[j][i]);
}

/// out (rows, k) += x (rows, 4) times rows [first, first + count) of the matrix; x is 0 beyond
/// count.
template <int Bits>
FOURFOLD_AVX512 void add_codes_avx512(const GroupCodes& matrix, std::int64_t first,
                                      std::int64_t count, const float* x, std::int64_t rows,
                                      float* out) {
  const std::int64_t k = matrix.columns;
  for (std::int64_t at = 0; at < k; at += kCodeBlock) {
    __m512 w[4][4];
#pragma GCC unroll 4
    for (std::int64_t j = 0; j < 4; ++j)
      decode_block<Bits>(matrix, (first + std::min(j, count - 1)) * k + at, w[j]);
    for (std::int64_t i = 0; i < rows; ++i) {
      float* to = out + i * k + at;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        __m512 sum = _mm512_loadu_ps(to + 16 * v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i * 4 + j]), w[j][v], sum);
        _mm512_storeu_ps(to + 16 * v, sum);
      }
    }
  }
}
#endif

/// sums (m, 4) = x (m, k) times up to 4 rows of the matrix, transposed.
template <class = void>
void dot_codes([[maybe_unused]] const GroupCodes& matrix, [[maybe_unused]] std::int64_t first,
               [[maybe_unused]] std::int64_t count, [[maybe_unused]] const float* x,
               [[maybe_unused]] std::int64_t m, [[maybe_unused]] float* sums) {
#if defined(__x86_64__)
  const auto run = [&]<int Bits>(std::integral_constant<int, Bits>) {
    constexpr decltype(&dot_codes_avx512<Bits, 1>) kernels[] = {
        dot_codes_avx512<Bits, 1>, dot_codes_avx512<Bits, 2>, dot_codes_avx512<Bits, 3>,
        dot_codes_avx512<Bits, 4>};
    for (std::int64_t i = 0; i < m; i += 4)
      kernels[std::min<std::int64_t>(4, m - i) - 1](matrix, first, count, x + i * matrix.columns,
                                                    sums + i * 4);
  };
  matrix.format.bits == 4 ? run(std::integral_constant<int, 4>{})
                          : run(std::integral_constant<int, 8>{});
#endif
}

/// out (m, k) += x (m, 4) times up to 4 rows of the matrix; x is 0 for rows beyond count.
template <class = void>
void add_codes([[maybe_unused]] const GroupCodes& matrix, [[maybe_unused]] std::int64_t first,
               [[maybe_unused]] std::int64_t count, [[maybe_unused]] const float* x,
               [[maybe_unused]] std::int64_t m, [[maybe_unused]] float* out) {
#if defined(__x86_64__)
  matrix.format.bits == 4 ? add_codes_avx512<4>(matrix, first, count, x, m, out)
                          : add_codes_avx512<8>(matrix, first, count, x, m, out);
#endif
}

}  // namespace fourfold::inline v0::detail::packed
FOURFOLD_INTRINSICS_END

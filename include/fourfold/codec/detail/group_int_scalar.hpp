// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Group codes by the plain loop: the fallback, and what the vector loops are held against.
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/random.hpp>

#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace fourfold::inline v0::detail {

/// A stream with its round keys laid out, so that vector loops load them rather than compute them.
struct PhiloxRounds {
  PhiloxStream stream;
  std::array<std::uint64_t, 10> key0, key1;
  explicit PhiloxRounds(const PhiloxStream& from) : stream(from) {
    auto k0 = static_cast<std::uint32_t>(from.key);
    auto k1 = static_cast<std::uint32_t>(from.key >> 32);
    for (std::size_t round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      key0[round] = k0, key1[round] = k1;
  }
};

/// Asks for `count` values that lie `ahead` values further, if there are any, while others are
/// worked on.
template <class T>
FOURFOLD_INLINE void prefetch(const T* values, std::int64_t ahead, std::int64_t count) {
  const auto bytes = [](std::int64_t n) { return static_cast<std::uintptr_t>(n) * sizeof(T); };
  const auto first = reinterpret_cast<std::uintptr_t>(values) + bytes(ahead);
  for (std::uintptr_t line = 0; line < bytes(count); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(first + line));
}

/// The word of `count` >= 1 values.
template <class T>
std::uint32_t group_word_scalar(IntFormat f, const T* values, std::int64_t count) {
  float lo = static_cast<float>(values[0]), hi = lo, poison = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(values[i]);
    lo = value < lo ? value : lo;
    hi = value > hi ? value : hi;
    poison += value * 0.0F;  // NaN from NaN and from infinity
  }
  return group_word(f, poison == poison ? lo : poison, hi);
}

/// Codes of `count` values of one group, whose first has the index `first` (a multiple of 8).
/// `rounds` null: nearest. Fills ceil(count * bits / 8) bytes.
template <class T>
void encode_group_scalar(IntFormat f, std::uint32_t word, const T* values, std::int64_t count,
                         const PhiloxRounds* rounds, std::int64_t first, std::uint8_t* codes) {
  const int per_byte = 8 / f.bits;
  const GroupEncoder encoder = group_encoder(f, word, rounds != nullptr);
  std::array<std::uint32_t, 4> block{};
  for (std::int64_t i = 0; i < count; ++i) {
    if (rounds != nullptr && i % 8 == 0)
      block = philox(rounds->stream, static_cast<std::uint64_t>(first + i) / 8);
    const float value = static_cast<float>(values[i]);
    const std::uint32_t code =
        rounds == nullptr
            ? encode_nearest(encoder, value)
            : encode_stochastic(encoder, value, (block[(i % 8) / 2] >> (16 * (i % 2))) & 0xFFFFu);
    std::uint8_t& byte = codes[i / per_byte];
    const auto place = static_cast<int>(i % per_byte) * f.bits;
    byte = static_cast<std::uint8_t>((place == 0 ? 0u : byte) | code << place);
  }
}

/// The code of value `i` of a tensor.
inline std::uint32_t code_at(IntFormat f, const std::uint8_t* codes, std::int64_t i) {
  const std::int64_t bit = i * f.bits;
  return (static_cast<std::uint32_t>(codes[bit / 8]) >> (bit % 8)) & ((1u << f.bits) - 1u);
}

/// A decoded value in the dtype that was asked for. 16-bit types saturate: a value within a step of
/// their largest must not come back infinite. NaN stays NaN.
template <class T>
T store_as(float value) {
  if constexpr (!std::is_same_v<T, float>) {
    const float largest = static_cast<float>(std::numeric_limits<T>::max());
    value = value > largest ? largest : value;
    value = value < -largest ? -largest : value;
  }
  return static_cast<T>(value);
}

/// Values [begin, end) of a tensor, all within one group, to out[0 ...].
template <class T>
void decode_group_scalar(IntFormat f, std::uint32_t word, const std::uint8_t* codes,
                         std::int64_t begin, std::int64_t end, T* out) {
  const GroupDecoder decoder = group_decoder(f, word);
  for (std::int64_t i = begin; i < end; ++i)
    out[i - begin] = store_as<T>(decode(decoder, code_at(f, codes, i)));
}

}  // namespace fourfold::inline v0::detail

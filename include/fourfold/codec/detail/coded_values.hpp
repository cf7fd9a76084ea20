// SPDX-License-Identifier: Apache-2.0
#pragma once
/// n values in one integer code, read and rewritten a tile at a time: what is summed or averaged in
/// few bits. A tile begins at a multiple of the group.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <fourfold/codec/group_int.hpp>

#include <cstdint>
#include <optional>

namespace fourfold::inline v0 {
namespace detail {

template <class C>
inline constexpr bool kIsGroupInt = false;
template <IntFormat F>
inline constexpr bool kIsGroupInt<GroupQuantizer<F>> = true;

struct CodedValues {
  at::Tensor codes, words;  ///< as GroupQuantizer's Packed has them

  CodedValues() = default;
  CodedValues(IntFormat f, std::int64_t n)
      : codes(at::zeros({ceil_div(n * f.bits, 8)}, at::kByte)),
        words(at::zeros({ceil_div(n, f.group)}, at::kInt)) {}

  /// Rounds to nearest, or with a key stochastically. NaN and infinities make their group NaN.
  void encode(IntFormat f, std::int64_t begin, std::int64_t n, const float* from,
              const std::optional<Key>& key, Isa isa) {
    std::optional<PhiloxRounds> rounds;
    if (key) {  // the index counts within the tile: tiles differ by their key
      Key of_tile = *key;
      of_tile.forward ^= mix(static_cast<std::uint64_t>(begin) + 1);
      rounds.emplace(philox_stream(of_tile));
    }
    auto* const word = reinterpret_cast<std::uint32_t*>(words.mutable_data_ptr<std::int32_t>());
    visit_isa(isa, [&](auto i) {
      encode_groups<i()>(f, from, n, 0, ceil_div(n, f.group), rounds ? &*rounds : nullptr,
                         codes.mutable_data_ptr<std::uint8_t>() + begin * f.bits / 8,
                         word + begin / f.group);
    });
  }
  void decode(IntFormat f, std::int64_t begin, std::int64_t n, float* to, Isa isa) const {
    decode_values(f, codes.const_data_ptr<std::uint8_t>(), group_words(words), begin, begin + n, to,
                  isa);
  }
  [[nodiscard]] std::int64_t nbytes() const {
    return codes.defined() ? static_cast<std::int64_t>(codes.nbytes() + words.nbytes()) : 0;
  }
};

}  // namespace detail
}  // namespace fourfold::inline v0

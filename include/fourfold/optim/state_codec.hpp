// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Which codes an optimizer may hold its moments in.
#include <fourfold/codec/companded.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>

#include <optional>
#include <type_traits>

namespace fourfold::inline v0 {
namespace optim {

/// Not packed: 4 bytes a value, as torch::optim keeps them.
struct Fp32 {
  static std::string name() { return "Fp32"; }
};

/// A codec that an optimizer can rewrite tile by tile: `kTile` values are coded together, so that
/// [begin, end) may be coded alone if begin is a multiple of kTile, and end too or the last.
template <class C>
concept StateCodec = StochasticCodec<C> &&
    requires(const C& codec, typename C::Packed& packed, std::int64_t index, const float* from,
             float* out, const std::optional<Key>& key, Isa isa) {
  { codec.zeros(at::IntArrayRef{}) } -> std::same_as<typename C::Packed>;
  codec.encode(packed, /*begin=*/index, /*end=*/index, from, key, isa);  // never throws on values
  codec.decode(packed, /*begin=*/index, /*end=*/index, out, isa);
  { C::kTile } -> std::convertible_to<std::int64_t>;
};

/// Evenly spaced codes: unfit for second moments, which differ by orders of magnitude within a
/// group; a small one becomes zero, and the step it divides becomes huge.
template <class C>
inline constexpr bool kIsLinear = false;
template <IntFormat F>
inline constexpr bool kIsLinear<GroupQuantizer<F>> = true;

/// The codecs of both moments that a user means by one word.
template <class C>
struct StatesOf {
  static_assert(
      !std::is_same_v<C, C>,
      "optimizer states come in Int8 (8 bits, companded) or optim::Fp32; for other codes name "
      "both moments: optim::AdamW<Companded<8, Softsign>, Companded<8, Sqrt>>");
};
template <>
struct StatesOf<Int8> {
  using First = Companded<8, Softsign>;
  using Second = Companded<8, Sqrt>;
};
template <>
struct StatesOf<Fp32> {
  using First = Fp32;
  using Second = Fp32;
};

static_assert(StateCodec<Companded<8, Softsign>> && StateCodec<Companded<8, Sqrt>>);

}  // namespace optim
}  // namespace fourfold::inline v0

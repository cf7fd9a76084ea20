// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Which codes an optimizer may hold its moments in.
#include <fourfold/codec/companded.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/optim/master_codec.hpp>  // Fp32
#include <fourfold/optim/state_codes.hpp>

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <type_traits>

namespace fourfold::inline v0 {
namespace optim {

/// A codec that an optimizer can rewrite tile by tile: `kTile` values are coded together, so that
/// [begin, end) may be coded alone if begin is a multiple of kTile, and end too or the last.
template <class C>
concept StateCodec = requires(const C& codec, typename C::Packed& packed, std::int64_t index,
                              const float* from, float* out, const std::optional<Key>& key,
                              Isa isa) {
  { C::name() } -> std::convertible_to<std::string>;  // in saved files
  { codec.zeros(at::IntArrayRef{}) } -> std::same_as<typename C::Packed>;
  codec.encode(packed, /*begin=*/index, /*end=*/index, from, key, isa);  // never throws on values
  codec.decode(packed, /*begin=*/index, /*end=*/index, out, isa);
  { C::kTile } -> std::convertible_to<std::int64_t>;
};

/// Codes with a zero that small values round to: unfit for second moments, which differ by orders of magnitude within a
/// group; a small one becomes zero, and the step it divides becomes huge.
template <class C>
inline constexpr bool kIsLinear =
    std::is_same_v<C, Normal4>;  // whose levels include zero, as theirs
template <IntFormat F>
inline constexpr bool kIsLinear<GroupQuantizer<F>> = true;

/// f(std::type_identity<C>{}) for the codec that a file names.
template <class F>
void visit_state_codec(const std::string& name, const F& f) {
  bool known = false;
  const auto offer = [&]<class C>(std::type_identity<C> codec) {
    if (known || C::name() != name) return;
    known = true;
    f(codec);
  };
  offer(std::type_identity<Fp32>{});
  offer(std::type_identity<Companded<8, Softsign>>{});
  offer(std::type_identity<Companded<8, Sqrt>>{});
  offer(std::type_identity<BFloat16>{});
  offer(std::type_identity<Normal4>{});
  offer(std::type_identity<Log4>{});
  TORCH_CHECK(
      known, "the states were saved in the code '", name,
      "', which this fourfold does not know; build with the fourfold that wrote the file, or "
      "begin with new states");
}

/// The codecs of both moments that a user means by one word.
template <class C>
struct StatesOf {
  static_assert(
      !std::is_same_v<C, C>,
      "optimizer states come in Int8 (8 bits, companded), Int4 (4 bits), optim::BFloat16 or "
      "optim::Fp32; for other codes name both moments: optim::AdamW<Companded<8, Softsign>, "
      "Companded<8, Sqrt>>");
};
template <>
struct StatesOf<Int8> {
  using First = Companded<8, Softsign>;
  using Second = Companded<8, Sqrt>;
};
template <>
struct StatesOf<Int4> {
  using First = Normal4;
  using Second = Log4;
};
template <>
struct StatesOf<BFloat16> {
  using First = BFloat16;
  using Second = BFloat16;
};
template <>
struct StatesOf<c10::BFloat16> : StatesOf<BFloat16> {
};  // by the name of its values: fourfold::BFloat16
template <>
struct StatesOf<Fp32> {
  using First = Fp32;
  using Second = Fp32;
};

static_assert(StateCodec<Companded<8, Softsign>> && StateCodec<Companded<8, Sqrt>>);
static_assert(StateCodec<BFloat16> && StateCodec<Normal4> && StateCodec<Log4>);

}  // namespace optim
}  // namespace fourfold::inline v0

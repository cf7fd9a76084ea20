// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an optimizer keeps of bf16 and fp16 weights beyond the weights themselves. Updates are
/// computed in fp32 whatever is kept; fp32 and fp64 weights are exact as they are, and nothing is
/// kept of them.
///                          bytes   a weight that the next step sees
///   RoundNearest             0     the weight
///   RoundStochastic          0     the weight; updates are right in the mean
///   ErrorCorrection<8>       1     16 significant bits: 24 in all (bf16 only)
///   ErrorCorrection<16>      2     fp32, bit for bit (bf16 only)
///   Kahan                    2     the weight and what its rounding lost, in bf16
///   Fp32                     4     fp32: a master copy
///   optim::AdamWOf<Int4, optim::ErrorCorrection<8>> optimizer(...);   // 4.06 bytes a parameter
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace fourfold::inline v0 {
namespace optim {

/// 4 bytes a value: moments as torch::optim keeps them, or a master copy of weights.
struct Fp32 {
  static std::string name() { return "Fp32"; }
  static constexpr at::ScalarType kError = at::kFloat;
};

/// Nothing is kept, and weights are rounded to nearest: an update below half a unit in a weight's
/// last place is lost.
struct RoundNearest {
  static std::string name() { return "RoundNearest"; }
};

/// Nothing is kept, and weights are rounded up or down at random, by counter, so that the mean of a
/// rounded weight is the weight (bf16 training after Zamirai et al., arXiv 2010.06192, section 4).
struct RoundStochastic {
  static std::string name() { return "RoundStochastic"; }
};

/// A bf16 weight is fp32 rounded to its upper 16 bits; the error that this made is held in the next
/// 8 or 16 bits, signed. After FlashOptim (arXiv 2602.23349, "error correction"), which scales the
/// error by the weight's exponent; taken from the bits themselves it is exact, and needs no power of
/// two. A tie is rounded away from zero, so that errors fit.
template <int Bits>
struct ErrorCorrection {
  static_assert(Bits == 8 || Bits == 16, "ErrorCorrection keeps 8 or 16 bits of a weight's error");
  static std::string name() { return "ErrorCorrection" + std::to_string(Bits); }
  static constexpr at::ScalarType kError = Bits == 8 ? at::kChar : at::kShort;
};

/// Kahan summation: what rounding lost is added to the next update (Zamirai et al., section 4).
struct Kahan {
  static std::string name() { return "Kahan"; }
  static constexpr at::ScalarType kError = at::kBFloat16;
};

template <class C>
inline constexpr bool kKeepsError = requires {
  C::kError;
};
template <class C>
inline constexpr bool kIsErrorCorrection = false;
template <int Bits>
inline constexpr bool kIsErrorCorrection<ErrorCorrection<Bits>> = true;

}  // namespace optim
}  // namespace fourfold::inline v0

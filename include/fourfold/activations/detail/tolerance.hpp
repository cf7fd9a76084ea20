// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What error of rounding a saved tensor bears, by what the backward of its operator does with it.
///
/// The input of a linear or a convolution reaches the gradient of that parameter alone. What is
/// multiplied with another activation reaches the gradients of all that came before, and through an
/// exponential it grows: of all that the 4-bit rounding of a transformer adds to the variance of
/// its gradient, attention's q, k and v are four fifths (bench/results, 2026-11-22-quality.md).
/// Where a backward divides, an error has no bound at all.
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/activations/detail/tape.hpp>

#include <cstddef>

namespace fourfold::inline v0::detail {

enum class Tolerance {
  kLow,        ///< few bits: ActivationOptions::pack
  kSensitive,  ///< a matrix product of two activations, an exponential: pack_sensitive
  kExact,      ///< a divisor, a logarithm's argument: kept, or computed again from what is exact
};

/// Whether an operator multiplies two tensors neither of which is the model's own.
template <class T>
bool multiplies_activations(const BasicTape<T>& tape, const typename BasicTape<T>::Frame& frame) {
  std::size_t activations = 0;
  // The first of an addmm's three is added.
  for (std::size_t i = frame.tensors.size() > 2 && frame.traits->adds ? 1 : 0;
       i < frame.tensors.size(); ++i)
    activations += !door::is_parameter(frame.tensors[i]) &&
                   !tape.index()->is_exact(frame.tensors[i].storage().unsafeGetStorageImpl());
  return activations > 1;
}

/// Whether pow's derivative has no bound near 0: an exponent below 1, or one that nobody knows.
template <class Frame>
bool steep(const Frame& frame) {
  const at::IValue& exponent = frame.arguments.at(1);
  return !exponent.isScalar() || exponent.toScalar().isComplex() ||
         exponent.toScalar().toDouble() < 1;
}

/// Of the storage `key`, which the operator that runs just now saves. `tape` may be null.
template <class T>
Tolerance tolerance(const BasicTape<T>* tape, c10::StorageImpl* key) {
  const auto* const frame = tape != nullptr ? tape->frame() : nullptr;
  if (frame == nullptr) return Tolerance::kLow;
  const BasicOperatorTraits<T>& traits = *frame->traits;
  if (traits.singular || (traits.powers && steep(*frame))) return Tolerance::kExact;
  if (traits.divides && !frame->tensors.empty() &&
      frame->tensors.back().storage().unsafeGetStorageImpl() == key)
    return Tolerance::kExact;
  if (traits.sensitive || (traits.multiplies && multiplies_activations(*tape, *frame)))
    return Tolerance::kSensitive;
  return Tolerance::kLow;
}

/// The codec for it; null: exactly, or not at all. `usual` is what another tensor would be packed
/// by.
template <class = void>
PackFunction pack_within(Tolerance tolerance, PackFunction usual,
                         const ActivationOptions& options) {
  if (usual == nullptr || tolerance == Tolerance::kExact) return nullptr;
  return tolerance == Tolerance::kSensitive ? options.pack_sensitive : usual;
}

}  // namespace fourfold::inline v0::detail

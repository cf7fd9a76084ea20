// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Activations<Codec>: what autograd saves, held by a codec until backward.
///
///   using Pipeline = CompressionPipeline<Activations<Int4>>;
///
/// What is packed and what is held as it is stands in store.hpp. Rounding is stochastic: where a
/// backward is linear in each tensor that it saved (linear, convolution, products), gradients stay
/// unbiased, with more variance; where it is not (gelu, layer_norm, a softmax), a bias of the size
/// of the rounding error squared remains, h^2 / 8 * max|f''| for codes h apart
/// (tests/activations/unbiasedness_test.cpp). `Sensitive` is for what reaches more than one
/// parameter's gradient at full size: what attention, softmax and matrix products of two activations save,
/// and the inputs of checkpoints; 8 bits unless said otherwise. What a backward divides by is exact.
#include <fourfold/activations/store.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/policy.hpp>

namespace fourfold::inline v0 {

template <StochasticCodec C, StochasticCodec Sensitive = Int8>
struct Activations {
  static constexpr Role role = Role::kActivations;
  using Format = C;
  using SensitiveFormat = Sensitive;

  /// Adds the codecs to a store's options.
  static void configure(ActivationOptions& options) {
    options.pack = pack_with<C>;
    options.pack_sensitive = pack_with<Sensitive>;
  }
};

static_assert(Policy<Activations<Int4>>, "Activations must stay a policy");

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Activations<Codec>: what autograd saves, held by a codec until backward.
///
///   using Pipeline = CompressionPipeline<Activations<Int4>>;
///
/// What is packed and what is held as it is stands in store.hpp. Rounding is stochastic: the
/// gradient of a linear or a convolution stays unbiased, with more variance; where a backward is
/// not linear in what it saved (gelu, layer_norm, a softmax), a bias of the size of the rounding
/// error squared remains. `Sensitive` is for results of softmax and log_softmax, which backward
/// reads through exp, and for the inputs of checkpoints, whose error reaches all that a block
/// computes again: 8 bits unless said otherwise.
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

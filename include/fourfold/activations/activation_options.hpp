// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How an ActivationStore packs, and what it leaves alone.
#include <ATen/core/Tensor.h>
#include <fourfold/activations/offloading.hpp>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/codec/bit_mask.hpp>
#include <fourfold/codec/narrow_int.hpp>
#include <fourfold/core/payload.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// Packs values exactly, or null: masks of at most two values, integers of a short range.
using MaskFunction = std::shared_ptr<const Payload> (*)(const at::Tensor& values);

template <class = void>
[[nodiscard]] std::shared_ptr<const Payload> pack_bits(const at::Tensor& values) {
  std::optional<BitMask::Packed> packed = BitMask::try_compress(values);
  if (!packed) return nullptr;
  return std::make_shared<CodecPayload<BitMask>>(std::move(*packed));
}

/// Integers in fewer bytes; null if their range needs all.
template <class = void>
[[nodiscard]] std::shared_ptr<const Payload> pack_narrow(const at::Tensor& values) {
  std::optional<NarrowInt::Packed> packed = NarrowInt::try_compress(values);
  if (!packed) return nullptr;
  return std::make_shared<CodecPayload<NarrowInt>>(std::move(*packed));
}

template <StochasticCodec C>
[[nodiscard]] std::shared_ptr<const Payload> pack_with(const at::Tensor& values, Key key) {
  return make_payload<C>(values, key);
}

template <class = void>
struct BasicActivationOptions {
  PackFunction pack = nullptr;  ///< null: what is not recomputed is held as it is
  /// For what attention, softmax and matrix products of two activations save, and for the inputs of
  /// checkpoints; null: they are held as they are.
  PackFunction pack_sensitive = nullptr;
  MaskFunction pack_mask = pack_bits<>;        ///< null: masks are packed or held like all else
  MaskFunction pack_integers = pack_narrow<>;  ///< null: integers are held as they are
  std::vector<std::string_view> recompute{};   ///< operators: "gelu", "mylib::op"; static strings
  int recompute_depth = 4;                     ///< operators that run again for one saved tensor
  std::int64_t min_numel = 1024;
  std::int64_t min_bytes = 4096;
  std::function<bool(const at::Tensor&)> keep{};  ///< true: held as it is
  /// The payload that a dense tensor was decompressed from, or null: it is saved in its stead.
  std::function<std::shared_ptr<const Payload>(const at::Tensor&)> payload_of{};
  std::shared_ptr<Offloading> offload{};  ///< null: nothing leaves memory
  std::shared_ptr<SavedPlan> plan{};      ///< null: everything is held as small as the rest says
};
using ActivationOptions = BasicActivationOptions<>;

}  // namespace fourfold::inline v0

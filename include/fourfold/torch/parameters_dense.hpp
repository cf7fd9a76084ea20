// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Plain values of packed tensors for operators that have no kernel of ours, and the one check that
/// every operator makes: what is packed is frozen.
#include <ATen/core/stack.h>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/parameters_range.hpp>

#include <vector>

namespace fourfold::door {

[[noreturn]] inline void refuse_gradient(const at::Tensor& packed, const Payload& payload) {
  TORCH_CHECK(!payload.factorised(), "requires_grad is on for a packed parameter (",
              payload.codec(), ", sizes ", packed.sizes(),
              "), but its trainable values are its factors: turn it off with requires_grad_(false) "
              "and give the optimizer fourfold::factors(module)");
  TORCH_CHECK(
      false, "requires_grad was turned on for a packed parameter (", payload.codec(), ", sizes ",
      packed.sizes(),
      "), which is frozen: no gradient would ever reach it. Leave it off, train its factors in its "
      "place with Weights<LowRank<R>>, or make it plain again with fourfold::decompress(module)");
}

/// A packed tensor takes no gradient. Where requires_grad was turned on past requires_grad_ (by
/// set_requires_grad), the next operator says so.
template <class = void>
void check_frozen(const at::Tensor& packed, const PackedHolder& holder) {
  if (packed.requires_grad() && at::GradMode::is_enabled())
    refuse_gradient(packed, *holder.payload());
}

/// Plain values of a packed tensor, view or whole, for reading.
template <class = void>
at::Tensor dense_of(const at::Tensor& packed) {
  PackedHolder* holder = packed_holder(packed);
  TORCH_INTERNAL_ASSERT(holder != nullptr);
  check_frozen(packed, *holder);
  const std::shared_ptr<const Payload> payload = holder->payload();
  if (is_whole(packed, *payload)) return dense_whole(payload);
  if (packed.is_contiguous() && packed.numel() < numel(*payload) && !payload->factorised() &&
      payload->device().is_cpu())
    return PayloadRange(payload, packed.storage_offset(), packed.sizes().vec()).decompress();
  return dense_whole(payload).as_strided(packed.sizes(), packed.strides(), packed.storage_offset());
}

template <class = void>
at::Tensor dense_if_packed(const at::Tensor& tensor) {
  return is_packed(tensor) ? dense_of(tensor) : tensor;
}

/// Writes to packed tensors of one operator call: each storage is decompressed once, so that views
/// and repeated arguments see each other, and compressed again at the end, or not at all.
template <class = void>
class BasicPackedWrites {
 public:
  /// The plain twin of `packed`: a view of the storage's plain values, to be written.
  at::Tensor open(const at::Tensor& packed) {
    PackedHolder* holder = packed_holder(packed);
    Write& write = writes_[packed.storage().unsafeGetStorageImpl()];
    if (!write.dense.defined()) {
      write.payload = holder->payload();
      const at::NoGradGuard no_grad;
      write.dense = write.payload->decompress().detach();
    }
    write.packed.push_back(packed);
    write.twins.push_back(
        write.dense.as_strided(packed.sizes(), packed.strides(), packed.storage_offset()));
    return write.twins.back();
  }

  /// The same for an argument that is only read, if its storage is also written.
  [[nodiscard]] at::Tensor read(const at::Tensor& packed) const {
    const Write* found = writes_.find(packed.storage().unsafeGetStorageImpl());
    if (found == nullptr) return dense_of(packed);
    return found->dense.as_strided(packed.sizes(), packed.strides(), packed.storage_offset());
  }

  [[nodiscard]] bool empty() const { return writes_.empty(); }

  /// Compresses all that was written, then lets every alias see it. Throws with nothing changed.
  void commit(const char* what) {
    std::vector<std::shared_ptr<const Payload>> made;
    writes_.for_each([&](const Write& write) {
      for (std::size_t i = 0; i < write.twins.size(); ++i) {
        const at::Tensor &twin = write.twins[i], &packed = write.packed[i];
        TORCH_CHECK(twin.sizes() == packed.sizes() && twin.strides() == packed.strides() &&
                        twin.is_alias_of(write.dense) && twin.scalar_type() == packed.scalar_type(),
                    what, " would change the sizes, strides or memory of a packed tensor (",
                    write.payload->codec(), ", sizes ", packed.sizes(), ", it would become ",
                    twin.sizes(),
                    "), which only its values may; nothing was changed. Use a view that is not in "
                    "place, a result of the right sizes, or fourfold::decompress(module) first");
        TORCH_CHECK(!twin.requires_grad(), what,
                    " would write values that require a gradient into "
                    "a packed tensor (",
                    write.payload->codec(), ", sizes ", packed.sizes(),
                    "), which is frozen; nothing was changed. detach() the values first");
      }
      const at::NoGradGuard no_grad;
      const PlaceGuard place(Place::kWeights);
      made.push_back(write.payload->compress(write.dense.detach()));
    });
    std::size_t next = 0;
    writes_.for_each([&](const Write& write) {
      replace(write.packed.front(), write.payload, made[next++]);
      if (!write.packed.front().is_inference())
        write.packed.front().unsafeGetTensorImpl()->bump_version();
    });
  }

  /// Puts `payload` where `before` was. Factors stay the tensors that an optimizer knows.
  static void replace(const at::Tensor& packed, const std::shared_ptr<const Payload>& before,
                      std::shared_ptr<const Payload> payload) {
    if (!before->factorised()) return packed_holder(packed)->replace(std::move(payload));
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < before->buffers().size(); ++i) {
      at::Tensor factor = before->buffers()[i];
      factor.copy_(payload->buffers()[i]);
    }
  }

 private:
  struct Write {
    std::shared_ptr<const Payload> payload;
    at::Tensor dense;
    std::vector<at::Tensor> packed, twins;
  };
  PointerMap<Write> writes_;
};
using PackedWrites = BasicPackedWrites<>;

}  // namespace fourfold::door

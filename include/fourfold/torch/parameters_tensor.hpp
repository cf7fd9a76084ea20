// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Tensors whose values are held by a Payload: made, recognised, read whole, swapped in place.
///
/// A packed tensor is a plain TensorImpl with the logical sizes, dtype and device; its key set also
/// has kPackedKey and its storage has no data, but a PackedHolder as context. Views share the
/// storage, so they are packed too, and a view's values are
/// payload.decompress().as_strided(sizes, strides, offset).
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/parameters_state.hpp>

#include <string>

namespace fourfold::door {

inline PackedHolder* packed_holder(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.key_set().has(kPackedKey) || !tensor.has_storage())
    return nullptr;
  return tensor.storage()
      .unsafeGetStorageImpl()
      ->_mutable_data_ptr_no_checks()
      .cast_context<PackedHolder>(parameters_state().delete_holder);
}

/// What holds the storage of `tensor` (of the whole storage, also where `tensor` is a view of it);
/// null if it is not packed.
template <class = void>
std::shared_ptr<const Payload> payload_of(const at::Tensor& tensor) {
  const PackedHolder* holder = packed_holder(tensor);
  return holder ? holder->payload() : nullptr;
}

inline bool is_packed(const at::Tensor& tensor) { return packed_holder(tensor) != nullptr; }

/// Whether `tensor` is its storage's payload, all of it and in its order.
template <class = void>
bool is_whole(const at::Tensor& tensor, const Payload& payload) {
  return tensor.storage_offset() == 0 && tensor.sizes() == payload.sizes() &&
         tensor.is_contiguous();
}

template <class = void>
std::int64_t numel(const Payload& payload) {
  return c10::multiply_integers(payload.sizes());
}

namespace detail {

template <class = void>
c10::Storage packed_storage(std::shared_ptr<const Payload> payload) {
  const auto bytes = static_cast<std::int64_t>(static_cast<std::size_t>(numel(*payload)) *
                                               c10::elementSize(payload->dtype()));
  const std::string codec = payload->codec();
  const at::Device device = payload->device();
  auto* holder = new PackedHolder(std::move(payload));
  c10::Storage storage(c10::Storage::use_byte_size_t{}, bytes,
                       at::DataPtr(nullptr, holder, parameters_state().delete_holder, device),
                       /*allocator=*/nullptr, /*resizable=*/false);
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "This tensor is held packed (" + codec +
      ") by fourfold, so there is no memory of plain values to point to: data_ptr and torch::save "
      "cannot read it. Use fourfold::decompress(tensor) or decompress(module) for plain values, "
      "and fourfold::save(module, path) to write a packed module to a file.");
  return storage;
}

template <class = void>
at::Tensor packed_view(const c10::Storage& storage, at::ScalarType dtype, at::IntArrayRef sizes,
                       at::IntArrayRef strides, std::int64_t offset, bool inference) {
  const c10::InferenceMode mode(inference);
  const c10::DispatchKeySet keys =
      at::empty({0}, at::TensorOptions(storage.device()).dtype(dtype)).key_set() |
      c10::DispatchKeySet(kPackedKey);
  at::Tensor packed = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys,
                                                               c10::scalarTypeToTypeMeta(dtype));
  packed.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return packed;
}

template <class = void>
at::Tensor packed_whole(std::shared_ptr<const Payload> payload, bool inference = false) {
  const std::vector<std::int64_t> sizes = payload->sizes().vec();
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<std::int64_t>(sizes[i], 1);
  const at::ScalarType dtype = payload->dtype();
  return packed_view(packed_storage(std::move(payload)), dtype, sizes, strides, 0, inference);
}

/// The geometry of `tensor` over another payload of the same sizes.
template <class = void>
at::Tensor packed_like(const at::Tensor& tensor, std::shared_ptr<const Payload> payload) {
  const at::ScalarType dtype = payload->dtype();
  return packed_view(packed_storage(std::move(payload)), dtype, tensor.sizes(), tensor.strides(),
                     tensor.storage_offset(), /*inference=*/false);
}

}  // namespace detail

/// `target` becomes `source`, packed or plain: every alias of its TensorImpl (member, dictionary,
/// user's own copy) sees it, a graph that saved it says that it was modified. Frozen afterwards.
template <class = void>
void swap_in_place(const at::Tensor& target, const at::Tensor& source) {
  target.set_requires_grad(false);
  target.mutable_grad().reset();
  target.unsafeGetTensorImpl()->shallow_copy_from(source.getIntrusivePtr());
  if (!target.is_inference()) target.unsafeGetTensorImpl()->bump_version();
}

/// Notes that `dense` holds just what `payload` decompresses to.
template <class = void>
void note_dense(const at::Tensor& dense, const std::shared_ptr<const Payload>& payload) {
  if (dense.is_inference() || !dense.has_storage()) return;
  ParametersState& state = parameters_state();
  const std::lock_guard lock(state.dense_mutex);
  if (state.dense.size() >= state.sweep_at) {
    state.dense.erase_if([](const DenseRecord& record) { return record.storage.expired(); });
    state.sweep_at = std::max<std::size_t>(64, 2 * state.dense.size());
  }
  c10::StorageImpl* storage = dense.storage().unsafeGetStorageImpl();
  state.dense.put(storage, {dense.storage().getWeakStorageImpl(), payload, dense._version()});
}

/// The payload that an operator of ours decompressed into the storage of `dense`, or null. Whoever
/// would keep `dense` (what autograd saves) keeps this in its place: the storage's values are
/// decompress(), and `dense` is a view of them. Null once `dense` was written to.
template <class = void>
std::shared_ptr<const Payload> payload_of_dense(const at::Tensor& dense) {
  if (!dense.defined() || !dense.has_storage() || dense.is_inference()) return nullptr;
  ParametersState& state = parameters_state();
  const std::lock_guard lock(state.dense_mutex);
  const DenseRecord* found = state.dense.find(dense.storage().unsafeGetStorageImpl());
  if (found == nullptr || found->storage.expired() || found->version != dense._version())
    return nullptr;
  return found->payload.lock();
}

/// Plain values of a payload, all of them; differentiable in its factors where it has any.
template <class = void>
at::Tensor dense_whole(const std::shared_ptr<const Payload>& payload) {
  if (payload->factorised() && at::GradMode::is_enabled())
    return at::matmul(payload->buffers()[0], payload->buffers()[1])
        .to(payload->dtype())
        .view(payload->sizes());
  at::Tensor dense = payload->decompress();
  note_dense(dense, payload);
  return dense;
}

}  // namespace fourfold::door

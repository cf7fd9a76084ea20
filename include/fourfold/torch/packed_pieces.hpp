// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Saved tensors that come back packed, and how a kernel reads them a piece at a time.
#include <ATen/core/Tensor.h>
#include <fourfold/torch/parameters_tensor.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

namespace fourfold::door {

/// What stands behind a packed tensor that autograd saved, in place of a parameter's payload.
class [[gnu::visibility("default")]] SavedPayload : public Payload {
 public:
  /// Whether its values are those that were saved, to the bit: then a sum over them is LibTorch's.
  [[nodiscard]] virtual bool exact() const = 0;
  /// Who reads it in pieces begins: the result, of so many bytes, takes the memory of the gradient
  /// that came in (0: it has its own). And ends.
  virtual void reading(std::int64_t overwritten) const = 0;
  virtual void read() const noexcept = 0;
};

namespace detail {

template <class = void>
std::shared_ptr<const Payload> saved_payload_of(const at::Tensor& tensor) {
  auto payload = payload_of(tensor);
  return dynamic_cast<const SavedPayload*>(payload.get()) != nullptr ? payload : nullptr;
}

/// Its plain values; any other tensor itself.
template <class = void>
at::Tensor plain_values(const at::Tensor& tensor) {
  const auto payload = payload_of(tensor);
  if (payload == nullptr) return tensor;
  return payload->decompress().as_strided(tensor.sizes(), tensor.strides(),
                                          tensor.storage_offset());
}

/// A packed tensor whose values lie in a row in its payload, as rows of `row` values.
struct PackedRows {
  std::shared_ptr<const Payload> payload;
  std::int64_t offset = 0, row = 1, rows = 0;
  std::int64_t at_once = 0;  ///< rows of a piece

  /// (last - first, row)
  [[nodiscard]] at::Tensor read(std::int64_t first, std::int64_t last) const {
    return payload->decompress(offset + first * row, offset + last * row).view({last - first, row});
  }
  /// f(first, count) for each piece; `overwritten`: see SavedPayload.
  template <class F>
  void for_each_piece(const F& f, std::int64_t overwritten = 0) const {
    const auto& saved = static_cast<const SavedPayload&>(*payload);
    saved.reading(overwritten);
    struct End {
      const SavedPayload& of;
      ~End() { of.read(); }
    } const end{saved};
    for (std::int64_t first = 0; first < rows; first += at_once)
      f(first, std::min(at_once, rows - first));
  }
};

/// `tensor` as rows of `row` values, pieces of about `values`; nothing where that cannot be: it is no
/// saved tensor, it is not contiguous, or no whole number of rows is a whole number of groups.
template <class = void>
std::optional<PackedRows> packed_rows(const at::Tensor& tensor, std::int64_t row,
                                      std::int64_t values) {
  PackedRows out{
      .payload = saved_payload_of(tensor), .offset = tensor.storage_offset(), .row = row};
  if (out.payload == nullptr || !tensor.is_contiguous() || row == 0) return std::nullopt;
  const std::int64_t granule = out.payload->granule();
  if (granule == 0 || out.offset % granule != 0) return std::nullopt;
  const std::int64_t step = granule / std::gcd(granule, row);
  out.rows = tensor.numel() / row;
  out.at_once = std::max<std::int64_t>(1, values / (row * step)) * step;
  if (out.at_once >= out.rows) return std::nullopt;  // the whole is one piece
  return out;
}

/// Whether nobody but the caller sees `gradient`, so that its memory may take the result. It is the
/// rule by which LibTorch's AccumulateGrad takes a gradient for the leaf's own: one reference; and
/// no other tensor shares its storage, but for the base that a view itself holds. A node that has
/// hooks, or whose input is captured, or retained, has copies of it.
template <class = void>
bool is_ours_to_write(const at::Tensor& gradient) {
  if (gradient.use_count() != 1 || !gradient.is_contiguous() || gradient.requires_grad() ||
      gradient.is_inference() || !gradient.has_storage())
    return false;
  const c10::StorageImpl& storage = *gradient.storage().unsafeGetStorageImpl();
  if (storage.allocator() == nullptr || !storage.resizable()) return false;  // memory of a user's
  std::size_t users = 1;
  if (gradient.is_view()) {
    const at::TensorBase& base = gradient._base();
    if (base.use_count() != 1) return false;
    users += base.is_alias_of(gradient);
  }
  return gradient.storage().use_count() == users;
}

}  // namespace detail
}  // namespace fourfold::door

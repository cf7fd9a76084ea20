// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Matrix products with packed tensors, differentiable in the other operand, any number of times:
/// x W^T and x W are each other's gradient, so neither needs x, and autograd keeps the payload.
#include <ATen/ops/matmul.h>
#include <fourfold/codec/packed_matmul.hpp>
#include <fourfold/torch/linear_map.hpp>
#include <fourfold/torch/parameters_range.hpp>

#include <optional>

namespace fourfold::door {

/// A matrix W (rows, columns) that lies in a row in a payload, or its transpose.
struct PackedMatrix {
  std::shared_ptr<const Payload> payload;  ///< W alone, sizes (rows, columns)
  bool transposed = false;                 ///< the tensor is W^T
};

namespace detail {

template <class = void>
at::Tensor plain_product(const at::Tensor& x, const Payload& weight, bool transposed) {
  return transposed ? packed_linear(x, weight) : packed_matmul(x, weight);
}

/// x W^T if `transposed`, else x W. x (M, ...).
template <class = void>
at::Tensor product(const at::Tensor& x, const std::shared_ptr<const Payload>& weight,
                   bool transposed) {
  return linear_map(
      "PackedProductBackward", x,
      [&](const at::Tensor& plain) { return plain_product(plain, *weight, transposed); },
      [=](const at::Tensor& gradient) { return product(gradient, weight, !transposed); });
}

}  // namespace detail

/// `tensor` as a matrix of consecutive rows of its payload, or the transpose of one.
template <class = void>
std::optional<PackedMatrix> packed_matrix(const at::Tensor& tensor) {
  const auto whole = payload_of(tensor);
  if (!whole || tensor.dim() != 2 || tensor.numel() == 0) return std::nullopt;
  const std::int64_t offset = tensor.storage_offset();
  for (const bool transposed : {false, true}) {
    const int row = transposed ? 1 : 0;
    const std::int64_t rows = tensor.size(row), columns = tensor.size(1 - row);
    if ((tensor.stride(1 - row) == 1 || columns == 1) &&
        (tensor.stride(row) == columns || rows == 1))
      if (auto range = payload_range(whole, offset, {rows, columns}))
        return PackedMatrix{std::move(range), transposed};
  }
  return std::nullopt;
}

/// x W (or x W^T), W packed; by two products where W is factorised, and never by their product.
template <class = void>
at::Tensor multiply(const at::Tensor& x, const PackedMatrix& weight) {
  TORCH_CHECK(x.scalar_type() == weight.payload->dtype(),
              "expected both matrices to have one dtype, but got ", c10::toString(x.scalar_type()),
              " and a packed ", c10::toString(weight.payload->dtype()), "; convert one with to()");
  if (weight.payload->factorised()) {
    const at::Tensor left = weight.payload->buffers()[0].to(x.scalar_type());
    const at::Tensor right = weight.payload->buffers()[1].to(x.scalar_type());
    return weight.transposed ? at::matmul(at::matmul(x, right.t()), left.t())
                             : at::matmul(at::matmul(x, left), right);
  }
  return detail::product(x, weight.payload, /*transposed=*/weight.transposed);
}

}  // namespace fourfold::door

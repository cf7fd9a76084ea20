// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The operators that read codes, in place of plain values, and those that keep a tensor packed.
///
/// Autocast lies below the key. Where it is on, an operator on its list goes to it first: it casts,
/// which changes a packed tensor's logical dtype alone, and comes back with autocast off.
#include <ATen/ops/_to_copy_ops.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/convolution_ops.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mv_ops.h>
#include <ATen/ops/to_ops.h>
#include <fourfold/core/parallel.hpp>
#include <fourfold/torch/autocast.hpp>  // at::autocast::is_autocast_enabled
#include <fourfold/torch/parameters_convolution.hpp>
#include <fourfold/torch/parameters_dense.hpp>
#include <fourfold/torch/parameters_hooks.hpp>

#include <optional>

namespace fourfold::door::detail {

template <class = void>
bool autocasts(const at::Tensor& tensor) {
  return at::autocast::is_autocast_enabled(tensor.device().type());
}

template <class = void>
void check_frozen(const at::Tensor& tensor) {
  if (PackedHolder* holder = packed_holder(tensor)) door::check_frozen(tensor, *holder);
}

template <class = void>
at::Tensor product_of(const at::Tensor& a, const at::Tensor& b) {
  check_frozen(a), check_frozen(b);
  if (a.layout() != at::kStrided || b.layout() != at::kStrided)
    return at::mm(dense_if_packed(a), dense_if_packed(b));
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "mat1 and mat2 shapes cannot be multiplied (", a.sizes(), " and ", b.sizes(), ")");
  if (const auto weight = packed_matrix(b)) return multiply(dense_if_packed(a), *weight);
  const auto weight = packed_matrix(a);
  if (!weight) return at::mm(dense_if_packed(a), dense_if_packed(b));
  // W b = (b^T W^T)^T, in row-major order as LibTorch's
  return multiply(dense_if_packed(b).t(), PackedMatrix{weight->payload, !weight->transposed})
      .t()
      .contiguous();
}

template <class = void>
at::Tensor mm(c10::DispatchKeySet keys, const at::Tensor& a, const at::Tensor& b) {
  if (autocasts(a)) return at::_ops::mm::redispatch(keys & kBelowPackedKey, a, b);
  return product_of(a, b);
}

template <class = void>
at::Tensor mv(c10::DispatchKeySet keys, const at::Tensor& a, const at::Tensor& v) {
  if (autocasts(a)) return at::_ops::mv::redispatch(keys & kBelowPackedKey, a, v);
  return product_of(a, v.unsqueeze(-1)).squeeze(-1);
}

template <class = void>
at::Tensor addmm(c10::DispatchKeySet keys, const at::Tensor& self, const at::Tensor& a,
                 const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  if (autocasts(a))
    return at::_ops::addmm::redispatch(keys & kBelowPackedKey, self, a, b, beta, alpha);
  at::Tensor made = product_of(a, b);
  if (!alpha.equal(1)) made = made.mul(alpha);
  if (beta.equal(0)) return made;
  check_frozen(self);
  const at::Tensor added = dense_if_packed(self);
  TORCH_CHECK(added.scalar_type() == made.scalar_type(),
              "self and mat2 must have the same dtype, but got ",
              c10::toString(added.scalar_type()), " and ", c10::toString(made.scalar_type()));
  return packed_matrix(b) ? made.add_(added.expand(made.sizes()), beta)
                          : made.add(added.expand(made.sizes()), beta);
}

/// x (B, M, ...), weight (B, N, K). One matrix of the batch is multiplied at a time, so at most one
/// is decoded.
template <class = void>
at::Tensor batch_product(const at::Tensor& x, const std::shared_ptr<const Payload>& weight,
                         bool transposed) {
  const std::int64_t rows = weight->sizes()[1], columns = weight->sizes()[2];
  return linear_map(
      "PackedBatchBackward", x,
      [&](const at::Tensor& plain) {
        const at::Tensor out =
            at::empty({plain.size(0), plain.size(1), transposed ? rows : columns}, plain.options());
        for (std::int64_t b = 0; b < plain.size(0); ++b)
          out.select(0, b).copy_(
              plain_product(plain.select(0, b),
                            PayloadRange(weight, b * rows * columns, {rows, columns}), transposed));
        return out;
      },
      [=](const at::Tensor& gradient) { return batch_product(gradient, weight, !transposed); });
}

/// Whether `tensor` (B, N, K) is a whole packed batch (or each of its matrices transposed).
template <class = void>
std::optional<bool> transposed_batch(const at::Tensor& tensor) {
  const auto payload = payload_of(tensor);
  if (!payload || tensor.dim() != 3 || payload->factorised() || tensor.numel() == 0)
    return std::nullopt;
  if (is_whole(tensor, *payload)) return false;
  const at::Tensor turned = tensor.transpose(1, 2);
  if (is_whole(turned, *payload)) return true;
  return std::nullopt;
}

template <class = void>
at::Tensor bmm(c10::DispatchKeySet keys, const at::Tensor& a, const at::Tensor& b) {
  if (autocasts(a)) return at::_ops::bmm::redispatch(keys & kBelowPackedKey, a, b);
  check_frozen(a), check_frozen(b);
  const bool fits = a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) &&
                    a.size(2) == b.size(1) && a.scalar_type() == b.scalar_type() &&
                    a.layout() == at::kStrided && b.layout() == at::kStrided;
  if (fits)
    if (const auto transposed = transposed_batch(b))
      return batch_product(dense_if_packed(a), payload_of(b), *transposed);
  if (fits)
    if (const auto transposed = transposed_batch(a))
      return batch_product(dense_if_packed(b).transpose(1, 2), payload_of(a), !*transposed)
          .transpose(1, 2)
          .contiguous();
  return at::bmm(dense_if_packed(a),
                 dense_if_packed(b));  // LibTorch's own words where they do not fit
}

template <class = void>
at::Tensor convolution_kernel(c10::DispatchKeySet keys, const at::Tensor& x,
                              const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation, bool transposed,
                              at::IntArrayRef output_padding, std::int64_t groups) {
  if (autocasts(x))
    return at::_ops::convolution::redispatch(
        keys & kBelowPackedKey, x, weight, bias, c10::fromIntArrayRefSlow(stride),
        c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), transposed,
        c10::fromIntArrayRefSlow(output_padding), groups);
  check_frozen(x), check_frozen(weight);
  const at::Tensor input = dense_if_packed(x);
  const at::Tensor added = bias && bias->defined() ? dense_if_packed(*bias) : at::Tensor();
  const auto payload = payload_of(weight);
  const auto spatial = static_cast<std::size_t>(std::max<std::int64_t>(weight.dim() - 2, 0));
  // What LibTorch would refuse, it refuses in its own words, given plain values.
  const bool ours = payload && is_whole(weight, *payload) && spatial >= 1 && spatial <= 3 &&
                    input.dim() == weight.dim() && input.scalar_type() == weight.scalar_type() &&
                    stride.size() == spatial && padding.size() == spatial &&
                    dilation.size() == spatial && output_padding.size() == spatial && groups > 0 &&
                    weight.size(0) % groups == 0 &&
                    input.size(1) == (transposed ? weight.size(0) : weight.size(1) * groups) &&
                    weight.numel() > 0 && input.numel() > 0;
  if (!ours)
    return at::convolution(input, dense_if_packed(weight), added, stride, padding, dilation,
                           transposed, output_padding, groups);
  const ConvolutionShape shape{stride.vec(),         padding.vec(), dilation.vec(),
                               output_padding.vec(), transposed,    groups};
  const at::Tensor made = payload->factorised() ? factorised_convolution(input, *payload, shape)
                                                : convolution(input, payload, shape);
  if (!added.defined()) return made;
  std::vector<std::int64_t> channels(spatial + 2, 1);
  channels[1] = -1;
  return made.add(added.view(channels));
}

/// Rows of a packed table, each decoded where it is asked for; the table is frozen, so there is
/// nothing to differentiate. Codes that are shared by a group of rows are read once a row.
template <class = void>
at::Tensor gather_rows(const Payload& table, const at::Tensor& indices) {
  const std::int64_t rows = table.sizes()[0], columns = table.sizes()[1];
  TORCH_CHECK(indices.is_cpu(), "embedding: the packed table is on the CPU and the indices on ",
              indices.device(), "; move one of them with to()");
  const at::Tensor which = indices.to(at::kLong).contiguous();
  std::vector<std::int64_t> sizes = indices.sizes().vec();
  sizes.push_back(columns);
  const at::Tensor out = at::empty(sizes, at::kFloat);
  const std::int64_t* row = which.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < which.numel(); ++i)
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < rows, "index out of range in self: ", row[i],
                      " in a packed table of ", rows, " rows");
  float* values = out.data_ptr<float>();
  parallel_for(0, which.numel(), std::max<std::int64_t>(1, 4096 / columns),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i)
                   table.decode(row[i] * columns, (row[i] + 1) * columns, values + i * columns);
               });
  return out.to(table.dtype());
}

template <class = void>
at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, std::int64_t padding_idx,
                     bool scale_grad_by_freq, bool sparse) {
  check_frozen(weight);
  const auto table = packed_matrix(weight);
  const at::Tensor which = dense_if_packed(indices);
  const bool integers = which.scalar_type() == at::kLong || which.scalar_type() == at::kInt;
  if (!table || table->transposed || !integers)
    return at::embedding(dense_if_packed(weight), which, padding_idx, scale_grad_by_freq, sparse);
  if (table->payload->factorised()) {
    const std::vector<at::Tensor>& factors = table->payload->buffers();
    return at::matmul(at::embedding(factors[0], which, padding_idx, scale_grad_by_freq, sparse),
                      factors[1])
        .to(table->payload->dtype());
  }
  if (!weight.device().is_cpu())
    return at::embedding(dense_if_packed(weight), which, padding_idx, scale_grad_by_freq, sparse);
  return gather_rows(*table->payload, which);
}

/// The same values, their factors (if any) their own and leaves.
template <class = void>
std::shared_ptr<const Payload> independent(const std::shared_ptr<const Payload>& payload,
                                           at::Device device, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const PlaceGuard place(Place::kWeights);
  if (!payload->factorised()) return payload->to(device, dtype);
  std::vector<at::Tensor> factors;
  for (const at::Tensor& factor : payload->buffers())
    factors.push_back(factor.to(device, factor.scalar_type(), /*non_blocking=*/false, /*copy=*/true)
                          .set_requires_grad(factor.requires_grad()));
  return payload->with_buffers(std::move(factors))->to(device, dtype);
}

template <class = void>
at::Tensor keep_packed(const at::Tensor& packed, const std::shared_ptr<const Payload>& payload) {
  at::Tensor made = packed_like(packed, payload);
  packed_holder(made)->was_trainable = packed_holder(packed)->was_trainable.load();
  return made;
}

/// Packed where the result would have the strides of `self` and hold no more values than it shows.
template <class = void>
bool may_stay_packed(const at::Tensor& self, std::optional<at::MemoryFormat> format) {
  const auto payload = payload_of(self);
  const at::MemoryFormat wanted = format.value_or(at::MemoryFormat::Preserve);
  return payload && self.numel() == numel(*payload) && self.is_non_overlapping_and_dense() &&
         (wanted == at::MemoryFormat::Preserve || self.is_contiguous(wanted));
}

template <class = void>
at::Tensor clone(const at::Tensor& self, std::optional<at::MemoryFormat> format) {
  check_frozen(self);
  if (!may_stay_packed(self, format)) return at::_ops::clone::call(dense_of(self), format);
  const auto payload = payload_of(self);
  return keep_packed(self, independent(payload, payload->device(), payload->dtype()));
}

template <class = void>
at::Tensor to_copy(const at::Tensor& self, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout> layout, std::optional<at::Device> device,
                   std::optional<bool> pin_memory, bool non_blocking,
                   std::optional<at::MemoryFormat> format) {
  check_frozen(self);
  const at::ScalarType wanted = dtype.value_or(self.scalar_type());
  const bool known = wanted == at::kFloat || wanted == at::kBFloat16 || wanted == at::kHalf ||
                     wanted == at::kDouble;
  if (!known || !may_stay_packed(self, format) || layout.value_or(at::kStrided) != at::kStrided ||
      device.value_or(self.device()).is_meta())
    return at::_ops::_to_copy::call(dense_of(self), dtype, layout, device, pin_memory, non_blocking,
                                    format);
  const at::Device where = device.value_or(self.device());
  const auto payload = payload_of(self);
  const at::NoGradGuard no_grad;
  const PlaceGuard place(Place::kWeights);
  if (payload->factorised() && where != payload->device())
    return keep_packed(self, independent(payload, where, wanted));
  return keep_packed(self, payload->to(where, wanted));
}

/// Printing a tensor asks for to(device, Double) and points into the result, so that gives plain
/// values; Module::to(dtype) and to(device) come by other overloads.
template <class = void>
at::Tensor to_device(c10::DispatchKeySet keys, const at::Tensor& self, at::Device device,
                     at::ScalarType dtype, bool non_blocking, bool copy,
                     std::optional<at::MemoryFormat> format) {
  if (dtype == at::kDouble && self.scalar_type() != at::kDouble && is_packed(self))
    return at::_ops::to_device::call(dense_of(self), device, dtype, non_blocking, copy, format);
  return at::_ops::to_device::redispatch(keys & kBelowPackedKey, self, device, dtype, non_blocking,
                                         copy, format);
}

/// What torch::load does to a parameter: its values are written, it stays packed.
template <class = void>
at::Tensor& set_source(at::Tensor& self, const at::Tensor& source) {
  if (!is_packed(self)) return self.set_(dense_of(source));
  TORCH_CHECK(source.sizes() == self.sizes(),
              "set_ (torch::load) would give a packed parameter of sizes ", self.sizes(),
              " the sizes ", source.sizes(),
              "; nothing was changed. Load into a model of the same sizes, or use "
              "fourfold::decompress(module) first");
  TORCH_CHECK(!source.is_complex(),
              "set_ (torch::load) would write complex values into a packed "
              "parameter of dtype ",
              c10::toString(self.scalar_type()), "; nothing was changed");
  const at::NoGradGuard no_grad;
  return self.copy_(source);
}

template <class = void>
at::Tensor& require_gradient(at::Tensor& self, bool requires_grad) {
  require_gradient_of(self, requires_grad);
  return self;
}

}  // namespace fourfold::door::detail

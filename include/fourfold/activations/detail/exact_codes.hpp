// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Exact codes that follow from the operator that saves a tensor: the offsets of max_pool's indices,
/// and what the backward of hardtanh and threshold asks of their input.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/threshold_backward.h>
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/activations/detail/tape.hpp>
#include <fourfold/codec/narrow_int.hpp>
#include <fourfold/codec/pool_offsets.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// Indices that max_pool2d_with_indices or max_pool3d_with_indices is about to return, (..., rows,
/// columns) or with channels last. Null where they fit no byte.
template <class Frame>
std::shared_ptr<const Payload> pack_pool(const at::Tensor& indices, const Frame& frame) {
  constexpr std::size_t kInput = 0, kKernel = 1, kStride = 2, kPadding = 3, kDilation = 4;
  if (frame.tensors.empty() || frame.arguments.size() <= kDilation) return nullptr;
  const std::int64_t dims = frame.traits->pools;
  const at::Tensor& input = frame.tensors[kInput];
  if (input.dim() != indices.dim() || input.dim() < dims) return nullptr;
  PoolWindows windows;
  const auto list = [&](std::size_t argument, std::array<std::int64_t, 3>& out) {
    const std::vector<std::int64_t> given = frame.arguments[argument].toIntVector();
    if (given.empty()) return false;
    for (std::int64_t i = 0; i < dims; ++i)
      out[static_cast<std::size_t>(3 - dims + i)] =
          given.size() == 1 ? given[0] : given.at(static_cast<std::size_t>(i));
    return true;
  };
  list(kKernel, windows.kernel), list(kPadding, windows.padding);
  list(kDilation, windows.dilation);
  if (!list(kStride, windows.stride)) windows.stride = windows.kernel;
  for (std::int64_t i = 0; i < dims; ++i) {
    const auto at = static_cast<std::size_t>(3 - dims + i);
    windows.input[at] = input.size(i - dims), windows.output[at] = indices.size(i - dims);
  }
  at::Tensor flat = indices;
  if (!indices.is_contiguous()) {
    const bool batched = indices.dim() == dims + 2;
    const auto last = dims == 2 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
    if (!batched || !indices.is_contiguous(last)) return nullptr;
    windows.inner = indices.size(1);
    flat = indices.as_strided({indices.numel()}, {1});
  }
  return pack_pool_indices(flat, windows);
}

/// One bit a value for an operator whose backward lets a gradient pass where its input lies in an
/// interval, and stops it elsewhere: hardtanh, relu6, threshold. What passes is asked of that
/// backward itself, and so are the two values that stand for it: 0 and one that is told apart.
/// Null where no value is. For its node alone, since these are not the tensor's values.
template <class Frame>
std::shared_ptr<const Payload> pack_gate(const at::Tensor& values, const Frame& frame,
                                         MaskFunction pack_mask) {
  const auto passes = [&](const at::Tensor& of) {
    const at::Tensor one = at::ones({}, of.options()).expand_as(of);
    return frame.traits->gate == OperatorTraits::Gate::kThreshold
               ? at::threshold_backward(one, of, frame.arguments.at(1).toScalar())
               : at::hardtanh_backward(one, of, frame.arguments.at(1).toScalar(),
                                       frame.arguments.at(2).toScalar());
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> stand_ins{0, -kInfinity, kInfinity};
  if (frame.traits->gate == OperatorTraits::Gate::kInterval)
    stand_ins.push_back(frame.arguments.at(1).toScalar().toDouble() / 2 +
                        frame.arguments.at(2).toScalar().toDouble() / 2);
  at::Tensor candidates = at::tensor(stand_ins, at::kDouble).to(values.scalar_type());
  const at::Tensor open = passes(candidates).to(at::kFloat);
  const float* pass = open.const_data_ptr<float>();
  std::size_t other = 1;
  while (other < stand_ins.size() && pass[other] == pass[0]) ++other;
  if (other == stand_ins.size()) return nullptr;
  // Bits say where the other value stands: where a gradient passes, if it does not pass at 0.
  at::Tensor stands = passes(values);
  if (pass[0] != 0) stands = at::rsub(stands, 1);
  const std::shared_ptr<const Payload> bits = pack_mask(stands);
  if (bits == nullptr) return nullptr;
  return bits->with_buffers(
      {bits->buffers().at(0), candidates.narrow(0, static_cast<std::int64_t>(other), 1)
                                  .to(values.device(), /*non_blocking=*/false, /*copy=*/true)});
}

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Door two: parameters held packed, in place, in any module.
///
///   at::Tensor packed = fourfold::door::packed_tensor(make_payload<Int8>(weight));
///   at::mm(x, packed.t());            // reads codes; any other operator gets plain values
///
/// Opened by the first packed tensor (never at static initialisation): a boxed fallback and a few
/// kernels are registered on LibTorch's TESTING_ONLY_GenericWrapper key, once in a process, some of
/// them by packed_backward.hpp. What leads there is a template: a program without packed parameters
/// does not compile the wrappers.
#include <fourfold/torch/packed_backward.hpp>
#include <fourfold/torch/parameters_fallback.hpp>
#include <fourfold/torch/parameters_kernels.hpp>

namespace fourfold::door {

namespace detail {

template <class = void>
void register_packed_kernels() {
  open_packed_backward();
  ParametersState& state = parameters_state();
  state.fallback.store(&packed_fallback<>);
  state.mm.store(&mm<>);
  register_packed_kernel("aten::mv", "", &mv<>);
  register_packed_kernel("aten::addmm", "", &addmm<>);
  register_packed_kernel("aten::bmm", "", &bmm<>);
  register_packed_kernel("aten::convolution", "", &convolution_kernel<>);
  register_packed_kernel("aten::embedding", "", &embedding<>);
  register_packed_kernel("aten::clone", "", &clone<>);
  register_packed_kernel("aten::_to_copy", "", &to_copy<>);
  register_packed_kernel("aten::to", "device", &to_device<>);
  register_packed_kernel("aten::set_", "source_Tensor", &set_source<>);
  register_packed_kernel("aten::requires_grad_", "", &require_gradient<>);
  install_frozen_hooks();
}

}  // namespace detail

/// Registers once. Nothing to do for whoever uses packed_tensor.
template <class = void>
void open_parameters_door() {
  ParametersState& state = parameters_state();
  if (state.open.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(state.opening);
  if (state.open.load(std::memory_order_relaxed)) return;
  detail::register_packed_kernels();
  state.open.store(true, std::memory_order_release);
}

/// A tensor of the payload's sizes, dtype and device that holds it; contiguous, no gradient.
template <class = void>
[[nodiscard]] at::Tensor packed_tensor(std::shared_ptr<const Payload> payload,
                                       bool inference = false) {
  TORCH_CHECK(payload != nullptr, "packed_tensor takes a payload, got a null pointer");
  open_parameters_door();
  return detail::packed_whole(std::move(payload), inference);
}

}  // namespace fourfold::door

namespace fourfold::inline v0 {

/// Plain values of a tensor that is held packed (a view or a whole one); any other tensor itself.
template <class = void>
[[nodiscard]] at::Tensor decompress(const at::Tensor& tensor) {
  return door::is_packed(tensor) ? door::dense_of(tensor) : tensor;
}

}  // namespace fourfold::inline v0

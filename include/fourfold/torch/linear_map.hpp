// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Linear maps whose gradient is their adjoint: autograd needs to keep nothing of x, and the
/// adjoint, written by the same means, is differentiable again. A node of its own, since
/// torch::autograd::Function costs each translation unit some 80 ms for each function.
#include <ATen/core/grad_mode.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <fourfold/torch/node.hpp>

#include <functional>
#include <string>
#include <utility>

namespace fourfold::door {

/// dx of dy; differentiable in dy.
using Adjoint = std::function<at::Tensor(const at::Tensor& gradient)>;

namespace detail {

template <class = void>
class BasicLinearMapBackward final : public Node {
 public:
  BasicLinearMapBackward(const char* name, Adjoint adjoint)
      : name_(name), adjoint_(std::move(adjoint)) {}
  std::string name() const override { return name_; }

 private:
  ::torch::autograd::variable_list apply(::torch::autograd::variable_list&& gradients) override {
    if (!gradients[0].defined() || !task_should_compute_output(0)) return {at::Tensor()};
    return {adjoint_(gradients[0])};
  }

  const char* name_;
  Adjoint adjoint_;
};
using LinearMapBackward = BasicLinearMapBackward<>;

}  // namespace detail

/// map(x), which autograd knows by its adjoint alone.
template <class = void>
at::Tensor linear_map(const char* name, const at::Tensor& x,
                      c10::function_ref<at::Tensor(const at::Tensor& x)> map, Adjoint adjoint) {
  TORCH_CHECK_NOT_IMPLEMENTED(!::torch::autograd::isFwGradDefined(x), name,
                              " has no forward-mode derivative; use backward, or "
                              "fourfold::decompress(module) first");
  if (!at::GradMode::is_enabled() || !x.requires_grad()) return map(x);
  const NodePtr node = make_node<detail::LinearMapBackward>(name, std::move(adjoint));
  node->set_next_edges(::torch::autograd::collect_next_edges(x));
  at::Tensor y;
  {
    const at::NoGradGuard no_grad;
    y = map(x);
  }
  ::torch::autograd::set_history(y, node);
  return y;
}

}  // namespace fourfold::door

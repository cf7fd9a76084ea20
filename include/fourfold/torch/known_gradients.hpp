// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A value whose gradients were computed along with it, so that backward has only to scale them.
/// They are the node's own: no packer of saved tensors sees them, and the last backward gives them
/// away.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <fourfold/torch/node.hpp>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::door {

namespace detail {

template <class = void>
class BasicKnownGradientsBackward final : public Node {
 public:
  BasicKnownGradientsBackward(const char* name, at::Tensor factor,
                              ::torch::autograd::variable_list gradients,
                              std::vector<at::ScalarType> dtypes)
      : name_(name),
        factor_(std::move(factor)),
        gradients_(std::move(gradients)),
        dtypes_(std::move(dtypes)) {}
  std::string name() const override { return name_; }

 private:
  void will_release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = true;
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients_.clear();
    released_ = true;
  }

  ::torch::autograd::variable_list apply(::torch::autograd::variable_list&& scale) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool last = std::exchange(last_, false);
    TORCH_CHECK(!released_, ::torch::autograd::ERR_BACKWARD_TWICE);
    TORCH_CHECK(!at::GradMode::is_enabled(), name_,
                " has no second derivative: its gradients are computed once, in forward; for "
                "create_graph use fourfold::chunked with the loss in LibTorch's operators");
    ::torch::autograd::variable_list own = last ? std::exchange(gradients_, {}) : gradients_;
    if (last) released_ = true;
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (!scale[0].defined() || !task_should_compute_output(i)) own[i].reset();
      if (!own[i].defined()) continue;
      // In the factor's type, fp32 or wider: a loss scale is beyond fp16, and so is what it lifts.
      const at::Tensor by = scale[0].to(factor_.scalar_type()).mul(factor_);
      const bool ours = last && own[i].scalar_type() == by.scalar_type();
      own[i] = (ours ? own[i].mul_(by) : own[i].to(by.scalar_type()).mul(by)).to(dtypes_[i]);
    }
    return own;
  }

  const char* name_;
  const at::Tensor factor_;
  ::torch::autograd::variable_list gradients_;
  const std::vector<at::ScalarType> dtypes_;
  bool last_ = false, released_ = false;
};
using KnownGradientsBackward = BasicKnownGradientsBackward<>;

}  // namespace detail

/// `value`, a scalar, as a function of `inputs`, whose gradients are `factor` (one value, fp32 or
/// fp64) times these (undefined: none is needed), and come in the inputs' dtypes.
template <class = void>
at::Tensor with_gradients(const char* name, at::Tensor value, const std::vector<at::Tensor>& inputs,
                          at::Tensor factor, std::vector<at::Tensor> gradients) {
  std::vector<at::ScalarType> dtypes;
  for (const at::Tensor& input : inputs)
    dtypes.push_back(input.defined() ? input.scalar_type() : at::kFloat);
  const NodePtr node = make_node<detail::KnownGradientsBackward>(
      name, std::move(factor), std::move(gradients), std::move(dtypes));
  node->set_next_edges(::torch::autograd::collect_next_edges(inputs));
  ::torch::autograd::set_history(value, node);
  return value;
}

}  // namespace fourfold::door

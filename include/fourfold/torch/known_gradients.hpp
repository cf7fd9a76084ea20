// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A value whose gradients were computed along with it, so that backward has only to scale them.
/// They are the node's own: no packer of saved tensors sees them, and the last backward gives them
/// away.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <fourfold/torch/node.hpp>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::door {

namespace detail {

class KnownGradientsBackward final : public Node {
 public:
  KnownGradientsBackward(const char* name, ::torch::autograd::variable_list gradients)
      : name_(name), gradients_(std::move(gradients)) {}
  std::string name() const override { return name_; }

 private:
  void will_release_variables() override { last_ = true; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradients_.clear();
    released_ = true;
  }

  ::torch::autograd::variable_list apply(::torch::autograd::variable_list&& scale) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, ::torch::autograd::ERR_BACKWARD_TWICE);
    TORCH_CHECK(!at::GradMode::is_enabled(), name_,
                " has no second derivative: its gradients are computed once, in forward; for "
                "create_graph use fourfold::chunked with the loss in LibTorch's operators");
    ::torch::autograd::variable_list out(gradients_.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (!gradients_[i].defined() || !scale[0].defined() || !task_should_compute_output(i))
        continue;
      const at::Tensor by = scale[0].to(gradients_[i].scalar_type());
      out[i] = last_ ? std::move(gradients_[i]).mul_(by) : gradients_[i].mul(by);
    }
    return out;
  }

  const char* name_;
  ::torch::autograd::variable_list gradients_;
  bool last_ = false, released_ = false;
};

}  // namespace detail

/// `value`, a scalar, as a function of `inputs` with these gradients (undefined: none is needed).
template <class = void>
at::Tensor with_gradients(const char* name, at::Tensor value, const std::vector<at::Tensor>& inputs,
                          std::vector<at::Tensor> gradients) {
  const NodePtr node = make_node<detail::KnownGradientsBackward>(name, std::move(gradients));
  node->set_next_edges(::torch::autograd::collect_next_edges(inputs));
  ::torch::autograd::set_history(value, node);
  return value;
}

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The backward pass that this thread works for.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <fourfold/torch/node.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

namespace fourfold::door {

/// Its number, or -1 outside of backward. Two passes never share one.
inline int current_graph_task() { return torch::autograd::get_current_graph_task_id(); }

/// How many graph nodes this thread made so far: tensors saved at one count belong to one operator.
inline std::uint64_t nodes_made() { return at::sequence_number::peek(); }

/// Runs `callback` when the pass ends without an error; only inside one.
template <class = void>
void at_end_of_graph_task(std::function<void()> callback) {
  torch::autograd::Engine::get_default_engine().queue_callback(std::move(callback));
}

/// The values of `tensor` as another tensor that asks for gradients: a leaf, or in the middle of a
/// graph whose other side is not there (so that it may be written to in place, as a leaf may not).
template <class = void>
at::Tensor with_gradient(const at::Tensor& tensor, bool leaf) {
  at::Tensor result;
  {
    const at::NoGradGuard no_grad;
    result = tensor.detach();
  }
  if (leaf) return result.requires_grad_(true);
  const NodePtr node = make_node<torch::autograd::Identity>();
  node->add_next_edge(torch::autograd::Edge());  // its gradient goes nowhere
  torch::autograd::create_gradient_edge(result, node);
  return result;
}

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A node of autograd's graph and its handle: LibTorch counts nodes by std::shared_ptr in 2.11, and by
/// c10::intrusive_ptr in 2.15.
#include <ATen/core/TensorBase.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace fourfold::door {

using Node = ::torch::autograd::Node;
using NodePtr = std::remove_cvref_t<decltype(std::declval<const at::TensorBase&>().grad_fn())>;
inline constexpr bool kSharedNodes = std::is_same_v<NodePtr, std::shared_ptr<Node>>;
using WeakNodePtr =
    std::conditional_t<kSharedNodes, std::weak_ptr<Node>, c10::weak_intrusive_ptr<Node>>;

template <class N, class... Arguments>
NodePtr make_node(Arguments&&... arguments) {
  if constexpr (kSharedNodes)  // deleteNode takes long chains of nodes apart without recursion
    return NodePtr(new N(std::forward<Arguments>(arguments)...),
                   [](auto* node) { deleteNode(node); });
  else
    return NodePtr(c10::make_intrusive<N>(std::forward<Arguments>(arguments)...));
}

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Which of autograd's nodes may be given a saved tensor that is still packed: LibTorch's own whose
/// backward is one of the operators of packed_backward.hpp. A custom Function hands what it saved to
/// its author, who may ask for data_ptr: it, and every node that is not named here, gets plain
/// values.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <fourfold/torch/autocast.hpp>

#include <algorithm>
#include <array>
#include <string_view>
#include <typeinfo>

namespace fourfold::door {

/// Whether the node that this thread evaluates just now takes packed tensors. Not where a graph of
/// the backward itself is made (create_graph), nor under autocast, which would cast them.
template <class = void>
bool node_takes_packed() {
  if (at::GradMode::is_enabled()) return false;
  const auto node = torch::autograd::get_current_node();
  if (node == nullptr) return false;
  if (autocasting()) return false;
  constexpr auto kNodes = std::to_array<std::string_view>(
      {"MmBackward0", "AddmmBackward0", "GeluBackward0", "SiluBackward0", "ReluBackward0",
       "ThresholdBackward0", "NativeLayerNormBackward0", "SoftmaxBackward0",
       "LogSoftmaxBackward0"});
  // By the names of their types: the header that declares them takes seconds to compile.
  const auto& type = *node;
  const std::string_view name = typeid(type).name();
  constexpr std::string_view kPrefix = "N5torch8autograd9generated";
  if (!name.starts_with(kPrefix) || !name.ends_with("E")) return false;
  std::string_view rest = name.substr(kPrefix.size());
  rest.remove_prefix(std::min(rest.find_first_not_of("0123456789"), rest.size()));
  rest.remove_suffix(1);
  return std::find(kNodes.begin(), kNodes.end(), rest) != kNodes.end();
}

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A chain of modules in checkpointed segments: what is held between them is the segments' inputs.
///
///   auto y = fourfold::checkpoint_sequential(sequential, /*segments=*/3, x);
///   auto y = fourfold::checkpoint_sequential<Block>(module_list, 3, x);   // children's forward(x)
#include <c10/util/Type.h>  // demangle
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <fourfold/activations/checkpoint.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

namespace detail {

/// `count` children in `segments` runs whose lengths differ by one at most, the longer ones first.
template <class Step>
at::Tensor run_in_segments(std::int64_t count, std::int64_t segments, at::Tensor input,
                           const Step& step, const CheckpointOptions& options) {
  TORCH_CHECK(count > 0,
              "checkpoint_sequential: got a container without children; give it at least one");
  TORCH_CHECK(segments >= 1 && segments <= count, "checkpoint_sequential: got ", segments,
              " segments for ", count, " children; give a number from 1 to ", count);
  std::int64_t begin = 0;
  for (std::int64_t segment = 0; segment < segments; ++segment) {
    const std::int64_t end = begin + count / segments + (segment < count % segments ? 1 : 0);
    input = checkpoint(
        options,
        [step, begin, end](at::Tensor x) {
          for (std::int64_t i = begin; i < end; ++i) x = step(i, std::move(x));
          return x;
        },
        std::move(input));
    begin = end;
  }
  return input;
}

}  // namespace detail

/// sequential->forward(input), its children (tensor to tensor) in `segments` checkpoints of like
/// length. The last one is checkpointed too: early stop makes its last product free, and its
/// activations are all that stands between one segment's memory and the whole chain's.
template <class = void>
at::Tensor checkpoint_sequential(const torch::nn::Sequential& sequential, std::int64_t segments,
                                 at::Tensor input, const CheckpointOptions& options = {}) {
  const std::shared_ptr<torch::nn::SequentialImpl> chain = sequential.ptr();
  return detail::run_in_segments(
      static_cast<std::int64_t>(chain->size()), segments, std::move(input),
      [chain](std::int64_t i, at::Tensor x) { return (chain->begin() + i)->forward(std::move(x)); },
      options);
}

/// The same for the children of a ModuleList, which are all a Block (or derive from it): a module
/// type or its holder.
template <class Block>
at::Tensor checkpoint_sequential(const torch::nn::ModuleList& list, std::int64_t segments,
                                 at::Tensor input, const CheckpointOptions& options = {}) {
  using Impl = typename decltype([] {
    if constexpr (requires { typename Block::ContainedType; }) {
      return std::type_identity<typename Block::ContainedType>{};
    } else {
      return std::type_identity<Block>{};
    }
  }())::type;
  std::vector<std::shared_ptr<Impl>> children;
  for (const auto& child : *list) {
    children.push_back(std::dynamic_pointer_cast<Impl>(child));
    TORCH_CHECK(children.back() != nullptr, "checkpoint_sequential<",
                c10::demangle(typeid(Impl).name()), ">: child ", children.size() - 1,
                " of the list is a ", child->name(),
                "; name the type that all children have, or call checkpoint() on each");
  }
  const auto count = static_cast<std::int64_t>(children.size());
  return detail::run_in_segments(
      count, segments, std::move(input),
      [children = std::move(children)](std::int64_t i, at::Tensor x) -> at::Tensor {
        return children[static_cast<std::size_t>(i)]->forward(std::move(x));
      },
      options);
}

}  // namespace fourfold::inline v0

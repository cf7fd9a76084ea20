// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The tensors of a model by name, whatever it is handed over as: a module, a ModuleHolder, a
/// Sequential, a shared_ptr. By its shape and not by its type: torch/nn/module.h would cost every
/// user of these headers its compile time.
#include <ATen/core/Tensor.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

template <class M>
concept Module = requires(M& module) {
  module.named_parameters(/*recurse=*/true);
  module.named_buffers(/*recurse=*/true);
};

/// A module, or what points to one: ModuleHolder, Sequential, shared_ptr, a pointer.
template <class M>
concept ModuleLike = Module<M> ||(requires(M& holder) { *holder; } &&
                                  Module<std::remove_reference_t<decltype(*std::declval<M&>())>>);

namespace detail {

template <ModuleLike M>
auto& module_of(M& given, const char* what) {
  if constexpr (Module<M>) {
    static_cast<void>(what);
    return given;
  } else {
    bool empty = false;
    if constexpr (requires { given.is_empty(); })
      empty = given.is_empty();
    else
      empty = given == nullptr;
    TORCH_CHECK(!empty, what,
                " was given an empty module holder or a null pointer; construct the "
                "module first");
    return *given;
  }
}

template <class Items>
NamedTensors named(const Items& items) {
  NamedTensors tensors;
  for (const auto& item : items)
    if (item.value().defined()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

}  // namespace detail

/// Parameters of all submodules, in the module's order; a tied one under each of its names.
template <ModuleLike M>
NamedTensors parameters_of(M& model, const char* what) {
  return detail::named(detail::module_of(model, what).named_parameters(/*recurse=*/true));
}
template <ModuleLike M>
NamedTensors buffers_of(M& model, const char* what) {
  return detail::named(detail::module_of(model, what).named_buffers(/*recurse=*/true));
}

}  // namespace fourfold::inline v0

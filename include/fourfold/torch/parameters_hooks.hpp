// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Tensor::requires_grad_ and Tensor::set_data go past the dispatcher, to at::impl's VariableHooks.
/// These stand in front of LibTorch's own: requires_grad_(true) on a packed tensor is refused, and
/// a parameter that set_data makes packed (Module::clone) becomes frozen. Everything else passes.
#include <ATen/core/VariableHooksInterface.h>
#include <fourfold/torch/node.hpp>
#include <fourfold/torch/parameters_dense.hpp>

#include <functional>
#include <type_traits>

namespace fourfold::door::detail {

/// requires_grad_ on a packed tensor: of its factors if it has any, else it must be false.
template <class = void>
void require_gradient_of(const at::Tensor& packed, bool requires_grad) {
  PackedHolder* holder = packed_holder(packed);
  const std::shared_ptr<const Payload> payload = holder->payload();
  if (payload->factorised())
    for (at::Tensor factor : payload->buffers()) factor.set_requires_grad(requires_grad);
  else if (requires_grad)
    refuse_gradient(packed, *payload);
  packed.set_requires_grad(false);
}

/// Moving a module keeps its factors: they are what an optimizer holds. `moved` is a copy of
/// `packed` that nobody else has.
template <class = void>
void keep_factors(const at::Tensor& packed, const at::Tensor& moved) {
  PackedHolder* const from = packed_holder(packed);
  PackedHolder* const to = packed_holder(moved);
  if (from == nullptr || to == nullptr || from == to) return;
  const std::shared_ptr<const Payload> old = from->payload(), made = to->payload();
  if (!old->factorised() || !made->factorised()) return;
  for (std::size_t i = 0; i < old->buffers().size(); ++i)
    at::Tensor(old->buffers()[i]).set_data(made->buffers()[i].detach());
  to->replace(made->with_buffers(old->buffers()));
}

/// No `override`: the interface has grown between LibTorch's versions, and a function that one does
/// not have yet must still compile. Where it has one that is not here, this class stays abstract,
/// is not installed, and requires_grad on a packed tensor is refused by the next operator instead.
template <class Interface>
class FrozenHooks : public Interface {
 public:
  explicit FrozenHooks(const Interface* next) : next_(next) {}

  void requires_grad_(const at::TensorBase& self, bool requires_grad) const {
    const at::Tensor tensor(self);
    if (!is_packed(tensor)) return next_->requires_grad_(self, requires_grad);
    require_gradient_of(tensor, requires_grad);
  }
  void set_data(const at::TensorBase& self, const at::TensorBase& data) const {
    const at::Tensor tensor(self);
    if (data.use_count() == 1) keep_factors(tensor, at::Tensor(data));  // Module::to's, of its own
    next_->set_data(self, data);
    if (is_packed(tensor) && tensor.is_leaf()) tensor.set_requires_grad(false);
  }

  at::TensorBase tensor_data(const at::TensorBase& self) const { return next_->tensor_data(self); }
  at::TensorBase variable_data(const at::TensorBase& self) const {
    return next_->variable_data(self);
  }
  const NodePtr& grad_fn(const at::TensorBase& self) const { return next_->grad_fn(self); }
  unsigned _register_hook(const at::TensorBase& self,
                          std::function<at::TensorBase(const at::TensorBase&)> hook) const {
    return next_->_register_hook(self, std::move(hook));
  }
  void remove_hook(const at::TensorBase& self, unsigned position) const {
    next_->remove_hook(self, position);
  }
  bool is_view(const at::TensorBase& self) const { return next_->is_view(self); }
  const at::TensorBase& base(const at::TensorBase& self) const { return next_->base(self); }
  const std::string& name(const at::TensorBase& self) const { return next_->name(self); }
  bool is_leaf(const at::TensorBase& self) const { return next_->is_leaf(self); }
  std::int64_t output_nr(const at::TensorBase& self) const { return next_->output_nr(self); }
  at::TensorBase data(const at::TensorBase& self) const { return next_->data(self); }
  std::int64_t _version(const at::TensorBase& self) const { return next_->_version(self); }
  void retain_grad(const at::TensorBase& self) const { next_->retain_grad(self); }
  bool retains_grad(const at::TensorBase& self) const { return next_->retains_grad(self); }
  void _backward(const at::Tensor& self, at::TensorList inputs,
                 const std::optional<at::Tensor>& gradient, std::optional<bool> keep_graph,
                 bool create_graph) const {
    next_->_backward(self, inputs, gradient, keep_graph, create_graph);
  }
  void basic_autograd_not_implemented_fallback(const c10::OperatorHandle& op,
                                               c10::DispatchKeySet keys,
                                               ::torch::jit::Stack* stack) const {
    next_->basic_autograd_not_implemented_fallback(op, keys, stack);
  }
  std::optional<c10::ScalarType> grad_dtype(const at::TensorBase& self) const {
    if constexpr (requires(const Interface& hooks) { hooks.grad_dtype(self); })
      return next_->grad_dtype(self);
    else
      return std::nullopt;
  }
  void set_grad_dtype(const at::TensorBase& self,
                      const std::optional<c10::ScalarType>& dtype) const {
    if constexpr (requires(const Interface& hooks) { hooks.set_grad_dtype(self, dtype); })
      next_->set_grad_dtype(self, dtype);
  }

 private:
  const Interface* next_;
};

template <class = void>
void install_frozen_hooks() {
  using Hooks = FrozenHooks<at::impl::VariableHooksInterface>;
  if constexpr (!std::is_abstract_v<Hooks>)  // leaked: LibTorch keeps the pointer
    at::impl::SetVariableHooks(new Hooks(at::impl::GetVariableHooks()));
}

}  // namespace fourfold::door::detail

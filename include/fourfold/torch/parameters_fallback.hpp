// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an operator without a kernel of ours does with packed tensors, told by its schema:
///  - it writes to one: through, by PackedWrites, whatever the operator;
///  - it is one of LibTorch's compositions: they are taken apart, and their parts come back here;
///  - it makes a view: the view shares the packed storage;
///  - anything else reads: it gets plain values.
/// Autocast lies below the key, so an operator taken apart or given plain values meets it as ever.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <fourfold/torch/parameters_dense.hpp>

#include <string_view>

namespace fourfold::door::detail {

using ::torch::jit::Stack;

/// Calls visit(tensor) on each defined tensor of an argument; what it returns takes its place.
template <class Visit>
void visit_tensors(c10::IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    if (is_packed(tensor)) value = visit(tensor);
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list = value.toTensorList();
    bool any = false;
    for (const at::Tensor& tensor : list) any = any || is_packed(tensor);
    if (!any) return;
    c10::List<at::Tensor> plain;  // the caller's list may be shared
    plain.reserve(list.size());
    for (const at::Tensor& tensor : list)
      plain.push_back(is_packed(tensor) ? visit(tensor) : tensor);
    value = std::move(plain);
  } else if (value.isList()) {  // optional tensors, and lists of anything else
    c10::List<c10::IValue> list = value.toList();
    bool any = false;
    for (const c10::IValue& item : list)
      any = any || (item.isTensor() && is_packed(item.toTensor()));
    if (!any) return;
    c10::impl::GenericList plain(list.elementType());
    plain.reserve(list.size());
    for (c10::IValue item : list) {
      visit_tensors(item, visit);
      plain.push_back(std::move(item));
    }
    value = std::move(plain);
  }
}

/// Results that the schema declares to be a written argument are that argument, packed as it was.
template <class = void>
void give_back_written(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments,
                       Stack& stack) {
  const std::size_t first = stack.size() - schema.returns().size();
  for (std::size_t r = 0; r < schema.returns().size(); ++r) {
    const c10::AliasInfo* result = schema.returns()[r].alias_info();
    if (result == nullptr || !result->isWrite()) continue;
    for (std::size_t a = 0; a < schema.arguments().size(); ++a) {
      const c10::AliasInfo* argument = schema.arguments()[a].alias_info();
      if (argument != nullptr && argument->isWrite() &&
          argument->beforeSets() == result->beforeSets())
        stack[first + r] = arguments[a];
    }
  }
}

template <class = void>
void write_through(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::size_t n = schema.arguments().size(), first = stack->size() - n;
  const std::vector<c10::IValue> arguments(stack->begin() + static_cast<std::ptrdiff_t>(first),
                                           stack->end());
  PackedWrites writes;
  for (std::size_t i = 0; i < n; ++i) {
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite())
      visit_tensors((*stack)[first + i], [&](const at::Tensor& t) { return writes.open(t); });
  }
  for (std::size_t i = 0; i < n; ++i)
    visit_tensors((*stack)[first + i], [&](const at::Tensor& t) { return writes.read(t); });
  op.callBoxed(stack);
  writes.commit(schema.name().c_str());
  give_back_written(schema, arguments, *stack);
}

/// What the schema says that an operator does with packed arguments.
enum class Does { kReads, kWrites, kViews };

template <class = void>
Does does_with_packed(const c10::FunctionSchema& schema, const Stack& stack) {
  const std::size_t n = schema.arguments().size(), first = stack.size() - n;
  Does does = Does::kReads;
  for (std::size_t i = 0; i < n; ++i) {
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    if (alias == nullptr) continue;
    c10::IValue value = stack[first + i];
    bool packed = false;
    visit_tensors(value, [&](const at::Tensor& t) { return packed = true, t; });
    if (!packed) continue;
    if (alias->isWrite()) return Does::kWrites;
    does = Does::kViews;
  }
  return does;
}

/// In-place operators that touch no value.
template <class = void>
bool writes_no_value(std::string_view name) {
  return name == "aten::detach_" || name == "aten::set_data" || name == "aten::retain_grad" ||
         name == "aten::rename_";
}

/// Views whose values are other bytes, or bytes seen otherwise.
template <class = void>
bool reinterprets(const c10::OperatorName& name) {
  return (name.name == "aten::view" && name.overload_name == "dtype") ||
         name.name == "aten::view_as_complex" || name.name == "aten::view_as_real";
}

/// embedding_bag asks its table whether it requires a gradient, and a factorised one, whose factors
/// do, would say no. Sums and means of rows of U V are those of U, times V.
template <class = void>
bool factorised_embedding_bag(const c10::OperatorHandle& op, Stack* stack) {
  constexpr std::size_t kMode = 4;  // 0 sum, 1 mean, 2 max
  const std::size_t first = stack->size() - op.schema().arguments().size();
  const at::Tensor table = (*stack)[first].toTensor();
  const auto payload = payload_of(table);
  if (!payload || !payload->factorised()) return false;
  const bool linear = (*stack)[first + kMode].toInt() < 2 && is_whole(table, *payload) &&
                      payload->sizes().size() == 2;
  (*stack)[first] = linear ? payload->buffers()[0] : dense_of(table);
  const std::size_t results = op.schema().returns().size();
  op.callBoxed(stack);
  at::Tensor rows = (*stack)[stack->size() - results].toTensor();
  if (linear) rows = at::matmul(rows, payload->buffers()[1]).to(payload->dtype());
  (*stack)[stack->size() - results] = rows;
  return true;
}

template <class = void>
void packed_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::size_t n = schema.arguments().size(), first = stack->size() - n;
  for (std::size_t i = 0; i < n; ++i) {
    c10::IValue value = (*stack)[first + i];
    visit_tensors(value, [](const at::Tensor& t) { return check_frozen(t, *packed_holder(t)), t; });
  }
  const std::string_view name = schema.name();
  if (name == "aten::embedding_bag" && factorised_embedding_bag(op, stack)) return;
  const bool composed = name.starts_with("aten::") &&
                        op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
  if (composed || writes_no_value(name)) return op.redispatchBoxed(keys & kBelowPackedKey, stack);

  switch (does_with_packed(schema, *stack)) {
    case Does::kWrites: return write_through(op, stack);
    case Does::kViews:
      TORCH_CHECK(!reinterprets(op.operator_name()), name,
                  " would show a packed tensor's values as other bytes, which it has not; convert "
                  "with to(dtype), or use fourfold::decompress(tensor) first");
      return op.redispatchBoxed(keys & kBelowPackedKey, stack);
    case Does::kReads: break;
  }
  for (std::size_t i = 0; i < n; ++i) visit_tensors((*stack)[first + i], dense_of);
  op.callBoxed(stack);
}

}  // namespace fourfold::door::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The operators of backward that read a saved tensor piece by piece, while it stays packed: one
/// piece is decoded, LibTorch's own kernel runs on it, the next piece takes its memory.
///
/// Which node is given a packed tensor says packed_nodes.hpp. Pieces hold 2^18 values (in a product
/// 2^19), whole rows. Where the gradient that comes in is nobody else's, the one that goes out is
/// written over it, so gelu's backward needs one buffer of the layer's width and not three.
///
///  - gelu, silu, threshold (relu), softmax, log_softmax, the input's gradient of layer_norm: the
///    kernels see the same values, so results are those of a whole tensor. (LibTorch's vector loops
///    end in scalar ones whose exp and erf may round otherwise: equal to the bit where both are cut
///    into threads at multiples of 64 values, as 2^18 / threads is for powers of two.)
///  - layer_norm's gradients of weight and bias: sums over pieces, in fp32.
///  - mm, either side packed: over pieces of the summed dimension C += A_p B_p, in C where it is fp32
///    or fp64; 16-bit products of pieces are added in fp32 and rounded once more. With P pieces and u
///    the dtype's unit: |C - C'| <= (K + P) u sum |a| |b| + O(u^2), LibTorch's own bound and P more.
///    Pieces of the other dimension are blocks of C, which have no such sum. What is held exactly is
///    multiplied whole.
///
/// Anything else gets plain values. On a CPU there is no operator for rms_norm's backward
/// (_fused_rms_norm_backward is a GPU's): it is a composition there, whose nodes get plain values.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/util/FunctionRef.h>
#include <fourfold/torch/packed_pieces.hpp>
#include <fourfold/torch/parameters_fallback.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <tuple>

namespace fourfold::door {
namespace detail {

/// run(out, gradient, values, first row) on each piece of `saved`; all are (rows, row). Undefined
/// where `saved` cannot be read so.
template <class = void>
at::Tensor in_pieces(
    const at::Tensor& gradient, const at::Tensor& saved, std::int64_t row,
    c10::function_ref<void(at::Tensor, const at::Tensor&, const at::Tensor&, std::int64_t)> run) {
  const auto pieces = packed_rows(saved, row, parameters_state().piece);
  if (!pieces || is_packed(gradient) || gradient.sizes() != saved.sizes() ||
      !gradient.is_contiguous() || gradient.scalar_type() != saved.scalar_type())
    return {};
  const bool over = is_ours_to_write(gradient);
  const at::Tensor out = over ? gradient : at::empty_like(gradient);
  const at::Tensor from = gradient.view({-1, row}), to = out.view({-1, row});
  const auto run_on = [&](std::int64_t first, std::int64_t count) {
    run(to.narrow(0, first, count), from.narrow(0, first, count),
        pieces->read(first, first + count), first);
  };
  pieces->for_each_piece(run_on, over ? static_cast<std::int64_t>(gradient.nbytes()) : 0);
  return out;
}

template <class = void>
at::Tensor gelu_backward(const at::Tensor& gradient, const at::Tensor& self,
                         std::string_view approximate) {
  at::Tensor made = in_pieces(gradient, self, 1, [&](at::Tensor out, auto& g, auto& x, auto) {
    at::gelu_backward_out(out, g, x, approximate);
  });
  if (made.defined()) return made;
  return at::gelu_backward(plain_values(gradient), plain_values(self), approximate);
}

template <class = void>
at::Tensor silu_backward(const at::Tensor& gradient, const at::Tensor& self) {
  at::Tensor made = in_pieces(gradient, self, 1, [](at::Tensor out, auto& g, auto& x, auto) {
    at::silu_backward_out(out, g, x);
  });
  return made.defined() ? made : at::silu_backward(plain_values(gradient), plain_values(self));
}

template <class = void>
at::Tensor threshold_backward(const at::Tensor& gradient, const at::Tensor& self,
                              const at::Scalar& threshold) {
  at::Tensor made = in_pieces(gradient, self, 1, [&](at::Tensor out, auto& g, auto& x, auto) {
    at::threshold_backward_out(out, g, x, threshold);
  });
  if (made.defined()) return made;
  return at::threshold_backward(plain_values(gradient), plain_values(self), threshold);
}

/// Both softmaxes: their backward sums over a row before it writes there, so by way of a copy.
template <class Backward>
at::Tensor softmax_rows(const at::Tensor& gradient, const at::Tensor& output, std::int64_t dim,
                        at::ScalarType dtype, const Backward& backward) {
  at::Tensor made;
  if (output.dim() > 0 && (dim == -1 || dim == output.dim() - 1) && dtype == output.scalar_type())
    made = in_pieces(
        gradient, output, output.size(-1),
        [&](at::Tensor out, auto& g, auto& y, auto) { out.copy_(backward(g, y, 1, dtype)); });
  if (made.defined()) return made;
  return backward(plain_values(gradient), plain_values(output), dim, dtype);
}
template <class = void>
at::Tensor softmax_backward(const at::Tensor& gradient, const at::Tensor& output, std::int64_t dim,
                            at::ScalarType dtype) {
  return softmax_rows(gradient, output, dim, dtype, at::_softmax_backward_data);
}
template <class = void>
at::Tensor log_softmax_backward(const at::Tensor& gradient, const at::Tensor& output,
                                std::int64_t dim, at::ScalarType dtype) {
  return softmax_rows(gradient, output, dim, dtype, at::_log_softmax_backward_data);
}

/// mean and rstd: a value a row of `input`.
template <class = void>
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const at::Tensor& gradient, const at::Tensor& input, at::IntArrayRef normalized,
    const at::Tensor& mean, const at::Tensor& rstd, const std::optional<at::Tensor>& any_weight,
    const std::optional<at::Tensor>& any_bias, std::array<bool, 3> mask) {
  const auto plain = [](const std::optional<at::Tensor>& tensor) {
    return tensor && tensor->defined() ? std::optional(plain_values(*tensor)) : std::nullopt;
  };
  const std::optional<at::Tensor> weight = plain(any_weight), bias = plain(any_bias);
  const auto flat = [](const std::optional<at::Tensor>& tensor) {
    return tensor && tensor->defined() ? std::optional(tensor->reshape({-1})) : std::nullopt;
  };
  const std::int64_t row = c10::multiply_integers(normalized);
  std::array<at::Tensor, 2> sums;
  at::Tensor made;
  if (!is_packed(mean) && !is_packed(rstd) && mask[0] && mean.defined() && rstd.defined()) {
    const at::Tensor means = mean.reshape({-1, 1}), rstds = rstd.reshape({-1, 1});
    const auto gain = flat(weight), shift = flat(bias);
    made = in_pieces(gradient, input, row, [&](at::Tensor out, auto& g, auto& x, auto first) {
      const std::int64_t rows = g.size(0);
      const auto part =
          at::native_layer_norm_backward(g, x, {row}, means.narrow(0, first, rows),
                                         rstds.narrow(0, first, rows), gain, shift, mask);
      out.copy_(std::get<0>(part));
      const std::array<at::Tensor, 2> more{std::get<1>(part), std::get<2>(part)};
      for (std::size_t i = 0; i < 2; ++i) {
        if (!mask[i + 1]) continue;
        const at::Tensor wide =
            more[i].to(more[i].scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
        sums[i] = sums[i].defined() ? sums[i].add_(wide) : wide;
      }
    });
  }
  if (!made.defined())
    return at::native_layer_norm_backward(plain_values(gradient), plain_values(input), normalized,
                                          plain_values(mean), plain_values(rstd), weight, bias,
                                          mask);
  for (std::size_t i = 0; i < 2; ++i)
    if (sums[i].defined()) {
      const at::Tensor& of = i == 0 ? *weight : bias && bias->defined() ? *bias : *weight;
      sums[i] = sums[i].to(of.scalar_type()).view(normalized);
    }
  return {made, sums[0], sums[1]};
}

/// left (M, K) times right (K, N), which is packed, to `out`. False where it cannot be read so.
template <class = void>
bool multiply_to(at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
  const std::int64_t values = 2 * parameters_state().piece;
  if (const auto rows = packed_rows(right, right.size(1), values)) {
    const bool narrow = out.scalar_type() != at::kFloat && out.scalar_type() != at::kDouble;
    at::Tensor sum;  // of products that were rounded to 16 bits
    rows->for_each_piece([&](std::int64_t first, std::int64_t count) {
      const at::Tensor of = left.narrow(1, first, count), piece = rows->read(first, first + count);
      if (narrow)
        sum = sum.defined() ? sum.add_(of.mm(piece)) : of.mm(piece).to(at::kFloat);
      else if (first == 0)
        at::mm_out(out, of, piece);
      else
        out.addmm_(of, piece);
    });
    if (narrow) out.copy_(sum);
    return true;
  }
  const auto columns = packed_rows(right.t(), right.size(0), values);
  if (!columns) return false;
  columns->for_each_piece([&](std::int64_t first, std::int64_t count) {
    at::Tensor block = out.narrow(1, first, count);
    at::mm_out(block, left, columns->read(first, first + count).t());
  });
  return true;
}

template <class = void>
at::Tensor mm_of_saved(const at::Tensor& a, const at::Tensor& b) {
  const bool fits = a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) &&
                    a.scalar_type() == b.scalar_type() && a.device() == b.device() &&
                    a.layout() == at::kStrided && b.layout() == at::kStrided;
  const auto inexact = [](const at::Tensor& tensor) {
    const auto payload = saved_payload_of(tensor);
    return payload != nullptr && !static_cast<const SavedPayload&>(*payload).exact();
  };
  if (fits && is_packed(a) != is_packed(b) && (inexact(a) || inexact(b))) {
    const at::Tensor& plain = is_packed(a) ? b : a;
    at::Tensor out = at::empty({a.size(0), b.size(1)}, plain.options());
    const bool made = is_packed(b) ? multiply_to(out, a, b) : multiply_to(out.t(), b.t(), a.t());
    if (made) return out;
  }
  return at::mm(plain_values(a), plain_values(b));
}

/// One kernel for saved tensors and for parameters.
template <class = void>
at::Tensor mm_of_packed(c10::DispatchKeySet keys, const at::Tensor& a, const at::Tensor& b) {
  auto* const of_parameters = parameters_state().mm.load();
  if (of_parameters == nullptr || saved_payload_of(a) != nullptr || saved_payload_of(b) != nullptr)
    return mm_of_saved(a, b);
  return of_parameters(keys, a, b);
}

/// What has no kernel: compositions are taken apart, views stay packed, anything else gets plain
/// values. Where parameters are packed too, their fallback does it.
template <class = void>
void saved_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (auto* const of_parameters = parameters_state().fallback.load())
    return of_parameters(op, keys, stack);
  const c10::FunctionSchema& schema = op.schema();
  const Does does = does_with_packed(schema, *stack);
  TORCH_CHECK(does != Does::kWrites, schema.name(),
              " would write to a tensor that autograd saved for backward; write to a clone of it");
  if (does == Does::kViews ||
      op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd))
    return op.redispatchBoxed(keys & kBelowPackedKey, stack);
  const std::size_t n = schema.arguments().size(), first = stack->size() - n;
  for (std::size_t i = 0; i < n; ++i) visit_tensors((*stack)[first + i], plain_values<>);
  op.callBoxed(stack);
}

template <class Kernel>
void register_packed_kernel(const char* name, const char* overload, Kernel kernel) {
  parameters_state().registrations.push_back(
      std::make_shared<c10::RegistrationHandleRAII>(c10::Dispatcher::singleton().registerImpl(
          {name, overload}, kPackedKey, c10::KernelFunction::makeFromUnboxedRuntimeFunction(kernel),
          c10::impl::CppSignature::make<Kernel>(), /*inferred_function_schema=*/nullptr,
          "fourfold/torch/packed_backward.hpp")));
}

template <class = void>
void register_packed_backward() {
  auto& dispatcher = c10::Dispatcher::singleton();
  TORCH_CHECK(!dispatcher.hasBackendFallbackForDispatchKey(kPackedKey),
              "fourfold holds parameters packed by a fallback on LibTorch's key ",
              c10::toString(kPackedKey),
              ", but something else of this program has one there already: another fourfold whose "
              "state is not shared with this one (built with another compiler or layout, or loaded "
              "with RTLD_LOCAL), or a test of LibTorch's. Keep one of the two");
  parameters_state().registrations.push_back(
      std::make_shared<c10::RegistrationHandleRAII>(dispatcher.registerFallback(
          kPackedKey, c10::KernelFunction::makeFromBoxedFunction<&saved_fallback<>>(),
          "fourfold/torch/packed_backward.hpp")));
  register_packed_kernel("aten::mm", "", &mm_of_packed<>);
  register_packed_kernel("aten::gelu_backward", "", &gelu_backward<>);
  register_packed_kernel("aten::silu_backward", "", &silu_backward<>);
  register_packed_kernel("aten::threshold_backward", "", &threshold_backward<>);
  register_packed_kernel("aten::_softmax_backward_data", "", &softmax_backward<>);
  register_packed_kernel("aten::_log_softmax_backward_data", "", &log_softmax_backward<>);
  register_packed_kernel("aten::native_layer_norm_backward", "", &layer_norm_backward<>);
}

}  // namespace detail

/// Registers once.
template <class = void>
void open_packed_backward() {
  ParametersState& state = parameters_state();
  if (state.reading.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(state.registering);
  if (state.reading.load(std::memory_order_relaxed)) return;
  detail::register_packed_backward();
  state.reading.store(true, std::memory_order_release);
}

/// A view of `payload`'s values, counted in a row, that a backward operator reads in pieces.
template <class = void>
[[nodiscard]] at::Tensor packed_saved_tensor(std::shared_ptr<const SavedPayload> payload,
                                             at::IntArrayRef sizes, at::IntArrayRef strides,
                                             std::int64_t offset) {
  open_packed_backward();
  const at::ScalarType dtype = payload->dtype();
  return detail::packed_view(detail::packed_storage(std::move(payload)), dtype, sizes, strides,
                             offset, /*inference=*/false);
}

}  // namespace fourfold::door

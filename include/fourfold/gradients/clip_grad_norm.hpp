// SPDX-License-Identifier: Apache-2.0
#pragma once
/// torch::nn::utils::clip_grad_norm_ in two passes over memory: one that reads all gradients for
/// their norm, in double and without a temporary, and one that scales them where they lie, if they
/// are too long. Results do not depend on the number of threads nor on the instructions used.
///   const double norm = fourfold::clip_grad_norm_(model->parameters(), 1.0);   // the norm before
///
/// Where LibTorch sums in fp32, this is exact but for the last digits of a double; the
/// coefficient is max_norm / (norm + 1e-6), at most 1, as LibTorch's.
///
/// Gradients of any dtype, device and layout, mixed: sparse ones by their coalesced values, complex
/// ones by both parts. Without a gradient (frozen, packed): passed over. A tensor named twice
/// counts once.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/view_as_real.h>
#include <c10/util/Exception.h>
#include <fourfold/core/visit.hpp>
#include <fourfold/gradients/detail/sum_of_squares.hpp>

#include <cmath>
#include <limits>
#include <unordered_set>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

/// The values that a gradient's norm is of: real and dense.
template <class = void>
at::Tensor gradient_values(const at::Tensor& gradient) {
  at::Tensor values = gradient.detach();
  if (values.layout() == at::kSparse) values = values.coalesce()._values();
  TORCH_CHECK(values.layout() == at::kStrided, "a gradient of sizes ", gradient.sizes(), " is ",
              gradient.layout(),
              ", whose norm is not known here; make it dense, or torch::kSparse");
  if (values.is_complex()) values = at::view_as_real(values.resolve_conj());
  TORCH_CHECK(values.is_floating_point(), "a gradient of sizes ", gradient.sizes(), " is ",
              gradient.scalar_type(), "; gradients of floating and complex types have a norm");
  return values;
}

/// sum |g|^p, or max |g| where p is infinite.
template <class = void>
double power_sum(const at::Tensor& gradient, double p) {
  at::Tensor values = gradient_values(gradient);
  if (values.numel() == 0) return 0;
  if (p == 2 && values.is_cpu()) {
    if (!values.is_non_overlapping_and_dense()) values = values.contiguous();
    return visit_float(values.scalar_type(), "clip_grad_norm_",
                       [&]<class T>(std::type_identity<T>) {
                         return sum_of_squares(values.const_data_ptr<T>(), values.numel());
                       });
  }
  const double norm =
      at::linalg_vector_norm(values, p, /*dim=*/{}, /*keepdim=*/false, at::kDouble).item<double>();
  return std::isinf(p) ? norm : std::pow(norm, p);
}

/// What the gradients are multiplied by. LibTorch's: NaN stays NaN.
inline double clip_coefficient(double max_norm, double norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

template <class = void>
void scale_gradient(const at::Tensor& gradient, double factor) {
  if (factor == 1) return;
  const c10::NoGradGuard no_grad;
  (gradient.layout() == at::kSparse ? gradient._values() : gradient.detach()).mul_(factor);
}

}  // namespace detail

/// Gives the norm of all gradients together, as if they were one vector. Errors, gradients as they
/// were: a norm that is not finite, if `error_if_nonfinite`; max_norm that is negative or NaN;
/// norm_type that is not above 0.
template <class = void>
double clip_grad_norm_(const std::vector<at::Tensor>& parameters, double max_norm,
                       double norm_type = 2.0, bool error_if_nonfinite = false) {
  TORCH_CHECK(max_norm >= 0, "clip_grad_norm_: max_norm is ", max_norm,
              "; give the largest norm that gradients may have, 0 or more");
  TORCH_CHECK(norm_type > 0, "clip_grad_norm_: norm_type is ", norm_type,
              "; give the p of a p-norm above 0, or infinity");
  std::unordered_set<const at::TensorImpl*> seen;
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : parameters)
    if (parameter.defined() && parameter.grad().defined() &&
        seen.insert(parameter.unsafeGetTensorImpl()).second)
      gradients.push_back(parameter.grad());
  const bool largest = std::isinf(norm_type);
  double sum = 0;
  for (const at::Tensor& gradient : gradients) {
    const double one = detail::power_sum(gradient, norm_type);
    sum = !largest ? sum + one : std::isnan(one) ? one : one > sum ? one : sum;
  }
  const double norm = largest          ? sum
                      : norm_type == 2 ? std::sqrt(sum)
                                       : std::pow(sum, 1 / norm_type);
  TORCH_CHECK(!error_if_nonfinite || std::isfinite(norm), "The total norm of order ", norm_type,
              " for gradients from `parameters` is non-finite, so it cannot be clipped. To disable "
              "this error and scale the gradients with the non-finite norm anyway, set "
              "`error_if_nonfinite=false`");
  const double coefficient = detail::clip_coefficient(max_norm, norm);
  for (const at::Tensor& gradient : gradients) detail::scale_gradient(gradient, coefficient);
  return norm;
}

}  // namespace fourfold::inline v0

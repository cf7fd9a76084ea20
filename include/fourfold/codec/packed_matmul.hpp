// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Products with a packed weight that never exists dense. Plain compute: nothing here is recorded
/// by autograd; the parameters' door makes it differentiable (each of the two products is the
/// other's gradient with respect to x).
///
/// Rows of the weight are decoded a rectangle at a time, at most 1 MiB a thread. Sums are taken in
/// fp32 (fp64 for an fp64 x), the result has x's dtype, and it is the same on any number of
/// threads. A factorised payload is multiplied by its two factors. On a GPU the kernels of
/// fourfold::cuda read the codes; without them the weight is decompressed for the duration of the
/// call.
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <fourfold/codec/detail/packed_matmul_rows.hpp>
#include <fourfold/codec/detail/packed_matmul_tiles.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/payload.hpp>
#include <fourfold/cuda/run_kernel.hpp>

#include <optional>
#include <string>
#include <vector>

namespace fourfold::inline v0 {
namespace detail::packed {

/// The formats that have a packed product in kernels/, by the codec's name.
template <class = void>
std::optional<FourfoldFormat> kernel_format(const Payload& weight) {
  const std::string codec = weight.codec();
  if (codec == "Int8") return FourfoldFormat{.kind = 0, .bits = 8, .group = 128, .symmetric = 0};
  if (codec == "Int4") return FourfoldFormat{.kind = 0, .bits = 4, .group = 64, .symmetric = 0};
  if (codec == "Int8Symmetric")
    return FourfoldFormat{.kind = 0, .bits = 8, .group = 128, .symmetric = 1};
  if (codec == "Int4Symmetric")
    return FourfoldFormat{.kind = 0, .bits = 4, .group = 64, .symmetric = 1};
  if (codec == "Nf4") return FourfoldFormat{.kind = 1, .bits = 4, .group = 64, .symmetric = 0};
  return std::nullopt;
}

/// Rows of x up to which the factors' kernel, which keeps x V^T in shared memory, is asked: more
/// are two products that fill the device.
inline constexpr std::int64_t kFewRowsOfFactors = 16;

/// x (rows_x, columns) V^T U^T to `out` (rows_x, rows) in one launch. False where no kernel takes
/// it.
template <class = void>
bool multiply_factors_by_kernel(const at::Tensor& matrix, const at::Tensor& left,
                                const at::Tensor& right, const at::Tensor& out) {
  const at::Tensor u = left.contiguous(), v = right.contiguous();
  return cuda::run_kernel(
      matrix, [&](const FourfoldKernels& kernels, FourfoldDtype dtype, void* stream) {
        return kernels.factor_matmul(out.mutable_data_ptr(), matrix.const_data_ptr(),
                                     u.const_data_ptr(), v.const_data_ptr(), dtype, matrix.size(0),
                                     u.size(0), v.size(1), u.size(1), stream);
      });
}

/// False where no kernel takes it.
template <class = void>
bool multiply_by_kernel(const at::Tensor& matrix, const Payload& weight, bool transposed,
                        const at::Tensor& out) {
  const auto format = kernel_format(weight);
  const at::IntArrayRef sizes = weight.sizes();
  // A range of a larger payload has that one's buffers: its codes do not begin with the first byte.
  if (!format || weight.buffers()[0].numel() != ceil_div(sizes[0] * sizes[1] * format->bits, 8))
    return false;
  return cuda::run_kernel(
      matrix, [&](const FourfoldKernels& kernels, FourfoldDtype dtype, void* stream) {
        return kernels.matmul(*format, /*transposed=*/!transposed, out.mutable_data_ptr(),
                              matrix.const_data_ptr(), dtype, weight.buffers()[0].const_data_ptr(),
                              weight.buffers()[1].const_data_ptr(), matrix.size(0),
                              weight.sizes()[0], weight.sizes()[1], stream);
      });
}

template <class = void>
at::Tensor product(const char* what, const at::Tensor& x, const Payload& weight, bool transposed,
                   Isa isa) {
  const at::IntArrayRef sizes = weight.sizes();
  TORCH_CHECK(sizes.size() == 2, what, " multiplies by a packed matrix, but the weight has sizes ",
              sizes, "; flatten it to 2 dimensions before it is packed, or decompress it");
  TORCH_CHECK(x.defined() && at::isFloatingType(x.scalar_type()), what,
              " takes an fp32, fp64, bf16 or fp16 tensor, got ",
              x.defined() ? c10::toString(x.scalar_type()) : "an undefined one",
              "; convert it with to()");
  const std::int64_t summed = sizes[transposed ? 1 : 0], free = sizes[transposed ? 0 : 1];
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == summed, what, ": the last size of x must be ", summed,
              " for a packed weight of sizes ", sizes, ", but x has sizes ", x.sizes());
  TORCH_CHECK(x.device() == weight.device(), what, ": x is on ", x.device(),
              " and the packed weight on ", weight.device(), "; move one of them with to()");
  const PlainArithmetic plain;
  const at::Tensor values = x.detach();
  std::vector<std::int64_t> out_sizes = x.sizes().vec();
  out_sizes.back() = free;
  const std::int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  if (weight.factorised()) {
    const at::Tensor left = weight.buffers()[0].detach().to(x.scalar_type());
    const at::Tensor right = weight.buffers()[1].detach().to(x.scalar_type());
    if (transposed && x.is_cuda() && rows <= kFewRowsOfFactors) {
      const at::Tensor out = at::empty({rows, free}, x.options());
      const at::Tensor matrix = values.reshape({rows, summed}).contiguous();
      if (multiply_factors_by_kernel(matrix, left, right, out)) return out.view(out_sizes);
    }
    return transposed ? at::matmul(at::matmul(values, right.t()), left.t())
                      : at::matmul(at::matmul(values, left), right);
  }
  if (rows == 0 || free == 0 || summed == 0) return at::zeros(out_sizes, x.options());
  const at::Tensor out = at::empty({rows, free}, x.options());
  const at::Tensor matrix = values.reshape({rows, summed}).contiguous();
  if (!x.device().is_cpu()) {
    if (multiply_by_kernel(matrix, weight, transposed, out)) return out.view(out_sizes);
    const at::Tensor dense = weight.decompress().to(x.scalar_type());
    return at::matmul(values, transposed ? dense.t() : dense);
  }
  if (x.scalar_type() == at::kFloat && rows <= kFewRows) {
    const auto few = transposed ? multiply_rows_transposed<> : multiply_rows<>;
    few(isa, matrix.const_data_ptr<float>(), rows, weight, out.mutable_data_ptr<float>());
  } else if (x.scalar_type() == at::kDouble) {
    multiply_tiles<double>(isa, matrix, weight, transposed, out);
  } else {
    multiply_tiles<float>(isa, matrix, weight, transposed, out);
  }
  return out.view(out_sizes);
}

}  // namespace detail::packed

/// x W^T: x (..., K), weight (N, K) -> (..., N).
template <class = void>
[[nodiscard]] at::Tensor packed_linear(const at::Tensor& x, const Payload& weight) {
  return detail::packed::product("packed_linear", x, weight, /*transposed=*/true, isa());
}

/// x W: x (..., N), weight (N, K) -> (..., K). Also packed_linear's gradient with respect to x.
template <class = void>
[[nodiscard]] at::Tensor packed_matmul(const at::Tensor& x, const Payload& weight) {
  return detail::packed::product("packed_matmul", x, weight, /*transposed=*/false, isa());
}

}  // namespace fourfold::inline v0

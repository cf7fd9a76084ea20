// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A matrix as the product of two factors of rank R: its truncated singular value decomposition.
///   auto packed = LowRank<32>{}.compress(weight);  // 32 (rows + columns) values
///   auto again  = LowRank<32>{}.decompress(packed);
///
/// buffers = {left (rows, R), right (R, columns)} in the dtype of the values, left right ~ values;
/// the singular values are split evenly, their roots in either factor, so that both train at one
/// rate. A tensor of more than 2 dimensions is taken as (size 0, all others).
///
/// The decomposition is randomized (Halko, Martinsson, Tropp, "Finding structure with randomness",
/// SIAM Review 2011, algorithms 4.4 and 5.1): 8 directions more than R, two power steps with a QR
/// after each half, one fixed seed. It works in fp64 on one copy of the values, on the device where
/// they are. Where R + 8 is half of the smaller size or more, it is at::linalg_svd itself.
///
/// A run repeats bit for bit. On another number of threads LAPACK may sum in another order: the
/// factors then agree up to fp64 rounding, which rounding to a narrower dtype hides but for rare
/// ties.
///
/// A NaN or an infinity is refused, and so is a rank above min(rows, columns).
#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <fourfold/codec/detail/low_rank_product.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/visit.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

namespace fourfold::inline v0 {
namespace detail::low_rank {

inline constexpr std::int64_t kOversampling = 8;
inline constexpr int kPowerSteps = 2;
inline constexpr std::uint64_t kSeed = 0x5EED;

struct Decomposition {
  at::Tensor left, singular, right;  ///< (rows, rank), (rank), (rank, columns); fp64
  double norm = 0;                   ///< Frobenius norm of what was decomposed
};

/// `a` (rows, columns), fp64.
template <class = void>
Decomposition decompose(const at::Tensor& a, std::int64_t rank, bool exact) {
  const std::int64_t width = rank + kOversampling, smaller = std::min(a.size(0), a.size(1));
  at::Tensor basis, core = a;
  if (!exact && 2 * width < smaller) {
    const auto orthonormal = [](const at::Tensor& y) { return std::get<0>(at::linalg_qr(y)); };
    const at::Tensor draws =  // on the CPU, so that a GPU finds the same factors
        at::randn({a.size(1), width}, at::detail::createCPUGenerator(kSeed), at::kDouble);
    basis = orthonormal(at::mm(a, draws.to(a.device())));
    for (int step = 0; step < kPowerSteps; ++step)
      basis = orthonormal(at::mm(a, orthonormal(at::mm(a.t(), basis))));
    core = at::mm(basis.t(), a);
  }
  auto [left, singular, right] = at::linalg_svd(core, /*full_matrices=*/false);
  left = left.narrow(1, 0, rank);
  if (basis.defined()) left = at::mm(basis, left);
  return {left, singular.narrow(0, 0, rank), right.narrow(0, 0, rank), a.norm().item<double>()};
}

/// The matrix of `values` in fp64, brought to a largest magnitude in [1, 2) by the power of two
/// that comes with it: no square overflows or is lost.
template <class = void>
std::tuple<at::Tensor, double> scaled_matrix(const std::string& name, const at::Tensor& values,
                                             std::int64_t rank) {
  TORCH_CHECK(values.defined(), name, " was given an undefined tensor; give it values to pack");
  TORCH_CHECK(values.layout() == at::kStrided && (values.is_cpu() || values.is_cuda()), name,
              " packs dense tensors on a CPU or a CUDA device, but was given a ", values.layout(),
              " tensor on ", values.device(), "; keep such a tensor as it is, or convert it first");
  visit_float(values.scalar_type(), name, [](auto) {});
  TORCH_CHECK(
      values.dim() >= 2, name, " factorises a matrix, but was given sizes ", values.sizes(),
      "; leave tensors of fewer than 2 dimensions unpacked (Filter), or pack them by another "
      "codec");
  const std::int64_t rows = values.size(0), columns = rows == 0 ? 0 : values.numel() / rows;
  TORCH_CHECK(rank <= std::min(rows, columns), name, ": a rank of ", rank,
              " is above min(rows, columns) of a ", rows, " x ", columns, " matrix (sizes ",
              values.sizes(), "); take a rank of ", std::min(rows, columns),
              " at most, or leave this tensor out by the filter");
  const at::Tensor matrix = values.resolve_neg().reshape({rows, columns}).to(at::kDouble);
  const at::Tensor finite = matrix.isfinite();
  if (!finite.all().item<bool>()) {
    const auto index = finite.logical_not().view({-1}).to(at::kByte).argmax().item<std::int64_t>();
    TORCH_CHECK(false, name, ": value ", index, " of ", matrix.numel(), " is ",
                matrix.reshape({-1})[index].item<double>(),
                ", and only finite values can be decomposed; look for its origin");
  }
  const double largest = matrix.abs().max().item<double>();
  const double scale = largest > 0 ? std::exp2(std::floor(std::log2(largest))) : 1.0;
  return {matrix.div(scale), scale};
}

template <class = void>
std::vector<at::Tensor> compress(const std::string& name, const at::Tensor& values,
                                 std::int64_t rank, bool exact) {
  const c10::NoGradGuard no_grad;
  const auto [matrix, scale] = scaled_matrix(name, values, rank);
  const Decomposition found = decompose(matrix, rank, exact);
  const at::Tensor root = found.singular.sqrt().mul(std::sqrt(scale));
  const at::ScalarType dtype = values.scalar_type();
  return {found.left.mul(root).to(dtype).contiguous(),
          found.right.mul(root.unsqueeze(1)).to(dtype).contiguous()};
}

/// The unit roundoff of a dtype and half of its smallest positive value.
template <class = void>
std::tuple<double, double> roundoff(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return {0x1p-53, 0.0};
    case at::kFloat: return {0x1p-24, 0x1p-150};
    case at::kHalf: return {0x1p-11, 0x1p-25};
    default: return {0x1p-8, 0x1p-134};  // bf16
  }
}

/// No element errs by more than the Frobenius norm of the residual, and that is
/// sqrt(|A|^2 - sum of the kept singular values of Q^T A, squared), since the residual is
/// orthogonal to what is kept. To it comes what fp64 rounds in that difference (16 max(rows,
/// columns) 2^-53 of |A|^2: the backward error of QR and SVD), what the factors' dtype rounds in
/// each factor, by Cauchy's inequality on a row of left and a column of right, what the product
/// rounds (gamma_R), and what the output's dtype rounds.
template <class = void>
at::Tensor error_bound(const std::string& name, const at::Tensor& values, std::int64_t rank) {
  const c10::NoGradGuard no_grad;
  const auto [matrix, scale] = scaled_matrix(name, values, rank);
  const Decomposition found = decompose(matrix, rank, /*exact=*/false);
  const double square = found.norm * found.norm,
               kept = found.singular.square().sum().item<double>();
  const double slack = 16 * 0x1p-53 * static_cast<double>(std::max(matrix.size(0), matrix.size(1)));
  const double residual = scale * std::sqrt(std::max(0.0, square - kept) + slack * square);
  const auto [unit, smallest] = roundoff(values.scalar_type());
  const double product =
      static_cast<double>(rank) * (values.scalar_type() == at::kDouble ? 0x1p-53 : 0x1p-24);
  const at::Tensor root = found.singular.sqrt().mul(std::sqrt(scale));
  const at::Tensor left = found.left.mul(root).norm(2, 1, /*keepdim=*/true);
  const at::Tensor right = found.right.mul(root.unsqueeze(1)).norm(2, 0, /*keepdim=*/true);
  const double relative = (2 * unit + unit * unit + product) * (1 + 0x1p-6);
  const double absolute = smallest * std::sqrt(static_cast<double>(rank)) * 2;
  const at::Tensor rounding = left.mul(right).mul(relative).add(left.add(right).mul(absolute));
  const at::Tensor inside =
      rounding.add(residual + static_cast<double>(rank) * std::min(smallest, 0x1p-150));
  const at::Tensor bound = matrix.abs().mul(scale).add(inside).mul(unit).add(inside).add(smallest);
  return bound.mul(1 + 0x1p-20)
      .to(values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)
      .view(values.sizes());
}

}  // namespace detail::low_rank

template <std::int64_t R>
class LowRank {
  static_assert(R > 0, "LowRank<R> keeps R singular values, so R is 1 or more");

 public:
  static constexpr std::int64_t kRank = R;
  static constexpr bool kFactorised =
      true;  ///< products use the two factors, and both can be trained
  using Packed = PackedAs<LowRank>;

  static std::string name() { return "LowRank/" + std::to_string(R); }

  /// `values` of 2 or more dimensions, (rows, ...), finite, R <= min(rows, all others together).
  [[nodiscard]] Packed compress(const at::Tensor& values) const {
    return {detail::low_rank::compress(name(), values, R, /*exact=*/false), values.sizes().vec(),
            values.scalar_type()};
  }
  /// The same by at::linalg_svd, whatever it takes: no factors of rank R are nearer (Eckart,
  /// Young).
  [[nodiscard]] Packed compress_exact(const at::Tensor& values) const {
    return {detail::low_rank::compress(name(), values, R, /*exact=*/true), values.sizes().vec(),
            values.scalar_type()};
  }
  /// left right, in the sizes and the dtype that came.
  [[nodiscard]] at::Tensor decompress(const Packed& packed) const {
    return detail::low_rank::decompress(packed.buffers.at(0), packed.buffers.at(1), packed.sizes,
                                        packed.dtype);
  }
  /// Values [begin, end) in row-major order as fp32, of CPU factors: rows of the product for that
  /// range only.
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out) const {
    TORCH_CHECK(packed.buffers.at(0).is_cpu(), name(),
                " decodes tiles of CPU factors only, and these are on ", packed.buffers[0].device(),
                "; use decompress()");
    TORCH_CHECK(0 <= begin && begin <= end && end <= packed.numel(), name(),
                " was asked for values [", begin, ", ", end, ") of ", packed.numel(),
                "; ask for a range inside");
    detail::low_rank::decode(packed.buffers[0], packed.buffers[1], begin, end, out);
  }
  /// Elementwise, of compress; fp32 (fp64 for fp64 values).
  [[nodiscard]] at::Tensor error_bound(const at::Tensor& values) const {
    return detail::low_rank::error_bound(name(), values, R);
  }
};

static_assert(Codec<LowRank<4>> && TileCodec<LowRank<4>>, "LowRank must stay a Codec");

}  // namespace fourfold::inline v0

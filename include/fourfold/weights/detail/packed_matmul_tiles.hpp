// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The packed product for many rows: rectangles of the weight are decoded into scratch that fits
/// the second-level cache, each by one thread, and multiplied there by ATen's gemm. The cut depends
/// on the sizes alone and each rectangle's gemm runs on the one thread that decoded it, so results
/// do not depend on how many threads there are.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <fourfold/core/payload.hpp>

#include <algorithm>
#include <cstdint>

namespace fourfold::inline v0::detail {

/// The gemms below are arithmetic, not part of anybody's model: no graph, no autocast, no recorder.
class PlainArithmetic {
 public:
  PlainArithmetic()
      : exclude_(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                 c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA,
                                      c10::DispatchKey::TESTING_ONLY_GenericMode})) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_;
};

// 256 x 1024 values of fp32 are 1 MiB: half of a core's second-level cache, and wide enough that a
// gemm on one rectangle runs as fast as a whole one (measured: 98 % at 256 wide, 80 % at 64).
inline constexpr std::int64_t kTileFree = 256;     // along the dimension that the result keeps
inline constexpr std::int64_t kTileSummed = 1024;  // along the dimension that is summed over
inline constexpr std::int64_t kTileRows = 512;     // rows of x against one decoded rectangle
/// Decoded values that a thread holds at once, at most.
inline constexpr std::int64_t kTileNumel = kTileFree * kTileSummed;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// How wide to cut a dimension of `size` along which the result is divided among threads: 256, or
/// less where that would leave fewer than four pieces, but never below 64.
constexpr std::int64_t free_width(std::int64_t size) {
  return std::clamp<std::int64_t>(ceil_div(ceil_div(size, 4), 32) * 32, 64, kTileFree);
}

/// Rows [row, row + rows) and columns [column, column + columns) of a 2-D payload, into `out`
/// (rows, columns).
inline void decode_rectangle(const Payload& weight, std::int64_t row, std::int64_t rows,
                             std::int64_t column, std::int64_t columns, float* out) {
  const std::int64_t width = weight.sizes()[1];
  if (columns == width) return weight.decode(row * width, (row + rows) * width, out);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t begin = (row + i) * width + column;
    weight.decode(begin, begin + columns, out + i * columns);
  }
}

/// x W^T (`transposed`) or x W, x (M, summed) of a floating dtype, W (N, K) on a CPU; into
/// `out` (M, free) of x's dtype. Sums in fp32, or in fp64 for an fp64 x.
inline void multiply_tiles(const at::Tensor& x, const Payload& weight, bool transposed,
                           const at::Tensor& out) {
  const std::int64_t m = x.size(0), free = out.size(1), summed = x.size(1);
  const bool wide = x.scalar_type() == at::kDouble;
  const at::ScalarType type = wide ? at::kDouble : at::kFloat;
  const bool direct = out.scalar_type() == type;
  const std::int64_t width = free_width(free), depth = wide ? kTileSummed / 2 : kTileSummed;
  const std::int64_t across = ceil_div(free, width), down = ceil_div(m, kTileRows);
  at::parallel_for(0, across * down, 1, [&](std::int64_t begin, std::int64_t end) {
    const PlainArithmetic plain;
    const at::Tensor scratch =
        at::empty({std::min(width, free) * std::min(depth, summed)}, at::kFloat);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t f = task % across * width, fs = std::min(width, free - f);
      const std::int64_t i = task / across * kTileRows, is = std::min(kTileRows, m - i);
      const at::Tensor target = out.narrow(0, i, is).narrow(1, f, fs);
      at::Tensor sum = direct ? target : at::empty({is, fs}, type);
      for (std::int64_t s = 0; s < summed; s += depth) {
        const std::int64_t ss = std::min(depth, summed - s);
        const std::int64_t rows = transposed ? fs : ss, columns = transposed ? ss : fs;
        decode_rectangle(weight, transposed ? f : s, rows, transposed ? s : f, columns,
                         scratch.mutable_data_ptr<float>());
        const at::Tensor dense =
            scratch.narrow(0, 0, rows * columns).view({rows, columns}).to(type);
        const at::Tensor right = transposed ? dense.t() : dense;
        const at::Tensor left = x.narrow(0, i, is).narrow(1, s, ss).to(type);
        if (s == 0) {
          at::mm_out(sum, left, right);
        } else {
          sum.addmm_(left, right);
        }
      }
      if (!direct) target.copy_(sum);
    }
  });
}

}  // namespace fourfold::inline v0::detail

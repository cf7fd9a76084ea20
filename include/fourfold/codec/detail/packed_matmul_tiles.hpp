// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The packed product for many rows: rectangles of the weight are decoded into scratch that fits
/// the second-level cache, each by one thread, and multiplied there. The cut depends on the sizes
/// alone, so results do not depend on how many threads there are.
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <fourfold/codec/detail/packed_matmul_gemm.hpp>
#include <fourfold/codec/detail/packed_matmul_pack.hpp>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/payload.hpp>

#include <algorithm>
#include <cstdint>

namespace fourfold::inline v0::detail::packed {

/// Conversions and products in here are arithmetic, not part of anybody's model: no graph, no
/// autocast, no recorder.
class PlainArithmetic {
 public:
  PlainArithmetic()
      : exclude_(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                 c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA,
                                      c10::DispatchKey::TESTING_ONLY_GenericMode})) {}

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_;
};

// A decoded rectangle is 512 KiB of fp32 at most: a quarter to a half of a core's second-level
// cache.
inline constexpr std::int64_t kTileFree = 256;   // along the dimension that the result keeps
inline constexpr std::int64_t kTileDepth = 512;  // along the dimension that is summed over
/// Rows of x against one decoded rectangle; decoding it costs as much as multiplying by 20 of them.
inline constexpr std::int64_t kTileRows = 512;

/// How wide to cut a dimension of `size` along which the result is divided among threads: whole
/// panels, 256 at most, in a multiple of four pieces where there are that many panels.
constexpr std::int64_t free_width(std::int64_t size) {
  const std::int64_t pieces = ceil_div(ceil_div(size, kTileFree), 4) * 4;
  return ceil_div(ceil_div(size, pieces), kPanel) * kPanel;
}

/// x W^T (`transposed`) or x W: x (M, summed) of type `x`, W (N, K) on a CPU, into `out` (M, free)
/// of x's dtype. T is the type in which sums are taken.
template <class T>
void multiply_tiles(Isa isa, const at::Tensor& x, const Payload& weight, bool transposed,
                    const at::Tensor& out) {
  constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  const bool converted = out.scalar_type() != type;
  const std::int64_t m = x.size(0), free = out.size(1), summed = x.size(1);
  const std::int64_t width = free_width(free), depth = std::min(kTileDepth, summed);
  const std::int64_t across = ceil_div(free, width), down = ceil_div(m, kTileRows);
  parallel_for(0, across * down, 1, [&](std::int64_t begin, std::int64_t end) {
    const PlainArithmetic plain;
    const at::Tensor panels = at::empty({width * depth}, type);
    const at::Tensor rows = at::empty({kPanelRows * std::max(width, depth)}, at::kFloat);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t first = task % across * width, columns = std::min(width, free - first);
      const std::int64_t row = task / across * kTileRows, height = std::min(kTileRows, m - row);
      const at::Tensor target = out.narrow(0, row, height).narrow(1, first, columns);
      const at::Tensor sum = converted ? at::empty({height, columns}, type) : target;
      for (std::int64_t start = 0; start < summed; start += depth) {
        const std::int64_t deep = std::min(depth, summed - start);
        if (transposed) {
          pack_transposed(isa, weight, first, columns, start, deep, rows.mutable_data_ptr<float>(),
                          panels.mutable_data_ptr<T>());
        } else {
          pack_straight(weight, first, columns, start, deep, rows.mutable_data_ptr<float>(),
                        panels.mutable_data_ptr<T>());
        }
        const at::Tensor left = x.narrow(0, row, height).narrow(1, start, deep).to(type);
        multiply_panels(isa, left.const_data_ptr<T>(), left.stride(0), panels.const_data_ptr<T>(),
                        sum.mutable_data_ptr<T>(), sum.stride(0), height, columns, deep, start > 0);
      }
      if (converted) target.copy_(sum);
    }
  });
}

}  // namespace fourfold::inline v0::detail::packed

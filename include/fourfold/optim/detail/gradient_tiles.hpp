// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A gradient as a step reads it, a tile at a time: where it lies, or, of a sparse one, zeros and
/// what falls into the tile. A sparse gradient is never made dense.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// A sparse gradient on a CPU: rows of `width` values by their place among all rows, in order and
/// each once. Rows are counted by the sparse dimensions, and hold the dense ones.
struct SparseRows {
  std::vector<std::int64_t> places;
  at::Tensor values;
  std::int64_t width = 1;
};

template <class = void>
SparseRows sparse_rows(const at::Tensor& gradient) {
  const at::Tensor summed = gradient.cpu().coalesce();
  const at::Tensor indices = summed._indices().contiguous();
  const auto* index = indices.const_data_ptr<std::int64_t>();
  SparseRows rows;
  rows.values = summed._values().contiguous();
  rows.places.resize(static_cast<std::size_t>(indices.size(1)));
  for (std::int64_t d = 0; d < summed.dim(); ++d) {
    if (d >= summed.sparse_dim()) {
      rows.width *= summed.size(d);
      continue;
    }
    for (std::int64_t& place : rows.places) place = place * summed.size(d) + *index++;
  }
  return rows;
}

template <class T>
class GradientTiles {
 public:
  explicit GradientTiles(const T* dense) : dense_(dense) {}
  /// `rows` must outlive it.
  explicit GradientTiles(const SparseRows& rows)
      : rows_(&rows), values_(rows.values.const_data_ptr<T>()) {}

  /// Values [begin, begin + n), which may be written to `scratch`.
  const T* tile(std::int64_t begin, std::int64_t n, T* scratch) const {
    if (dense_ != nullptr) return dense_ + begin;
    std::fill_n(scratch, n, T(0));
    const auto& [places, values, width] = *rows_;
    for (auto row = std::lower_bound(places.begin(), places.end(), begin / width);
         row != places.end() && *row * width < begin + n; ++row) {
      const std::int64_t first = *row * width;
      const T* of_row = values_ + (row - places.begin()) * width - first;
      // added, so that -0 becomes 0 as it does in a dense gradient
      for (std::int64_t i = std::max(begin, first); i < std::min(begin + n, first + width); ++i)
        scratch[i - begin] += of_row[i];
    }
    return scratch;
  }

 private:
  const T* dense_ = nullptr;
  const SparseRows* rows_ = nullptr;
  const T* values_ = nullptr;
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How a tensor lies in its storage, apart from the storage: what is saved once may have been seen
/// by many.
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/TensorOptions.h>
#include <c10/util/DimVector.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

struct StorageView {
  c10::DimVector sizes, strides;
  std::int64_t offset = 0;  ///< in values
  at::ScalarType dtype = at::kFloat;

  StorageView() = default;
  explicit StorageView(const at::Tensor& tensor)
      : sizes(tensor.sizes()),
        strides(tensor.strides()),
        offset(tensor.storage_offset()),
        dtype(tensor.scalar_type()) {}

  /// The view on a storage whose first value is value `first` of the original one.
  [[nodiscard]] at::Tensor on(const c10::Storage& storage, std::int64_t first = 0) const {
    at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage),
        c10::DispatchKeySet(c10::computeDispatchKey(dtype, std::nullopt, storage.device())),
        c10::scalarTypeToTypeMeta(dtype));
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset - first);
    return tensor;
  }
  friend bool operator==(const StorageView&, const StorageView&) = default;

  [[nodiscard]] std::int64_t numel() const {
    std::int64_t n = 1;
    for (std::int64_t size : sizes) n *= size;
    return n;
  }
  /// Whether its values lie in a row, in their order.
  [[nodiscard]] bool contiguous() const {
    std::int64_t stride = 1;
    for (std::size_t i = sizes.size(); i-- > 0; stride *= sizes[i])
      if (sizes[i] != 1 && strides[i] != stride) return false;
    return true;
  }
};

/// Values [begin, end) of a storage.
template <class = void>
at::Tensor run_of(const c10::Storage& storage, std::int64_t begin, std::int64_t end,
                  at::ScalarType dtype) {
  StorageView run;
  run.sizes = {end - begin}, run.strides = {1}, run.offset = begin, run.dtype = dtype;
  return run.on(storage);
}

/// Which values of its storage a view reads: their order and number of reads forgotten. Dense where
/// one stride of 1 is left, so q, k and v of one product, or their transposes, are told alike.
struct Extent {
  std::int64_t begin = 0;
  std::int64_t span = 0;          ///< from `begin` to one past the last
  c10::DimVector sizes, strides;  ///< descending strides, adjoining dimensions merged

  /// Of a view of at least one value; strides are not negative in LibTorch.
  template <class = void>
  explicit Extent(const StorageView& view) : begin(view.offset) {
    std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // stride, size
    for (std::size_t i = 0; i < view.sizes.size(); ++i)
      if (view.sizes[i] != 1 && view.strides[i] != 0)
        dims.emplace_back(view.strides[i], view.sizes[i]);
    std::sort(dims.begin(), dims.end(), std::greater<>());
    span = 1;
    std::int64_t values = 1;
    for (const auto& [stride, size] : dims) span += stride * (size - 1), values *= size;
    if (values >= span) dims = {{1, span}};  // dense, or windows that overlap
    for (const auto& [stride, size] : dims) {
      if (!strides.empty() && strides.back() == stride * size) {
        sizes.back() *= size, strides.back() = stride;
      } else {
        sizes.push_back(size), strides.push_back(stride);
      }
    }
    if (sizes.empty()) sizes.push_back(1), strides.push_back(1);
  }
  /// `count` values from the first on.
  static Extent whole(std::int64_t count) { return Extent(0, count); }

  [[nodiscard]] bool dense() const { return sizes.size() == 1 && strides.front() == 1; }
  [[nodiscard]] std::int64_t numel() const {
    std::int64_t n = 1;
    for (std::int64_t size : sizes) n *= size;
    return n;
  }
  [[nodiscard]] bool covers(const Extent& other) const {
    if (dense()) return begin <= other.begin && other.begin + other.span <= begin + span;
    return begin == other.begin && sizes == other.sizes && strides == other.strides;
  }
  [[nodiscard]] StorageView view(at::ScalarType dtype) const {
    StorageView v;
    v.sizes = sizes, v.strides = strides, v.offset = begin, v.dtype = dtype;
    return v;
  }

 private:
  Extent(std::int64_t first, std::int64_t count) : begin(first), span(count) {
    sizes.push_back(count), strides.push_back(1);
  }
};

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Indices that max_pool1d, 2d and 3d return, as the place within each window: one byte in place of
/// eight. Lossless: an index is the window's first place in the input's plane, plus the offset.
///   auto payload = pack_pool_indices(indices, windows);   // null: not one byte, or not such indices
///
/// On a CPU, for windows of at most 256 places.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/payload.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// Where windows lie in a plane of depth, height and width; depth 1 in two dimensions.
struct PoolWindows {
  std::array<std::int64_t, 3> input{1, 1, 1}, output{1, 1, 1};
  std::array<std::int64_t, 3> kernel{1, 1, 1}, stride{1, 1, 1}, padding{0, 0, 0}, dilation{1, 1, 1};
  /// Values that lie side by side for one window: 1, or the channels where they come last.
  std::int64_t inner = 1;

  [[nodiscard]] std::int64_t places() const { return kernel[0] * kernel[1] * kernel[2]; }
  /// Of a place in the window: how far it lies behind the window's first one, by its number.
  [[nodiscard]] std::vector<std::int64_t> distances() const {
    std::vector<std::int64_t> out;
    for (std::int64_t d = 0; d < kernel[0]; ++d)
      for (std::int64_t h = 0; h < kernel[1]; ++h)
        for (std::int64_t w = 0; w < kernel[2]; ++w)
          out.push_back((d * dilation[0] * input[1] + h * dilation[1]) * input[2] +
                        w * dilation[2]);
    return out;
  }
  /// The first place of window (row, 0), which padding may put before the plane. Rows are counted
  /// through depth, then through planes.
  [[nodiscard]] std::int64_t first(std::int64_t row) const {
    const std::int64_t d = row / output[1] % output[0] * stride[0] - padding[0];
    const std::int64_t h = row % output[1] * stride[1] - padding[1];
    return (d * input[1] + h) * input[2] - padding[2];
  }
  [[nodiscard]] std::int64_t row_values() const { return output[2] * inner; }
};

namespace detail {

inline constexpr std::int64_t kPoolGrain = 1 << 14;     ///< values a thread takes at least
inline constexpr std::int64_t kMostDistance = 1 << 16;  ///< within a window: a table's length

/// False where an index is none of its window's.
template <class = void>
bool pool_offsets(const std::int64_t* indices, std::int64_t rows, const PoolWindows& windows,
                  std::uint8_t* offsets) {
  constexpr std::uint16_t kNone = 256;
  const std::vector<std::int64_t> distances = windows.distances();
  const std::int64_t most = *std::max_element(distances.begin(), distances.end());
  if (distances.size() > kNone || most >= kMostDistance) return false;
  std::vector<std::uint16_t> place(static_cast<std::size_t>(most) + 1, kNone);
  for (std::size_t i = 0; i < distances.size(); ++i)
    place[static_cast<std::size_t>(distances[i])] = static_cast<std::uint16_t>(i);
  const std::int64_t values = windows.row_values();
  std::atomic<bool> all{true};
  const auto row_grain = std::max<std::int64_t>(1, kPoolGrain / values);
  parallel_for(0, rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    std::uint16_t seen = 0;
    for (std::int64_t row = begin; row < end && seen < kNone; ++row) {
      const std::int64_t* from = indices + row * values;
      std::uint8_t* to = offsets + row * values;
      std::int64_t first = windows.first(row);
      for (std::int64_t w = 0; w < windows.output[2]; ++w, first += windows.stride[2])
        for (std::int64_t c = 0; c < windows.inner; ++c, ++from, ++to) {
          const auto distance = static_cast<std::uint64_t>(*from - first);
          const std::uint16_t found = distance < place.size() ? place[distance] : kNone;
          seen = std::max(seen, found);
          *to = static_cast<std::uint8_t>(found);
        }
    }
    if (seen >= kNone) all.store(false, std::memory_order_relaxed);
  });
  return all.load();
}

template <class = void>
void pool_indices(const std::uint8_t* offsets, std::int64_t rows, const PoolWindows& windows,
                  std::int64_t* indices) {
  const std::vector<std::int64_t> distances = windows.distances();
  const std::int64_t values = windows.row_values();
  const auto row_grain = std::max<std::int64_t>(1, kPoolGrain / values);
  parallel_for(0, rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::uint8_t* from = offsets + row * values;
      std::int64_t* to = indices + row * values;
      std::int64_t first = windows.first(row);
      for (std::int64_t w = 0; w < windows.output[2]; ++w, first += windows.stride[2])
        for (std::int64_t c = 0; c < windows.inner; ++c) *to++ = first + distances[*from++];
    }
  });
}

/// Held as they lie in memory; sizes() are those of a flat tensor.
template <class = void>
class PoolIndices final : public Payload {
 public:
  PoolIndices(at::Tensor offsets, PoolWindows windows)
      : buffers_{std::move(offsets)}, sizes_{buffers_[0].numel()}, windows_(windows) {}

  at::Tensor decompress() const override {
    const c10::NoGradGuard no_grad;
    at::Tensor out = at::empty(sizes_, buffers_[0].options().dtype(at::kLong));
    pool_indices(buffers_[0].template const_data_ptr<std::uint8_t>(),
                 sizes_[0] / windows_.row_values(), windows_,
                 out.template mutable_data_ptr<std::int64_t>());
    return out;
  }
  void decode(std::int64_t, std::int64_t, float*) const override {
    TORCH_CHECK(false, codec(),
                " cannot be read tile by tile; use decompress() for the whole tensor");
  }
  std::shared_ptr<const Payload> compress(const at::Tensor&) const override {
    TORCH_CHECK(false, codec(), " holds what max_pool returned and nothing else");
  }
  std::shared_ptr<const Payload> to(at::Device device, at::ScalarType dtype) const override {
    TORCH_CHECK(device.is_cpu() && dtype == at::kLong, codec(),
                " holds Long indices on a CPU, and was asked for ", dtype, " on ", device,
                "; decompress() them first");
    return std::make_shared<PoolIndices>(*this);
  }
  std::shared_ptr<const Payload> with_buffers(std::vector<at::Tensor> buffers) const override {
    return std::make_shared<PoolIndices>(std::move(buffers.at(0)), windows_);
  }
  at::IntArrayRef sizes() const override { return sizes_; }
  at::ScalarType dtype() const override { return at::kLong; }
  at::Device device() const override { return buffers_[0].device(); }
  std::int64_t nbytes() const override { return static_cast<std::int64_t>(buffers_[0].nbytes()); }
  std::string codec() const override { return "PoolIndices"; }
  bool factorised() const override { return false; }
  const std::vector<at::Tensor>& buffers() const override { return buffers_; }

 private:
  const std::vector<at::Tensor> buffers_;  // offsets uint8 (n)
  const std::vector<std::int64_t> sizes_;
  const PoolWindows windows_;
};

}  // namespace detail

/// `indices`: Long and dense, contiguous or with `windows.inner` channels last. Null where they are
/// not what max_pool returns for such windows.
template <class = void>
[[nodiscard]] std::shared_ptr<const Payload> pack_pool_indices(const at::Tensor& indices,
                                                               const PoolWindows& windows) {
  const std::int64_t rows_values = windows.row_values(), n = indices.numel();
  if (!indices.is_cpu() || indices.scalar_type() != at::kLong || n == 0 || windows.places() < 1 ||
      rows_values < 1 || n % (rows_values * windows.output[0] * windows.output[1]) != 0)
    return nullptr;
  at::Tensor offsets = at::empty({n}, indices.options().dtype(at::kByte));
  if (!detail::pool_offsets(indices.const_data_ptr<std::int64_t>(), n / rows_values, windows,
                            offsets.mutable_data_ptr<std::uint8_t>()))
    return nullptr;
  return std::make_shared<detail::PoolIndices<>>(std::move(offsets), windows);
}

}  // namespace fourfold::inline v0

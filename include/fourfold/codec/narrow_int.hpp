// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Integers in the smallest width that their range holds: 1, 2 or 4 bytes for Long, 1 or 2 for Int.
/// Lossless, as indices of embedding and gather are, and targets of a loss.
///   if (auto packed = NarrowInt::try_compress(indices)) keep(*packed);   // null: no width is smaller
///
/// buffers = {codes uint8 (n * width), least value int64 (1)}. A code is the value's lowest bytes,
/// so one pass narrows and finds the range: with it, a value is the only one of the range that ends
/// in its code. A sample guesses the width; where the range turns out wider, one more pass is made.
/// CPU alone so far.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/parallel.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace fourfold::inline v0 {
namespace detail {

struct IntRange {
  std::int64_t low = std::numeric_limits<std::int64_t>::max();
  std::int64_t high = std::numeric_limits<std::int64_t>::min();

  void include(const IntRange& other) {
    low = std::min(low, other.low), high = std::max(high, other.high);
  }
  /// Bytes that tell its values apart.
  [[nodiscard]] std::int64_t width() const {
    const std::uint64_t span = static_cast<std::uint64_t>(high) - static_cast<std::uint64_t>(low);
    return span <= 0xFF ? 1 : span <= 0xFFFF ? 2 : span <= 0xFFFFFFFF ? 4 : 8;
  }
};

/// Writes the lowest bytes of each value. Four ranges at once, so that none waits for the last one.
template <class T, class U>
IntRange narrow_ints(const T* from, std::int64_t n, U* to) {
  constexpr int kLanes = 4;
  std::array<T, kLanes> low, high;
  low.fill(std::numeric_limits<T>::max()), high.fill(std::numeric_limits<T>::min());
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const T value = from[i + lane];
      low[lane] = std::min(low[lane], value), high[lane] = std::max(high[lane], value);
      to[i + lane] = static_cast<U>(value);
    }
  for (; i < n; ++i) {
    low[0] = std::min(low[0], from[i]), high[0] = std::max(high[0], from[i]);
    to[i] = static_cast<U>(from[i]);
  }
  return {*std::min_element(low.begin(), low.end()), *std::max_element(high.begin(), high.end())};
}

/// The one value from `low` on, fewer than 2^(bits of U) away, that ends in each code.
template <class T, class U>
void widen_ints(const U* from, std::int64_t n, T low, T* to) {
  using Unsigned = std::make_unsigned_t<T>;
  for (std::int64_t i = 0; i < n; ++i)
    to[i] =
        static_cast<T>(static_cast<Unsigned>(low) + static_cast<U>(from[i] - static_cast<U>(low)));
}

/// Calls f(T{}, U{}) with the dtype's integer and the code's.
template <class F>
void visit_narrow(at::ScalarType dtype, std::int64_t width, const F& f) {
  const auto with = [&](auto value) {
    if (width == 1) return f(value, std::uint8_t{});
    if (width == 2) return f(value, std::uint16_t{});
    f(value, std::uint32_t{});
  };
  if (dtype == at::kLong)
    with(std::int64_t{});
  else
    with(std::int32_t{});
}

inline constexpr std::int64_t kNarrowGrain = 1 << 15;  ///< values a thread takes at least

/// Of dense Long or Int values; undefined where no width is smaller. `low`: the least value.
template <class = void>
at::Tensor narrow(const at::Tensor& flat, std::int64_t& low) {
  const std::int64_t n = flat.numel();
  const std::int64_t full = flat.element_size();
  IntRange some{0, 0};
  const std::int64_t stride = std::max<std::int64_t>(1, n / 64);
  for (std::int64_t i = 0; i < n; i += stride) {
    const std::int64_t value =
        full == 8 ? flat.const_data_ptr<std::int64_t>()[i] : flat.const_data_ptr<std::int32_t>()[i];
    if (i == 0) some = {value, value};
    some.include({value, value});
  }
  for (std::int64_t width = some.width(); width < full;) {
    at::Tensor codes = at::empty({n * width}, flat.options().dtype(at::kByte));
    IntRange range = some;
    std::mutex mutex;
    visit_narrow(flat.scalar_type(), width, [&]<class T, class U>(T, U) {
      const T* from = flat.const_data_ptr<T>();
      U* to = static_cast<U*>(codes.mutable_data_ptr());
      parallel_for(0, n, kNarrowGrain, [&](std::int64_t first, std::int64_t last) {
        const IntRange piece = narrow_ints(from + first, last - first, to + first);
        const std::lock_guard lock(mutex);
        range.include(piece);
      });
    });
    low = range.low;
    if (range.width() == width) return codes;
    width = range.width();
  }
  return {};
}

}  // namespace detail

template <class = void>
class BasicNarrowInt {
 public:
  using Packed = PackedAs<BasicNarrowInt>;

  static std::string name() { return "NarrowInt"; }

  /// Nothing if the range needs all bytes, or the tensor is of another kind.
  [[nodiscard]] static std::optional<Packed> try_compress(const at::Tensor& values) {
    if (!takes(values)) return std::nullopt;
    const c10::NoGradGuard no_grad;
    at::Tensor low = at::empty({1}, values.options().dtype(at::kLong));
    at::Tensor codes =
        detail::narrow(values.contiguous().view({-1}), *low.mutable_data_ptr<std::int64_t>());
    if (!codes.defined()) return std::nullopt;
    return Packed{{std::move(codes), std::move(low)}, values.sizes().vec(), values.scalar_type()};
  }
  /// The same; an error where there is nothing.
  [[nodiscard]] Packed compress(const at::Tensor& values) const {
    TORCH_CHECK(values.defined() && takes(values), name(),
                " packs dense Long or Int tensors on a CPU, but was given ",
                values.defined() ? at::toString(values.scalar_type()) : "an undefined tensor",
                values.defined() ? " on " + values.device().str() : "",
                "; keep such a tensor as it is, or convert it first");
    std::optional<Packed> packed = try_compress(values);
    TORCH_CHECK(packed, name(), ": the range of these ", values.numel(), " values needs all ",
                values.element_size(), " bytes of ", values.scalar_type(),
                "; ask try_compress() first, or keep them as they are");
    return *std::move(packed);
  }
  /// Contiguous, in the sizes and the dtype that came.
  [[nodiscard]] at::Tensor decompress(const Packed& packed) const {
    const c10::NoGradGuard no_grad;
    const at::Tensor& codes = packed.buffers.at(0);
    at::Tensor out = at::empty(packed.sizes, codes.options().dtype(packed.dtype));
    const std::int64_t n = out.numel();
    if (n == 0) return out;
    const std::int64_t low = *packed.buffers.at(1).template const_data_ptr<std::int64_t>();
    detail::visit_narrow(packed.dtype, codes.numel() / n, [&]<class T, class U>(T, U) {
      const U* from = static_cast<const U*>(codes.const_data_ptr());
      T* to = out.mutable_data_ptr<T>();
      parallel_for(0, n, detail::kNarrowGrain, [&](std::int64_t first, std::int64_t last) {
        detail::widen_ints(from + first, last - first, static_cast<T>(low), to + first);
      });
    });
    return out;
  }
  [[nodiscard]] at::Tensor error_bound(const at::Tensor& values) const {
    return at::zeros(values.sizes(), values.options().dtype(at::kFloat));
  }

 private:
  static bool takes(const at::Tensor& values) {
    return values.layout() == at::kStrided && values.is_cpu() &&
           (values.scalar_type() == at::kLong || values.scalar_type() == at::kInt);
  }
};
using NarrowInt = BasicNarrowInt<>;

static_assert(Codec<NarrowInt>, "NarrowInt must stay a Codec");

}  // namespace fourfold::inline v0

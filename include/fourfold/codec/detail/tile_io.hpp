// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Tiles of a tensor as fp32, whatever its floating dtype, and what codecs in groups say alike.
#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>
#include <fourfold/core/parallel.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace fourfold::inline v0 {
namespace detail {

inline void check_dense(const at::Tensor& values, const std::string& codec) {
  TORCH_CHECK(values.defined(), codec, " was given an undefined tensor; give it values to pack");
  TORCH_CHECK(values.layout() == at::kStrided, codec, " packs dense tensors, but was given a ",
              values.layout(), " tensor; keep such a tensor as it is, or convert it first");
}

/// Throws unless [begin, end) of n values can be read tile by tile from `codes`.
template <class = void>
void check_tile(const at::Tensor& codes, std::int64_t begin, std::int64_t end, std::int64_t n,
                const std::string& codec) {
  TORCH_CHECK(codes.is_cpu(), codec, " decodes tiles of CPU codes only, and these are on ",
              codes.device(), "; use decompress()");
  TORCH_CHECK(0 <= begin && begin <= end && end <= n, codec, " was asked for values [", begin, ", ",
              end, ") of ", n, "; ask for a range inside");
}

/// A whole group of `group` values as fp32: where they already lie so, else in `buffer`. A tail of
/// n < group values is padded with zeros.
template <class T>
const float* load_group(const T* values, std::int64_t begin, std::int64_t n, std::int64_t group,
                        float* buffer) {
  if constexpr (std::is_same_v<T, float>)
    if (n == group) return values + begin;
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(values[begin + i]);
  std::fill(buffer + n, buffer + group, 0.0F);
  return buffer;
}

/// A loop in groups of `group` values: so many are worth a thread.
constexpr std::int64_t groups_per_task(std::int64_t group) {
  return std::max<std::int64_t>(1, 32768 / group);
}

/// Fills to[0 ... n) by decode(begin, end, fp32 out), on all threads; begin is a multiple of
/// `group`.
template <class T, class Decode>
void decode_to(T* to, std::int64_t n, std::int64_t group, const Decode& decode) {
  const std::int64_t groups = (n + group - 1) / group;
  parallel_for(0, groups, groups_per_task(group), [&](std::int64_t a, std::int64_t b) {
    const std::int64_t begin = a * group, end = std::min(n, b * group);
    if constexpr (std::is_same_v<T, float>) {
      decode(begin, end, to + begin);
    } else {
      constexpr std::int64_t kPart = 512;
      float part[kPart];
      for (std::int64_t at = begin; at < end; at += kPart) {
        const std::int64_t stop = std::min(end, at + kPart);
        decode(at, stop, part);
        for (std::int64_t i = at; i < stop; ++i) to[i] = static_cast<T>(part[i - at]);
      }
    }
  });
}

/// The lowest index that any thread reported.
class FirstIndex {
 public:
  void report(std::int64_t index) {
    std::int64_t seen = first_.load(std::memory_order_relaxed);
    while (index < seen && !first_.compare_exchange_weak(seen, index)) {
    }
  }
  [[nodiscard]] bool found() const { return value() != std::numeric_limits<std::int64_t>::max(); }
  [[nodiscard]] std::int64_t value() const { return first_.load(); }

 private:
  std::atomic<std::int64_t> first_{std::numeric_limits<std::int64_t>::max()};
};

/// Throws, naming the first value from `begin` on, in row-major order, that is not finite in fp32.
template <class = void>
[[noreturn]] void refuse_not_finite(const at::Tensor& values, std::int64_t begin,
                                    const std::string& codec) {
  const at::Tensor flat = values.reshape({-1}), rest = flat.slice(0, begin).to(at::kFloat);
  const std::int64_t index =
      begin + rest.isfinite().logical_not().to(at::kByte).argmax().item<std::int64_t>();
  TORCH_CHECK(
      false, codec, ": value ", index, " of ", flat.numel(), " is ", flat[index].item<double>(),
      ", and rounding to nearest takes finite fp32 numbers only; look for its origin (stochastic "
      "rounding, compress(values, key), carries it through: what shares its scale becomes NaN)");
}

/// `bound` of the codes, widened by what arithmetic rounds: eight operations in fp32, one rounding
/// to the dtype, and what lies below their normal numbers.
inline float with_rounding(double bound, double value, at::ScalarType dtype) {
  const double unit = dtype == at::kBFloat16 ? 0x1p-8 : dtype == at::kHalf ? 0x1p-11 : 0.0;
  const double smallest = dtype == at::kHalf ? 0x1p-24 : 0x1p-125;
  return static_cast<float>(bound + (std::fabs(value) + bound) * (unit + 8 * 0x1p-24) + smallest);
}

}  // namespace detail
}  // namespace fourfold::inline v0

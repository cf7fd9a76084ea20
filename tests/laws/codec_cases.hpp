// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What the codec laws are run on. A codec whose domain is smaller than all finite tensors says so
/// by specialising CodecDomain in its own test, deriving from AnyValues:
///   template <> struct fourfold::laws::CodecDomain<BitMask> : AnyValues {
///     static at::Tensor project(const at::Tensor& normal) { return
///     normal.gt(0).to(normal.dtype()); }
///   };
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fourfold/core/codec.hpp>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace fourfold::laws {

struct AnyValues {
  /// Normal values, brought into the codec's domain; keeps sizes and dtype.
  static at::Tensor project(const at::Tensor& normal) { return normal; }
  /// Values that share a scale: cases lie around its multiples.
  static constexpr std::int64_t kGroup = 64;
  /// Only tensors of two dimensions, at least kSmallest by kSmallest.
  static constexpr bool kMatricesOnly = false;
  static constexpr std::int64_t kSmallest = 1;
  /// compress(values) takes NaN and infinities as they are and gives them back.
  static constexpr bool kKeepsNonfinite = false;
  /// Twice error_bound bounds the stochastic error.
  static constexpr bool kStochasticWithinTwice = true;
  /// The bytes that n values take, where the codec's header states them.
  static std::optional<std::int64_t> nbytes(std::int64_t, at::ScalarType) { return std::nullopt; }
};

template <class C>
struct CodecDomain : AnyValues {};

struct Case {
  std::string what;
  at::Tensor values;
};

inline std::string describe(const Case& c) {
  std::ostringstream out;
  out << c.what << ", " << c.values.scalar_type() << " " << c.values.sizes();
  return out.str();
}

/// Normal numbers that depend on the seed and the sizes alone.
inline at::Tensor normal(at::IntArrayRef sizes, std::uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(sizes, generator);
}

/// Shapes, strides, dtypes and magnitudes at which codecs break.
template <class C>
std::vector<Case> edge_cases() {
  using Domain = CodecDomain<C>;
  constexpr std::int64_t group = Domain::kGroup, least = Domain::kSmallest;
  std::vector<Case> cases;
  std::uint64_t seed = 1;
  const auto add = [&](const std::string& what, const at::Tensor& values) {
    cases.push_back({what, values});
  };
  const auto drawn = [&](at::IntArrayRef sizes) { return Domain::project(normal(sizes, seed++)); };
  std::vector<std::vector<std::int64_t>> shapes = {
      {},          {0},         {3, 0, 2},        {1},        {2},       {group - 1}, {group},
      {group + 1}, {1, 1, 257}, {16 * group + 3}, {5, 7, 11}, {3, group}};
  if (Domain::kMatricesOnly)
    shapes = {{least, least}, {least, least + 7}, {64, 64}, {group + 1, least + 2}, {37, 129}};
  for (const auto& shape : shapes)
    for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble})
      add("drawn", drawn(shape).to(dtype));
  const at::Tensor matrix = drawn({70, 2 * least + 30});
  add("transposed", matrix.t());
  add("every other column", matrix.slice(1, 0, std::nullopt, 2));
  add("one row expanded", matrix.slice(0, 0, 1).expand({least + 9, matrix.size(1)}));
  add("a view that starts inside", matrix.slice(0, 3));
  add("with gradient", drawn({70, 2 * least + 5}).requires_grad_(true));
  for (double size : {1e-42, 1e-30, 1e30, 1e37})
    add("times " + std::to_string(size), Domain::project(normal({33, 40}, seed++) * size));
  add("zeros", at::zeros({33, 40}));
  add("of one value", Domain::project(at::full({33, 40}, 0.3)));
  add("far from zero", Domain::project(normal({33, 40}, seed++) + 1000));
  at::Tensor outlier = normal({33, 40}, seed++);
  outlier.select(0, 5).select(0, 7).fill_(1e6);
  add("with an outlier", Domain::project(outlier));
  return cases;
}

}  // namespace fourfold::laws

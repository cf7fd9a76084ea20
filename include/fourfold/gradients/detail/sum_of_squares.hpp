// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The sum of squares of many values in one pass, in double. The sums of pieces of 2^15 values are
/// added in order, so that neither instructions nor threads change the result. n values err by
/// (n / 16 + 32) 2^-53 of it at most.
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/squares.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

inline constexpr std::int64_t kSquarePiece = 32768;

/// The sum of the squares of n contiguous values of a floating type.
template <class T>
double sum_of_squares(const T* x, std::int64_t n, Isa isa = fourfold::isa()) {
  const std::int64_t pieces = (n + kSquarePiece - 1) / kSquarePiece;
  std::vector<double> of_piece(static_cast<std::size_t>(pieces));
  parallel_for(0, pieces, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t piece = first; piece < last; ++piece) {
      const std::int64_t begin = piece * kSquarePiece, end = std::min(n, begin + kSquarePiece);
      double lanes[kSquareLanes] = {};
      if constexpr (std::is_same_v<T, float>) {
        add_squares(lanes, x + begin, end - begin, isa);
      } else if constexpr (std::is_same_v<T, double>) {
        for (std::int64_t i = begin; i < end; ++i)
          lanes[i % kSquareLanes] = std::fma(x[i], x[i], lanes[i % kSquareLanes]);
      } else {
        constexpr std::int64_t kPart = 512;
        float part[kPart];
        for (std::int64_t at = begin; at < end; at += kPart) {
          const std::int64_t size = std::min(kPart, end - at);
          for (std::int64_t i = 0; i < size; ++i) part[i] = static_cast<float>(x[at + i]);
          add_squares(lanes, part, size, isa);
        }
      }
      for (std::int64_t width = kSquareLanes / 2; width > 0; width /= 2)
        for (std::int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
      of_piece[static_cast<std::size_t>(piece)] = lanes[0];
    }
  });
  double sum = 0;
  for (const double one : of_piece) sum += one;
  return sum;
}

}  // namespace detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's step by a rule that looks at rows, at columns or at the whole of it, as a matrix
/// (rows, columns): rows are dimension 0, and what follows is one row. It is read tile by tile, once
/// for what is summed and once for the update; sums are of fixed parts in a fixed order, so that no
/// number of threads changes a bit.
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/squares.hpp>
#include <fourfold/optim/detail/parameter_step.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <numeric>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// sums[i] += x[i]^2
struct AddSquares {
  FOURFOLD_LOOP static void run(double* __restrict sums, const float* __restrict x,
                                std::int64_t n) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { sums[i] += double{x[i]} * x[i]; });
  }
};

/// p = p * decay + x * rate
struct AddScaled {
  FOURFOLD_LOOP static void run(float* __restrict p, const float* __restrict x, std::int64_t n,
                                float decay, float rate) {
    for_each_value(
        n, [&](std::int64_t i) FOURFOLD_LOOP_BODY { p[i] = std::fma(x[i], rate, p[i] * decay); });
  }
};

template <class = void>
double sum_of_squares(const float* x, std::int64_t n, Isa isa) {
  double lanes[fourfold::detail::kSquareLanes] = {};
  fourfold::detail::add_squares(lanes, x, n, isa);
  return std::accumulate(std::begin(lanes), std::end(lanes), 0.0);
}
template <class = void>
double total(const std::vector<double>& parts) {
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

/// f(row, from, to) for the parts of values [begin, begin + n) that lie in one row: from and to count
/// from begin.
template <class F>
void for_each_row_part(std::int64_t begin, std::int64_t n, std::int64_t columns, const F& f) {
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t row = (begin + i) / columns, end = std::min(n, (row + 1) * columns - begin);
    f(row, i, end);
    i = end;
  }
}

template <class T, class State>
struct MatrixStep {
  T* values;
  const GradientTiles<T>& slope;
  std::int64_t rows, columns;
  State& state;
  const StepKeys& keys;
  bool maximize;
  Isa isa;

  [[nodiscard]] std::int64_t numel() const { return rows * columns; }
  [[nodiscard]] std::int64_t tiles() const { return (numel() + kTile - 1) / kTile; }

  /// The gradient's values [begin, begin + n) as fp32, at most a tile: where they lie or in `out`.
  const float* gradient(std::int64_t begin, std::int64_t n, float* out) const {
    if constexpr (std::is_same_v<T, float>) {
      const float* from = slope.tile(begin, n, out);
      if (!maximize) return from;
      if (from != out) return run_vectorised<Negate>(isa, out, from, n), out;
    } else {
      alignas(64) T rows[kTile];
      run_vectorised<Widen>(isa, out, slope.tile(begin, n, rows), n);
      if (!maximize) return out;
    }
    run_vectorised<NegateInPlace>(isa, out, n);
    return out;
  }

  /// Sums of the gradient's squares, row by row.
  [[nodiscard]] std::vector<double> row_squares() const {
    std::vector<double> sums(static_cast<std::size_t>(rows));
    parallel_for(0, rows, rows_a_task(), [&](std::int64_t a, std::int64_t b) {
      alignas(64) float scratch[kTile];
      for (std::int64_t row = a; row < b; ++row)
        for (std::int64_t c = 0; c < columns; c += kTile) {
          const std::int64_t n = std::min(kTile, columns - c);
          const float* g = gradient(row * columns + c, n, scratch);
          sums[static_cast<std::size_t>(row)] += sum_of_squares(g, n, isa);
        }
    });
    return sums;
  }
  /// The same, column by column: a thread takes 1024 columns.
  [[nodiscard]] std::vector<double> column_squares() const {
    std::vector<double> sums(static_cast<std::size_t>(columns));
    parallel_for(0, (columns + kTile - 1) / kTile, 1, [&](std::int64_t a, std::int64_t b) {
      alignas(64) float scratch[kTile];
      for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t c = a * kTile; c < std::min(columns, b * kTile); c += kTile) {
          const std::int64_t n = std::min(kTile, columns - c);
          const float* g = gradient(row * columns + c, n, scratch);
          run_vectorised<AddSquares>(isa, sums.data() + c, g, n);
        }
    });
    return sums;
  }
  /// The sum over tiles of f(begin, n, weights, gradient), weights as a step sees them.
  template <class F>
  [[nodiscard]] double sum(const F& f) const {
    std::vector<double> parts(static_cast<std::size_t>(tiles()));
    for_each_tile([&](std::int64_t begin, std::int64_t n) {
      alignas(64) float value[kTile], scratch[kTile];
      const float* weights = load(begin, n, value);
      parts[static_cast<std::size_t>(begin / kTile)] =
          f(begin, n, weights, gradient(begin, n, scratch));
    });
    return total(parts);
  }
  /// f(begin, n, weights, gradient, m, v) for each tile, which may write all but the gradient. m and
  /// v are null unless the rule keeps one a value; they are rounded and stored, as weights are.
  template <class F>
  void update(const F& f) const {
    for_each_tile([&](std::int64_t begin, std::int64_t n) {
      alignas(64) float value[kTile];
      float* weights = load(begin, n, value);
      with_moments(begin, n,
                   [&](const float* g, float* m, float* v) { f(begin, n, weights, g, m, v); });
      if constexpr (!std::is_same_v<T, float>)
        state.master.store(begin, n, weights, values + begin, keys.master, isa);
    });
  }
  /// f(begin, n, weights, gradient): the same without the moments.
  template <class F>
  void update_weights(const F& f) const {
    for_each_tile([&](std::int64_t begin, std::int64_t n) {
      alignas(64) float value[kTile], scratch[kTile];
      float* weights = load(begin, n, value);
      f(begin, n, weights, gradient(begin, n, scratch));
      if constexpr (!std::is_same_v<T, float>)
        state.master.store(begin, n, weights, values + begin, keys.master, isa);
    });
  }
  /// f(begin, n, gradient, m, v): the same without the weights.
  template <class F>
  void update_moments(const F& f) const {
    for_each_tile([&](std::int64_t begin, std::int64_t n) {
      with_moments(begin, n, [&](const float* g, float* m, float* v) { f(begin, n, g, m, v); });
    });
  }

 private:
  [[nodiscard]] std::int64_t rows_a_task() const {
    return std::max<std::int64_t>(1, 32 * kTile / std::max<std::int64_t>(1, columns));
  }
  template <class F>
  void for_each_tile(const F& f) const {
    parallel_for(0, tiles(), 32, [&](std::int64_t a, std::int64_t b) {
      for (std::int64_t tile = a; tile < b; ++tile)
        f(tile * kTile, std::min(kTile, numel() - tile * kTile));
    });
  }
  template <class F>
  void with_moments(std::int64_t begin, std::int64_t n, const F& f) const {
    alignas(64) float scratch[kTile], first[kTile], second[kTile];
    const bool has_first = state.first.numel() == numel();
    const bool has_second = state.second.numel() == numel();
    float* m = has_first ? state.first.load(begin, n, first, isa) : nullptr;
    float* v = has_second ? state.second.load(begin, n, second, isa) : nullptr;
    f(gradient(begin, n, scratch), m, v);
    if (has_first) state.first.store(begin, n, m, keys.first, isa);
    if (has_second) state.second.store(begin, n, v, keys.second, isa);
  }
  float* load(std::int64_t begin, std::int64_t n, float* scratch) const {
    if constexpr (std::is_same_v<T, float>)
      return values + begin;
    else
      return state.master.load(begin, n, values + begin, scratch, isa), scratch;
  }
};

/// Calls f with p's MatrixStep.
template <class State, class F>
void step_matrix(const at::Tensor& p, const at::Tensor& grad, State& state, const StepKeys& keys,
                 bool maximize, const std::string& rule, Isa isa, const F& f) {
  if (p.numel() == 0) return;
  in_memory_order(p, grad, /*by_rows=*/true, rule,
                  [&]<class T>(T* values, const GradientTiles<T>& slope) {
                    if constexpr (!std::is_same_v<T, double>) {
                      const std::int64_t rows = p.dim() < 2 ? 1 : p.size(0);
                      f(MatrixStep<T, State>{values, slope, rows, p.numel() / rows, state, keys,
                                             maximize, isa});
                    }
                  });
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

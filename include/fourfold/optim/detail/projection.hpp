// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A gradient seen through few directions: G (rows, columns) by P (rank, the shorter dimension). What
/// comes out is (rank, columns) where rows are the shorter dimension, else (rows, rank). Sums run in
/// one order on any number of threads.
#include <fourfold/core/random.hpp>
#include <fourfold/optim/detail/adamw_update.hpp>
#include <fourfold/optim/detail/matrix_step.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// A plain matrix in fp32.
struct Floats {
  std::int64_t rows = 0, columns = 0;
  std::vector<float> values;

  Floats() = default;
  Floats(std::int64_t r, std::int64_t c)
      : rows(r), columns(c), values(static_cast<std::size_t>(r * c)) {}
  float* row(std::int64_t i) { return values.data() + i * columns; }
  [[nodiscard]] const float* row(std::int64_t i) const { return values.data() + i * columns; }
};

template <class = void>
Floats transposed(const Floats& x) {
  Floats out(x.columns, x.rows);
  for (std::int64_t i = 0; i < x.rows; ++i)
    for (std::int64_t j = 0; j < x.columns; ++j) out.row(j)[i] = x.row(i)[j];
  return out;
}

/// Independent normal values of variance 1 / rank, four from each block of the counter (Box and
/// Muller), so that a projection is drawn again where it is needed, and never kept.
template <class = void>
Floats random_projection(const Key& key, std::int64_t rank, std::int64_t n) {
  Floats out(rank, n);
  const PhiloxStream stream = philox_stream(key);
  const double size = 1 / std::sqrt(static_cast<double>(rank));
  const auto count = static_cast<std::int64_t>(out.values.size());
  parallel_for(0, (count + 3) / 4, 4096, [&](std::int64_t a, std::int64_t b) {
    for (std::int64_t block = a; block < b; ++block) {
      const auto words = philox(stream, static_cast<std::uint64_t>(block));
      for (std::int64_t pair = 0; pair < 2; ++pair) {
        const double u = (words[static_cast<std::size_t>(2 * pair)] + 0.5) * 0x1p-32;
        const double angle =
            2 * std::numbers::pi * words[static_cast<std::size_t>(2 * pair + 1)] * 0x1p-32;
        const double length = size * std::sqrt(-2 * std::log(u));
        const std::int64_t i = 4 * block + 2 * pair;
        if (i < count)
          out.values[static_cast<std::size_t>(i)] = static_cast<float>(length * std::cos(angle));
        if (i + 1 < count)
          out.values[static_cast<std::size_t>(i + 1)] =
              static_cast<float>(length * std::sin(angle));
      }
    }
  });
  return out;
}

/// P (rank, rows) times G: (rank, columns). A thread takes columns.
template <class Matrix>
Floats project_columns(const Matrix& g, const Floats& p) {
  Floats out(p.rows, g.columns);
  constexpr std::int64_t kPart = 256;
  parallel_for(0, (g.columns + kPart - 1) / kPart, 1, [&](std::int64_t a, std::int64_t b) {
    alignas(64) float scratch[kTile];
    for (std::int64_t c = a * kPart; c < std::min(g.columns, b * kPart); c += kPart) {
      const std::int64_t n = std::min(kPart, g.columns - c);
      for (std::int64_t row = 0; row < g.rows; ++row) {
        const float* part = g.gradient(row * g.columns + c, n, scratch);
        for (std::int64_t k = 0; k < p.rows; ++k)
          run_vectorised<AddScaled>(g.isa, out.row(k) + c, part, n, 1.0F, p.row(k)[row]);
      }
    }
  });
  return out;
}
/// G times P^T for P (rank, columns): (rows, rank). A thread takes rows.
template <class Matrix>
Floats project_rows(const Matrix& g, const Floats& p) {
  Floats out(g.rows, p.rows);
  const Floats across = transposed(p);
  parallel_for(0, g.rows, 8, [&](std::int64_t a, std::int64_t b) {
    alignas(64) float scratch[kTile];
    for (std::int64_t row = a; row < b; ++row)
      for (std::int64_t c = 0; c < g.columns; c += kTile) {
        const std::int64_t n = std::min(kTile, g.columns - c);
        const float* part = g.gradient(row * g.columns + c, n, scratch);
        for (std::int64_t i = 0; i < n; ++i)
          run_vectorised<AddScaled>(g.isa, out.row(row), across.row(c + i), p.rows, 1.0F, part[i]);
      }
  });
  return out;
}
template <class Matrix>
Floats project(const Matrix& g, const Floats& p) {
  return g.rows <= g.columns ? project_columns(g, p) : project_rows(g, p);
}

/// Adam's direction for r, whose moments `state` holds, bias corrected.
template <class State>
Floats adam_direction(const Floats& r, State& state, double beta1, double beta2, double eps,
                      std::int64_t step, const StepKeys& keys, Isa isa) {
  Floats out(r.rows, r.columns);
  const AdamWFactors factors(/*lr=*/-1, beta1, beta2, eps, /*weight_decay=*/0, step);
  const auto n = static_cast<std::int64_t>(r.values.size());
  parallel_for(0, (n + kTile - 1) / kTile, 32, [&](std::int64_t a, std::int64_t b) {
    alignas(64) float first[kTile], second[kTile];
    for (std::int64_t begin = a * kTile; begin < std::min(n, b * kTile); begin += kTile) {
      const std::int64_t size = std::min(kTile, n - begin);
      float* m = state.first.load(begin, size, first, isa);
      float* v = state.second.load(begin, size, second, isa);
      update(out.values.data() + begin, r.values.data() + begin, m, v, size, factors, isa);
      state.first.store(begin, size, m, keys.first, isa);
      state.second.store(begin, size, v, keys.second, isa);
    }
  });
  return out;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Adafactor: no first moment, and a second one held as the means of rows and of columns (Shazeer and
/// Stern, arXiv 1804.04235, algorithms 4 and 5), with the options and defaults of Python's
/// torch.optim.Adafactor.
///   optim::Adafactor<> optimizer(model->parameters(), optim::AdafactorOptions(1e-2));
///
/// A matrix takes 4 * (rows + columns) bytes. A vector has a second moment a value, in the codec. A
/// tensor of more dimensions is a matrix of dimension 0 and the rest; Python factors its last two
/// dimensions, batched over the others.
#include <fourfold/optim/detail/matrix_step.hpp>
#include <fourfold/optim/optimizer.hpp>
#include <fourfold/optim/options.hpp>

#include <limits>

namespace fourfold::inline v0 {
namespace optim {

struct AdafactorOptions : detail::OptionsOf<AdafactorOptions> {
  AdafactorOptions(double lr = 1e-2) : lr_(lr) {}
  typedef std::tuple<double, double> eps_t;
  TORCH_ARG(double, lr) = 1e-2;           ///< at most; the step is relative to the weights' size
  TORCH_ARG(double, beta2_decay) = -0.8;  ///< beta2 of step t is 1 - t^beta2_decay
  /// The smallest root of a second moment (0: the dtype's epsilon), and of the weights' size.
  TORCH_ARG(eps_t, eps) = std::make_tuple(0.0, 1e-3);
  TORCH_ARG(double, d) = 1.0;  ///< a step's root mean square is clipped to it
  TORCH_ARG(double, weight_decay) = 0;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("beta2_decay", beta2_decay()), archive("eps", eps());
    archive("d", d()), archive("weight_decay", weight_decay());
  }
};

namespace detail {

/// p = p * decay + g * row * columns[i]: with row = rate / sqrt(R_row) and columns = 1 / sqrt(C).
struct AdafactorLoop {
  FOURFOLD_LOOP static void run(float* __restrict p, const float* __restrict g,
                                const float* __restrict columns, std::int64_t n, float row,
                                float least, float decay, float rate) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      const float root = row * columns[i];  // 1 / sqrt(v), at most 1 / eps
      const float way = g[i] * (root < least ? root : least);
      p[i] = std::fma(way, rate, p[i] * decay);
    });
  }
};

}  // namespace detail

struct AdafactorRule {
  using Options = AdafactorOptions;
  static constexpr bool kByRows = true;

  static std::string name() { return "Adafactor"; }
  static void check(const Options& options, const std::string& whose) {
    const auto [eps1, eps2] = options.eps();
    detail::check_learning_rate(options.lr(), whose);
    detail::check_option(options.beta2_decay() <= 0, "beta2_decay", options.beta2_decay(), whose,
                         "is 0 or less");
    detail::check_option(eps1 >= 0, "epsilon at index 0", eps1, whose, "is 0 or more");
    detail::check_option(eps2 >= 0, "epsilon at index 1", eps2, whose, "is 0 or more");
    detail::check_option(options.d() >= 1, "clipping threshold d", options.d(), whose,
                         "is 1 or more");
    detail::check_weight_decay(options.weight_decay(), whose);
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) {
    return {0, p.dim() < 2 ? p.numel() : 0};
  }
  static std::vector<std::vector<std::int64_t>> extra(const at::Tensor& p, const Options&) {
    if (p.dim() < 2 || p.numel() == 0) return {};
    return {{p.size(0)}, {p.numel() / p.size(0)}};
  }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount& count, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    const auto step = static_cast<double>(count.step);
    const auto [given, eps2] = options.eps();
    const double eps1 = given > 0                          ? given
                        : p.scalar_type() == at::kBFloat16 ? 0x1p-7
                        : p.scalar_type() == at::kHalf     ? 0x1p-10
                                                           : 0x1p-23;
    const double take = std::pow(step, options.beta2_decay());
    const double rho = std::min(options.lr(), 1 / std::sqrt(step));
    const auto decay = static_cast<float>(1 - options.lr() * options.weight_decay());
    detail::step_matrix(p, grad, state, keys, maximize, name(), isa, [&](const auto& matrix) {
      const auto count_of_all = static_cast<double>(matrix.numel());
      const double size =
          matrix.sum([&](std::int64_t, std::int64_t n, const float* w, const float*) {
            return detail::sum_of_squares(w, n, isa);
          });
      const double alpha = std::max(eps2, std::sqrt(size / count_of_all)) * rho;
      const auto least = static_cast<float>(1 / eps1);
      const auto rate_of = [&](double squares) {
        const double denominator = std::max(1.0, std::sqrt(squares / count_of_all) / options.d());
        return static_cast<float>(-alpha / denominator);
      };
      if (state.extra.empty()) {
        step_vector(matrix, static_cast<float>(take), least, decay, rate_of);
      } else {
        const auto [rows, columns] = factors(matrix, take, eps1);
        step_factored(matrix, rows, columns, least, decay, rate_of);
      }
    });
  }

 private:
  /// Both means brought up to date; returned are 1 / sqrt of each, whose product is 1 / sqrt(v).
  template <class Matrix>
  static std::pair<std::vector<float>, std::vector<float>> factors(const Matrix& matrix,
                                                                   double take, double eps1) {
    const auto update = [&](at::Tensor& means, const std::vector<double>& squares, double count) {
      float* mean = means.mutable_data_ptr<float>();
      for (std::size_t i = 0; i < squares.size(); ++i)
        mean[i] = static_cast<float>(mean[i] + take * (squares[i] / count - mean[i]));
      return mean;
    };
    const float* row =
        update(matrix.state.extra[0], matrix.row_squares(), static_cast<double>(matrix.columns));
    const float* column =
        update(matrix.state.extra[1], matrix.column_squares(), static_cast<double>(matrix.rows));
    double mean = 0;
    for (std::int64_t i = 0; i < matrix.rows; ++i) mean += row[i];
    mean = std::max(mean / static_cast<double>(matrix.rows), eps1);
    std::vector<float> rows(static_cast<std::size_t>(matrix.rows));
    std::vector<float> columns(static_cast<std::size_t>(matrix.columns));
    for (std::size_t i = 0; i < rows.size(); ++i)
      rows[i] = static_cast<float>(std::sqrt(mean / row[i]));  // of 0 it is infinity, bounded below
    for (std::size_t i = 0; i < columns.size(); ++i)
      columns[i] = static_cast<float>(1 / std::sqrt(double{column[i]}));
    return {std::move(rows), std::move(columns)};
  }

  template <class Matrix, class Rate>
  static void step_factored(const Matrix& matrix, const std::vector<float>& rows,
                            const std::vector<float>& columns, float least, float decay,
                            const Rate& rate_of) {
    const auto each_part = [&](std::int64_t begin, std::int64_t n, const auto& f) {
      detail::for_each_row_part(
          begin, n, matrix.columns, [&](std::int64_t row, std::int64_t from, std::int64_t to) {
            const float* column = columns.data() + (begin + from - row * matrix.columns);
            f(from, to, rows[static_cast<std::size_t>(row)], column);
          });
    };
    const double squares = matrix.sum([&](std::int64_t begin, std::int64_t n, const float*,
                                          const float* g) {
      alignas(64) float way[detail::kTile];
      std::fill_n(way, n, 0.0F);
      each_part(begin, n, [&](std::int64_t from, std::int64_t to, float row, const float* column) {
        detail::run_vectorised<detail::AdafactorLoop>(matrix.isa, way + from, g + from, column,
                                                      to - from, row, least, 0.0F, 1.0F);
      });
      return detail::sum_of_squares(way, n, matrix.isa);
    });
    const float rate = rate_of(squares);
    matrix.update([&](std::int64_t begin, std::int64_t n, float* weights, const float* g, float*,
                      float*) {
      each_part(begin, n, [&](std::int64_t from, std::int64_t to, float row, const float* column) {
        detail::run_vectorised<detail::AdafactorLoop>(matrix.isa, weights + from, g + from, column,
                                                      to - from, row, least, decay, rate);
      });
    });
  }

  /// Vectors are short: the new moment is computed twice, and stored once.
  template <class Matrix, class Rate>
  static void step_vector(const Matrix& matrix, float take, float least, float decay,
                          const Rate& rate_of) {
    const auto way = [&](float g, float& v) {
      v = std::fma(take, std::fma(g, g, -v), v);
      return g * std::min(1 / std::sqrt(v), least);
    };
    const double squares =
        matrix.sum([&](std::int64_t begin, std::int64_t n, const float*, const float* g) {
          alignas(64) float scratch[detail::kTile];
          const float* v = matrix.state.second.load(begin, n, scratch, matrix.isa);
          double sum = 0;
          for (std::int64_t i = 0; i < n; ++i) {
            float next = v[i];
            const double one = way(g[i], next);
            sum += one * one;
          }
          return sum;
        });
    const float rate = rate_of(squares);
    matrix.update(
        [&](std::int64_t, std::int64_t n, float* weights, const float* g, float*, float* v) {
          for (std::int64_t i = 0; i < n; ++i) {
            const float one = way(g[i], v[i]);
            weights[i] = std::fma(one, rate, weights[i] * decay);
          }
        });
  }
};
static_assert(UpdateRule<AdafactorRule>);

template <class SecondMomentCodec = Fp32, class MasterCodec = RoundNearest>
using Adafactor = Optimizer<AdafactorRule, Fp32, SecondMomentCodec, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

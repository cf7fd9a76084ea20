// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Muon: momentum, brought near the closest orthogonal matrix by Newton and Schulz's iteration (Jordan
/// et al., 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982), with the options and
/// defaults of Python's torch.optim.Muon.
///   optim::MuonOf<Int8> optimizer(matrices, optim::MuonOptions(0.02));   // and AdamW for the rest
///
/// The iteration needs the whole matrix: a step's scratch is four matrices of the parameter's size in
/// fp32, one parameter at a time. Its products are LibTorch's, in fp32 (Python: bf16), and round
/// differently on other numbers of threads. Matrices only: vectors are refused; convolutions are
/// (outputs, the rest).
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <fourfold/optim/detail/matrix_step.hpp>
#include <fourfold/optim/optimizer.hpp>
#include <fourfold/optim/options.hpp>

namespace fourfold::inline v0 {
namespace optim {

struct MuonOptions : detail::OptionsOf<MuonOptions> {
  MuonOptions(double lr = 1e-3) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(double, weight_decay) = 0.1;
  TORCH_ARG(double, momentum) = 0.95;
  TORCH_ARG(bool, nesterov) = true;
  TORCH_ARG(double, eps) = 1e-7;
  TORCH_ARG(std::int64_t, ns_steps) = 5;
  /// Rates that fit AdamW: lr * 0.2 * sqrt(max(rows, columns)), in place of the original
  /// lr * sqrt(max(1, rows / columns)).
  TORCH_ARG(bool, match_rms_adamw) = false;

 public:
  template <class Archive>
  void each(Archive&& archive) {
    archive("lr", lr()), archive("weight_decay", weight_decay()), archive("momentum", momentum());
    archive("nesterov", nesterov()), archive("eps", eps()), archive("ns_steps", ns_steps());
    archive("match_rms_adamw", match_rms_adamw());
  }
};

namespace detail {

/// m = m + take * (g - m); out is m, or the same mean of g and m once more.
struct MuonLoop {
  FOURFOLD_LOOP static void run(float* __restrict m, const float* __restrict g,
                                float* __restrict out, std::int64_t n, float take, bool nesterov) {
    for_each_value(n, [&](std::int64_t i) FOURFOLD_LOOP_BODY {
      m[i] = std::fma(take, g[i] - m[i], m[i]);
      out[i] = nesterov ? std::fma(take, g[i] - m[i], m[i]) : m[i];
    });
  }
};
/// x's singular values are brought near 1: x (rows, columns) / |x|, then `steps` times
/// a x + (b y + c y y) x with y = x x^T.
template <class = void>
at::Tensor newton_schulz(at::Tensor x, double eps, std::int64_t steps) {
  constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
  const bool tall = x.size(0) > x.size(1);
  if (tall) x = x.t();
  x.div_(std::max(x.norm().template item<double>(), eps));
  for (std::int64_t i = 0; i < steps; ++i) {
    const at::Tensor y = at::mm(x, x.t());
    x = at::addmm(x, at::addmm(y, y, y, kB, kC), x, kA);
  }
  return (tall ? x.t() : x).contiguous();
}

}  // namespace detail

struct MuonRule {
  using Options = MuonOptions;
  static constexpr bool kByRows = true;

  static std::string name() { return "Muon"; }
  static void check(const Options& options, const std::string& whose) {
    detail::check_learning_rate(options.lr(), whose);
    detail::check_weight_decay(options.weight_decay(), whose);
    detail::check_option(0 <= options.momentum() && options.momentum() < 1, "momentum value",
                         options.momentum(), whose, "lies in [0, 1)");
    detail::check_option(options.eps() > 0, "epsilon value", options.eps(), whose, "is above 0");
    detail::check_option(1 <= options.ns_steps() && options.ns_steps() < 100, "ns_steps",
                         options.ns_steps(), whose, "lies in [1, 100)");
  }
  static void check_parameter(const at::Tensor& p, std::int64_t index) {
    TORCH_CHECK(p.dim() >= 2, "Muon steps matrices, and parameter ", index, " is ", p.sizes(),
                "; give vectors to an AdamW of their own");
  }
  static MomentSizes moments(const at::Tensor& p, const Options&) { return {p.numel(), 0}; }

  template <class State>
  static void step(const at::Tensor& p, const at::Tensor& grad, State& state,
                   const Options& options, const StepCount&, const detail::StepKeys& keys,
                   bool maximize, Isa isa = fourfold::isa()) {
    const auto take = static_cast<float>(1 - options.momentum());
    const auto decay = static_cast<float>(1 - options.lr() * options.weight_decay());
    detail::step_matrix(p, grad, state, keys, maximize, name(), isa, [&](const auto& matrix) {
      const auto rows = static_cast<double>(matrix.rows);
      const auto columns = static_cast<double>(matrix.columns);
      at::Tensor way = at::empty({matrix.rows, matrix.columns}, at::kFloat);
      float* to = way.mutable_data_ptr<float>();
      matrix.update_moments(
          [&](std::int64_t begin, std::int64_t n, const float* g, float* m, float*) {
            detail::run_vectorised<detail::MuonLoop>(isa, m, g, to + begin, n, take,
                                                     options.nesterov());
          });
      way = detail::newton_schulz(std::move(way), options.eps(), options.ns_steps());
      const float* from = way.const_data_ptr<float>();
      const double adjusted = options.match_rms_adamw() ? 0.2 * std::sqrt(std::max(rows, columns))
                                                        : std::sqrt(std::max(1.0, rows / columns));
      const auto rate = static_cast<float>(-options.lr() * adjusted);
      matrix.update_weights([&](std::int64_t begin, std::int64_t n, float* weights, const float*) {
        detail::run_vectorised<detail::AddScaled>(isa, weights, from + begin, n, decay, rate);
      });
    });
  }
};
static_assert(UpdateRule<MuonRule>);

template <class MomentCodec, class MasterCodec = RoundNearest>
using Muon = Optimizer<MuonRule, MomentCodec, Fp32, MasterCodec>;
template <class C, class MasterCodec = RoundNearest>
using MuonOf = Muon<typename StatesOf<C>::First, MasterCodec>;

}  // namespace optim
}  // namespace fourfold::inline v0

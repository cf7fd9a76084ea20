// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's step by an elementwise rule: by a kernel where its states are on a GPU, else tile
/// by tile: decode, update, encode. Scratch is one tile of at most six arrays a thread, 24 KiB.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/Exception.h>
#include <fourfold/codec/detail/by_kernel.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/visit.hpp>
#include <fourfold/optim/detail/gradient_tiles.hpp>
#include <fourfold/optim/detail/parameter_state.hpp>
#include <fourfold/optim/detail/step_by_kernel.hpp>
#include <fourfold/optim/rule.hpp>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Throws unless `grad` is one that a rule can step `p` with.
template <class = void>
void check_gradient(const std::string& rule, const at::Tensor& p, const at::Tensor& grad,
                    std::int64_t index) {
  TORCH_CHECK(grad.layout() == at::kStrided || grad.layout() == at::kSparse, rule,
              " takes dense gradients and those of layout Sparse, and that of parameter ", index,
              " is ", grad.layout(), "; convert it with to_sparse() or to_dense()");
  TORCH_CHECK(at::isFloatingType(p.scalar_type()), rule,
              " steps floating parameters, and parameter ", index, " is ", p.scalar_type(),
              "; leave it out of the optimizer");
  TORCH_CHECK(grad.sizes() == p.sizes() && grad.scalar_type() == p.scalar_type() &&
                  grad.device() == p.device(),
              rule, ": the gradient of parameter ", index, " is ", grad.scalar_type(), " ",
              grad.sizes(), " on ", grad.device(), ", but the parameter is ", p.scalar_type(), " ",
              p.sizes(), " on ", p.device(), "; set a gradient like the parameter");
}

/// The noise of one parameter's step: none where states are rounded to nearest.
struct StepKeys {
  std::optional<Key> first, second, master;
  Key matrix;  ///< of random projections; its step is the rule's to set

  /// Of one of a step's gradients.
  void of_micro_batch(std::int64_t index) {
    for (std::optional<Key>* key : {&first, &second, &master})
      if (*key) (*key)->forward = static_cast<std::uint64_t>(index);
  }

  StepKeys() = default;
  /// `storage`: two numbers a parameter, one for each moment; the others have numbers far from both.
  /// Forward 0 is no scope's.
  StepKeys(std::uint64_t seed, std::int64_t step, std::uint64_t storage, bool moments) {
    const auto at = static_cast<std::uint64_t>(step);
    if (moments) first = Key{seed, at, 0, storage}, second = Key{seed, at, 0, storage + 1};
    master = Key{seed, at, 0, storage + (std::uint64_t{1} << 62)};
    matrix = Key{seed, 0, 0, storage + (std::uint64_t{1} << 61)};
  }
};

/// f(values, gradient) with p's memory and a GradientTiles, both in the order of
/// state_strides(p, by_rows). A sparse gradient is made dense where that order is not row-major.
template <class F>
void in_memory_order(const at::Tensor& p, at::Tensor grad, bool by_rows, const std::string& rule,
                     const F& f) {
  const c10::NoGradGuard no_grad;
  const bool direct = stepped_in_place(p, by_rows);
  at::Tensor target = p.detach();
  if (!direct) {
    if (!p.is_cpu())
      fourfold::detail::warn_without_kernel("fourfold's " + rule + " steps parameters", p.device(),
                                            "by way of the CPU, where their states stay",
                                            /*has_kernel=*/false);
    target = p.detach().to(at::kCPU).contiguous();
  }
  const bool sparse = grad.is_sparse() && target.is_contiguous();
  SparseRows rows;
  if (sparse)
    rows = sparse_rows(grad);
  else if (grad.is_sparse() || !grad.is_cpu() ||
           !same_order(target.sizes(), grad.strides(), target.strides()))
    grad = at::empty_like(target).copy_(grad.is_sparse() ? grad.to_dense() : grad);
  visit_float(p.scalar_type(), rule, [&]<class T>(std::type_identity<T>) {
    f(target.mutable_data_ptr<T>(),
      sparse ? GradientTiles<T>(rows) : GradientTiles<T>(grad.const_data_ptr<T>()));
  });
  if (!direct) {
    p.copy_(target);
  } else if (!p.is_inference()) {
    p.unsafeGetTensorImpl()->bump_version();  // as an in-place operator would
  }
}

/// Values [begin, begin + n) of a parameter of type T in memory order.
template <class Rule, class T, class State>
void step_tile(T* p, const GradientTiles<T>& grad, State& state, std::int64_t begin, std::int64_t n,
               const typename Rule::Factors& factors, const StepKeys& keys, bool maximize,
               Isa isa) {
  alignas(64) float first[kTile], second[kTile];
  float* m = state.first.load(begin, n, first, isa);
  float* v = state.second.load(begin, n, second, isa);
  alignas(64) T rows[kTile];
  const T* g = grad.tile(begin, n, rows);
  p += begin;
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    alignas(64) T slope[kTile];
    if (maximize) run_vectorised<Negate>(isa, static_cast<T*>(slope), g, n);
    Rule::update(p, maximize ? slope : g, m, v, n, factors, isa);
  } else {
    alignas(64) float value[kTile], slope[kTile];
    state.master.load(begin, n, p, value, isa);
    run_vectorised<Widen>(isa, static_cast<float*>(slope), g, n);
    if (maximize) run_vectorised<NegateInPlace>(isa, static_cast<float*>(slope), n);
    Rule::update(value, slope, m, v, n, factors, isa);
    state.master.store(begin, n, value, p, keys.master, isa);
  }
  state.first.store(begin, n, m, keys.first, isa);
  state.second.store(begin, n, v, keys.second, isa);
}

template <class Rule, class State>
void step_values(const at::Tensor& p, const at::Tensor& grad, State& state,
                 const typename Rule::Factors& factors, const StepKeys& keys, bool maximize = false,
                 Isa isa = fourfold::isa()) {
  if constexpr (kHasKernel<Rule, State>)
    if (!state.device.is_cpu())
      return step_by_kernel<Rule>(p, grad, state, factors, keys, maximize);
  in_memory_order(p, grad, /*by_rows=*/false, Rule::name(), [&](auto* values, const auto& slope) {
    const std::int64_t n = p.numel(), tiles = (n + kTile - 1) / kTile;
    parallel_for(0, tiles, 32, [&](std::int64_t a, std::int64_t b) {
      for (std::int64_t tile = a; tile < b; ++tile)
        step_tile<Rule>(values, slope, state, tile * kTile, std::min(kTile, n - tile * kTile),
                        factors, keys, maximize, isa);
    });
  });
}

/// The weights that p and `rest` (core/rounded_weight.hpp) hold together, from now on in p and its
/// master.
template <class Rule, class State>
void start_master(const at::Tensor& p, const at::Tensor& rest, State& state) {
  const at::Device where = state.device;
  const at::Tensor host = where.is_cpu() ? p : p.detach().to(at::kCPU);
  state.to(at::kCPU);
  in_memory_order(host, rest, kByRows<Rule>, Rule::name(), [&]<class T>(T* values, const auto& of) {
    if constexpr (std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>) {
      alignas(64) float exact[kTile];
      alignas(64) T scratch[kTile];
      for (std::int64_t begin = 0; begin < p.numel(); begin += kTile) {
        const std::int64_t n = std::min(kTile, p.numel() - begin);
        run_vectorised<WithRest>(fourfold::isa(), static_cast<float*>(exact), values + begin,
                                 of.tile(begin, n, scratch), n);
        state.master.store(begin, n, exact, values + begin, std::nullopt, fourfold::isa());
      }
    }
  });
  if (!where.is_cpu()) p.copy_(host);
  state.to(where);
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's step, tile by tile: decode both moments, update, encode them again. Scratch is
/// one tile of four arrays a thread, 16 KiB.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/Exception.h>
#include <c10/util/strides.h>
#include <fourfold/codec/detail/by_kernel.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/visit.hpp>
#include <fourfold/optim/detail/adamw_update.hpp>
#include <fourfold/optim/detail/moment.hpp>

#include <torch/optim/optimizer.h>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Whether a step reads and writes `p` where it lies.
template <class = void>
bool stepped_in_place(const at::Tensor& p) {
  return p.is_cpu() && p.is_non_overlapping_and_dense();
}

/// The order in which p's moments lie: p's own in memory, or row-major where a step copies p.
template <class = void>
std::vector<std::int64_t> moment_strides(const at::Tensor& p) {
  if (stepped_in_place(p)) return p.strides().vec();
  const auto strides = c10::contiguous_strides(p.sizes());
  return {strides.begin(), strides.end()};
}

template <class First, class Second>
struct AdamWState final
    : public ::torch::optim::OptimizerCloneableParamState<AdamWState<First, Second>> {
  std::int64_t step = 0;
  std::vector<std::int64_t> sizes;    ///< of the parameter
  std::vector<std::int64_t> strides;  ///< moment_strides() of it
  Moment<First> first;
  Moment<Second> second;

  AdamWState() = default;
  AdamWState(const at::Tensor& p, std::int64_t min_packed_elements)
      : sizes(p.sizes().vec()),
        strides(moment_strides(p)),
        first(p.numel(), p.numel() >= min_packed_elements),
        second(p.numel(), p.numel() >= min_packed_elements) {}
};

/// Whether element i of one lies in memory where element i of the other does: equal strides, those
/// of dimensions of size 1 aside.
template <class = void>
bool same_order(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != sizes.size() || b.size() != sizes.size()) return false;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && a[i] != b[i]) return false;
  return true;
}

/// Throws unless `grad` is one that AdamW can step `p` with.
template <class = void>
void check_gradient(const at::Tensor& p, const at::Tensor& grad, std::int64_t index) {
  TORCH_CHECK(grad.layout() == at::kStrided,
              "AdamW does not support sparse gradients, and that of parameter ", index, " is ",
              grad.layout(), "; build its Embedding with sparse(false)");
  TORCH_CHECK(at::isFloatingType(p.scalar_type()),
              "AdamW steps floating parameters, and parameter ", index, " is ", p.scalar_type(),
              "; leave it out of the optimizer");
  TORCH_CHECK(grad.sizes() == p.sizes() && grad.scalar_type() == p.scalar_type() &&
                  grad.device() == p.device(),
              "AdamW: the gradient of parameter ", index, " is ", grad.scalar_type(), " ",
              grad.sizes(), " on ", grad.device(), ", but the parameter is ", p.scalar_type(), " ",
              p.sizes(), " on ", p.device(), "; set a gradient like the parameter");
}

inline void update_wide(double* p, const double* g, float* m, float* v, std::int64_t n,
                        const AdamWFactors& k) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double first = double{m[i]} * k.keep_first + g[i] * k.take_first;
    const double second = double{v[i]} * k.keep_second + g[i] * g[i] * k.take_second;
    p[i] = p[i] * k.decay + k.rate * first / (std::sqrt(second) * k.root + k.eps);
    m[i] = static_cast<float>(first), v[i] = static_cast<float>(second);
  }
}

/// Values [begin, begin + n) of a parameter of type T in memory order.
template <class T, class State>
void step_tile(T* p, const T* g, State& state, std::int64_t begin, std::int64_t n,
               const AdamWFactors& factors, const std::optional<Key>& key, Isa isa) {
  alignas(64) float first[kTile], second[kTile];
  float* m = state.first.load(begin, n, first, isa);
  float* v = state.second.load(begin, n, second, isa);
  if constexpr (std::is_same_v<T, float>) {
    update(p + begin, g + begin, m, v, n, factors, isa);
  } else if constexpr (std::is_same_v<T, double>) {
    update_wide(p + begin, g + begin, m, v, n, factors);
  } else {
    alignas(64) float value[kTile] = {}, grad[kTile] = {};
    for (std::int64_t i = 0; i < n; ++i) value[i] = static_cast<float>(p[begin + i]);
    for (std::int64_t i = 0; i < n; ++i) grad[i] = static_cast<float>(g[begin + i]);
    update(value, grad, m, v, n, factors, isa);
    for (std::int64_t i = 0; i < n; ++i) p[begin + i] = static_cast<T>(value[i]);
  }
  std::optional<Key> other = key;  // no two tensors of a step share noise
  if (other) other->storage += 1;
  state.first.store(begin, n, m, key, isa);
  state.second.store(begin, n, v, other, isa);
}

/// Steps `p`. `key` is that of the first moment; the second's has the next storage number.
template <class State>
void step_parameter(at::Tensor p, at::Tensor grad, State& state, const AdamWFactors& factors,
                    const std::optional<Key>& key, Isa isa = fourfold::isa()) {
  const c10::NoGradGuard no_grad;
  const bool direct = stepped_in_place(p);
  at::Tensor target = p.detach();
  if (!direct) {
    if (!p.is_cpu())
      fourfold::detail::warn_without_kernel("fourfold's AdamW steps parameters", p.device(),
                                            "by way of the CPU, where their states stay",
                                            /*has_kernel=*/false);
    target = p.detach().to(at::kCPU).contiguous();
  }
  if (!same_order(target.sizes(), grad.strides(), target.strides()) || !grad.is_cpu())
    grad = at::empty_like(target).copy_(grad);
  visit_float(p.scalar_type(), "AdamW", [&]<class T>(std::type_identity<T>) {
    T* values = target.mutable_data_ptr<T>();
    const T* slope = grad.const_data_ptr<T>();
    const std::int64_t n = target.numel(), tiles = (n + kTile - 1) / kTile;
    parallel_for(0, tiles, 32, [&](std::int64_t a, std::int64_t b) {
      for (std::int64_t tile = a; tile < b; ++tile)
        step_tile(values, slope, state, tile * kTile, std::min(kTile, n - tile * kTile), factors,
                  key, isa);
    });
  });
  if (!direct) {
    p.copy_(target);
  } else if (!p.is_inference()) {
    p.unsafeGetTensorImpl()->bump_version();  // as an in-place operator would
  }
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

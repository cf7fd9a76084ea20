// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A step of one parameter on a GPU by fourfold::cuda, with the bits of the step on a CPU: states lie
/// beside the parameter, in the order of its memory. Without the kernel, for rules that look at rows,
/// and for codecs of a user's own, states stay on the CPU and the step goes by way of it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fourfold/cuda/run_kernel.hpp>
#include <fourfold/optim/detail/parameter_state.hpp>
#include <fourfold/optim/rule.hpp>
#include <fourfold/optim/state_codec.hpp>

#include <algorithm>
#include <optional>
#include <type_traits>

namespace fourfold::inline v0 {
namespace optim::detail {

// The numbers that FourfoldMoment and FourfoldStep give to codecs; -1: the kernel does not know it.

template <class C>
inline constexpr std::int32_t kMomentCode = std::is_same_v<C, Fp32>                     ? 1
                                            : std::is_same_v<C, BFloat16>               ? 2
                                            : std::is_same_v<C, Companded<8, Softsign>> ? 3
                                            : std::is_same_v<C, Companded<8, Sqrt>>     ? 4
                                            : std::is_same_v<C, Normal4>                ? 5
                                            : std::is_same_v<C, Log4>                   ? 6
                                                                                        : -1;
template <class C>
inline constexpr std::int32_t kMasterCode = std::is_same_v<C, RoundNearest>          ? 0
                                            : std::is_same_v<C, RoundStochastic>     ? 1
                                            : std::is_same_v<C, ErrorCorrection<8>>  ? 2
                                            : std::is_same_v<C, ErrorCorrection<16>> ? 3
                                            : std::is_same_v<C, Kahan>               ? 4
                                            : std::is_same_v<C, Fp32>                ? 5
                                                                                     : -1;
/// A first moment has a sign, a second one has none: the kernel knows no code for the other's.
template <class Rule, class State>
inline constexpr bool kHasKernel = [] {
  if constexpr (requires(const typename Rule::Factors& k) { Rule::in_kernel(k, MomentSizes{}); }) {
    constexpr std::int32_t first = kMomentCode<typename State::First>,
                           second = kMomentCode<typename State::Second>;
    return (first == 1 || first == 2 || first == 3 || first == 5) &&
           (second == 1 || second == 2 || second == 4 || second == 6) &&
           kMasterCode<typename State::MasterCodec> >= 0;
  } else {
    return false;
  }
}();

/// Where the states of `p` lie; `on_host`: by the user's wish.
template <class Rule, class State>
at::Device state_device(const at::Tensor& p, bool on_host = false) {
  if constexpr (kHasKernel<Rule, State>)
    if (!on_host && p.is_cuda() && cuda::kernels() != nullptr &&
        cuda::kernel_dtype(p.scalar_type()) && p.is_non_overlapping_and_dense())
      return p.device();
  return at::kCPU;
}

template <class C>
FourfoldMoment kernel_moment(const Moment<C>& moment, const std::optional<Key>& key) {
  FourfoldMoment out{};
  if (moment.numel() == 0) return out;
  out.code = moment.packed() ? kMomentCode<C> : kMomentCode<Fp32>;
  out.stochastic = key.has_value();
  out.values = moment.buffers()[0].mutable_data_ptr();
  if (moment.buffers().size() > 1) out.scales = moment.buffers()[1].mutable_data_ptr();
  if (key) out.key = *cuda::kernel_key(key);
  return out;
}

/// Of a gradient in p's memory order.
template <class Rule, class State, class Keys>
FourfoldStep kernel_step(const at::Tensor& p, const at::Tensor& grad, const State& state,
                         const typename Rule::Factors& factors, const Keys& keys, bool maximize) {
  FourfoldStep out{};
  const KernelUpdate update = Rule::in_kernel(factors, {state.first.numel(), state.second.numel()});
  out.rule = update.rule;
  std::copy(update.numbers.begin(), update.numbers.end(), out.numbers);
  out.master = kMasterCode<typename State::MasterCodec>;
  out.dtype = *cuda::kernel_dtype(p.scalar_type());
  out.maximize = maximize;
  out.weights = p.mutable_data_ptr(), out.gradient = grad.const_data_ptr();
  if (!state.master.buffers().empty()) out.error = state.master.buffers()[0].mutable_data_ptr();
  out.first = kernel_moment(state.first, keys.first);
  out.second = kernel_moment(state.second, keys.second);
  if (keys.master) out.key = *cuda::kernel_key(keys.master);
  out.n = p.numel();
  return out;
}

template <class Rule, class State, class Keys>
void step_by_kernel(const at::Tensor& p, at::Tensor grad, const State& state,
                    const typename Rule::Factors& factors, const Keys& keys, bool maximize) {
  const c10::NoGradGuard no_grad;
  const at::Tensor target = p.detach();
  if (grad.is_sparse()) grad = grad.to_dense();
  if (!same_order(target.sizes(), grad.strides(), target.strides()))
    grad = at::empty_like(target).copy_(grad);
  const FourfoldStep step = kernel_step<Rule>(target, grad, state, factors, keys, maximize);
  const bool done = cuda::run_kernel(p.device(), [&](const FourfoldKernels& kernels, void* stream) {
    return kernels.step(&step, stream);
  });
  TORCH_INTERNAL_ASSERT(done, "fourfold::cuda has no kernel for rule ", step.rule, " with moments ",
                        step.first.code, " and ", step.second.code);
  if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

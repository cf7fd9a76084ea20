// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an optimizer holds for one parameter, and the order in which its values lie.
#include <ATen/core/Tensor.h>
#include <c10/util/strides.h>
#include <fourfold/optim/detail/master.hpp>
#include <fourfold/optim/detail/moment.hpp>
#include <fourfold/optim/rule.hpp>

#include <torch/optim/optimizer.h>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Where a parameter stands in an optimizer.
struct GroupPlace {
  std::size_t group = 0, position = 0;
};

/// Whether a step reads and writes `p` where it lies. By rows: rows, which are what dimension 0
/// counts, must lie one after another.
template <class = void>
bool stepped_in_place(const at::Tensor& p, bool by_rows = false) {
  if (!p.is_cpu() || !p.is_non_overlapping_and_dense()) return false;
  return !by_rows || p.dim() < 2 || p.numel() == 0 || p.size(0) == 1 ||
         p.stride(0) == p.numel() / p.size(0);
}

/// The order in which p's states, which are on `device`, lie: p's own in memory, or row-major where a
/// step copies p.
template <class = void>
std::vector<std::int64_t> state_strides(const at::Tensor& p, bool by_rows = false,
                                        at::Device device = at::kCPU) {
  if (!device.is_cpu() || stepped_in_place(p, by_rows)) return p.strides().vec();
  const auto strides = c10::contiguous_strides(p.sizes());
  return {strides.begin(), strides.end()};
}

/// Whether element i of one lies in memory where element i of the other does: equal strides, those
/// of dimensions of size 1 aside.
template <class = void>
bool same_order(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != sizes.size() || b.size() != sizes.size()) return false;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && a[i] != b[i]) return false;
  return true;
}

/// What else a rule keeps for a parameter, in zeros: fp32 tensors of the sizes that Rule::extra()
/// names.
template <class Rule>
std::vector<at::Tensor> make_extra(const at::Tensor& p, const typename Rule::Options& options) {
  std::vector<at::Tensor> made;
  if constexpr (requires { Rule::extra(p, options); }) {
    const PlaceGuard place(Place::kOptimizer);
    for (const std::vector<std::int64_t>& sizes : Rule::extra(p, options))
      made.push_back(at::zeros(sizes, at::kFloat));
  }
  static_cast<void>(p), static_cast<void>(options);
  return made;
}

template <class FirstCodec, class SecondCodec, class WeightCodec>
struct ParameterState final : public ::torch::optim::OptimizerCloneableParamState<
                                  ParameterState<FirstCodec, SecondCodec, WeightCodec>> {
  using First = FirstCodec;
  using Second = SecondCodec;
  using MasterCodec = WeightCodec;

  std::int64_t step = 0;
  GroupPlace place;                   ///< where it stood at its last step
  void* next = nullptr;               ///< whose states were stepped after these
  std::vector<std::int64_t> sizes;    ///< of the parameter
  at::Device device = at::kCPU;       ///< of all that follows
  std::vector<std::int64_t> strides;  ///< state_strides() of it
  Moment<First> first;
  Moment<Second> second;
  Master<MasterCodec> master;
  std::vector<at::Tensor> extra;  ///< what else a rule keeps, in fp32

  ParameterState() = default;
  /// `where`: a CPU, or p's GPU.
  ParameterState(const at::Tensor& p, bool by_rows, at::Device where = at::kCPU)
      : sizes(p.sizes().vec()),
        device(where),
        strides(state_strides(p, by_rows, where)),
        master(p, strides, where) {}

  void to(at::Device where) {
    first.to(where), second.to(where), master.to(where);
    for (at::Tensor& one : extra) one = one.to(where);
    device = where;
  }

  /// Makes the moments that are not there yet; whether there were none before. All of it comes to
  /// `where`, if the parameter has moved.
  template <class Rule>
  bool make(const at::Tensor& p, const typename Rule::Options& options,
            std::int64_t min_packed_elements, at::Device where = at::kCPU) {
    if (where != device) to(where);
    const MomentSizes n = Rule::moments(p, options);
    const bool fresh = first.numel() != n.first || second.numel() != n.second || step == 0;
    if (first.numel() != n.first)
      first = Moment<First>(n.first, n.first >= min_packed_elements, device);
    if (second.numel() != n.second)
      second = Moment<Second>(n.second, n.second >= min_packed_elements, device);
    if (fresh) extra = make_extra<Rule>(p, options);
    return fresh;
  }
  /// f(buffer) for all that is kept.
  template <class F>
  void for_each_buffer(const F& f) {
    for (std::vector<at::Tensor>* all :
         {&first.buffers(), &second.buffers(), &master.buffers(), &extra})
      for (at::Tensor& buffer : *all) f(buffer);
  }
  [[nodiscard]] std::int64_t nbytes() const {
    std::int64_t bytes = first.nbytes() + second.nbytes() + master.nbytes();
    for (const at::Tensor& one : extra) bytes += static_cast<std::int64_t>(one.nbytes());
    return bytes;
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

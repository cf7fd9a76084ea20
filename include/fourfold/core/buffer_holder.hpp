// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Who holds tensors elsewhere than in memory, to be read and written where they lie, one after
/// another: an optimizer's states, averages of weights (mapped_file.hpp, host_memory.hpp).
#include <ATen/core/Tensor.h>

#include <utility>

namespace fourfold::inline v0 {

/// Any thread.
class BufferHolder {
 public:
  virtual ~BufferHolder() = default;

  /// A tensor of the same values, held elsewhere as long as it lives. `values` itself where it
  /// stays in memory or is held already.
  [[nodiscard]] virtual at::Tensor hold(const at::Tensor& values) = 0;
  /// `held` will be used soon: returns at once. Here and below, nothing for other tensors.
  virtual void will_need(const at::Tensor& held) noexcept = 0;
  /// `held` is used now, all of it: quicker in one piece.
  virtual void need(const at::Tensor& held) noexcept = 0;
  /// `held` is not used for a while: its memory may go.
  virtual void done_with(const at::Tensor& held) noexcept = 0;

  /// Of a parameter that is not on the CPU, where its held states are: copies of it and of its
  /// gradient, row-major, on the CPU. Undefined for one that is there. will_copy() begins to make
  /// them, and returns at once.
  virtual void will_copy(const at::Tensor& parameter) = 0;
  [[nodiscard]] virtual std::pair<at::Tensor, at::Tensor> copies(const at::Tensor& parameter) = 0;
};

}  // namespace fourfold::inline v0

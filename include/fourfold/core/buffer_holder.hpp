// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Who holds tensors elsewhere than in memory, to be read and written where they lie, one after
/// another: an optimizer's states, averages of weights (mapped_file.hpp).
#include <ATen/core/Tensor.h>

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
  /// `held` is not used until will_need(), or is slower to use: its memory may go.
  virtual void done_with(const at::Tensor& held) noexcept = 0;
};

}  // namespace fourfold::inline v0

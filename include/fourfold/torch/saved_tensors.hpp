// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Door one: what autograd saves. INTERFACE SKETCH, being implemented.
#include <ATen/core/Tensor.h>

#include <memory>

namespace fourfold::door {

/// One saved tensor, as a SavedTensors holds it. Lives as long as the graph node that saved it.
class Saved {
 public:
  virtual ~Saved() = default;
  /// The tensor as it was saved: sizes, strides, dtype, device. Called any number of times
  /// (retain_graph, double backward), on any thread, needing no thread-local state.
  [[nodiscard]] virtual at::Tensor unpack() = 0;
};

/// What a scope does with the tensors that autograd saves on its thread.
class SavedTensors {
 public:
  virtual ~SavedTensors() = default;
  /// Under NoGrad, once for each saved tensor; `tensor` is detached from the graph already.
  [[nodiscard]] virtual std::shared_ptr<Saved> pack(const at::Tensor& tensor) = 0;
  /// What else must be on while tensors are packed (the operators' tape); held during a recompute.
  [[nodiscard]] virtual std::shared_ptr<void> activate() { return nullptr; }
};

/// While it lives, `packer` gets what autograd saves on this thread; the innermost scope wins. Passes
/// through during backward and where gradients are off, unless `in_backward`.
class SavedTensorsScope {
 public:
  explicit SavedTensorsScope(std::shared_ptr<SavedTensors> packer, bool in_backward = false);
  ~SavedTensorsScope();
};

/// The innermost packer of this thread, or null.
std::shared_ptr<SavedTensors> current_saved_tensors();

/// A detached reference that remembers the version and compares it on unpack, in LibTorch's words.
std::shared_ptr<Saved> saved_reference(const at::Tensor& tensor);

}  // namespace fourfold::door

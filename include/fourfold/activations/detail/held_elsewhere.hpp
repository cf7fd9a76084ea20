// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What pieces in a file (offload_piece.hpp) and on the host (host_piece.hpp) share.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/Exception.h>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/operators.hpp>

#include <cstdint>
#include <utility>

namespace fourfold::inline v0::detail {

/// Values that are elsewhere, and come back.
class HeldElsewhere {
 public:
  virtual ~HeldElsewhere() = default;
  [[nodiscard]] virtual at::Tensor get() = 0;  ///< flat
  virtual void before_write() = 0;             ///< what it was put with is about to be written to
};

/// Values that have yet to go: a piece's own, or a tensor's at the version that it has now.
class PutValues {
 public:
  /// `source`: whose values they are; undefined: nobody writes to them.
  PutValues(at::Tensor values, const at::Tensor& source) : values_(std::move(values)) {
    if (!source.defined()) return;
    counter_ = source.unsafeGetTensorImpl()->version_counter();
    version_ = counter_.current_version();
  }

  [[nodiscard]] bool here() const { return values_.defined(); }
  /// Whether a write to `source` would be one to them.
  [[nodiscard]] bool borrowed() const { return here() && counter_.enabled(); }
  [[nodiscard]] const at::Tensor& unchecked() const { return values_; }
  [[nodiscard]] const at::Tensor& get() const {
    TORCH_CHECK(!counter_.enabled() || counter_.current_version() == version_,
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation after the forward: fourfold had yet to offload a tensor of ",
                values_.numel(), " values; it is at version ", counter_.current_version(),
                "; expected version ", version_,
                " instead. Write to it before backward inside the pipeline's scope only");
    return values_;
  }
  /// A copy in their place, the piece's own.
  void copy() {
    const door::OperatorsPause pause;  // the program's tape is not told of it
    const c10::NoGradGuard no_grad;
    const PlaceGuard place(Place::kActivations);
    values_ = values_.clone();
    counter_ = c10::VariableVersion();
  }
  /// They have gone.
  at::Tensor take() { return std::exchange(values_, at::Tensor()); }

 private:
  at::Tensor values_;
  c10::VariableVersion counter_;  // disabled: nobody writes to them
  std::uint32_t version_ = 0;
};

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What schedulers that cycle momentum (OneCycleLR) ask of options that are not LibTorch's.

namespace fourfold::inline v0 {
namespace optim::detail {

class CycledMomentum {
 public:
  /// Where it stands; null where an optimizer has none.
  virtual double* cycled_momentum() = 0;

 protected:
  CycledMomentum() = default;
  CycledMomentum(const CycledMomentum&) = default;
  CycledMomentum& operator=(const CycledMomentum&) = default;
  ~CycledMomentum() = default;
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

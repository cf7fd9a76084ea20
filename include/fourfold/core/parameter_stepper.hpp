// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Where gradients meet an optimizer: what releases a gradient steps its parameter at once.
///   for (const at::Tensor& p : model->parameters()) { stepper.step_parameter(p); }   // is step()
namespace at {
class Tensor;
}

namespace fourfold::inline v0 {

/// Steps one parameter with the gradient that it holds, and leaves that gradient where it is.
///
/// Parameters are stepped in any order, from any thread, one at a time; each counts its own steps,
/// so that one pass over all of them gives bit for bit what step() gives. A parameter without a
/// gradient, or frozen, is left alone as step() leaves it. Errors are step()'s, before `p` is
/// changed, and one more: `p` belongs to no parameter group.
class ParameterStepper {
 public:
  virtual void step_parameter(const at::Tensor& p) = 0;

 protected:
  ParameterStepper() = default;
  ParameterStepper(const ParameterStepper&) = default;
  ParameterStepper(ParameterStepper&&) = default;
  ParameterStepper& operator=(const ParameterStepper&) = default;
  ParameterStepper& operator=(ParameterStepper&&) = default;
  ~ParameterStepper() = default;
};

}  // namespace fourfold::inline v0

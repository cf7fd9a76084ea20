// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Where gradients meet an optimizer: what releases a gradient steps its parameter at once.
///   for (const at::Tensor& p : model->parameters()) { stepper.step_parameter(p); }   // is step()
#include <c10/util/Exception.h>

#include <cstdint>
#include <memory>
#include <utility>

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
template <class = void>
class BasicParameterStepper {
 public:
  virtual void step_parameter(const at::Tensor& p) = 0;

  /// The same with one of a step's gradients, which moments take up one by one, numbered from 0: the
  /// weight moves with the last. Error: a rule whose moments are no sums over gradients.
  virtual void fold_gradient(const at::Tensor& p, std::int64_t micro_batch, bool last) = 0;
  /// That error, if so, before there is a gradient.
  virtual void check_folds() const = 0;

  /// The stepper, for whoever steps its parameters in backward; null once it is gone.
  using Link = std::shared_ptr<BasicParameterStepper*>;
  /// From now on step() by hand is an error, until release(false). Once at a time.
  Link release(bool on) {
    TORCH_CHECK(!on || link_ == nullptr,
                "the gradients of this optimizer are released already; one GradientRelease is for "
                "one optimizer: destroy the other one first");
    link_ = on ? std::make_shared<BasicParameterStepper*>(this) : nullptr;
    return link_;
  }

 protected:
  BasicParameterStepper() = default;
  BasicParameterStepper(const BasicParameterStepper&) {}
  BasicParameterStepper(BasicParameterStepper&& other) noexcept { take(std::move(other)); }
  BasicParameterStepper& operator=(const BasicParameterStepper&) { return *this; }
  BasicParameterStepper& operator=(BasicParameterStepper&& other) noexcept {
    take(std::move(other));
    return *this;
  }
  ~BasicParameterStepper() {
    if (link_) *link_ = nullptr;
  }

  /// To be called by step() before anything else.
  void check_stepped_by_hand() const {
    TORCH_CHECK(link_ == nullptr,
                "step() was called on an optimizer whose gradients are released: its parameters "
                "have been stepped in backward, and their gradients are gone; leave step() out, or "
                "destroy the GradientRelease first");
  }

 private:
  void take(BasicParameterStepper&& other) {
    if (this == &other) return;
    if (link_) *link_ = nullptr;
    link_ = std::move(other.link_);
    if (link_) *link_ = this;
  }
  Link link_;
};
using ParameterStepper = BasicParameterStepper<>;

}  // namespace fourfold::inline v0

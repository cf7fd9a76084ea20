// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Gradient release: each parameter steps inside backward, as soon as its gradient is complete, and
/// the gradient is freed, so that no two of them need exist at once (LOMO, arXiv 2306.09782;
/// FlashOptim, arXiv 2602.23349, "gradient release").
///
///   optim::AdamWOf<Int8> optimizer(model->parameters(), 1e-3);
///   GradientRelease release(optimizer);
///   for (...) criterion(model->forward(x), y).backward();      // has stepped; no zero_grad, no step()
///
/// Parameters end bit for bit where step() after backward() would bring them. Clipped, accumulated
/// and unscaled too, which takes the last step's norm, or two passes for the exact one:
///
///   GradientRelease release(optimizer, {.clip = ClipGradients::kGlobalNorm, .max_norm = 1});
///   release.backward(loss);                                    // in place of loss.backward()
///   GradientRelease<Int4> saving(optimizer, {.micro_batches = 8});   // sums in 4-bit buffers
///
/// In a pipeline by the policy Release: pipeline.optimizer() is stepped in backward.
///
/// What a program must know:
/// - A pass changes weights, as step() does: a second backward through the same graph, or one with
///   create_graph, is an error (LibTorch's, and ours). torch::autograd::grad() steps nothing.
/// - If a pass throws, parameters whose gradients were complete have stepped, others have not, and
///   training may go on; of an accumulation, begin anew after reset().
/// - A gradient that is accumulated by a backward inside a backward counts as complete.
/// - A block that is computed again in backward must not read a parameter detached: nothing waits
///   for that reading, and it may see the weight after its step.
/// - Parameters may be tied, frozen, unfrozen and added later. Forward must not run elsewhere at the
///   same time, backward may on any thread.
#include <ATen/core/Tensor.h>
#include <fourfold/core/parameter_stepper.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/gradients/detail/release_state.hpp>
#include <fourfold/gradients/release_options.hpp>

#include <torch/optim/optimizer.h>
#include <concepts>
#include <memory>
#include <utility>

namespace fourfold::inline v0 {

/// `Code`: of the sums of micro-batches, by GradientBuffer<Code>.
template <class Code = Int8>
class [[nodiscard]] GradientRelease {
 public:
  /// From here on backward steps. The optimizer must live as long as backward is called.
  template <class Optimizer>
  explicit GradientRelease(Optimizer& optimizer, const GradientReleaseOptions& options = {}) {
    static_assert(std::derived_from<Optimizer, ::torch::optim::Optimizer> &&
                      std::derived_from<Optimizer, ParameterStepper>,
                  "GradientRelease steps one parameter at a time, which LibTorch's own optimizers "
                  "cannot: give it one of fourfold::optim, as AdamWOf<optim::Fp32>");
    detail::check_release(options);
    if (options.accumulate == AccumulateGradients::kMoments && options.micro_batches > 1)
      optimizer.check_folds();
    state_ = std::make_shared<detail::ReleaseState<Code>>(options, optimizer.release(true));
    try {
      state_->hook_parameters();
    } catch (...) {
      remove();
      throw;
    }
  }
  GradientRelease(GradientRelease&&) = default;
  GradientRelease& operator=(GradientRelease&& other) noexcept {
    if (this != &other) remove(), state_ = std::move(other.state_);
    return *this;
  }
  ~GradientRelease() { remove(); }

  /// The model and the optimizer are as before, but for what was accumulated: that is dropped.
  void remove() {
    if (!state_) return;
    state_->unhook();
    state_.reset();
  }

  /// loss.backward(). With kGlobalNorm twice: once for the norm, once to step. Error, nothing
  /// stepped: a norm that is not finite, unless a scaler shall leave such steps out.
  void backward(const at::Tensor& loss) { state_->backward(loss); }

  /// Drops what micro-batches have accumulated; the next backward is the first one of a step.
  void reset() { state_->reset(); }

  /// Steps so far; one that a scaler left out is none.
  [[nodiscard]] std::int64_t steps() const { return state_->steps(); }
  /// The norm of all gradients of the last step, before clipping; NaN before the first one, and
  /// where nothing measures it (kNone, kLocalNorm).
  [[nodiscard]] double last_norm() const { return state_->last_norm(); }
  /// Bytes of sums of micro-batches that are held in codes now.
  [[nodiscard]] std::int64_t buffer_bytes() const { return state_->buffer_bytes(); }

 private:
  std::shared_ptr<detail::ReleaseState<Code>> state_;
};

/// The policy: what pipeline.optimizer() gives is released. For one that clips or accumulates, have
/// an optimizer over pipeline.parameters() and a GradientRelease of your own.
struct Release {
  static constexpr Role role = Role::kRelease;

  template <class Optimizer>
  static std::shared_ptr<::torch::optim::Optimizer> release(std::shared_ptr<Optimizer> optimizer) {
    struct Both {
      std::shared_ptr<Optimizer> optimizer;
      GradientRelease<> release;
    };
    GradientRelease<> released(*optimizer);
    auto* const stepped = optimizer.get();
    auto both = std::make_shared<Both>(Both{std::move(optimizer), std::move(released)});
    return {std::move(both), stepped};
  }
};
static_assert(Policy<Release>, "Release must stay a Policy");

}  // namespace fourfold::inline v0

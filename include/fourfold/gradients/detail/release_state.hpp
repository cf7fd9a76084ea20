// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a GradientRelease does when a gradient is complete and when a pass ends: accumulate,
/// measure, clip, step, free.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <fourfold/core/parameter_stepper.hpp>
#include <fourfold/gradients/clip_grad_norm.hpp>
#include <fourfold/gradients/grad_scaler.hpp>
#include <fourfold/gradients/gradient_buffer.hpp>
#include <fourfold/gradients/release_options.hpp>
#include <fourfold/torch/gradients.hpp>
#include <fourfold/torch/graph_task.hpp>

#include <torch/optim/optimizer.h>
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

/// Shared by a GradientRelease with its hooks, which hold it weakly.
template <class Code>
class ReleaseState : public std::enable_shared_from_this<ReleaseState<Code>> {
 public:
  ReleaseState(const GradientReleaseOptions& options, ParameterStepper::Link link);

  void hook_parameters();
  void unhook();
  void backward(const at::Tensor& loss);
  void reset();

  [[nodiscard]] std::int64_t steps() const { return steps_; }
  [[nodiscard]] double last_norm() const { return last_norm_; }
  [[nodiscard]] std::int64_t buffer_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [key, record] : records_) bytes += record.sum.nbytes();
    return bytes;
  }

 private:
  struct Record {
    at::Tensor parameter() const { return at::Tensor(leaf.lock()); }
    c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl> leaf{
        c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>()};
    GradientBuffer<Code> sum;
    std::int64_t folded = 0;  ///< gradients of this step that its moments have taken up
    double squares = 0;       ///< of this step's gradient
  };
  enum class Pass { kSteps, kMeasures };

  void on_gradient(const at::Tensor& leaf);
  void release(const at::Tensor& leaf, Record& record);
  void fold(const at::Tensor& leaf, Record& record);
  void pass_ended(int task);

  [[nodiscard]] bool last_micro_batch() const { return micro_batch_ + 1 == options_.micro_batches; }
  [[nodiscard]] double norm() const {
    double sum = 0;
    for (const at::TensorImpl* key : order_) sum += records_.at(key).squares;
    return std::sqrt(sum);
  }
  [[nodiscard]] ::torch::optim::Optimizer& optimizer() const {
    return dynamic_cast<::torch::optim::Optimizer&>(**link_);
  }

  const GradientReleaseOptions options_;
  ParameterStepper::Link link_;
  std::vector<door::GradientHooks> hooks_;
  std::unordered_map<const at::TensorImpl*, Record> records_;
  std::vector<const at::TensorImpl*> order_;  ///< of records, as the optimizer has them

  std::recursive_mutex mutex_;
  std::vector<int> open_;  ///< graph tasks that have reached a parameter
  bool by_backward_ = false;
  Pass pass_ = Pass::kSteps;
  double unscale_ = 1, coefficient_ = 1;  ///< what gradients of this pass are multiplied by
  std::int64_t micro_batch_ = 0, steps_ = 0;
  double last_norm_ = std::numeric_limits<double>::quiet_NaN();
};

template <class Code>
ReleaseState<Code>::ReleaseState(const GradientReleaseOptions& options, ParameterStepper::Link link)
    : options_(options), link_(std::move(link)) {}

template <class Code>
void ReleaseState<Code>::unhook() {
  for (auto& hooks : hooks_) hooks.remove();
  if (*link_) (*link_)->release(false);
}

template <class Code>
void ReleaseState<Code>::reset() {
  const std::lock_guard lock(mutex_);
  micro_batch_ = 0;
  for (auto& [key, record] : records_) {
    record.sum.clear(), record.folded = 0;
    if (const at::Tensor leaf = record.parameter(); leaf.defined()) leaf.mutable_grad().reset();
  }
}

/// Parameters that the optimizer has now and had not before.
template <class Code>
void ReleaseState<Code>::hook_parameters() {
  std::vector<at::Tensor> fresh;
  for (auto& group : optimizer().param_groups())
    for (const at::Tensor& p : group.params())
      if (const auto [at, is_new] = records_.try_emplace(p.unsafeGetTensorImpl()); is_new) {
        at->second.leaf = decltype(Record::leaf)(p.getIntrusivePtr());
        order_.push_back(p.unsafeGetTensorImpl());
        fresh.push_back(p);
      }
  if (fresh.empty()) return;
  hooks_.push_back(
      door::after_gradients(fresh, [weak = this->weak_from_this()](const at::Tensor& leaf) {
        if (const auto state = weak.lock()) state->on_gradient(leaf);
      }));
}

template <class Code>
void ReleaseState<Code>::on_gradient(const at::Tensor& leaf) {
  if (!leaf.grad().defined()) return;
  const std::lock_guard lock(mutex_);
  TORCH_CHECK(
      !at::GradMode::is_enabled(),
      "backward was called with create_graph while gradients are released, which changes "
      "the weights that the new graph needs; get such gradients by torch::autograd::grad()");
  TORCH_CHECK(*link_ != nullptr, "GradientRelease: the optimizer is gone, and a gradient of sizes ",
              leaf.grad().sizes(),
              " has nobody to step it; keep the optimizer as long as its GradientRelease");
  TORCH_CHECK(by_backward_ || options_.clip != ClipGradients::kGlobalNorm || !last_micro_batch(),
              "GradientRelease clips by the norm of all gradients, which takes two passes: call "
              "release.backward(loss) in place of loss.backward()");
  const c10::NoGradGuard no_grad;
  const int task = door::current_graph_task();
  if (task != -1 && std::find(open_.begin(), open_.end(), task) == open_.end()) {
    open_.push_back(task);
    door::at_end_of_graph_task([weak = this->weak_from_this(), task] {
      if (const auto state = weak.lock()) state->pass_ended(task);
    });
  }
  Record& record = records_.at(leaf.unsafeGetTensorImpl());
  const at::Tensor gradient = leaf.grad();
  if (options_.accumulate == AccumulateGradients::kMoments) {
    fold(leaf, record);
  } else if (last_micro_batch()) {
    if (!record.sum.empty()) record.sum.add_to(gradient);
    release(leaf, record);
  } else if (gradient.is_cpu() && gradient.layout() == at::kStrided &&
             gradient.is_floating_point() && gradient.numel() >= options_.min_packed_elements) {
    record.sum.add(gradient);
    leaf.mutable_grad().reset();
  }  // else LibTorch accumulates
}

/// Measures or steps with the whole gradient, and frees it.
template <class Code>
void ReleaseState<Code>::release(const at::Tensor& leaf, Record& record) {
  const at::Tensor gradient = leaf.grad();
  scale_gradient(gradient, unscale_);
  if (pass_ == Pass::kMeasures || options_.clip == ClipGradients::kLastNorm)
    record.squares = power_sum(gradient, 2);
  if (pass_ == Pass::kSteps) {
    if (options_.clip == ClipGradients::kLocalNorm)
      coefficient_ = clip_coefficient(options_.max_norm, std::sqrt(detail::power_sum(gradient, 2)));
    scale_gradient(gradient, coefficient_);
    (*link_)->step_parameter(leaf);
    record.sum.clear();
  }
  leaf.mutable_grad().reset();
}

/// Gives the gradient to the moments, the last one to the weight too, and frees it.
template <class Code>
void ReleaseState<Code>::fold(const at::Tensor& leaf, Record& record) {
  (*link_)->fold_gradient(leaf, record.folded, last_micro_batch());
  record.folded = last_micro_batch() ? 0 : record.folded + 1;
  leaf.mutable_grad().reset();
}

template <class Code>
void ReleaseState<Code>::pass_ended(int task) {
  const std::lock_guard lock(mutex_);
  const c10::NoGradGuard no_grad;
  std::erase(open_, task);
  if (*link_ == nullptr) return;
  hook_parameters();
  if (!last_micro_batch()) {
    ++micro_batch_;
    return;
  }
  for (const at::TensorImpl* key : order_) {  // what only earlier micro-batches reached, or is new
    Record& record = records_.at(key);
    const at::Tensor leaf = record.parameter();
    if (!leaf.defined()) continue;
    if (record.folded > 0) leaf.mutable_grad() = at::zeros_like(leaf), fold(leaf, record);
    if (!leaf.grad().defined() && !record.sum.empty()) leaf.mutable_grad() = record.sum.value();
    if (leaf.grad().defined()) release(leaf, record);
  }
  if (pass_ == Pass::kMeasures) return;
  if (options_.clip == ClipGradients::kLastNorm) {
    last_norm_ = norm();
    coefficient_ = clip_coefficient(options_.max_norm, last_norm_);
    for (auto& [key, record] : records_) record.squares = 0;
  }
  micro_batch_ = 0;
  ++steps_;
}

template <class Code>
void ReleaseState<Code>::backward(const at::Tensor& loss) {
  if (options_.clip != ClipGradients::kGlobalNorm || !last_micro_batch()) return loss.backward();
  hook_parameters();
  struct Ours {
    explicit Ours(ReleaseState& state) : of(state) { of.by_backward_ = true; }
    ~Ours() {
      of.by_backward_ = false, of.pass_ = Pass::kSteps, of.unscale_ = of.coefficient_ = 1;
      for (auto& [key, record] : of.records_) record.squares = 0;
    }
    ReleaseState& of;
  } const ours(*this);
  // What LibTorch holds already (small sums of micro-batches) is needed in both passes.
  std::vector<std::pair<at::Tensor, at::Tensor>> held;
  for (const auto& [key, record] : records_)
    if (const at::Tensor leaf = record.parameter(); leaf.defined() && leaf.grad().defined())
      held.emplace_back(leaf, leaf.grad().clone());
  const auto give_back = [&] {
    for (const auto& [leaf, gradient] : held) leaf.mutable_grad() = gradient;
  };
  GradScaler* const scaler = options_.scaler;
  const bool may_skip = scaler != nullptr && scaler->is_enabled();
  if (may_skip) unscale_ = 1 / scaler->get_scale();
  pass_ = Pass::kMeasures;
  double measured = 0;
  try {
    loss.backward(/*gradient=*/{}, /*retain_graph=*/true);
    measured = norm();
    TORCH_CHECK(std::isfinite(measured) || may_skip,
                "GradientRelease: the norm of all gradients is ", measured,
                ", so no parameter was stepped; look for where it comes from, or give "
                "GradientReleaseOptions a scaler, which leaves such steps out");
    if (may_skip)
      scaler->record(optimizer(), at::full({}, std::isfinite(measured) ? 0.0 : 1.0, at::kFloat));
  } catch (...) {
    give_back();
    throw;
  }
  if (!std::isfinite(measured)) return reset();
  give_back();
  last_norm_ = measured;
  coefficient_ = clip_coefficient(options_.max_norm, measured);
  pass_ = Pass::kSteps;
  loss.backward();
}

}  // namespace detail
}  // namespace fourfold::inline v0

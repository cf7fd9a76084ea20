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
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <fourfold/core/parameter_stepper.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/gradients/clip_grad_norm.hpp>
#include <fourfold/gradients/grad_scaler.hpp>
#include <fourfold/gradients/gradient_buffer.hpp>
#include <fourfold/torch/gradients.hpp>
#include <fourfold/torch/graph_task.hpp>

#include <torch/optim/optimizer.h>
#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// By which norm gradients are clipped to max_norm.
enum class ClipGradients {
  kNone,
  kGlobalNorm,  ///< of all gradients of this step, as clip_grad_norm_: two passes, by backward()
  kLastNorm,    ///< of all gradients of the step before; the first step is not clipped
  kLocalNorm,   ///< of each gradient by itself
};

struct GradientReleaseOptions {
  ClipGradients clip = ClipGradients::kNone;
  double max_norm = 1;
  std::int64_t micro_batches = 1;  ///< backward passes a step; divide their losses yourself
  std::int64_t min_packed_elements = 4096;  ///< smaller sums of micro-batches stay as they are
  /// Its scale is divided out of gradients, and a step whose gradients are not all finite is left
  /// out. Needs kGlobalNorm (max_norm may be infinite): before the first parameter steps, the last
  /// gradient must be known. Call update() after each backward(); outlives this.
  GradScaler* scaler = nullptr;
};

/// `Code`: of the sums of micro-batches, by GradientBuffer<Code>.
template <class Code = Int8>
class [[nodiscard]] GradientRelease {
 public:
  /// From here on backward steps. The optimizer must live as long as backward is called.
  template <class Optimizer>
  explicit GradientRelease(Optimizer& optimizer, const GradientReleaseOptions& options = {})
      : state_(std::make_shared<State>(options)) {
    static_assert(std::derived_from<Optimizer, ::torch::optim::Optimizer> &&
                      std::derived_from<Optimizer, ParameterStepper>,
                  "GradientRelease steps one parameter at a time, which LibTorch's own optimizers "
                  "cannot: give it one of fourfold::optim, as AdamWOf<optim::Fp32>");
    state_->link = optimizer.release(true);
    state_->hook_parameters(state_);
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
    for (auto& hooks : state_->hooks) hooks.remove();
    if (*state_->link) (*state_->link)->release(false);
    state_.reset();
  }

  /// loss.backward(). With kGlobalNorm twice: once for the norm, once to step. Error, nothing
  /// stepped: a norm that is not finite, unless a scaler shall leave such steps out.
  void backward(const at::Tensor& loss) { state_->backward(state_, loss); }

  /// Drops what micro-batches have accumulated; the next backward is the first one of a step.
  void reset() {
    const std::lock_guard lock(state_->mutex);
    state_->reset();
  }

  /// Steps so far; one that a scaler left out is none.
  [[nodiscard]] std::int64_t steps() const { return state_->steps; }
  /// The norm of all gradients of the last step, before clipping; NaN before the first one, and
  /// where nothing measures it (kNone, kLocalNorm).
  [[nodiscard]] double last_norm() const { return state_->last_norm; }
  /// Bytes of sums of micro-batches that are held in codes now.
  [[nodiscard]] std::int64_t buffer_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [key, record] : state_->records) bytes += record.sum.nbytes();
    return bytes;
  }

 private:
  struct Record {
    at::Tensor parameter() const { return at::Tensor(leaf.lock()); }
    c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl> leaf{
        c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>()};
    GradientBuffer<Code> sum;
    double squares = 0;  ///< of this step's gradient
  };
  enum class Pass { kSteps, kMeasures };

  /// Shared with the hooks, which hold it weakly.
  struct State {
    explicit State(const GradientReleaseOptions& given) : options(given) {
      TORCH_CHECK(given.max_norm > 0, "GradientRelease: max_norm is ", given.max_norm,
                  "; give the largest norm that gradients may have, above 0");
      TORCH_CHECK(given.micro_batches >= 1, "GradientRelease: micro_batches is ",
                  given.micro_batches, "; give the number of backward passes a step, 1 or more");
      TORCH_CHECK(given.scaler == nullptr || given.clip == ClipGradients::kGlobalNorm,
                  "GradientRelease was given a scaler, whose step is left out if any gradient is "
                  "not finite: that is known before the first parameter steps after two passes "
                  "alone; set clip to ClipGradients::kGlobalNorm (max_norm may be infinite)");
    }

    void hook_parameters(const std::shared_ptr<State>& self);
    void on_gradient(const std::shared_ptr<State>& self, const at::Tensor& leaf);
    void release(const at::Tensor& leaf, Record& record);
    void pass_ended(const std::shared_ptr<State>& self, int task);
    void backward(const std::shared_ptr<State>& self, const at::Tensor& loss);
    void reset() {
      micro_batch = 0;
      for (auto& [key, record] : records) {
        record.sum.clear();
        if (const at::Tensor leaf = record.parameter(); leaf.defined()) leaf.mutable_grad().reset();
      }
    }
    bool last_micro_batch() const { return micro_batch + 1 == options.micro_batches; }
    bool measured() const {
      return options.clip == ClipGradients::kGlobalNorm || options.clip == ClipGradients::kLastNorm;
    }
    double norm() const {
      double sum = 0;
      for (const at::TensorImpl* key : order) sum += records.at(key).squares;
      return std::sqrt(sum);
    }

    ::torch::optim::Optimizer& optimizer() const {
      return dynamic_cast<::torch::optim::Optimizer&>(**link);
    }

    ParameterStepper::Link link;
    const GradientReleaseOptions options;
    std::vector<door::GradientHooks> hooks;
    std::unordered_map<const at::TensorImpl*, Record> records;
    std::vector<const at::TensorImpl*> order;  ///< of records, as the optimizer has them

    std::recursive_mutex mutex;
    std::vector<int> open;  ///< graph tasks that have reached a parameter
    bool by_backward = false;
    Pass pass = Pass::kSteps;
    double unscale = 1, coefficient = 1;  ///< what gradients of this pass are multiplied by
    std::int64_t micro_batch = 0, steps = 0;
    double last_norm = std::numeric_limits<double>::quiet_NaN();
  };

  std::shared_ptr<State> state_;
};

/// Parameters that the optimizer has now and had not before.
template <class Code>
void GradientRelease<Code>::State::hook_parameters(const std::shared_ptr<State>& self) {
  std::vector<at::Tensor> fresh;
  for (auto& group : optimizer().param_groups())
    for (const at::Tensor& p : group.params())
      if (const auto [at, is_new] = records.try_emplace(p.unsafeGetTensorImpl()); is_new) {
        at->second.leaf = decltype(Record::leaf)(p.getIntrusivePtr());
        order.push_back(p.unsafeGetTensorImpl());
        fresh.push_back(p);
      }
  if (fresh.empty()) return;
  hooks.push_back(
      door::after_gradients(fresh, [weak = std::weak_ptr<State>(self)](const at::Tensor& leaf) {
        if (const auto state = weak.lock()) state->on_gradient(state, leaf);
      }));
}

template <class Code>
void GradientRelease<Code>::State::on_gradient(const std::shared_ptr<State>& self,
                                               const at::Tensor& leaf) {
  if (!leaf.grad().defined()) return;
  const std::lock_guard lock(mutex);
  TORCH_CHECK(
      !at::GradMode::is_enabled(),
      "backward was called with create_graph while gradients are released, which changes "
      "the weights that the new graph needs; get such gradients by torch::autograd::grad()");
  TORCH_CHECK(*link != nullptr, "GradientRelease: the optimizer is gone, and a gradient of sizes ",
              leaf.grad().sizes(),
              " has nobody to step it; keep the optimizer as long as its GradientRelease");
  TORCH_CHECK(by_backward || options.clip != ClipGradients::kGlobalNorm || !last_micro_batch(),
              "GradientRelease clips by the norm of all gradients, which takes two passes: call "
              "release.backward(loss) in place of loss.backward()");
  const c10::NoGradGuard no_grad;
  const int task = door::current_graph_task();
  if (task != -1 && std::find(open.begin(), open.end(), task) == open.end()) {
    open.push_back(task);
    door::at_end_of_graph_task([weak = std::weak_ptr<State>(self), task] {
      if (const auto state = weak.lock()) state->pass_ended(state, task);
    });
  }
  Record& record = records.at(leaf.unsafeGetTensorImpl());
  const at::Tensor gradient = leaf.grad();
  if (last_micro_batch()) {
    if (!record.sum.empty()) record.sum.add_to(gradient);
    release(leaf, record);
  } else if (gradient.is_cpu() && gradient.layout() == at::kStrided &&
             gradient.is_floating_point() && gradient.numel() >= options.min_packed_elements) {
    record.sum.add(gradient);
    leaf.mutable_grad().reset();
  }  // else LibTorch accumulates
}

/// Measures or steps with the whole gradient, and frees it.
template <class Code>
void GradientRelease<Code>::State::release(const at::Tensor& leaf, Record& record) {
  const at::Tensor gradient = leaf.grad();
  detail::scale_gradient(gradient, unscale);
  if (pass == Pass::kMeasures || options.clip == ClipGradients::kLastNorm)
    record.squares = detail::power_sum(gradient, 2);
  if (pass == Pass::kSteps) {
    if (options.clip == ClipGradients::kLocalNorm)
      coefficient =
          detail::clip_coefficient(options.max_norm, std::sqrt(detail::power_sum(gradient, 2)));
    detail::scale_gradient(gradient, coefficient);
    (*link)->step_parameter(leaf);
    record.sum.clear();
  }
  leaf.mutable_grad().reset();
}

template <class Code>
void GradientRelease<Code>::State::pass_ended(const std::shared_ptr<State>& self, int task) {
  const std::lock_guard lock(mutex);
  const c10::NoGradGuard no_grad;
  std::erase(open, task);
  if (*link == nullptr) return;
  hook_parameters(self);
  if (!last_micro_batch()) {
    ++micro_batch;
    return;
  }
  for (const at::TensorImpl* key : order) {  // what only earlier micro-batches reached, or is new
    Record& record = records.at(key);
    const at::Tensor leaf = record.parameter();
    if (!leaf.defined()) continue;
    if (!leaf.grad().defined() && !record.sum.empty()) leaf.mutable_grad() = record.sum.value();
    if (leaf.grad().defined()) release(leaf, record);
  }
  if (pass == Pass::kMeasures) return;
  if (options.clip == ClipGradients::kLastNorm) {
    last_norm = norm();
    coefficient = detail::clip_coefficient(options.max_norm, last_norm);
    for (auto& [key, record] : records) record.squares = 0;
  }
  micro_batch = 0;
  ++steps;
}

template <class Code>
void GradientRelease<Code>::State::backward(const std::shared_ptr<State>& self,
                                            const at::Tensor& loss) {
  if (options.clip != ClipGradients::kGlobalNorm || !last_micro_batch()) return loss.backward();
  hook_parameters(self);
  struct Ours {
    explicit Ours(State& state) : of(state) { of.by_backward = true; }
    ~Ours() {
      of.by_backward = false, of.pass = Pass::kSteps, of.unscale = of.coefficient = 1;
      for (auto& [key, record] : of.records) record.squares = 0;
    }
    State& of;
  } const ours(*this);
  // What LibTorch holds already (small sums of micro-batches) is needed in both passes.
  std::vector<std::pair<at::Tensor, at::Tensor>> held;
  for (const auto& [key, record] : records)
    if (const at::Tensor leaf = record.parameter(); leaf.defined() && leaf.grad().defined())
      held.emplace_back(leaf, leaf.grad().clone());
  const auto give_back = [&] {
    for (const auto& [leaf, gradient] : held) leaf.mutable_grad() = gradient;
  };
  GradScaler* const scaler = options.scaler;
  const bool may_skip = scaler != nullptr && scaler->is_enabled();
  if (may_skip) unscale = 1 / scaler->get_scale();
  pass = Pass::kMeasures;
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
  last_norm = measured;
  coefficient = detail::clip_coefficient(options.max_norm, measured);
  pass = Pass::kSteps;
  loss.backward();
}

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

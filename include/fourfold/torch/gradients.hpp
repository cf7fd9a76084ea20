// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A door beside the three: what happens right after a gradient has been accumulated into a leaf.
///
///   auto hooks = fourfold::door::after_gradients(parameters, [](const at::Tensor& leaf) { ... });
///   auto tags  = fourfold::door::retag_gradients(parameters);  // counts them to Place::kGradients
///
/// LibTorch has one slot a leaf for such a hook (torch/csrc/autograd/variable.h,
/// post_acc_grad_hooks_, which Python uses for register_post_accumulate_grad_hook). A hook that
/// stands there already is kept and called first. Leaves are held by weak references alone: no
/// cycle, and a leaf may die before its hooks, or the hooks before the leaf.
#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <fourfold/core/place.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/allocator.hpp>

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace fourfold::door {

/// Called with the leaf, whose grad() is complete for this accumulation: a leaf used in several
/// graphs, or in micro-batches, is seen once for each backward. On the thread that accumulated. It
/// may take the gradient away. It must not hold the leaf: the leaf holds it.
using AfterGradient = std::function<void(const at::Tensor& leaf)>;

namespace detail {

struct GradientCall {
  explicit GradientCall(AfterGradient call) : after(std::move(call)) {}
  AfterGradient after;
  std::atomic<bool> active{true};
};

/// Our tenant of a leaf's slot: whoever stood there before, then all that after_gradients() added.
template <class = void>
class [[gnu::visibility("default")]] BasicGradientChain final
    : public torch::autograd::PostAccumulateGradHook {
 public:
  using Hook = torch::autograd::PostAccumulateGradHook;

  explicit BasicGradientChain(std::unique_ptr<Hook> before) : before_(std::move(before)) {}

  void operator()(const at::Tensor& leaf) override {
    if (before_) (*before_)(leaf);
    // A copy: a call may remove hooks, itself included, and this chain with the last of them.
    const auto calls = calls_;
    for (const auto& call : calls)
      if (call->active) call->after(leaf);
  }

  void add(std::shared_ptr<GradientCall> call) { calls_.push_back(std::move(call)); }
  void remove(const std::shared_ptr<GradientCall>& call) { std::erase(calls_, call); }
  [[nodiscard]] bool empty() const { return calls_.empty(); }
  std::unique_ptr<Hook> take_before() { return std::move(before_); }

 private:
  std::unique_ptr<Hook> before_;
  std::vector<std::shared_ptr<GradientCall>> calls_;
};
using GradientChain = BasicGradientChain<>;

/// The chain in the leaf's slot, or null where something else, or nothing, stands there.
template <class = void>
GradientChain* gradient_chain(const at::Tensor& leaf) {
  if (!torch::autograd::impl::get_autograd_meta(leaf)) return nullptr;
  return dynamic_cast<GradientChain*>(torch::autograd::impl::post_acc_grad_hooks(leaf).get());
}

}  // namespace detail

template <class = void>
class BasicGradientHooks;
using GradientHooks = BasicGradientHooks<>;
template <class = void>
GradientHooks after_gradients(at::TensorList leaves, AfterGradient after);

/// Keeps the hooks of one after_gradients() in place until it dies or remove() is called. Not to be
/// removed while another thread runs a backward over the same leaves.
template <class>
class [[nodiscard]] BasicGradientHooks {
 public:
  BasicGradientHooks() = default;
  BasicGradientHooks(BasicGradientHooks&& other) noexcept
      : call_(std::move(other.call_)), leaves_(std::move(other.leaves_)) {}
  BasicGradientHooks& operator=(BasicGradientHooks&& other) noexcept {
    if (this != &other) {
      remove();
      call_ = std::move(other.call_), leaves_ = std::move(other.leaves_);
    }
    return *this;
  }
  ~BasicGradientHooks() { remove(); }

  /// Each leaf's slot is as it was before, unless others have put themselves there since: what they
  /// wrapped of ours stays, and does nothing.
  void remove() {
    if (!call_) return;
    call_->active = false;
    for (const auto& weak : leaves_) {
      const at::Tensor leaf(weak.lock());
      detail::GradientChain* const chain = leaf.defined() ? detail::gradient_chain(leaf) : nullptr;
      if (!chain) continue;
      chain->remove(call_);
      if (chain->empty())
        torch::autograd::impl::set_post_acc_grad_hooks(leaf, chain->take_before());
    }
    call_.reset(), leaves_.clear();
  }

  /// How many leaves have the hook: tied ones once.
  [[nodiscard]] std::size_t size() const { return leaves_.size(); }

 private:
  template <class>
  friend BasicGradientHooks after_gradients(at::TensorList, AfterGradient);
  using WeakLeaf = c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>;

  std::shared_ptr<detail::GradientCall> call_;
  std::vector<WeakLeaf> leaves_;
};

/// Calls `after` with each leaf whose gradient has been accumulated, until the returned guard is
/// gone. A leaf named twice (a tied parameter) is hooked once; undefined tensors are passed over,
/// and leaves that do not require a gradient now are hooked for the day they do. A tensor that is
/// no leaf is an error, and then nothing is hooked.
template <class>
GradientHooks after_gradients(at::TensorList leaves, AfterGradient after) {
  TORCH_CHECK(after,
              "after_gradients got an empty function; pass what shall be called with each leaf");
  for (std::size_t i = 0; i < leaves.size(); ++i)
    TORCH_CHECK(!leaves[i].defined() || leaves[i].is_leaf(), "after_gradients: tensor ", i,
                " of sizes ", leaves[i].sizes(),
                " is no leaf but the result of an operation; gradients are accumulated in leaves "
                "alone: pass parameters");
  GradientHooks hooks;
  hooks.call_ = std::make_shared<detail::GradientCall>(std::move(after));
  PointerSet seen;
  for (const at::Tensor& leaf : leaves) {
    if (!leaf.defined() || leaf.is_inference() || !seen.insert(leaf.unsafeGetTensorImpl()))
      continue;
    detail::GradientChain* chain = detail::gradient_chain(leaf);
    if (!chain) {
      std::unique_ptr<detail::GradientChain::Hook> before;
      if (torch::autograd::impl::get_autograd_meta(leaf))
        before = std::move(torch::autograd::impl::post_acc_grad_hooks(leaf));
      auto made = std::make_unique<detail::GradientChain>(std::move(before));
      chain = made.get();
      torch::autograd::impl::set_post_acc_grad_hooks(leaf, std::move(made));
    }
    chain->add(hooks.call_);
    hooks.leaves_.emplace_back(leaf.getIntrusivePtr());
  }
  return hooks;
}

/// Counts each gradient to Place::kGradients as it appears. (The buffer was allocated as a
/// temporary of backward, and LibTorch makes it the gradient without a copy.)
template <class = void>
GradientHooks retag_gradients(at::TensorList leaves) {
  return after_gradients(leaves,
                         [](const at::Tensor& leaf) { retag(leaf.grad(), Place::kGradients); });
}

}  // namespace fourfold::door

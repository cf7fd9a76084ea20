// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Door one: what autograd saves for backward.
///
/// LibTorch asks its engine, once for each tensor that a graph node saves, for a pair of hooks
/// (SavedVariable::get_default_hooks in torch/csrc/autograd/saved_variable.cpp). We install an
/// engine that answers with the packer of the innermost scope open on the asking thread; for
/// everything else it is LibTorch's own. It is installed when the first scope opens and never
/// destroyed, since graphs and device threads outlive every scope.
///
/// Hooks switch LibTorch's check of versions off. Ours check it for every packer, copies included:
/// what is an error in plain LibTorch ("... modified by an inplace operation ...") is that error
/// here.
///
/// Packers never meet: undefined tensors, inference tensors (LibTorch refuses to save them) and
/// wrapped numbers (LibTorch keeps them). They do meet integer, bool, complex, sparse, quantised,
/// nested, meta, zero-dimensional and empty tensors, and keep what they cannot pack.
#include <ATen/core/Tensor.h>
#include <fourfold/torch/saved_tensors_engine.hpp>  // Saved, SavedTensors

#include <cstdint>
#include <memory>
#include <thread>

namespace fourfold::door {

/// While it lives, `packer` gets what autograd saves on this thread; the innermost scope wins.
/// Passes through (LibTorch saves as it always does) during backward and where gradients are off,
/// unless `in_backward`; a scope that passes through still hides those around it.
///
/// Errors: a null packer; a packer whose scope is open on this thread already, unless
/// `in_backward`; an engine of somebody else's in this process (PythonEngine, another version of
/// this library). Left out of order, it goes and the scopes inside it stay, with a warning. Left on
/// another thread, it goes as soon as its own thread looks for a scope, with a warning. Destructors
/// never throw.
template <class = void>
class [[nodiscard]] BasicSavedTensorsScope {
 public:
  explicit BasicSavedTensorsScope(std::shared_ptr<SavedTensors> packer, bool in_backward = false)
      : engine_(detail::saved_tensors_engine()) {
    TORCH_CHECK(packer != nullptr,
                "SavedTensorsScope: got no packer; give it one, or open no scope at all");
    scope_ = engine_.open(std::move(packer), in_backward);
  }
  ~BasicSavedTensorsScope() { engine_.close(scope_); }
  BasicSavedTensorsScope(const BasicSavedTensorsScope&) = delete;
  BasicSavedTensorsScope& operator=(const BasicSavedTensorsScope&) = delete;

  /// Tensors that this scope's packer was given so far.
  [[nodiscard]] std::int64_t packed() const {
    return scope_->packed.load(std::memory_order_relaxed);
  }
  /// Tensors that autograd saved past this scope: during backward, or beneath no gradient.
  [[nodiscard]] std::int64_t passed() const {
    return scope_->passed.load(std::memory_order_relaxed);
  }

 private:
  detail::SavedTensorsEngine<>& engine_;
  std::shared_ptr<detail::OpenScope> scope_;
};
using SavedTensorsScope = BasicSavedTensorsScope<>;

/// The innermost packer of this thread, or null; also where it passes through just now.
template <class = void>
std::shared_ptr<SavedTensors> current_saved_tensors() {
  auto* const engine = detail::installed_saved_tensors_engine();
  const std::shared_ptr<detail::OpenScope> scope = engine ? engine->innermost() : nullptr;
  return scope ? scope->packer : nullptr;
}

/// The packer that a tensor saved on this thread would be given now, or null.
template <class = void>
std::shared_ptr<SavedTensors> active_saved_tensors() {
  auto* const engine = detail::installed_saved_tensors_engine();
  const std::shared_ptr<detail::OpenScope> scope = engine ? engine->innermost() : nullptr;
  return scope && !scope->passes_through() ? scope->packer : nullptr;
}

/// Tensors saved in this process, since it began, on threads that had no scope while another thread
/// had one: what a report names when a forward ran on the wrong thread.
template <class = void>
std::int64_t tensors_saved_outside_scopes() {
  auto* const engine = detail::installed_saved_tensors_engine();
  return engine ? engine->outside() : 0;
}

/// A detached reference that remembers the version and compares it on unpack, in LibTorch's words.
/// An undefined tensor comes back undefined; an inference tensor has no version and comes back as
/// is.
template <class T = void>
std::shared_ptr<Saved> saved_reference(const at::Tensor& tensor) {
  return std::make_shared<detail::SavedReference<T>>(tensor);
}

/// Whether the model owns it: a leaf that asks for gradients, or a view of one. `attached`: in the
/// graph.
template <class = void>
bool is_parameter(const at::Tensor& attached) {
  if (!attached.requires_grad()) return false;
  if (attached.is_leaf()) return true;
  if (!attached.is_view()) return false;
  const at::TensorBase& base = attached._base();
  return base.requires_grad() && base.is_leaf();
}

}  // namespace fourfold::door

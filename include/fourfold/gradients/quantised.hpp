// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Compression-aware training: gradients pass through few bits on their way into parameters, as
/// they would on their way between machines (QSGD, arXiv 1610.02132). Rounding is stochastic and
/// unbiased, so that training meets the noise and not an error.
///
///   auto quantised = fourfold::quantise_gradients<Int4>(model->parameters());   // while it lives
///   using Mine = CompressionPipeline<Gradients<Int4>, OptimizerStates<Int8>>;   // or as a policy
///
/// A parameter's whole gradient of a pass is rounded (a tied one's once), before it is added to what
/// grad() holds, and in torch::autograd::grad() alike. With create_graph the rounding is passed
/// through: the gradient's own gradient is that of the unrounded one. A value that is not finite
/// makes its group NaN, which a GradScaler sees.
///
/// Left as they are: gradients of fewer than `min_packed_elements` values, sparse and complex ones.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/policy.hpp>

#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

struct QuantisedGradientsOptions {
  std::int64_t min_packed_elements = 4096;  ///< smaller gradients stay as they are
};

namespace detail {

/// Noise of gradients is not that of saved tensors or states: other seeds.
inline constexpr std::uint64_t kGradientNoise = 0x6772616469656E74u;

/// `gradient` as C gives it back; where a graph is made, with the gradient of `gradient` itself.
template <StochasticCodec C>
at::Tensor quantised_gradient(const at::Tensor& gradient, const Key& key) {
  const bool graph = at::GradMode::is_enabled() && gradient.requires_grad();
  at::Tensor rounded;
  {
    const c10::NoGradGuard no_grad;
    rounded = C{}.decompress(C{}.compress(gradient.detach(), key));
  }
  return graph ? gradient.add(rounded.sub(gradient.detach())) : rounded;
}

}  // namespace detail

class QuantisedGradients;
template <StochasticCodec C = Int4>
QuantisedGradients quantise_gradients(const std::vector<at::Tensor>& parameters,
                                      const QuantisedGradientsOptions& options = {});

/// What quantise_gradients() gives: gradients pass through few bits until it dies.
class [[nodiscard]] QuantisedGradients {
 public:
  QuantisedGradients() = default;
  QuantisedGradients(QuantisedGradients&& other) noexcept : hooks_(std::move(other.hooks_)) {
    other.hooks_.clear();
  }
  QuantisedGradients& operator=(QuantisedGradients&& other) noexcept {
    if (this != &other) remove(), hooks_ = std::exchange(other.hooks_, {});
    return *this;
  }
  ~QuantisedGradients() { remove(); }

  void remove() {
    for (const auto& [weak, hook] : hooks_)
      if (const at::Tensor leaf(weak.lock()); leaf.defined()) leaf.remove_hook(hook);
    hooks_.clear();
  }
  /// Parameters whose gradients are taken.
  [[nodiscard]] std::size_t size() const { return hooks_.size(); }

 private:
  template <StochasticCodec C>
  friend QuantisedGradients quantise_gradients(const std::vector<at::Tensor>&,
                                               const QuantisedGradientsOptions&);
  using WeakLeaf = c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>;
  std::vector<std::pair<WeakLeaf, unsigned>> hooks_;
};

/// Each gradient of `parameters` is rounded by C from now on. A parameter named twice is taken once,
/// one that is frozen now is passed over. The noise goes by the default generator's seed, the
/// parameter's place in the list, and how many gradients it had. Error, nothing changed: a tensor
/// that is no leaf.
template <StochasticCodec C>
QuantisedGradients quantise_gradients(const std::vector<at::Tensor>& parameters,
                                      const QuantisedGradientsOptions& options) {
  for (std::size_t i = 0; i < parameters.size(); ++i)
    TORCH_CHECK(!parameters[i].defined() || parameters[i].is_leaf(), "quantise_gradients: tensor ",
                i, " of sizes ", parameters[i].sizes(),
                " is no leaf but the result of an operation; pass parameters");
  const std::uint64_t seed =
      mix(at::detail::getDefaultCPUGenerator().current_seed() ^ detail::kGradientNoise);
  QuantisedGradients result;
  std::unordered_set<const at::TensorImpl*> seen;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& leaf = parameters[i];
    if (!leaf.defined() || !leaf.requires_grad() || !seen.insert(leaf.unsafeGetTensorImpl()).second)
      continue;
    const auto round = [=, passes = std::make_shared<std::atomic<std::uint64_t>>(0)](
                           const at::Tensor& gradient) -> at::Tensor {
      if (!gradient.defined() || gradient.layout() != at::kStrided ||
          !gradient.is_floating_point() || gradient.numel() < options.min_packed_elements)
        return gradient;
      return detail::quantised_gradient<C>(
          gradient, Key{.seed = seed, .step = (*passes)++, .forward = 0, .storage = i});
    };
    result.hooks_.emplace_back(leaf.getIntrusivePtr(), leaf.register_hook(round));
  }
  return result;
}

/// The policy: gradients of what a pipeline trains are rounded by C while the pipeline lives.
template <StochasticCodec C = Int4>
struct Gradients {
  static constexpr Role role = Role::kGradients;
  using Format = C;

  static std::shared_ptr<void> attach(const std::vector<at::Tensor>& parameters) {
    return std::make_shared<QuantisedGradients>(quantise_gradients<C>(parameters));
  }
};
static_assert(Policy<Gradients<Int4>>, "Gradients must stay a Policy");

}  // namespace fourfold::inline v0

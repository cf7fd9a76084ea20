// SPDX-License-Identifier: Apache-2.0
#pragma once
/// CompressionPipeline: what a program holds in memory, compressed by composition.
///
///   using Pipeline =
///       CompressionPipeline<Activations<Int4>, Recompute<CheapOps>, OptimizerStates<Int8>>;
///
///   auto pipeline  = Pipeline(*model);                 // in place: same names, same calls
///   auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(1e-3));
///   auto loss      = pipeline.forward([&] { return criterion(model->forward(x), y); });
///   loss.backward();
///   std::cout << pipeline.report();
///
/// Policies are found by role, in any order, one for each role; what is not named stays as it is,
/// so CompressionPipeline<> changes nothing, bit for bit. A policy is any type with a `role`
/// (core/policy.hpp); those of this library are
///   Weights<Codec, Filter>    weights/weights.hpp          parameters packed in place, frozen
///   Activations<Codec>        activations/activations.hpp  what autograd saves, packed
///   Recompute<Operators>      activations/recompute.hpp    cheap operators computed again
///   Blocks<Every>             activations/blocks.hpp       whole blocks computed again
///   OptimizerStates<Codec>    optim/optimizer_states.hpp   AdamW's moments packed
/// and, by includes of their own,
///   Budget<>                  plan/budget.hpp              which of it is done, within a budget
///   ActivationsBySensitivity<> plan/by_sensitivity.hpp     in 8, 4 or 2 bits, by the gradients
///   Offload<>                 activations/offload.hpp      what else is saved, in a file
///   Precision<BFloat16>       precision.hpp                forward under autocast
///   Gradients<Codec>          gradients/quantised.hpp      gradients passed through few bits
///   Release                   gradients/release.hpp        parameters step in backward
///
/// A model is a module, a ModuleHolder, a Sequential or a pointer to one. The pipeline holds its
/// parameters and not the module, and may outlive it. Errors leave the model as it was.
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/blocks.hpp>
#include <fourfold/activations/recompute.hpp>
#include <fourfold/core/plan_options.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/core/rounded_weight.hpp>
#include <fourfold/core/void_of.hpp>
#include <fourfold/optim/optimizer_states.hpp>
#include <fourfold/report/meter.hpp>
#include <fourfold/torch/gradients.hpp>
#include <fourfold/weights/compress_weights.hpp>

#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

namespace detail {

template <class P>
constexpr int role_of() {
  if constexpr (Policy<P>) return static_cast<int>(P::role);
  return -1;
}
template <class... Policies>
constexpr bool one_policy_a_role() {
  const std::vector<int> roles{role_of<Policies>()...};
  for (std::size_t i = 0; i < roles.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (roles[i] >= 0 && roles[i] == roles[j]) return false;
  return true;
}

/// The policy of role R, or void.
template <Role R, class... Policies>
struct PolicyOf {
  using Type = void;
};
template <class P>
struct Named {
  using Type = P;
};
template <Role R, class First, class... Rest>
struct PolicyOf<R, First, Rest...> {
  using Type = typename std::conditional_t<role_of<First>() == static_cast<int>(R), Named<First>,
                                           PolicyOf<R, Rest...>>::Type;
};

/// What outlives the module: a pipeline's scopes and reports need no more.
template <class = void>
struct BasicPipelineState {
  Meter meter;  // first, so that all that follows is counted
  NamedTensors parameters;
  std::vector<at::Tensor> trainable;
  CompressedWeights weights;
  std::shared_ptr<ActivationStore> store;
  door::GradientHooks gradient_tags;
  SequentialBlocks wrapped_blocks;
  int block_every = 0;                    ///< 0: blocks are not recomputed
  std::shared_ptr<BlockPlan> block_plan;  ///< a budget's; null: each of them is
  std::int64_t blocks_met = 0;
  bool left = false;  ///< a scope was left, so blocks_met tells something
  std::int64_t scopes = 0;
  std::int64_t without_gradients = 0;  ///< scopes that were entered where nothing is saved
  std::int64_t elsewhere_before = door::tensors_saved_outside_scopes();
  bool optimizer_made = false;
  std::shared_ptr<void> gradients;                 ///< what a policy does to them
  std::shared_ptr<void> (*precision)() = nullptr;  ///< entered with each scope
  std::vector<RoundedWeight> rounded;              ///< by it, until there is an optimizer
};

}  // namespace detail

/// While it lives, what this thread's forward saves is the pipeline's. Entered once, and left on
/// the thread that entered it.
template <class T = void>
class [[nodiscard]] BasicPipelineScope {
 public:
  explicit BasicPipelineScope(std::shared_ptr<detail::BasicPipelineState<T>> state)
      : state_(std::move(state)), saved_(state_->store), operators_(state_->store->activate()) {
    if (state_->block_every > 0)
      blocks_.emplace(state_->block_every, CheckpointOptions{}, state_->block_plan);
    if (state_->precision != nullptr) precision_ = state_->precision();
    ++state_->scopes;
    if (!at::GradMode::is_enabled()) ++state_->without_gradients;
  }
  ~BasicPipelineScope() {
    if (blocks_) state_->blocks_met += blocks_->met();
    state_->left = true;
  }
  BasicPipelineScope(const BasicPipelineScope&) = delete;
  BasicPipelineScope& operator=(const BasicPipelineScope&) = delete;

 private:
  std::shared_ptr<detail::BasicPipelineState<T>> state_;
  door::BasicSavedTensorsScope<T> saved_;
  std::shared_ptr<void> operators_;
  std::optional<BasicBlocksScope<T>> blocks_;
  std::shared_ptr<void> precision_;
};
using PipelineScope = BasicPipelineScope<>;

template <class... Policies>
class CompressionPipeline {
  static_assert(
      (Policy<Policies> && ...),
      "a codec is not a policy: say what it packs, as in Activations<Int4> or Weights<Int4>");
  static_assert(detail::one_policy_a_role<Policies...>(),
                "two policies for one role: keep one Activations<>, one Weights<>, and so on");
  template <Role R>
  using PolicyOf = typename detail::PolicyOf<R, Policies...>::Type;
  template <Role R>
  static constexpr bool kHas = !std::is_void_v<PolicyOf<R>>;
  /// Whether the bits of what is saved follow from the gradients.
  static constexpr bool kChoosesBits = requires { &PolicyOf<Role::kActivations>::follow; };
  using Void = typename VoidOf<Policies...>::Type;
  using State = detail::BasicPipelineState<Void>;
  using Scope = BasicPipelineScope<Void>;
  using Store = BasicActivationStore<Void>;

 public:
  /// Whether backward is the step (the policy Release): then leave step() and zero_grad() out.
  static constexpr bool kReleases = kHas<Role::kRelease>;

  /// Weights, if a policy covers them, are compressed here, in place.
  template <ModuleLike M>
  explicit CompressionPipeline(M&& model) {
    build(model, nullptr);
  }
  /// With a budget in bytes: `Pipeline(*model, {.budget = 512_MiB})`. Needs the policy Budget<>.
  template <ModuleLike M>
  CompressionPipeline(M&& model, const PlanOptions& options) {
    static_assert(kHas<Role::kBudget>,
                  "a budget needs the policy Budget<>: include <fourfold/plan/budget.hpp> and name "
                  "it among the pipeline's policies");
    static_assert(kHas<Role::kActivations> || kHas<Role::kRecompute> || kHas<Role::kOffload>,
                  "Budget<> chooses among what other policies do: add Activations<...> (packed), "
                  "Recompute<...> (exact), or both");
    build(model, &options);
  }

  /// A handle: copies are the same pipeline, and so is what a move leaves behind.
  CompressionPipeline(const CompressionPipeline&) = default;
  CompressionPipeline& operator=(const CompressionPipeline&) = default;

  /// What `run` returns, run within the scope.
  template <class F>
  decltype(auto) forward(F&& run) {
    const Scope inside = scope();
    return std::forward<F>(run)();
  }
  /// The same as a guard, for loops that do not fit a lambda.
  Scope scope() { return Scope(state_); }

  /// AdamW over parameters(), its states as the policy says; torch::optim::AdamW without one.
  [[nodiscard]] std::shared_ptr<::torch::optim::Optimizer> optimizer(
      ::torch::optim::AdamWOptions options = {}) const {
    state_->optimizer_made = true;
    if constexpr (kHas<Role::kOptimizerStates>) {
      auto made = std::make_shared<typename PolicyOf<Role::kOptimizerStates>::Optimizer>(
          parameters(), options);
      if constexpr (kHas<Role::kPrecision>) made->start_from(std::move(state_->rounded));
      return released(std::move(made));
    } else if constexpr (kHas<Role::kRelease>)
      return released(std::make_shared<optim::AdamWOf<optim::Fp32>>(parameters(), options));
    else
      return std::make_shared<optim::PlainAdamW>(parameters(), options);
  }

  /// What is trained: parameters that require gradients, and the factors of LowRank weights.
  [[nodiscard]] const std::vector<at::Tensor>& parameters() const { return state_->trainable; }

  /// Bytes by place, now and at the peak, measured.
  [[nodiscard]] Ledger report() const {
    Ledger ledger = state_->meter.ledger();
    ledger.saved_bytes = state_->store->held_bytes().peak;
    if constexpr (!kHas<Role::kBlocks>)  // what a block drops is not seen again as it was
      ledger.saved_plain_bytes = state_->store->plain_bytes().peak;
    if constexpr (kHas<Role::kBudget>)
      if (state_->store->plan() != nullptr)
        ledger.predicted_peak_bytes =
            PolicyOf<Role::kBudget>::predicted_peak_bytes(*state_->store->plan());
    if (!state_->weights.names.empty()) {
      std::ostringstream note;
      note << "weights: " << state_->weights.names.size() << " parameters packed, "
           << detail::mib(state_->weights.bytes_before) << " MiB before, "
           << detail::mib(state_->weights.bytes_after) << " now";
      if (state_->trainable.empty()) note << "; all are frozen";
      ledger.notes.push_back(note.str());
    }
    if (!state_->optimizer_made && ledger[Place::kGradients].own_peak > 0 &&
        ledger[Place::kOptimizer].now == 0)
      ledger.notes.push_back(
          "optimizer: what LibTorch's own optimizers hold is counted under \"other\"; take "
          "pipeline.optimizer(), or one of fourfold::optim, to see it apart");
    if constexpr (kChoosesBits)
      if (std::string bits = state_->store->plan()->explain(); !bits.empty())
        ledger.notes.push_back(std::move(bits));
    if (const std::string why = explain(); !why.empty()) ledger.notes.push_back(why);
    if constexpr (kHas<Role::kOffload>)
      if (const std::string note = state_->store->offload()->note(); !note.empty())
        ledger.notes.push_back(note);
    return ledger;
  }

  /// Each saved storage, how the budget's plan holds it and what that costs; what else could be had.
  [[nodiscard]] auto plan() const requires(kHas<Role::kBudget>) {
    return PolicyOf<Role::kBudget>::report(budgeted());
  }
  /// The bits that each saved storage is held in, and what they add to the gradients' variance.
  [[nodiscard]] auto bits() const requires(kChoosesBits) {
    return PolicyOf<Role::kActivations>::report(*state_->store->plan());
  }
  /// Another budget, from the next step on.
  void set_budget(std::int64_t bytes) requires(kHas<Role::kBudget>) {
    PolicyOf<Role::kBudget>::set_budget(budgeted(), bytes);
  }

  /// Why nothing was saved, or no block was recomputed, if so; else empty.
  [[nodiscard]] std::string explain() const {
    if constexpr (!kHas<Role::kActivations> && !kHas<Role::kRecompute> && !kHas<Role::kBlocks> &&
                  !kHas<Role::kOffload>)
      return {};  // nothing here is a scope's work
    if (state_->scopes == 0)
      return "no forward ran inside the pipeline's scope: call pipeline.forward([&] { ... }), or "
             "hold pipeline.scope() while the model runs";
    if (state_->store->counts().tensors() > 0) {
      if (state_->block_every == 0 || state_->blocks_met > 0 || !state_->left) return {};
      return "Blocks<>: no block ran, so none is recomputed: name them by fourfold::block(layer, "
             "x) in the model's forward, or put them in a torch::nn::Sequential";
    }
    const std::int64_t elsewhere = door::tensors_saved_outside_scopes() - state_->elsewhere_before;
    if (elsewhere > 0)
      return "no tensor passed: " + std::to_string(elsewhere) +
             " tensors were saved on threads without a scope: hold pipeline.scope() on the thread "
             "that runs the model, while it runs";
    if (state_->without_gradients == state_->scopes)
      return "no tensor passed: gradients were disabled (NoGradGuard, InferenceMode) whenever a "
             "scope was entered, and then there is nothing to save";
    if (state_->trainable.empty())
      return "no tensor passed: no parameter requires gradients, and then there is nothing to save";
    return "no tensor passed: the model did not run inside the scope";
  }

 private:
  template <class Optimizer>
  static std::shared_ptr<::torch::optim::Optimizer> released(std::shared_ptr<Optimizer> optimizer) {
    if constexpr (kHas<Role::kRelease>) return PolicyOf<Role::kRelease>::release(optimizer);
    return optimizer;
  }

  /// What holding weights in fewer bits will save.
  template <class Precision>
  static std::int64_t bytes_saved_by(const torch::nn::Module& module) {
    if constexpr (requires { Precision::bytes_saved(module); })
      return Precision::bytes_saved(module);
    else
      return 0;
  }

  [[nodiscard]] SavedPlan& budgeted() const {
    TORCH_CHECK(state_->store->plan() != nullptr,
                "CompressionPipeline: it was made without a budget, so there is no plan; make it "
                "with one, as in Pipeline(*model, {.budget = 512_MiB})");
    return *state_->store->plan();
  }

  template <class M>
  void build(M& model, const PlanOptions* plan) {
    torch::nn::Module& module = detail::module_of(model, "CompressionPipeline");
    ActivationOptions options;
    // First: an error leaves the model as it was.
    if constexpr (kHas<Role::kOffload>)
      options.offload = PolicyOf<Role::kOffload>::make(/*planned=*/plan != nullptr);
    if constexpr (kHas<Role::kBudget>)
      if (plan != nullptr)
        options.plan = PolicyOf<Role::kBudget>::template make<PolicyOf<Role::kActivations>>(
            *plan, kHas<Role::kWeights> ? NamedTensors{} : parameters_of(model, "Budget"),
            options.offload, bytes_saved_by<PolicyOf<Role::kPrecision>>(module));
    if constexpr (kHas<Role::kBlocks>) {  // first: it undoes itself, and packing rounds
      state_->block_every = PolicyOf<Role::kBlocks>::every;
      state_->wrapped_blocks = wrap_sequential_blocks(module);
    }
    if constexpr (kHas<Role::kWeights>) {
      using Chosen = PolicyOf<Role::kWeights>;
      state_->weights = compress_weights<typename Chosen::Format>(model, typename Chosen::Chosen{});
    }
    state_->parameters = parameters_of(model, "CompressionPipeline");
    TORCH_CHECK(!state_->parameters.empty(),
                "CompressionPipeline: the module has no parameters, so there is nothing to train; "
                "hand over the module that holds them, after they are registered");
    if constexpr (kHas<Role::kPrecision>) {
      using Chosen = PolicyOf<Role::kPrecision>;
      state_->precision = Chosen::on(state_->parameters.front().second.device().type());
      constexpr bool keep = [] {
        if constexpr (kHas<Role::kOptimizerStates>)
          return PolicyOf<Role::kOptimizerStates>::Optimizer::kKeepsWeights;
        return false;
      }();
      state_->rounded = Chosen::convert(module, keep);
    }
    for (const auto& [name, parameter] : state_->parameters)
      if (parameter.requires_grad()) state_->trainable.push_back(parameter);
    for (const at::Tensor& factor : factors(model)) state_->trainable.push_back(factor);

    std::vector<at::Tensor> weights;
    for (const auto& [name, parameter] : state_->parameters)
      if (!door::is_packed(parameter)) weights.push_back(parameter);
    for (const auto& [name, buffer] : buffers_of(model, "CompressionPipeline"))
      weights.push_back(buffer);
    state_->meter.adopt(weights, Place::kWeights);
    state_->gradient_tags = door::retag_gradients(state_->trainable);
    if constexpr (kHas<Role::kGradients>)
      state_->gradients = PolicyOf<Role::kGradients>::attach(state_->trainable);

    if (std::any_of(state_->parameters.begin(), state_->parameters.end(),
                    [](const auto& one) { return door::is_packed(one.second); }))
      options.payload_of = [](const at::Tensor& dense) { return door::payload_of_dense(dense); };
    if constexpr (kHas<Role::kActivations>) PolicyOf<Role::kActivations>::configure(options);
    if constexpr (kChoosesBits)
      PolicyOf<Role::kActivations>::follow(*options.plan, state_->trainable);
    if constexpr (kHas<Role::kRecompute>)
      options.recompute = operator_names<typename PolicyOf<Role::kRecompute>::Operators>();
    state_->store = Store::make(std::move(options));
    state_->store->keep_storages(weights);
    if constexpr (kHas<Role::kBudget> && kHas<Role::kBlocks>)
      if (plan != nullptr) state_->block_plan = PolicyOf<Role::kBudget>::blocks(state_->store);
  }

  std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// AdamW with packed moments (Loshchilov and Hutter, arXiv 1711.05101; 8-bit companded states after
/// FlashOptim, arXiv 2602.23349). A torch::optim::Optimizer with torch::optim::AdamWOptions:
/// parameter groups, schedulers, closures, torch::save and torch::load are LibTorch's.
///   optim::AdamW<Companded<8, Softsign>, Companded<8, Sqrt>> optimizer(model->parameters(), 1e-3);
///   optim::AdamWOf<Int8> same(model->parameters(), torch::optim::AdamWOptions(1e-3));
///   optim::AdamWOf<optim::Fp32> exact(...);   // torch::optim::AdamW but for rounding
///
/// A step decodes, updates and encodes 1024 values at a time: 16 KiB of scratch a thread, no dense
/// state. Arithmetic is fp32, moments of tensors below
/// `min_packed_elements` stay fp32. Codes are rounded stochastically by counter: nearest rounding
/// freezes a second moment, whose relative change of 1 - beta2 a step is less than half a code.
/// Results do not depend on the number of threads nor on the instructions used.
///
/// Left alone: parameters without a gradient, and frozen ones (requires_grad off: packed weights),
/// which skipped() counts. Errors, raised before anything is changed: a sparse gradient; one of
/// another shape, dtype or device; a parameter that is not floating; amsgrad; options out of range.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fourfold/core/parameter_stepper.hpp>
#include <fourfold/core/random.hpp>
#include <fourfold/optim/detail/adamw_archive.hpp>
#include <fourfold/optim/detail/adamw_step.hpp>
#include <fourfold/optim/state_codec.hpp>

#include <torch/optim/adamw.h>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace optim {

/// How states are held.
struct StateOptions {
  std::int64_t min_packed_elements = 4096;  ///< smaller parameters keep fp32 moments
  bool stochastic = true;                   ///< false: codes are rounded to nearest
};

template <class MomentCodec, class SecondMomentCodec>
class AdamW : public ::torch::optim::Optimizer, public ParameterStepper {
  static_assert(
      !kIsLinear<SecondMomentCodec>,
      "a second moment spans orders of magnitude, and evenly spaced codes round its small values "
      "to zero, which the step divides by: use Companded<8, Sqrt> for the second moment");
  using State = detail::AdamWState<MomentCodec, SecondMomentCodec>;
  using Options = ::torch::optim::AdamWOptions;
  using Group = ::torch::optim::OptimizerParamGroup;

 public:
  explicit AdamW(const std::vector<Group>& groups, Options defaults = {}, StateOptions states = {})
      : Optimizer(groups, std::make_unique<Options>(defaults)),
        states_(states),
        seed_(default_seed()) {
    check_options(defaults, "the defaults");
    for (std::size_t g = 0; g < param_groups_.size(); ++g)
      check_options(options_of(param_groups_[g]), "group " + std::to_string(g));
    TORCH_CHECK(states.min_packed_elements >= 0, "StateOptions::min_packed_elements is ",
                states.min_packed_elements, "; it is a number of elements, 0 or more");
  }
  explicit AdamW(std::vector<at::Tensor> parameters, Options defaults = {},
                 StateOptions states = {})
      : AdamW({Group(std::move(parameters))}, std::move(defaults), states) {}

  /// One step of all parameters that have a gradient. Gives what `closure` gives, run with
  /// gradients on.
  at::Tensor step(LossClosure closure = nullptr) override;
  /// `p` alone, as step() steps it: core/parameter_stepper.hpp.
  void step_parameter(const at::Tensor& p) override;

  /// Bytes of all moments now. Before the first step there are none.
  [[nodiscard]] std::int64_t state_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [key, state] : state_) {
      const auto& ours = static_cast<const State&>(*state);
      bytes += ours.first.nbytes() + ours.second.nbytes();
    }
    return bytes;
  }
  /// Parameters that cannot be stepped, since they are frozen: packed weights among them.
  [[nodiscard]] std::int64_t skipped() const {
    std::int64_t count = 0;
    for (const Group& group : param_groups_)
      for (const at::Tensor& p : group.params()) count += p.requires_grad() ? 0 : 1;
    return count;
  }

  /// Format: detail/adamw_archive.hpp. After load, training goes on bit for bit as if it had not
  /// stopped.
  void save(::torch::serialize::OutputArchive& archive) const override {
    detail::save_states<MomentCodec, SecondMomentCodec>(
        archive, param_groups_, seed_, [this](const at::Tensor& p) { return find(p); });
  }
  /// Errors, nothing changed: a newer version, another codec, other groups or shapes, a damaged
  /// file.
  void load(::torch::serialize::InputArchive& archive) override;

 private:
  static std::uint64_t default_seed() {
    at::Generator generator = at::detail::getDefaultCPUGenerator();  // a handle
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.current_seed();
  }
  static Options& options_of(Group& group) {
    auto* options = dynamic_cast<Options*>(&group.options());
    TORCH_CHECK(options != nullptr,
                "a parameter group has the options of another optimizer; give it "
                "torch::optim::AdamWOptions");
    return *options;
  }
  static void check_options(const Options& options, const std::string& whose);
  using Place = detail::GroupPlace;

  /// f(parameter, where it stands) for all.
  template <class F>
  void for_each_parameter(const F& f) const {
    for (Place at; at.group < param_groups_.size(); ++at.group)
      for (at.position = 0; at.position < param_groups_[at.group].params().size(); ++at.position)
        f(param_groups_[at.group].params()[at.position], at);
  }
  /// The running number of a parameter: its noise and messages go by it.
  std::int64_t index_of(const Place& at) const {
    std::size_t index = at.position;
    for (std::size_t g = 0; g < at.group; ++g) index += param_groups_[g].params().size();
    return static_cast<std::int64_t>(index);
  }
  Place place_of(const at::Tensor& p) const;
  void check(const at::Tensor& p, const Place& at);
  void step_one(const at::Tensor& p, const Place& at);

  const State* find(const at::Tensor& p) const {
    const auto found = state_.find(p.unsafeGetTensorImpl());
    return found == state_.end() ? nullptr : static_cast<const State*>(found->second.get());
  }
  State& state_for(const at::Tensor& p) {
    auto& state = state_[p.unsafeGetTensorImpl()];
    if (state == nullptr) state = std::make_unique<State>(p, states_.min_packed_elements);
    return static_cast<State&>(*state);
  }

  StateOptions states_;
  std::uint64_t seed_;
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  ///< an optimizer may move
};

template <class M, class V>
void AdamW<M, V>::check_options(const Options& options, const std::string& whose) {
  const auto [beta1, beta2] = options.betas();
  TORCH_CHECK(options.lr() >= 0, "Invalid learning rate: ", options.lr(), " in ", whose,
              "; it is 0 or more");
  TORCH_CHECK(options.eps() >= 0, "Invalid epsilon value: ", options.eps(), " in ", whose,
              "; it is 0 or more");
  TORCH_CHECK(0 <= beta1 && beta1 < 1, "Invalid beta parameter at index 0: ", beta1, " in ", whose,
              "; it lies in [0, 1)");
  TORCH_CHECK(0 <= beta2 && beta2 < 1, "Invalid beta parameter at index 1: ", beta2, " in ", whose,
              "; it lies in [0, 1)");
  TORCH_CHECK(options.weight_decay() >= 0, "Invalid weight_decay value: ", options.weight_decay(),
              " in ", whose, "; it is 0 or more");
  TORCH_CHECK(!options.amsgrad(), "amsgrad is set in ", whose,
              ", and packed states have no third moment for it; use torch::optim::AdamW, or "
              "amsgrad(false)");
}

template <class M, class V>
at::Tensor AdamW<M, V>::step(LossClosure closure) {
  check_stepped_by_hand();
  const c10::NoGradGuard no_grad;
  at::Tensor loss;
  if (closure != nullptr) {
    const at::AutoGradMode with_gradients(true);
    loss = closure();
  }
  const std::lock_guard<std::mutex> lock(*mutex_);
  for_each_parameter([this](const at::Tensor& p, const Place& at) { check(p, at); });
  for_each_parameter([this](const at::Tensor& p, const Place& at) { step_one(p, at); });
  return loss;
}

template <class M, class V>
void AdamW<M, V>::step_parameter(const at::Tensor& p) {
  const c10::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(*mutex_);
  const Place at = place_of(p);
  check(p, at);
  step_one(p, at);
}

template <class M, class V>
typename AdamW<M, V>::Place AdamW<M, V>::place_of(const at::Tensor& p) const {
  if (const State* state = find(p)) {  // known since its first step
    const Place& at = state->place;
    if (at.group < param_groups_.size() && at.position < param_groups_[at.group].params().size() &&
        param_groups_[at.group].params()[at.position].is_same(p))
      return at;
  }
  std::optional<Place> found;
  for_each_parameter([&](const at::Tensor& one, const Place& at) {
    if (!found && one.is_same(p)) found = at;
  });
  TORCH_CHECK(found.has_value(), "AdamW was to step a parameter of ",
              p.defined() ? p.sizes() : at::IntArrayRef(),
              " that is in none of its groups; give it to the optimizer, or to add_param_group()");
  return *found;
}

template <class M, class V>
void AdamW<M, V>::check(const at::Tensor& p, const Place& at) {
  check_options(options_of(param_groups_[at.group]), "group " + std::to_string(at.group));
  if (!p.requires_grad() || !p.grad().defined()) return;
  const std::int64_t index = index_of(at);
  detail::check_gradient(p, p.grad(), index);
  const State* state = find(p);
  if (state == nullptr) return;
  TORCH_CHECK(p.sizes() == state->sizes, "AdamW: parameter ", index, " is ", p.sizes(),
              ", and its states are for ", at::IntArrayRef(state->sizes),
              "; build the optimizer anew after changing a parameter's shape");
  TORCH_CHECK(detail::same_order(state->sizes, detail::moment_strides(p), state->strides),
              "AdamW: parameter ", index, " lies in memory with strides ", p.strides(), " on ",
              p.device(), ", and its states for ", at::IntArrayRef(state->strides),
              "; build the optimizer anew after changing a parameter's memory format");
}

template <class M, class V>
void AdamW<M, V>::step_one(const at::Tensor& p, const Place& at) {
  if (!p.requires_grad() || !p.grad().defined()) return;
  const Options& options = options_of(param_groups_[at.group]);
  const auto [beta1, beta2] = options.betas();
  State& state = state_for(p);
  state.place = at;
  ++state.step;
  const detail::AdamWFactors factors(options.lr(), beta1, beta2, options.eps(),
                                     options.weight_decay(), state.step);
  // Two moments a parameter, two storage numbers; forward 0 is no scope's.
  const auto storage = static_cast<std::uint64_t>(2 * index_of(at));
  std::optional<Key> key;
  if (states_.stochastic) key = Key{seed_, static_cast<std::uint64_t>(state.step), 0, storage};
  detail::step_parameter(p, p.grad(), state, factors, key);
}

template <class M, class V>
void AdamW<M, V>::load(::torch::serialize::InputArchive& archive) {
  detail::LoadedStates<M, V> loaded(archive, param_groups_, states_.min_packed_elements);
  for (std::size_t g = 0; g < param_groups_.size(); ++g)
    check_options(static_cast<const Options&>(*loaded.groups[g].options),
                  "group " + std::to_string(g) + " of the file");
  seed_ = loaded.seed;
  for (std::size_t g = 0; g < param_groups_.size(); ++g) {
    options_of(param_groups_[g]) = static_cast<const Options&>(*loaded.groups[g].options);
    for (std::size_t i = 0; i < param_groups_[g].params().size(); ++i) {
      void* key = param_groups_[g].params()[i].unsafeGetTensorImpl();
      if (auto& state = loaded.groups[g].states[i]; state != nullptr)
        state_[key] = std::move(state);
      else
        state_.erase(key);
    }
  }
}

/// AdamW by one word for both moments: AdamWOf<Int8> has 8-bit companded moments, AdamWOf<Fp32>
/// plain.
template <class C>
using AdamWOf = AdamW<typename StatesOf<C>::First, typename StatesOf<C>::Second>;

}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One optimizer, composed at compile time: an update rule, a codec for each of its moments, and
/// what is kept of bf16 weights. A torch::optim::Optimizer: parameter groups, LibTorch's options,
/// schedulers, closures, torch::save and torch::load are as usual.
///   optim::AdamWOf<Int8> packed(model->parameters(), torch::optim::AdamWOptions(1e-3));
///   optim::Optimizer<optim::LionRule, Companded<8, Softsign>, optim::Fp32> same_algebra(...);
///
/// A step decodes, updates and encodes 1024 values at a time: at most 24 KiB of scratch a thread, no
/// dense state. Arithmetic is fp32; moments of fewer than `min_packed_elements` values stay fp32.
/// Codes are rounded stochastically by counter: nearest rounding freezes a second moment, whose
/// relative change of 1 - beta2 a step is less than half a code; two optimizers of a program round
/// by different noise (detail/noise_seed.hpp). Results do not depend on the number of threads nor on
/// the instructions used.
///
/// Left alone: parameters without a gradient, and frozen ones (requires_grad off: packed weights),
/// which skipped() counts. An optimizer of no parameters steps nothing; parameters may be added at
/// any time. A gradient that is not finite makes its value, and the moments that share a scale with
/// it, NaN: leave such a step out, as GradScaler does.
///
/// A sparse gradient (torch::kSparse: an Embedding's with sparse(true)) is stepped with as the dense
/// one that it stands for, bit for bit: values without a gradient have one of zero, so their moments
/// decay. It is made dense on a GPU and where a parameter's memory is not row-major, else nowhere.
///
/// Errors, raised before anything is changed: a gradient of another shape, dtype, layout or device;
/// a parameter that is not floating; options out of range.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <fourfold/core/buffer_holder.hpp>
#include <fourfold/core/parameter_stepper.hpp>
#include <fourfold/core/rounded_weight.hpp>
#include <fourfold/optim/detail/noise_seed.hpp>
#include <fourfold/optim/detail/optimizer_archive.hpp>
#include <fourfold/optim/detail/parameter_step.hpp>
#include <fourfold/optim/rule.hpp>
#include <fourfold/optim/state_codec.hpp>

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
  std::int64_t min_packed_elements = 4096;  ///< smaller moments are held in fp32
  bool stochastic = true;                   ///< false: moments are rounded to nearest
  bool maximize = false;                    ///< steps along the gradient, not against it
  std::shared_ptr<BufferHolder> offload{};  ///< who holds the larger of them; null: memory
};

template <UpdateRule Rule, class MomentCodec, class SecondMomentCodec,
          class MasterCodec = RoundNearest>
class Optimizer : public ::torch::optim::Optimizer, public ParameterStepper {
  static_assert(
      !kIsLinear<SecondMomentCodec>,
      "a second moment spans orders of magnitude, and evenly spaced codes round its small values "
      "to zero, which the step divides by: use Companded<8, Sqrt> for the second moment");
  using Base = ::torch::optim::Optimizer;
  using Group = ::torch::optim::OptimizerParamGroup;
  using GroupPlace = detail::GroupPlace;

 public:
  using RuleType = Rule;
  using Options = typename Rule::Options;
  using State = detail::ParameterState<MomentCodec, SecondMomentCodec, MasterCodec>;

  explicit Optimizer(const std::vector<Group>& groups, Options defaults = {},
                     StateOptions states = {})
      : Base(groups, std::make_unique<Options>(defaults)), states_(states) {
    Rule::check(defaults, "the defaults");
    for (std::size_t g = 0; g < param_groups_.size(); ++g) check_options(g);
    seed_ = detail::noise_seed(param_groups_);
    TORCH_CHECK(states.min_packed_elements >= 0, "StateOptions::min_packed_elements is ",
                states.min_packed_elements, "; it is a number of elements, 0 or more");
  }
  explicit Optimizer(std::vector<at::Tensor> parameters, Options defaults = {},
                     StateOptions states = {})
      : Optimizer({Group(std::move(parameters))}, std::move(defaults), states) {}

  /// One step of all parameters that have a gradient. Gives what `closure` gives, run with
  /// gradients on.
  at::Tensor step(LossClosure closure = nullptr) override;
  /// `p` alone, as step() steps it: core/parameter_stepper.hpp.
  void step_parameter(const at::Tensor& p) override { fold_gradient(p, 0, true); }
  void fold_gradient(const at::Tensor& p, std::int64_t micro_batch, bool last) override;
  void check_folds() const override {
    TORCH_CHECK(kFolds<Rule>, Rule::name(),
                " cannot take up a step's gradients one by one, which AdamW can: accumulate them, "
                "as AccumulateGradients::kBuffers does");
  }

  /// Whether more is kept of 16-bit weights than they hold.
  static constexpr bool kKeepsWeights = kKeepsError<MasterCodec>;
  /// To be called before the first step: weights that were converted go on from what they were, and
  /// not from their rounding, as long as nobody has set them since. Others are left aside.
  void start_from(std::vector<RoundedWeight> rounded);

  /// Bytes of all that is kept between steps beside weights and gradients. Before the first step
  /// there are none, unless weights were given to start_from().
  [[nodiscard]] std::int64_t state_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [key, state] : state_) bytes += static_cast<const State&>(*state).nbytes();
    return bytes;
  }
  /// Parameters that cannot be stepped, since they are frozen: packed weights among them.
  [[nodiscard]] std::int64_t skipped() const {
    std::int64_t count = 0;
    for_each_parameter(
        [&](const at::Tensor& p, GroupPlace) { count += p.requires_grad() ? 0 : 1; });
    return count;
  }

  /// Format: detail/optimizer_archive.hpp. After load, training goes on bit for bit as if it had
  /// not stopped. Moments that the file has in another code are decoded and encoded anew, rounded to
  /// nearest.
  void save(::torch::serialize::OutputArchive& archive) const override {
    detail::save_states<Rule, State>(archive, param_groups_, seed_, state_);
  }
  /// Errors, nothing changed: a newer version, another rule, an unknown codec, other groups or
  /// shapes, a damaged file.
  void load(::torch::serialize::InputArchive& archive) override;

 private:
  Options& options_of(std::size_t g) {
    auto* options = dynamic_cast<Options*>(&param_groups_[g].options());
    TORCH_CHECK(options != nullptr, "group ", g, " has the options of another optimizer; give it ",
                Rule::name(), "'s");
    return *options;
  }
  void check_options(std::size_t g) { Rule::check(options_of(g), "group " + std::to_string(g)); }

  /// f(parameter, where it stands) for all.
  template <class F>
  void for_each_parameter(const F& f) const {
    for (GroupPlace at; at.group < param_groups_.size(); ++at.group)
      for (at.position = 0; at.position < param_groups_[at.group].params().size(); ++at.position)
        f(param_groups_[at.group].params()[at.position], at);
  }
  /// The running number of a parameter: its noise and messages go by it.
  std::int64_t index_of(const GroupPlace& at) const {
    std::size_t index = at.position;
    for (std::size_t g = 0; g < at.group; ++g) index += param_groups_[g].params().size();
    return static_cast<std::int64_t>(index);
  }
  GroupPlace place_of(const at::Tensor& p) const;
  void check(const at::Tensor& p, const GroupPlace& at);
  void step_one(const at::Tensor& p, const GroupPlace& at, std::int64_t micro_batch = 0,
                bool last = true);
  void read_ahead(const at::Tensor& p, State& state);

  at::Device device_of_states(const at::Tensor& p) const {
    return detail::state_device<Rule, State>(p, /*on_host=*/states_.offload != nullptr);
  }
  const State* find(const at::Tensor& p) const { return detail::find_state<State>(state_, p); }
  State& state_for(const at::Tensor& p) {
    auto& state = state_[p.unsafeGetTensorImpl()];
    if (state == nullptr) state = std::make_unique<State>(p, kByRows<Rule>, device_of_states(p));
    return static_cast<State&>(*state);
  }

  StateOptions states_;
  std::uint64_t seed_ = 0;
  void* last_ = nullptr;  ///< whose states were stepped last
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  ///< an optimizer may move
};

template <UpdateRule R, class M, class V, class W>
at::Tensor Optimizer<R, M, V, W>::step(LossClosure closure) {
  check_stepped_by_hand();
  at::Tensor loss;
  if (closure != nullptr) {
    const at::AutoGradMode with_gradients(true);
    loss = closure();
  }
  const c10::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(*mutex_);
  for (std::size_t g = 0; g < param_groups_.size(); ++g) check_options(g);
  for_each_parameter([this](const at::Tensor& p, const GroupPlace& at) { check(p, at); });
  std::optional<std::pair<at::Tensor, GroupPlace>> before;  // the next is copied meanwhile
  for_each_parameter([&](const at::Tensor& p, const GroupPlace& at) {
    if (states_.offload && p.requires_grad()) states_.offload->will_copy(p);
    if (before) step_one(before->first, before->second);
    before.emplace(p, at);
  });
  if (before) step_one(before->first, before->second);
  return loss;
}

template <UpdateRule R, class M, class V, class W>
void Optimizer<R, M, V, W>::fold_gradient(const at::Tensor& p, std::int64_t micro_batch,
                                          bool last) {
  if (micro_batch != 0 || !last) check_folds();
  const c10::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(*mutex_);
  const GroupPlace at = place_of(p);
  check_options(at.group);
  check(p, at);
  step_one(p, at, micro_batch, last);
}

template <UpdateRule R, class M, class V, class W>
detail::GroupPlace Optimizer<R, M, V, W>::place_of(const at::Tensor& p) const {
  if (const State* state = find(p)) {  // known since its first step
    const GroupPlace& at = state->place;
    if (at.group < param_groups_.size() && at.position < param_groups_[at.group].params().size() &&
        param_groups_[at.group].params()[at.position].is_same(p))
      return at;
  }
  std::optional<GroupPlace> found;
  for_each_parameter([&](const at::Tensor& one, const GroupPlace& at) {
    if (!found && one.is_same(p)) found = at;
  });
  TORCH_CHECK(found.has_value(), R::name(), " was to step a parameter of ",
              p.defined() ? p.sizes() : at::IntArrayRef(),
              " that is in none of its groups; give it to the optimizer, or to add_param_group()");
  return *found;
}

template <UpdateRule R, class M, class V, class W>
void Optimizer<R, M, V, W>::check(const at::Tensor& p, const GroupPlace& at) {
  if (!p.requires_grad() || !p.grad().defined()) return;
  const std::int64_t index = index_of(at);
  detail::check_gradient(R::name(), p, p.grad(), index);
  detail::Master<W>::check(p, R::name(), index);
  if constexpr (kByRows<R>)
    TORCH_CHECK(p.scalar_type() != at::kDouble, R::name(), " steps Float, BFloat16 and Half ",
                "parameters, and parameter ", index,
                " is Double; convert it with to(torch::kFloat)");
  if constexpr (requires { R::check_parameter(p, index); }) R::check_parameter(p, index);
  const State* state = find(p);
  if (state == nullptr) return;
  TORCH_CHECK(p.sizes() == state->sizes, R::name(), ": parameter ", index, " is ", p.sizes(),
              ", and its states are for ", at::IntArrayRef(state->sizes),
              "; build the optimizer anew after changing a parameter's shape");
  TORCH_CHECK(
      state->master.fits(p), R::name(), ": parameter ", index, " is ", p.scalar_type(),
      " now, and was not when its states were made; build the optimizer anew after changing "
      "a parameter's dtype");
  TORCH_CHECK(
      detail::same_order(state->sizes, detail::state_strides(p, kByRows<R>, device_of_states(p)),
                         state->strides),
      R::name(), ": parameter ", index, " lies in memory with strides ", p.strides(), " on ",
      p.device(), ", and its states for ", at::IntArrayRef(state->strides),
      "; build the optimizer anew after changing a parameter's memory format");
}

template <UpdateRule R, class M, class V, class W>
void Optimizer<R, M, V, W>::step_one(const at::Tensor& p, const GroupPlace& at,
                                     std::int64_t micro_batch, bool last) {
  if (!p.requires_grad() || !p.grad().defined()) return;
  const Options& options = options_of(at.group);
  State& state = state_for(p);
  state.place = at;
  const bool fresh =
      state.template make<R>(p, options, states_.min_packed_elements, device_of_states(p));
  BufferHolder* const holder = states_.offload.get();
  if (holder != nullptr) {
    if (fresh) state.for_each_buffer([&](at::Tensor& buffer) { buffer = holder->hold(buffer); });
    read_ahead(p, state);
  }
  const StepCount count{state.step += micro_batch == 0, fresh};
  detail::StepKeys keys(seed_, state.step, static_cast<std::uint64_t>(2 * index_of(at)),
                        states_.stochastic);
  keys.of_micro_batch(micro_batch);
  at::Tensor values = p, grad = p.grad();
  if (holder != nullptr)
    if (auto copies = holder->copies(p); copies.first.defined())
      std::tie(values, grad) = std::move(copies);
  if constexpr (kFolds<R>)
    detail::step_values<R>(values, grad, state,
                           R::factors(options, count).folded(micro_batch == 0, last), keys,
                           states_.maximize);
  else if constexpr (ElementwiseRule<R>)
    detail::step_values<R>(values, grad, state, R::factors(options, count), keys, states_.maximize);
  else
    R::step(values, grad, state, options, count, keys, states_.maximize);
  if (!values.is_same(p)) p.copy_(values, /*non_blocking=*/true);
  if (holder != nullptr)
    state.for_each_buffer([&](const at::Tensor& buffer) { holder->done_with(buffer); });
}

/// Parameters are stepped in the order of the step before: by step() in that of the groups, in
/// backward in that in which gradients are complete.
template <UpdateRule R, class M, class V, class W>
void Optimizer<R, M, V, W>::read_ahead(const at::Tensor& p, State& state) {
  void* const key = p.unsafeGetTensorImpl();
  if (State* before = detail::find_state<State>(state_, last_)) before->next = key;
  last_ = key;
  if (State* next = detail::find_state<State>(state_, state.next))
    next->for_each_buffer([&](const at::Tensor& buffer) { states_.offload->will_need(buffer); });
  state.for_each_buffer([&](const at::Tensor& buffer) { states_.offload->need(buffer); });
}

template <UpdateRule R, class M, class V, class W>
void Optimizer<R, M, V, W>::start_from(std::vector<RoundedWeight> rounded) {
  if constexpr (kKeepsWeights) {
    const c10::NoGradGuard no_grad;
    const std::lock_guard<std::mutex> lock(*mutex_);
    for_each_parameter([&](const at::Tensor& p, const GroupPlace& at) {
      for (RoundedWeight& one : rounded) {
        if (!one.rest.defined() || !one.weight.is_same(p)) continue;
        const bool counts = one.is_as_it_was() && p.requires_grad();
        const at::Tensor rest = std::exchange(one.rest, {});
        if (!counts) continue;
        State& state = state_for(p);
        state.place = at;
        state.template make<R>(p, options_of(at.group), states_.min_packed_elements, state.device);
        detail::start_master<R>(p, rest, state);
      }
    });
  }
}

template <UpdateRule R, class M, class V, class W>
void Optimizer<R, M, V, W>::load(::torch::serialize::InputArchive& archive) {
  detail::LoadedStates<R, State> loaded(archive, param_groups_, states_.min_packed_elements,
                                        /*on_host=*/states_.offload != nullptr);
  for (std::size_t g = 0; g < param_groups_.size(); ++g) {  // what may throw
    static_cast<void>(options_of(g));
    for (auto& state : loaded.groups[g].states)
      if (states_.offload && state != nullptr)
        state->for_each_buffer([&](at::Tensor& buffer) { buffer = states_.offload->hold(buffer); });
  }
  seed_ = loaded.seed;
  for (std::size_t g = 0; g < param_groups_.size(); ++g) {
    options_of(g) = static_cast<const Options&>(*loaded.groups[g].options);
    for (std::size_t i = 0; i < param_groups_[g].params().size(); ++i) {
      void* key = param_groups_[g].params()[i].unsafeGetTensorImpl();
      auto& state = loaded.groups[g].states[i];
      if (state == nullptr)
        state_.erase(key);
      else
        state_[key] = std::move(state);
    }
  }
}

}  // namespace optim
}  // namespace fourfold::inline v0

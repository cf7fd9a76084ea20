// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Python's torch.amp.GradScaler, one to one, for any torch::optim::Optimizer. fp16 gradients below
/// 6e-8 are zero: the loss is multiplied by a scale before backward, the gradients are divided by it
/// before the step, and the scale is found by trying: it grows while gradients are finite, and falls
/// when one was not, whose step is left out.
///
///   fourfold::GradScaler scaler;
///   scaler.scale(loss).backward();
///   scaler.unscale_(optimizer);              // only if gradients are read or clipped in between
///   scaler.step(optimizer);                  // optimizer.step(), or nothing: states as they were
///   scaler.update();                         // once an iteration, after the steps of all optimizers
///
/// The scale (fp32) and its count live on the device of the first tensor that was scaled, and a
/// skipped step is what waits for that device, as in Python. On a CPU and on CUDA.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_amp_update_scale.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fourfold/torch/archive.hpp>

#include <torch/optim/optimizer.h>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// Defaults are Python's.
struct GradScalerOptions {
  double init_scale = 65536;    ///< the first scale; above 0, in fp32's range
  double growth_factor = 2;     ///< on the scale, after growth_interval finite iterations; above 1
  double backoff_factor = 0.5;  ///< on the scale, after one that was not finite; above 0, below 1
  std::int64_t growth_interval = 2000;  ///< iterations; 1 or more
  bool enabled = true;  ///< false: step() is optimizer.step(), all else does nothing
};

class GradScaler {
 public:
  using Optimizer = ::torch::optim::Optimizer;

  /// What a checkpoint holds. To be taken after update().
  struct State {
    double scale = 0, growth_factor = 0, backoff_factor = 0;
    std::int64_t growth_interval = 0;
    std::int64_t growth_tracker = 0;  ///< finite iterations since the scale last changed
    friend bool operator==(const State&, const State&) = default;
  };

  explicit GradScaler(const GradScalerOptions& options = {}) : options_(options) {
    if (!options.enabled) return;
    check_scale(options.init_scale, "init_scale");
    TORCH_CHECK(options.growth_factor > 1 && std::isfinite(options.growth_factor),
                "GradScaler: growth_factor is ", options.growth_factor,
                "; give what the scale grows by, above 1");
    TORCH_CHECK(options.backoff_factor > 0 && options.backoff_factor < 1,
                "GradScaler: backoff_factor is ", options.backoff_factor,
                "; give what the scale falls by, above 0 and below 1");
    check_interval(options.growth_interval);
  }
  GradScaler(GradScaler&&) = default;  // no copies: the scale is a tensor, and they would share it
  GradScaler& operator=(GradScaler&&) = default;

  /// `outputs` times the scale, on their device.
  [[nodiscard]] at::Tensor scale(const at::Tensor& outputs) {
    if (!is_enabled()) return outputs;
    TORCH_CHECK(outputs.defined(), "GradScaler::scale got an undefined tensor; give it the loss");
    if (!scale_.defined()) {
      const auto on = at::TensorOptions().device(outputs.device());
      scale_ = at::full({}, options_.init_scale, on.dtype(at::kFloat));
      growth_tracker_ = at::full({}, init_growth_tracker_, on.dtype(at::kInt));
    }
    return outputs.mul(scale_.to(outputs.device(), at::kFloat, /*non_blocking=*/true));
  }
  [[nodiscard]] std::vector<at::Tensor> scale(at::TensorList outputs) {
    std::vector<at::Tensor> scaled;
    scaled.reserve(outputs.size());
    for (const at::Tensor& output : outputs) scaled.push_back(scale(output));
    return scaled;
  }

  /// Divides the gradients of `optimizer` by the scale, in place, and notes whether all are finite.
  /// Once between two update(); step() does it where you have not. Sparse gradients by their
  /// values. Errors, gradients as they were: fp16 gradients (their parameters are to be fp32, under
  /// autocast); a second call; after step(); before scale().
  void unscale_(Optimizer& optimizer);

  /// optimizer.step(), if all its gradients are finite, and then what it gave; otherwise nothing: no
  /// parameter and no state is touched, and the tensor is undefined. `closure` only where disabled.
  /// Errors: a second call before update(); no parameter with a gradient; before scale().
  at::Tensor step(Optimizer& optimizer, Optimizer::LossClosure closure = nullptr);

  /// For whoever unscales and steps `optimizer` itself, as GradientRelease does: what step() would
  /// have found, an fp32 scalar, 0 where all gradients were finite. Error: a second time, or after
  /// unscale_() or step(), before update().
  void record(Optimizer& optimizer, const at::Tensor& found_inf) {
    if (!is_enabled()) return;
    check_scaled("record");
    OfOptimizer& state = optimizers_[&optimizer];
    TORCH_CHECK(state.stage == Stage::kReady,
                "GradScaler::record: the gradients of this optimizer have been checked since the "
                "last update(); call update() at the end of the iteration");
    state.found_inf = {found_inf};
    state.stage = Stage::kStepped;
  }

  /// The next iteration's scale: times backoff_factor if any optimizer's gradients were not finite,
  /// times growth_factor if they have been for growth_interval iterations (and the product is in
  /// fp32's range). Error: no gradients were checked since the last one.
  void update();
  /// Sets the scale. The count of finite iterations stays.
  void update(double new_scale);
  /// Likewise, from one floating value, which is copied. Waits for its device.
  void update(const at::Tensor& new_scale);

  /// The scale now; 1 where disabled. Waits for the device.
  [[nodiscard]] double get_scale() const {
    if (!is_enabled()) return 1;
    return scale_.defined() ? scale_.item<double>() : options_.init_scale;
  }
  [[nodiscard]] bool is_enabled() const { return options_.enabled; }
  [[nodiscard]] double get_growth_factor() const { return options_.growth_factor; }
  [[nodiscard]] double get_backoff_factor() const { return options_.backoff_factor; }
  [[nodiscard]] std::int64_t get_growth_interval() const { return options_.growth_interval; }
  /// 1 holds the scale, here and below.
  void set_growth_factor(double factor) {
    check_growth(factor);
    options_.growth_factor = factor;
  }
  void set_backoff_factor(double factor) {
    check_backoff(factor);
    options_.backoff_factor = factor;
  }
  void set_growth_interval(std::int64_t interval) {
    check_interval(interval);
    options_.growth_interval = interval;
  }

  /// Nothing where disabled.
  [[nodiscard]] std::optional<State> state_dict() const {
    if (!is_enabled()) return std::nullopt;
    return State{.scale = get_scale(),
                 .growth_factor = options_.growth_factor,
                 .backoff_factor = options_.backoff_factor,
                 .growth_interval = options_.growth_interval,
                 .growth_tracker = growth_tracker_.defined() ? growth_tracker_.item<std::int64_t>()
                                                             : init_growth_tracker_};
  }
  /// Where disabled, nothing happens. Errors, nothing changed: an empty one (of a disabled scaler),
  /// numbers out of range.
  void load_state_dict(const std::optional<State>& state);

  /// Format, version 1: fourfold_grad_scaler (int, the version), enabled, and if so what State
  /// holds, by its names. torch::save and torch::load work too.
  void save(::torch::serialize::OutputArchive& archive) const;
  void load(::torch::serialize::InputArchive& archive);

 private:
  enum class Stage : std::int8_t { kReady, kUnscaled, kStepped };
  struct OfOptimizer {
    Stage stage = Stage::kReady;
    std::vector<at::Tensor> found_inf;  ///< a device: fp32, 0 where all its gradients are finite
  };
  static constexpr std::int64_t kFormatVersion = 1;

  static void check_scale(double scale, const char* what) {
    const auto held = static_cast<float>(scale);
    TORCH_CHECK(held > 0 && std::isfinite(held), "GradScaler: ", what, " is ", scale,
                "; give a scale above 0 that fp32 can hold");
  }
  static void check_growth(double factor) {
    TORCH_CHECK(factor >= 1 && std::isfinite(factor), "GradScaler: growth_factor is ", factor,
                "; give what the scale grows by, 1 or more");
  }
  static void check_backoff(double factor) {
    TORCH_CHECK(factor > 0 && factor <= 1, "GradScaler: backoff_factor is ", factor,
                "; give what the scale falls by, above 0, at most 1");
  }
  static void check_interval(std::int64_t interval) {
    // LibTorch's kernel takes it as an int.
    TORCH_CHECK(interval >= 1 && interval <= std::int64_t{1} << 30,
                "GradScaler: growth_interval is ", interval,
                "; give a number of iterations, 1 or more (and at most 2^30)");
  }
  void check_scaled(const char* caller) const {
    TORCH_CHECK(scale_.defined(), "GradScaler::", caller,
                " was called before scale(): there is no scale yet; call backward on scale(loss) "
                "first");
  }
  void end_iteration() { optimizers_.clear(); }

  GradScalerOptions options_;
  std::int64_t init_growth_tracker_ = 0;
  at::Tensor scale_, growth_tracker_;  ///< fp32 and int32 scalars; undefined before scale()
  std::map<const Optimizer*, OfOptimizer> optimizers_;
};

inline void GradScaler::unscale_(Optimizer& optimizer) {
  if (!is_enabled()) return;
  check_scaled("unscale_");
  OfOptimizer& state = optimizers_[&optimizer];
  TORCH_CHECK(
      state.stage != Stage::kUnscaled,
      "GradScaler::unscale_ has been called for this optimizer since the last update(), and "
      "its gradients are divided by the scale already; call update() at the end of the "
      "iteration");
  TORCH_CHECK(state.stage != Stage::kStepped,
              "GradScaler::unscale_ was called after step() of this optimizer; call it before "
              "step(), or not at all");
  const c10::NoGradGuard no_grad;
  std::map<std::pair<std::string, c10::ScalarType>, std::vector<at::Tensor>> by_kind;
  for (auto& group : optimizer.param_groups())
    for (const at::Tensor& parameter : group.params()) {
      const at::Tensor& gradient = parameter.grad();
      if (!gradient.defined()) continue;
      TORCH_CHECK(gradient.scalar_type() != at::kHalf, "GradScaler: a gradient of sizes ",
                  gradient.sizes(),
                  " is fp16, and unscaled in fp16 it would lose what the scale kept; hold the "
                  "parameters in fp32 and compute in fp16 under autocast");
      TORCH_CHECK(gradient.is_floating_point(), "GradScaler: a gradient of sizes ",
                  gradient.sizes(), " is ", gradient.scalar_type(),
                  "; gradients of real floating types can be unscaled");
      const at::Tensor values = gradient.is_sparse() ? gradient._values() : gradient;
      by_kind[{values.device().str(), values.scalar_type()}].push_back(values);
    }
  // The reciprocal in double: fp32 division is imprecise under some compilers' options.
  const at::Tensor inverse = scale_.to(at::kDouble).reciprocal().to(at::kFloat);
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> of_device;  // found_inf, inverse
  for (auto& [kind, gradients] : by_kind) {
    auto& [found_inf, factor] = of_device[kind.first];
    if (!found_inf.defined()) {
      const c10::Device device = gradients.front().device();
      found_inf = at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device));
      factor = inverse.to(device, at::kFloat, /*non_blocking=*/true);
    }
    at::_amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, factor);
  }
  for (auto& [device, tensors] : of_device) state.found_inf.push_back(tensors.first);
  if (!state.found_inf.empty()) state.stage = Stage::kUnscaled;
}

inline at::Tensor GradScaler::step(Optimizer& optimizer, Optimizer::LossClosure closure) {
  if (!is_enabled()) return optimizer.step(std::move(closure));
  TORCH_CHECK(closure == nullptr,
              "GradScaler::step was given a closure, and gradients that a closure makes cannot be "
              "checked before the step; call the closure yourself, on scale(loss), then step "
              "without it");
  check_scaled("step");
  OfOptimizer& state = optimizers_[&optimizer];
  TORCH_CHECK(state.stage != Stage::kStepped,
              "GradScaler::step has been called for this optimizer since the last update(); call "
              "update() at the end of the iteration");
  if (state.stage == Stage::kReady) unscale_(optimizer);
  TORCH_CHECK(!state.found_inf.empty(),
              "GradScaler::step: no parameter of this optimizer has a gradient to check for "
              "infinities; call backward on scale(loss) first");
  bool finite = true;
  for (const at::Tensor& found_inf : state.found_inf)
    finite = found_inf.item<float>() == 0 && finite;
  at::Tensor given;
  if (finite) given = optimizer.step();
  state.stage = Stage::kStepped;
  return given;
}

inline void GradScaler::update() {
  if (!is_enabled()) return;
  check_scaled("update");
  at::Tensor any;
  for (const auto& [optimizer, state] : optimizers_)
    for (const at::Tensor& found_inf : state.found_inf) {
      const at::Tensor here = found_inf.to(scale_.device(), at::kFloat, /*non_blocking=*/true);
      any = any.defined() ? any.add(here) : here;
    }
  TORCH_CHECK(any.defined(),
              "GradScaler::update: no gradients were checked for infinities since the last "
              "update(); call step() or unscale_() for each optimizer first, or give update() a "
              "scale");
  at::_amp_update_scale_(scale_, growth_tracker_, any, options_.growth_factor,
                         options_.backoff_factor, options_.growth_interval);
  end_iteration();
}

inline void GradScaler::update(double new_scale) {
  if (!is_enabled()) return;
  check_scaled("update");
  check_scale(new_scale, "new_scale");
  scale_.fill_(new_scale);
  end_iteration();
}

inline void GradScaler::update(const at::Tensor& new_scale) {
  if (!is_enabled()) return;
  check_scaled("update");
  TORCH_CHECK(new_scale.defined() && new_scale.numel() == 1 && new_scale.is_floating_point() &&
                  !new_scale.requires_grad(),
              "GradScaler::update: new_scale is ",
              new_scale.defined()
                  ? c10::str(new_scale.scalar_type(), " of sizes ", new_scale.sizes(),
                             new_scale.requires_grad() ? " with requires_grad" : "")
                  : "undefined",
              "; give a double, or one floating value with requires_grad off");
  check_scale(new_scale.item<double>(), "new_scale");
  scale_.copy_(new_scale.reshape({}));
  end_iteration();
}

inline void GradScaler::load_state_dict(const std::optional<State>& state) {
  if (!is_enabled()) return;
  TORCH_CHECK(state.has_value(),
              "GradScaler::load_state_dict got an empty state, which a disabled GradScaler gives; "
              "load what an enabled one has saved");
  check_scale(state->scale, "the scale to load");
  check_growth(state->growth_factor);
  check_backoff(state->backoff_factor);
  check_interval(state->growth_interval);
  TORCH_CHECK(state->growth_tracker >= 0 && state->growth_tracker <= std::int64_t{1} << 30,
              "GradScaler: growth_tracker is ", state->growth_tracker,
              "; it counts iterations, from 0 to growth_interval");
  options_.init_scale = state->scale;
  options_.growth_factor = state->growth_factor;
  options_.backoff_factor = state->backoff_factor;
  options_.growth_interval = state->growth_interval;
  init_growth_tracker_ = state->growth_tracker;
  if (scale_.defined()) {
    scale_.fill_(state->scale);
    growth_tracker_.fill_(state->growth_tracker);
  }
}

inline void GradScaler::save(::torch::serialize::OutputArchive& archive) const {
  archive.write("fourfold_grad_scaler", c10::IValue(kFormatVersion));
  archive.write("enabled", c10::IValue(is_enabled()));
  const std::optional<State> state = state_dict();
  if (!state) return;
  archive.write("scale", c10::IValue(state->scale));
  archive.write("growth_factor", c10::IValue(state->growth_factor));
  archive.write("backoff_factor", c10::IValue(state->backoff_factor));
  archive.write("growth_interval", c10::IValue(state->growth_interval));
  archive.write("growth_tracker", c10::IValue(state->growth_tracker));
}

inline void GradScaler::load(::torch::serialize::InputArchive& archive) {
  if (!is_enabled()) return;
  const door::ArchiveReader file(archive, "the file of a GradScaler");
  file.read_version("fourfold_grad_scaler", kFormatVersion, "the state of a GradScaler");
  if (!file.read_bool("enabled")) return load_state_dict(std::nullopt);
  load_state_dict(State{.scale = file.read_double("scale"),
                        .growth_factor = file.read_double("growth_factor"),
                        .backoff_factor = file.read_double("backoff_factor"),
                        .growth_interval = file.read_int("growth_interval"),
                        .growth_tracker = file.read_int("growth_tracker")});
}

inline ::torch::serialize::OutputArchive& operator<<(::torch::serialize::OutputArchive& archive,
                                                     const GradScaler& scaler) {
  scaler.save(archive);
  return archive;
}
inline ::torch::serialize::InputArchive& operator>>(::torch::serialize::InputArchive& archive,
                                                    GradScaler& scaler) {
  scaler.load(archive);
  return archive;
}

}  // namespace fourfold::inline v0

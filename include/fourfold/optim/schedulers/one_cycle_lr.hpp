// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The rate goes up, then down to nearly nothing, once, and momentum the other way (Smith and Topin,
/// arXiv 1708.07120; two phases as fastai has them, or the paper's three).
///   optim::OneCycleLR scheduler(optimizer, {.max_lr = 0.1, .total_steps = 1000});
#include <fourfold/optim/schedulers/detail/momentum.hpp>
#include <fourfold/optim/schedulers/scheduler.hpp>

#include <cmath>
#include <initializer_list>
#include <numbers>

namespace fourfold::inline v0 {
namespace optim {

/// One number for all parameter groups, or one for each: 0.1, or {0.1, 0.01}.
struct PerGroup {
  PerGroup(double value) : values{value} {}  // NOLINT(google-explicit-constructor)
  PerGroup(std::initializer_list<double> each) : values(each) {}
  PerGroup(std::vector<double> each)  // NOLINT(google-explicit-constructor)
      : values(std::move(each)) {}
  std::vector<double> values;
};

enum class AnnealStrategy : std::int8_t { kCos, kLinear };

/// Defaults are Python's.
struct OneCycleLROptions {
  PerGroup max_lr = 0;               ///< the highest rate; to be given
  std::int64_t total_steps = 0;      ///< steps of the cycle, or 0: epochs * steps_per_epoch
  std::int64_t epochs = 0;           ///< instead of total_steps
  std::int64_t steps_per_epoch = 0;  ///< instead of total_steps
  double pct_start = 0.3;            ///< the part of the steps that go up; 0 to 1
  AnnealStrategy anneal_strategy = AnnealStrategy::kCos;
  bool cycle_momentum = true;     ///< beta1 or momentum goes opposite to the rate
  PerGroup base_momentum = 0.85;  ///< where the rate is highest; 0 to 1
  PerGroup max_momentum = 0.95;   ///< at both ends; 0 to 1
  double div_factor = 25;         ///< the first rate is max_lr / div_factor
  double final_div_factor = 1e4;  ///< the last is the first / final_div_factor
  bool three_phase = false;       ///< up, down to the first rate, down to the last
  /// Sets the momentum of a group whose options are neither LibTorch's for Adam, AdamW, SGD or RMSprop
  /// nor this library's.
  std::function<void(::torch::optim::OptimizerOptions&, double)> set_momentum = nullptr;
};

/// Whatever the rate was before, max_lr decides. A step beyond total_steps is an error.
class OneCycleLR final : public Scheduler {
 public:
  OneCycleLR(::torch::optim::Optimizer& optimizer, OneCycleLROptions options)
      : Scheduler(optimizer), options_(std::move(options)) {
    check_steps(options_);
    if (options_.total_steps == 0)
      options_.total_steps = options_.epochs * options_.steps_per_epoch;
    for_each_group(options_.max_lr, "max_lr");
    for_each_group(options_.base_momentum, "base_momentum");
    for_each_group(options_.max_momentum, "max_momentum");
    check(options_);
    check_momentum(options_);
    Lrs lrs = options_.max_lr.values;
    for (double& lr : lrs) lr /= options_.div_factor;
    set_initial_lrs(lrs);
    start();
  }
  [[nodiscard]] std::string name() const override { return "OneCycleLR"; }
  /// As given, with total_steps and a value for each group.
  [[nodiscard]] const OneCycleLROptions& options() const { return options_; }

 private:
  using Options = OneCycleLROptions;
  struct Phase {
    double start_step, end_step;
    bool rises, last;  ///< rises: from the first rate to the highest; last: ends at the last rate
    bool high;         ///< starts at the highest
  };

  void check_momentum(const Options& o) const {
    if (!o.cycle_momentum || o.set_momentum) return;
    for (auto& group : optimizer().param_groups())
      TORCH_CHECK(detail::visit_momentum(group.options(), [](double) {}),
                  "OneCycleLR: a group's options have neither betas nor momentum that it knows; "
                  "give set_momentum, or cycle_momentum = false");
  }
  static void check_steps(const Options& o) {
    TORCH_CHECK(o.total_steps > 0 || (o.total_steps == 0 && o.epochs > 0 && o.steps_per_epoch > 0),
                "OneCycleLR: total_steps is ", o.total_steps, ", epochs ", o.epochs,
                " and steps_per_epoch ", o.steps_per_epoch,
                "; give total_steps, or epochs and steps_per_epoch, 1 or more");
  }
  void for_each_group(PerGroup& values, const char* what) const {
    if (values.values.size() == 1) values.values.resize(groups(), values.values.front());
    TORCH_CHECK(values.values.size() == groups(), "OneCycleLR: ", what, " has ",
                values.values.size(), " values, and the optimizer has ", groups(),
                " parameter groups; give one number, or one for each group");
  }
  static void check(const Options& o) {
    TORCH_CHECK(o.pct_start >= 0 && o.pct_start <= 1, "OneCycleLR: pct_start is ", o.pct_start,
                "; give the part of the steps that go up, 0 to 1");
    for (const double lr : o.max_lr.values)
      TORCH_CHECK(lr > 0 && std::isfinite(lr), "OneCycleLR: max_lr is ", lr,
                  "; give the highest rate, above 0");
    for (const auto* momentum : {&o.base_momentum, &o.max_momentum})
      for (const double value : momentum->values)
        TORCH_CHECK(value >= 0 && value <= 1, "OneCycleLR: a momentum is ", value,
                    "; give base_momentum and max_momentum from 0 to 1");
    TORCH_CHECK(o.div_factor > 0 && std::isfinite(o.div_factor), "OneCycleLR: div_factor is ",
                o.div_factor, "; give what max_lr is divided by, above 0");
    TORCH_CHECK(o.final_div_factor > 0 && std::isfinite(o.final_div_factor),
                "OneCycleLR: final_div_factor is ", o.final_div_factor,
                "; give what the first rate is divided by, above 0");
    TORCH_CHECK(rounded(o.pct_start * static_cast<double>(o.total_steps)) != 1.0,
                "OneCycleLR: pct_start ", o.pct_start, " of ", o.total_steps,
                " steps is one step, and a rise of one step has no length; give another pct_start, "
                "0 for none");
  }

  /// Ends of phases are fractions of steps, as in Python.
  [[nodiscard]] static Phase phase_of(const Options& o, double step) {
    const auto total = static_cast<double>(o.total_steps);
    const double up = rounded(o.pct_start * total) - 1;
    if (step <= up)
      return {.start_step = 0, .end_step = up, .rises = true, .last = false, .high = false};
    const double down = rounded(2 * o.pct_start * total) - 2;
    if (o.three_phase && step <= down)
      return {.start_step = up, .end_step = down, .rises = false, .last = false, .high = true};
    return {.start_step = o.three_phase ? down : up,
            .end_step = total - 1,
            .rises = false,
            .last = true,
            .high = !o.three_phase};
  }
  [[nodiscard]] double anneal(double from, double to, double pct) const {
    if (options_.anneal_strategy == AnnealStrategy::kLinear)
      return rounded((to - from) * pct) + from;
    return to + rounded((from - to) / 2.0 * (std::cos(std::numbers::pi * pct) + 1));
  }
  Lrs next(std::int64_t epoch, const Lrs&) override {
    TORCH_CHECK(epoch <= options_.total_steps, "OneCycleLR was stepped ", epoch,
                " times, and its total_steps is ", options_.total_steps,
                "; give as many as the training has");
    const auto step = static_cast<double>(epoch);
    const Phase phase = phase_of(options_, step);
    TORCH_CHECK(phase.end_step != phase.start_step, "OneCycleLR: pct_start ", options_.pct_start,
                " of ", options_.total_steps, " steps leaves none to fall in at step ", epoch,
                "; give a smaller pct_start");
    const double pct = (step - phase.start_step) / (phase.end_step - phase.start_step);
    Lrs lrs(groups());
    for (std::size_t g = 0; g < lrs.size(); ++g) {
      const double highest = options_.max_lr.values[g], lowest = highest / options_.div_factor;
      const double least = lowest / options_.final_div_factor;
      lrs[g] = anneal(phase.high ? highest : lowest,
                      phase.rises  ? highest
                      : phase.last ? least
                                   : lowest,
                      pct);
    }
    if (options_.cycle_momentum)
      for (std::size_t g = 0; g < lrs.size(); ++g) {
        const double base = options_.base_momentum.values[g], max = options_.max_momentum.values[g];
        const double now = anneal(phase.high ? base : max, phase.rises ? base : max, pct);
        auto& options = optimizer().param_groups()[g].options();
        if (options_.set_momentum)
          options_.set_momentum(options, now);
        else
          detail::visit_momentum(options, [&](double& momentum) { momentum = now; });
      }
    return lrs;
  }
  void write_options(::torch::serialize::OutputArchive& archive) const override {
    archive.write("max_lr", c10::IValue(options_.max_lr.values));
    archive.write("total_steps", c10::IValue(options_.total_steps));
    archive.write("pct_start", c10::IValue(options_.pct_start));
    archive.write("anneal_linear",
                  c10::IValue(options_.anneal_strategy == AnnealStrategy::kLinear));
    archive.write("cycle_momentum", c10::IValue(options_.cycle_momentum));
    archive.write("base_momentum", c10::IValue(options_.base_momentum.values));
    archive.write("max_momentum", c10::IValue(options_.max_momentum.values));
    archive.write("div_factor", c10::IValue(options_.div_factor));
    archive.write("final_div_factor", c10::IValue(options_.final_div_factor));
    archive.write("three_phase", c10::IValue(options_.three_phase));
  }
  std::function<void()> read_options(const door::ArchiveReader& file) override {
    Options read{.max_lr = read_per_group(file, "max_lr"),
                 .total_steps = file.read_int("total_steps"),
                 .pct_start = file.read_double("pct_start"),
                 .anneal_strategy = file.read_bool("anneal_linear") ? AnnealStrategy::kLinear
                                                                    : AnnealStrategy::kCos,
                 .cycle_momentum = file.read_bool("cycle_momentum"),
                 .base_momentum = read_per_group(file, "base_momentum"),
                 .max_momentum = read_per_group(file, "max_momentum"),
                 .div_factor = file.read_double("div_factor"),
                 .final_div_factor = file.read_double("final_div_factor"),
                 .three_phase = file.read_bool("three_phase"),
                 .set_momentum = options_.set_momentum};
    check_steps(read);
    check(read);
    check_momentum(read);
    return [this, read = std::move(read)] { options_ = read; };
  }

  Options options_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Warm up, hold, cool down (MiniCPM, arXiv 2404.06395; Haegele et al., arXiv 2405.18392): a run is
/// prolonged by holding longer, and ended at any time by the cool-down.
///   optim::WarmupStableDecayLR scheduler(optimizer, {.num_warmup_steps = 100,
///       .num_stable_steps = 800, .num_decay_steps = 100,
///       .decay_type = optim::WarmupStableDecayShape::kOneMinusSqrt});
#include <fourfold/optim/schedulers/scheduler.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace fourfold::inline v0 {
namespace optim {

/// How a factor goes between 0 and 1, x being the part of the way: x, half a cosine, or a square
/// root: up by 1 - sqrt(1 - x), down by 1 - sqrt(x).
enum class WarmupStableDecayShape : std::int8_t { kLinear, kCosine, kOneMinusSqrt };

/// Names and defaults are those of get_wsd_schedule in Hugging Face's transformers; torch has none.
struct WarmupStableDecayLROptions {
  std::int64_t num_warmup_steps = 0;  ///< epochs from min_lr_ratio to 1; 0 or more
  std::int64_t num_stable_steps = 0;  ///< epochs at 1; 0 or more
  std::int64_t num_decay_steps = 0;   ///< epochs from 1 to min_lr_ratio; 0 or more
  WarmupStableDecayShape warmup_type = WarmupStableDecayShape::kLinear;
  WarmupStableDecayShape decay_type = WarmupStableDecayShape::kCosine;
  double min_lr_ratio = 0;  ///< the least factor, at the start and from the end on; 0 to 1
};

/// lr(e) = base * factor(e), whatever the rate was before.
class WarmupStableDecayLR final : public Scheduler {
 public:
  WarmupStableDecayLR(::torch::optim::Optimizer& optimizer,
                      const WarmupStableDecayLROptions& options)
      : Scheduler(optimizer), options_(options) {
    check(options_);
    start();
  }
  [[nodiscard]] std::string name() const override { return "WarmupStableDecayLR"; }
  [[nodiscard]] const WarmupStableDecayLROptions& options() const { return options_; }

 private:
  using Shape = WarmupStableDecayShape;
  using Options = WarmupStableDecayLROptions;

  static void check(const Options& o) {
    const auto steps = [](const char* which, std::int64_t n) {
      TORCH_CHECK(n >= 0, "WarmupStableDecayLR: ", which, " is ", n,
                  "; give a number of epochs, 0 or more");
    };
    steps("num_warmup_steps", o.num_warmup_steps);
    steps("num_stable_steps", o.num_stable_steps);
    steps("num_decay_steps", o.num_decay_steps);
    TORCH_CHECK(
        o.num_warmup_steps + o.num_stable_steps + o.num_decay_steps > 0,
        "WarmupStableDecayLR: all three numbers of steps are 0; give the epochs to warm up, "
        "to hold and to cool down");
    TORCH_CHECK(o.min_lr_ratio >= 0 && o.min_lr_ratio <= 1, "WarmupStableDecayLR: min_lr_ratio is ",
                o.min_lr_ratio, "; give a factor from 0 to 1");
  }
  [[nodiscard]] double between(double factor) const {
    const double least = options_.min_lr_ratio;
    return std::max(0.0, rounded(factor * (1.0 - least)) + least);
  }
  [[nodiscard]] double factor(std::int64_t epoch) const {
    const Options& o = options_;
    const auto part = [](std::int64_t done, std::int64_t all) {
      return static_cast<double>(done) / static_cast<double>(all);
    };
    if (epoch < o.num_warmup_steps) {
      const double x = part(epoch, o.num_warmup_steps);
      switch (o.warmup_type) {
        case Shape::kLinear: return between(x);
        case Shape::kCosine: return between(0.5 * (1.0 - std::cos(std::numbers::pi * x)));
        case Shape::kOneMinusSqrt: return between(1.0 - std::sqrt(1.0 - x));
      }
    }
    const std::int64_t held = o.num_warmup_steps + o.num_stable_steps;
    if (epoch < held) return 1.0;
    if (epoch >= held + o.num_decay_steps) return o.min_lr_ratio;
    const double x = part(epoch - held, o.num_decay_steps);
    switch (o.decay_type) {
      case Shape::kLinear: return between(1.0 - x);
      case Shape::kCosine: return between(0.5 * (1.0 + std::cos(std::numbers::pi * x)));
      case Shape::kOneMinusSqrt: return between(1.0 - std::sqrt(x));
    }
    TORCH_INTERNAL_ASSERT(false, "a shape beyond the enumeration");
  }
  Lrs next(std::int64_t epoch, const Lrs&) override {
    Lrs lrs = base_lrs();
    const double now = factor(epoch);
    for (double& lr : lrs) lr *= now;
    return lrs;
  }
  void write_options(::torch::serialize::OutputArchive& archive) const override {
    archive.write("num_warmup_steps", c10::IValue(options_.num_warmup_steps));
    archive.write("num_stable_steps", c10::IValue(options_.num_stable_steps));
    archive.write("num_decay_steps", c10::IValue(options_.num_decay_steps));
    archive.write("warmup_type", c10::IValue(static_cast<std::int64_t>(options_.warmup_type)));
    archive.write("decay_type", c10::IValue(static_cast<std::int64_t>(options_.decay_type)));
    archive.write("min_lr_ratio", c10::IValue(options_.min_lr_ratio));
  }
  std::function<void()> read_options(const door::ArchiveReader& file) override {
    const auto shape = [&](const char* key) {
      const std::int64_t value = file.read_int(key);
      TORCH_CHECK(value >= 0 && value <= static_cast<std::int64_t>(Shape::kOneMinusSqrt), "'", key,
                  "' in the file of a scheduler is ", value,
                  ", and shapes are 0 to 2: the file is damaged; save it again");
      return static_cast<Shape>(value);
    };
    const Options read{.num_warmup_steps = file.read_int("num_warmup_steps"),
                       .num_stable_steps = file.read_int("num_stable_steps"),
                       .num_decay_steps = file.read_int("num_decay_steps"),
                       .warmup_type = shape("warmup_type"),
                       .decay_type = shape("decay_type"),
                       .min_lr_ratio = file.read_double("min_lr_ratio")};
    check(read);
    return [this, read] { options_ = read; };
  }

  Options options_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

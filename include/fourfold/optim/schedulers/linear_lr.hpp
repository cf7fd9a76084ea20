// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A factor on the rate that goes in equal steps from start_factor to end_factor: linear warm-up.
///   optim::LinearLR scheduler(optimizer, {.start_factor = 0.01, .total_iters = 500});
#include <fourfold/optim/schedulers/scheduler.hpp>

namespace fourfold::inline v0 {
namespace optim {

/// Defaults are Python's.
struct LinearLROptions {
  double start_factor = 1.0 / 3;  ///< at epoch 0; above 0, at most 1
  double end_factor = 1.0;        ///< from epoch total_iters on; 0 to 1
  std::int64_t total_iters = 5;   ///< epochs; 1 or more
};

/// lr(e) = base * (start + (end - start) * min(e, total) / total), computed from lr(e - 1).
class LinearLR final : public Scheduler {
 public:
  explicit LinearLR(::torch::optim::Optimizer& optimizer, const LinearLROptions& options = {})
      : Scheduler(optimizer), options_(options) {
    check(options_);
    start();
  }
  [[nodiscard]] std::string name() const override { return "LinearLR"; }
  [[nodiscard]] const LinearLROptions& options() const { return options_; }

 private:
  static void check(const LinearLROptions& o) {
    TORCH_CHECK(o.start_factor > 0 && o.start_factor <= 1, "LinearLR: start_factor is ",
                o.start_factor, "; give a factor above 0, at most 1");
    TORCH_CHECK(o.end_factor >= 0 && o.end_factor <= 1, "LinearLR: end_factor is ", o.end_factor,
                "; give a factor from 0 to 1");
    TORCH_CHECK(o.total_iters >= 1, "LinearLR: total_iters is ", o.total_iters,
                "; give a number of epochs, 1 or more");
  }
  Lrs next(std::int64_t epoch, const Lrs& current) override {
    if (epoch > options_.total_iters) return current;
    const double start = options_.start_factor, rise = options_.end_factor - start;
    const double factor =
        epoch == 0 ? start
                   : 1.0 + rise / (rounded(static_cast<double>(options_.total_iters) * start) +
                                   rounded(static_cast<double>(epoch - 1) * rise));
    Lrs lrs = current;
    for (double& lr : lrs) lr *= factor;
    return lrs;
  }
  Lrs restarted(const Lrs&) override {
    Lrs lrs = base_lrs();
    for (double& lr : lrs) lr *= options_.start_factor;
    return lrs;
  }
  void write_options(::torch::serialize::OutputArchive& archive) const override {
    archive.write("start_factor", c10::IValue(options_.start_factor));
    archive.write("end_factor", c10::IValue(options_.end_factor));
    archive.write("total_iters", c10::IValue(options_.total_iters));
  }
  std::function<void()> read_options(const door::ArchiveReader& file) override {
    const LinearLROptions read{.start_factor = file.read_double("start_factor"),
                               .end_factor = file.read_double("end_factor"),
                               .total_iters = file.read_int("total_iters")};
    check(read);
    return [this, read] { options_ = read; };
  }

  LinearLROptions options_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The rate falls to zero along a polynomial.
///   optim::PolynomialLR scheduler(optimizer, {.total_iters = 1000, .power = 2});
#include <fourfold/optim/schedulers/scheduler.hpp>

#include <cmath>

namespace fourfold::inline v0 {
namespace optim {

/// Defaults are Python's.
struct PolynomialLROptions {
  std::int64_t total_iters = 5;  ///< epochs until zero; 1 or more
  double power = 1.0;            ///< 0 or more
};

/// lr(e) = base * (1 - e / total) ^ power, computed from lr(e - 1); from total on it stays.
class PolynomialLR final : public Scheduler {
 public:
  explicit PolynomialLR(::torch::optim::Optimizer& optimizer,
                        const PolynomialLROptions& options = {})
      : Scheduler(optimizer), options_(options) {
    check(options_);
    start();
  }
  [[nodiscard]] std::string name() const override { return "PolynomialLR"; }
  [[nodiscard]] const PolynomialLROptions& options() const { return options_; }

 private:
  static void check(const PolynomialLROptions& o) {
    TORCH_CHECK(o.total_iters >= 1, "PolynomialLR: total_iters is ", o.total_iters,
                "; give a number of epochs, 1 or more");
    TORCH_CHECK(o.power >= 0 && std::isfinite(o.power), "PolynomialLR: power is ", o.power,
                "; give an exponent, 0 or more");
  }
  Lrs first(const Lrs& current) override { return current; }
  Lrs next(std::int64_t epoch, const Lrs& current) override {
    if (epoch > options_.total_iters) return current;
    const auto left = [&](std::int64_t e) {
      return 1.0 - static_cast<double>(e) / static_cast<double>(options_.total_iters);
    };
    const double factor = std::pow(left(epoch) / left(epoch - 1), options_.power);
    Lrs lrs = current;
    for (double& lr : lrs) lr *= factor;
    return lrs;
  }
  Lrs restarted(const Lrs&) override { return base_lrs(); }
  void write_options(::torch::serialize::OutputArchive& archive) const override {
    archive.write("total_iters", c10::IValue(options_.total_iters));
    archive.write("power", c10::IValue(options_.power));
  }
  std::function<void()> read_options(const door::ArchiveReader& file) override {
    const PolynomialLROptions read{.total_iters = file.read_int("total_iters"),
                                   .power = file.read_double("power")};
    check(read);
    return [this, read] { options_ = read; };
  }

  PolynomialLROptions options_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The rate falls from its base to eta_min along half a cosine (Loshchilov and Hutter, arXiv
/// 1608.03983, without restarts).
///   optim::CosineAnnealingLR scheduler(optimizer, {.T_max = 1000, .eta_min = 1e-5});
#include <fourfold/optim/schedulers/scheduler.hpp>

#include <cmath>
#include <numbers>

namespace fourfold::inline v0 {
namespace optim {

struct CosineAnnealingLROptions {
  std::int64_t T_max = 0;  ///< epochs from the base to eta_min; 1 or more, to be given
  double eta_min = 0;      ///< the least rate; 0 or more
};

/// lr(e) = eta_min + (base - eta_min) * (1 + cos(pi e / T_max)) / 2, computed from lr(e - 1). Past
/// T_max it rises again, and is back at its base after 2 T_max.
class CosineAnnealingLR final : public Scheduler {
 public:
  CosineAnnealingLR(::torch::optim::Optimizer& optimizer, const CosineAnnealingLROptions& options)
      : Scheduler(optimizer), options_(options) {
    check(options_);
    start();
  }
  [[nodiscard]] std::string name() const override { return "CosineAnnealingLR"; }
  [[nodiscard]] const CosineAnnealingLROptions& options() const { return options_; }

 private:
  static void check(const CosineAnnealingLROptions& o) {
    TORCH_CHECK(o.T_max >= 1, "CosineAnnealingLR: T_max is ", o.T_max,
                "; give the number of epochs until the rate is least, 1 or more");
    TORCH_CHECK(o.eta_min >= 0 && std::isfinite(o.eta_min), "CosineAnnealingLR: eta_min is ",
                o.eta_min, "; give the least rate, 0 or more");
  }
  [[nodiscard]] double one_plus_cosine(std::int64_t epoch) const {
    return 1 + std::cos(std::numbers::pi * static_cast<double>(epoch) /
                        static_cast<double>(options_.T_max));
  }
  Lrs first(const Lrs& current) override { return current; }
  Lrs next(std::int64_t epoch, const Lrs& current) override {
    const std::int64_t length = options_.T_max;
    const double least = options_.eta_min;
    Lrs lrs = current;
    for (std::size_t g = 0; g < lrs.size(); ++g) {
      // One epoch before, the rate was least: no multiple of it leads up again.
      if ((epoch - 1 - length) % (2 * length) == 0)
        lrs[g] += rounded((base_lrs()[g] - least) *
                          (1 - std::cos(std::numbers::pi / static_cast<double>(length)))) /
                  2;
      else
        lrs[g] =
            rounded(one_plus_cosine(epoch) / one_plus_cosine(epoch - 1) * (lrs[g] - least)) + least;
    }
    return lrs;
  }
  Lrs restarted(const Lrs&) override {
    Lrs lrs = base_lrs();
    for (double& lr : lrs) lr = options_.eta_min + (lr - options_.eta_min);
    return lrs;
  }
  void write_options(::torch::serialize::OutputArchive& archive) const override {
    archive.write("T_max", c10::IValue(options_.T_max));
    archive.write("eta_min", c10::IValue(options_.eta_min));
  }
  std::function<void()> read_options(const door::ArchiveReader& file) override {
    const CosineAnnealingLROptions read{.T_max = file.read_int("T_max"),
                                        .eta_min = file.read_double("eta_min")};
    check(read);
    return [this, read] { options_ = read; };
  }

  CosineAnnealingLROptions options_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

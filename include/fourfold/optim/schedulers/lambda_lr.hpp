// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The base rate times a function of the epoch.
///   optim::LambdaLR scheduler(optimizer, [](std::int64_t epoch) { return std::pow(0.95, epoch); });
#include <fourfold/optim/schedulers/scheduler.hpp>

namespace fourfold::inline v0 {
namespace optim {

/// lr(e) = base * lr_lambda(e), whatever the rate was before. A file does not hold the functions:
/// build the scheduler with them, then load.
class LambdaLR final : public Scheduler {
 public:
  using Function = std::function<double(std::int64_t epoch)>;

  /// One function for all groups.
  LambdaLR(::torch::optim::Optimizer& optimizer, const Function& lr_lambda)
      : LambdaLR(optimizer, std::vector<Function>(optimizer.param_groups().size(), lr_lambda)) {}
  /// One function for each group.
  LambdaLR(::torch::optim::Optimizer& optimizer, std::vector<Function> lr_lambdas)
      : Scheduler(optimizer), lr_lambdas_(std::move(lr_lambdas)) {
    TORCH_CHECK(lr_lambdas_.size() == groups(), "LambdaLR got ", lr_lambdas_.size(),
                " functions, and the optimizer has ", groups(),
                " parameter groups; give one function, or one for each group");
    for (const Function& lr_lambda : lr_lambdas_)
      TORCH_CHECK(lr_lambda, "LambdaLR got an empty function; give one from an epoch to a factor");
    start();
  }
  [[nodiscard]] std::string name() const override { return "LambdaLR"; }

 private:
  Lrs next(std::int64_t epoch, const Lrs&) override {
    Lrs lrs = base_lrs();
    for (std::size_t g = 0; g < lrs.size(); ++g) lrs[g] *= lr_lambdas_[g](epoch);
    return lrs;
  }

  std::vector<Function> lr_lambdas_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

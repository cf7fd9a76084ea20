// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One schedule after another: warm-up, then a cosine, and so on.
///   optim::SequentialLR scheduler(optimizer,
///       {std::make_shared<optim::LinearLR>(optimizer, optim::LinearLROptions{.total_iters = 500}),
///        std::make_shared<optim::CosineAnnealingLR>(
///            optimizer, optim::CosineAnnealingLROptions{.T_max = 9500})},
///       {500});
#include <fourfold/optim/schedulers/scheduler.hpp>

#include <algorithm>

namespace fourfold::inline v0 {
namespace optim {

/// From epoch milestones[i] on, schedulers[i + 1] runs, from its own epoch 0, which starts from its
/// base and not from where the one before it ended. Step this one alone.
///
/// A part cannot be a SequentialLR itself (Python's cannot follow another part either): give all
/// parts to one. Nor can LibTorch's own schedulers be parts: they have no way back to their start.
class SequentialLR final : public Scheduler {
 public:
  /// `milestones` ascend, are 1 or more, and are one fewer than the schedulers. Of equal ones, the
  /// scheduler between them is left out.
  SequentialLR(::torch::optim::Optimizer& optimizer,
               std::vector<std::shared_ptr<Scheduler>> schedulers,
               std::vector<std::int64_t> milestones)
      : Scheduler(optimizer),
        schedulers_(std::move(schedulers)),
        milestones_(std::move(milestones)) {
    TORCH_CHECK(!schedulers_.empty(), "SequentialLR got no scheduler; give one at least");
    for (std::size_t i = 0; i < schedulers_.size(); ++i) {
      const auto& part = schedulers_[i];
      TORCH_CHECK(part != nullptr, "SequentialLR: scheduler ", i,
                  " is null; give one for each part");
      TORCH_CHECK(&part->optimizer() == &optimizer, "SequentialLR: scheduler ", i, ", a ",
                  part->name(), ", belongs to another optimizer; build it for this one");
      TORCH_CHECK(dynamic_cast<const SequentialLR*>(part.get()) == nullptr,
                  "SequentialLR: scheduler ", i,
                  " is a SequentialLR itself; give its parts and milestones to this one");
      TORCH_CHECK(
          std::find(schedulers_.begin(), schedulers_.begin() + static_cast<std::ptrdiff_t>(i),
                    part) == schedulers_.begin() + static_cast<std::ptrdiff_t>(i),
          "SequentialLR: scheduler ", i, ", a ", part->name(),
          ", is given twice; build one for each part");
    }
    check(milestones_);
    start();
  }
  [[nodiscard]] std::string name() const override { return "SequentialLR"; }
  [[nodiscard]] const std::vector<std::int64_t>& milestones() const { return milestones_; }

 private:
  void check(const std::vector<std::int64_t>& milestones) const {
    TORCH_CHECK(milestones.size() == schedulers_.size() - 1, "SequentialLR got ",
                schedulers_.size(), " schedulers and ", milestones.size(),
                " milestones; give one milestone fewer than schedulers");
    std::int64_t before = 1;
    for (const std::int64_t milestone : milestones) {
      TORCH_CHECK(milestone >= before, "SequentialLR: milestone ", milestone, " is below ", before,
                  "; give epochs in ascending order, the first 1 or more");
      before = milestone;
    }
  }
  Lrs first(const Lrs&) override {
    set_lrs(initial_lrs());  // what building the parts has set is undone
    schedulers_.front()->start();
    return get_lrs_now();
  }
  Lrs next(std::int64_t epoch, const Lrs&) override {
    const auto after = std::upper_bound(milestones_.begin(), milestones_.end(), epoch);
    Scheduler& part = *schedulers_[static_cast<std::size_t>(after - milestones_.begin())];
    if (after != milestones_.begin() && *(after - 1) == epoch)
      part.begin(&Scheduler::restarted);
    else
      part.step();
    return get_lrs_now();
  }
  void write_options(::torch::serialize::OutputArchive& archive) const override {
    archive.write("milestones", c10::IValue(milestones_));
    for (std::size_t i = 0; i < schedulers_.size(); ++i) {
      ::torch::serialize::OutputArchive part(archive.compilation_unit());
      schedulers_[i]->save(part);
      archive.write("part" + std::to_string(i), part);
    }
  }
  std::function<void()> read_options(const door::ArchiveReader& file) override {
    std::vector<std::int64_t> milestones = file.read_ints("milestones");
    check(milestones);
    std::vector<std::function<void()>> parts;
    for (std::size_t i = 0; i < schedulers_.size(); ++i) {
      ::torch::serialize::InputArchive part;
      file.read_part("part" + std::to_string(i), part);
      parts.push_back(schedulers_[i]->read(part));
    }
    return [this, milestones = std::move(milestones), parts = std::move(parts)] {
      milestones_ = milestones;
      for (const auto& set : parts) set();
    };
  }

  std::vector<std::shared_ptr<Scheduler>> schedulers_;
  std::vector<std::int64_t> milestones_;
};

}  // namespace optim
}  // namespace fourfold::inline v0

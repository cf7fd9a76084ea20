// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What the schedulers of Python's torch.optim.lr_scheduler have in common, for any optimizer of
/// LibTorch and ours; the schedules themselves are beside this file, and schedulers.hpp has all.
///
///   optim::CosineAnnealingLR scheduler(optimizer, {.T_max = 1000});   // sets epoch 0's rates
///   for (...) { ...; optimizer.step(); scheduler.step(); }            // epoch 1, 2, ...
///
/// As in Python, and unlike LibTorch's own StepLR: constructing a scheduler sets the rates of epoch
/// 0, and the n-th step() those of epoch n. An epoch is whatever lies between two calls of step(), a
/// batch as a rule. A rate comes from the group's rate one epoch before, in double and in Python's
/// order of operations, so that sequences agree to the last bit, and schedulers chain: two that step
/// by turns multiply, and a rate set by hand in between is gone on from.
///
/// A checkpoint is the optimizer's (rates, momentum) and the scheduler's. To resume, construct both
/// as at first, then load both: constructing a scheduler afterwards would overwrite loaded rates.
///
/// Yours: derive, give next() and name(), and call start() at the end of the constructor.
#include <fourfold/optim/schedulers/detail/initial_lrs.hpp>
#include <fourfold/torch/archive.hpp>

#include <torch/optim/schedulers/lr_scheduler.h>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace optim {

class Scheduler : public ::torch::optim::LRScheduler {
 public:
  using Lrs = std::vector<double>;  ///< a learning rate for each parameter group

  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// Calls of step() since the schedule began.
  [[nodiscard]] std::int64_t last_epoch() const { return step_count_; }
  /// What this scheduler set last.
  [[nodiscard]] const Lrs& get_last_lr() const { return last_lrs_; }
  /// The rates that the schedule starts from: those of the groups before the first scheduler of
  /// this optimizer that is still alive.
  [[nodiscard]] const Lrs& base_lrs() const { return base_lrs_; }
  /// "CosineAnnealingLR", as files have it.
  [[nodiscard]] virtual std::string name() const = 0;

  /// Format, version 1: fourfold_scheduler (int, the version), name, last_epoch, base_lrs, last_lrs,
  /// then the options by their names; a SequentialLR's parts lie in part0, part1, ... torch::save
  /// and torch::load work too. Rates and momentum of groups are the optimizer's to save.
  void save(::torch::serialize::OutputArchive& archive) const {
    archive.write("fourfold_scheduler", c10::IValue(kFormatVersion));
    archive.write("name", c10::IValue(name()));
    archive.write("last_epoch", c10::IValue(last_epoch()));
    archive.write("base_lrs", c10::IValue(base_lrs_));
    archive.write("last_lrs", c10::IValue(last_lrs_));
    write_options(archive);
  }
  /// Takes the place in the schedule and its options from the file. Errors, nothing changed: a newer
  /// version, another scheduler, another number of groups, a damaged file.
  void load(::torch::serialize::InputArchive& archive) { read(archive)(); }

 protected:
  explicit Scheduler(::torch::optim::Optimizer& optimizer)
      : LRScheduler(optimizer),
        optimizer_(optimizer),
        initial_lrs_(detail::initial_lrs(optimizer)),
        base_lrs_(*initial_lrs_),
        last_lrs_(base_lrs_) {
    TORCH_CHECK(!base_lrs_.empty(),
                "a scheduler was given an optimizer without parameter groups; "
                "add them before its schedulers");
  }

  /// The rates at epoch 0 of groups that have `current`: what constructing sets.
  virtual Lrs first(const Lrs& current) { return next(0, current); }
  /// The rates at `epoch` of groups that had `current` one epoch before.
  virtual Lrs next(std::int64_t epoch, const Lrs& current) = 0;
  /// The rates at epoch 0 when SequentialLR comes to this schedule.
  virtual Lrs restarted(const Lrs& current) { return next(0, current); }

  virtual void write_options(::torch::serialize::OutputArchive&) const {}
  /// Reads and checks; what it gives then changes the scheduler, and cannot fail.
  virtual std::function<void()> read_options(const door::ArchiveReader&) {
    return [] {};
  }

  /// A value for each group, from a file.
  std::vector<double> read_per_group(const door::ArchiveReader& file, const char* key) const {
    auto values = file.read_doubles(key);
    TORCH_CHECK(values.size() == groups(), "'", key, "' in the file of a scheduler is for ",
                values.size(), " parameter groups, and this optimizer has ", groups(),
                "; load it for an optimizer with the groups that it was saved with");
    return values;
  }

  /// Epoch 0: for the end of a constructor.
  void start() { begin(&Scheduler::first); }

  [[nodiscard]] ::torch::optim::Optimizer& optimizer() const { return optimizer_; }
  [[nodiscard]] std::size_t groups() const { return base_lrs_.size(); }

  /// Makes `lrs` the rates that schedules of this optimizer start from, this one and later ones.
  void set_initial_lrs(const Lrs& lrs) { *initial_lrs_ = base_lrs_ = lrs; }
  [[nodiscard]] const Lrs& initial_lrs() const { return *initial_lrs_; }

  void set_lrs(const Lrs& lrs) {
    for (std::size_t g = 0; g < lrs.size(); ++g)
      optimizer_.param_groups()[g].options().set_lr(lrs[g]);
  }
  [[nodiscard]] Lrs get_lrs_now() const { return get_current_lrs(); }

  /// A product that is rounded before it is added to: compilers contract a * b + c as they like, and
  /// Python never does.
  static double rounded(double product) {
    const volatile double kept = product;
    return kept;
  }

 private:
  friend class SequentialLR;
  static constexpr std::int64_t kFormatVersion = 1;

  void begin(Lrs (Scheduler::*rates)(const Lrs&)) {
    check_groups();
    last_lrs_ = (this->*rates)(get_current_lrs());
    set_lrs(last_lrs_);
    step_count_ = 0;
  }
  Lrs get_lrs() final {
    check_groups();
    last_lrs_ = next(last_epoch() + 1, get_current_lrs());
    return last_lrs_;
  }
  void check_groups() const {
    TORCH_CHECK(optimizer_.param_groups().size() == groups(), name(), " was built for ", groups(),
                " parameter groups, and the optimizer has ", optimizer_.param_groups().size(),
                " now; add groups before building schedulers");
  }
  std::function<void()> read(::torch::serialize::InputArchive& archive);

  ::torch::optim::Optimizer& optimizer_;
  std::shared_ptr<Lrs> initial_lrs_;
  Lrs base_lrs_, last_lrs_;
};

inline std::function<void()> Scheduler::read(::torch::serialize::InputArchive& archive) {
  const door::ArchiveReader file(archive, "the file of a scheduler");
  file.read_version("fourfold_scheduler", kFormatVersion, "the state of a fourfold scheduler");
  const std::string saved = file.read_string("name");
  TORCH_CHECK(saved == name(), "the file holds the state of a ", saved, ", and this is a ", name(),
              "; load it into a ", saved);
  const std::int64_t epoch = file.read_int("last_epoch");
  TORCH_CHECK(epoch >= 0 && epoch <= std::numeric_limits<unsigned>::max(),
              "the file of a scheduler says epoch ", epoch, ": the file is damaged; save it again");
  return [this, epoch, base = read_per_group(file, "base_lrs"),
          last = read_per_group(file, "last_lrs"), set_options = read_options(file)] {
    step_count_ = static_cast<unsigned>(epoch);
    base_lrs_ = base;
    last_lrs_ = last;
    set_options();
  };
}

inline ::torch::serialize::OutputArchive& operator<<(::torch::serialize::OutputArchive& archive,
                                                     const Scheduler& scheduler) {
  scheduler.save(archive);
  return archive;
}
inline ::torch::serialize::InputArchive& operator>>(::torch::serialize::InputArchive& archive,
                                                    Scheduler& scheduler) {
  scheduler.load(archive);
  return archive;
}

}  // namespace optim
}  // namespace fourfold::inline v0

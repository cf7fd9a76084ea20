// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Obeys a budget: records a step, plans, and corrects the plan by what it measures.
///
/// The first step of each kind runs with everything held as small as can be, and is recorded. From
/// then on the plan says how each storage is held; after every step the peak that was measured is
/// compared with the one predicted, the difference corrects what the plan may use, and it is made
/// anew where that leaves room or takes some away. A step is known by what it saves: operators in
/// their order and sizes. One that differs from its first storage on is recorded at once or has a
/// plan already; where it differs later on, the rest of it is held as small as can be, and the next
/// one is recorded. A block that no plan knows is computed again.
#include <c10/util/Exception.h>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/core/plan_options.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/plan/device.hpp>
#include <fourfold/plan/plan_report.hpp>
#include <fourfold/plan/step.hpp>
#include <fourfold/plan/step_plan.hpp>
#include <fourfold/torch/allocator.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

class Planner final : public SavedPlan {
 public:
  Planner(const PlanOptions& options, Means means) : options_(options), means_(std::move(means)) {}

  void forward_began(std::uint64_t forward) override {
    const std::lock_guard lock(mutex_);
    if (step_ == nullptr || !step_->alive()) {
      conclude();
      step_ = std::make_shared<Step>();
    }
    forwards_.push_back({forward, step_->forward_began()});
  }

  void forward_ended(std::uint64_t forward) noexcept override {
    const std::lock_guard lock(mutex_);
    std::erase_if(forwards_, [&](const Forward& one) { return one.told == forward; });
    if (step_ != nullptr) step_->forward_ended();
  }

  Choice choose(const SavedStorage& storage) override {
    const std::lock_guard lock(mutex_);
    const Forward* const forward = find(storage.forward);
    if (forward == nullptr) return {};  // the tape of an older scope
    const StorageId id = id_of(storage, forward->number);
    const Met met{id, storage.bytes, std::string(storage.producer)};
    if (met_.empty() && met_blocks_.empty()) start([&] { met_.push_back(met); });
    met_.push_back(met);
    Choice choice{.watch = step_, .item = kUnknown};
    if (recording_) {
      choice.item = step_->saving(id, storage);
      return choice;
    }
    const std::ptrdiff_t at =
        found([&] { return plan_->find(id, storage.bytes, storage.producer); });
    if (at < 0) {
      unknown_bytes_ += storage.bytes;
      return choice;
    }
    choice.item = static_cast<std::uint32_t>(at);
    known_[static_cast<std::size_t>(at)] = true;
    const Way way = plan_->way(static_cast<std::size_t>(at));
    choice.keep = way.kind == Way::Kind::kKeep;
    choice.offload = way.kind == Way::Kind::kOffload;
    choice.code = way.kind == Way::Kind::kPack;
    if (choice.code && way.rung < means_.rungs.size()) choice.pack = means_.rungs[way.rung].pack;
    return choice;
  }

  BlockChoice block_began(std::uint64_t told, std::uint64_t look,
                          const std::vector<SavedStorage>& inputs) override {
    const std::lock_guard lock(mutex_);
    Forward* const forward = find(told);
    if (forward == nullptr) return {};
    const BlockId met{forward->number, forward->blocks++, look};
    std::vector<std::pair<StorageId, SavedStorage>> storages;
    for (const SavedStorage& input : inputs)
      storages.emplace_back(id_of(input, forward->number), input);
    if (met_.empty() && met_blocks_.empty()) start([&] { met_blocks_.push_back(met); });
    met_blocks_.push_back(met);
    if (recording_) {
      step_->block_began(met, storages);
      return {};
    }
    const std::ptrdiff_t at = found([&] { return plan_->find(met); });
    if (at < 0) return {.recompute = true, .token = step_->token()};
    const BlockWay& way = plan_->block_way(static_cast<std::size_t>(at));
    if (!way.recompute) return {};
    return {.recompute = true, .reference = way.reference, .token = step_->token()};
  }
  void block_ended(std::uint64_t told) noexcept override {
    const std::lock_guard lock(mutex_);
    if (const Forward* const forward = find(told); forward != nullptr && recording_)
      step_->block_ended(forward->number);
  }

  /// What is planned, measured and predicted, of the step that ended last.
  [[nodiscard]] PlanReport report() {
    const std::lock_guard lock(mutex_);
    if (step_ != nullptr && !step_->alive()) conclude();
    PlanReport out{.budget = options_.budget, .last = last_, .notches = notches_};
    out.least = refused_;
    if (plan_ == nullptr) return out;
    out.fill(*plan_);
    return out;
  }

  [[nodiscard]] StepBytes last() {
    const std::lock_guard lock(mutex_);
    if (step_ != nullptr && !step_->alive()) conclude();
    return last_;
  }
  [[nodiscard]] PlanOptions options() const {
    const std::lock_guard lock(mutex_);
    return options_;
  }
  /// From the next step on.
  void set_budget(std::int64_t budget) {
    const std::lock_guard lock(mutex_);
    options_.budget = budget;
  }

 private:
  static constexpr std::uint32_t kUnknown = ~std::uint32_t{0};
  static constexpr std::size_t kPlans = 16;  ///< kinds of steps that are remembered

  struct Known {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // keeps the address from being used again
    StorageId id;
  };
  struct Met {
    StorageId id;
    std::int64_t bytes;
    std::string producer;
  };

  struct Forward {
    std::uint64_t told, number;  ///< its number as told, and in the step
    std::uint64_t blocks = 0;
  };

  [[nodiscard]] Forward* find(std::uint64_t told) {
    const auto found = std::find_if(forwards_.begin(), forwards_.end(),
                                    [&](const Forward& one) { return one.told == told; });
    return found != forwards_.end() ? &*found : nullptr;
  }

  /// One storage may be saved several times, first within the operator that makes it.
  StorageId id_of(const SavedStorage& saved, std::uint64_t forward) {
    const c10::Storage& storage = saved.values->storage();
    if (const Known* known = ids_.find(storage.unsafeGetStorageImpl())) return known->id;
    const StorageId id{forward, saved.operation, saved.place, saved.made};
    ids_.put(storage.unsafeGetStorageImpl(), {storage.getWeakStorageImpl(), id});
    return id;
  }

  /// The step's first storage or block, which `meet` notes: is it one that has a plan?
  template <class Meet>
  void start(const Meet& meet) {
    meet();
    const std::shared_ptr<StepPlan> known = record_next_ ? nullptr : fitting();
    met_.clear(), met_blocks_.clear();
    unknown_bytes_ = 0;
    recording_ = known == nullptr;
    if (recording_) {
      record_next_ = false;
      step_->record(means_);
    } else {
      follow(known);
    }
  }
  /// What `find` finds in the present plan, or in another one that fits; then that is followed.
  template <class Find>
  [[nodiscard]] std::ptrdiff_t found(const Find& find) {
    if (const std::ptrdiff_t at = find(); at >= 0) return at;
    const std::shared_ptr<StepPlan> other = fitting();
    if (other == nullptr) return -1;
    follow(other);
    return find();
  }

  /// A plan in which all that this step has met stands; the present one first. Where gradients are
  /// there when it begins (they are accumulated) and were not before, or the other way round, one is
  /// made of the same record.
  [[nodiscard]] std::shared_ptr<StepPlan> fitting() {
    const auto fits = [&](const std::shared_ptr<StepPlan>& plan) {
      return plan != nullptr &&
             std::all_of(met_.begin(), met_.end(),
                         [&](const Met& one) {
                           return plan->find(one.id, one.bytes, one.producer) >= 0;
                         }) &&
             std::all_of(met_blocks_.begin(), met_blocks_.end(),
                         [&](const BlockId& one) { return plan->find(one) >= 0; });
    };
    const std::int64_t gradients = step_->gradients();
    std::shared_ptr<StepPlan> other;
    std::vector<std::shared_ptr<StepPlan>> all{plan_};
    all.insert(all.end(), plans_.begin(), plans_.end());
    for (const std::shared_ptr<StepPlan>& plan : all) {
      if (!fits(plan)) continue;
      if (std::abs(plan->gradients() - gradients) <= options_.budget / 500) return plan;
      if (other == nullptr) other = plan;
    }
    if (other == nullptr) return nullptr;
    auto plan = std::make_shared<StepPlan>(other->record(), gradients, options_.most_variance);
    plan->strict = other->strict;
    keep(plan);
    return plan;
  }
  void keep(const std::shared_ptr<StepPlan>& plan) {
    if (plans_.size() >= kPlans) plans_.erase(plans_.begin());
    plans_.push_back(plan);
  }

  /// This step runs by `plan`, whose choice is for what lives now.
  void follow(const std::shared_ptr<StepPlan>& plan) {
    const std::int64_t base = step_->base();
    const std::int64_t room = options_.budget - base;
    if (plan->least() > room) {
      std::erase(plans_, plan);
      if (plan_ == plan) plan_ = nullptr;
      refused_ = base + plan->least();
      const auto mib = [](std::int64_t bytes) { return fourfold::detail::mib(bytes); };
      TORCH_CHECK(false, "fourfold: a budget of ", options_.budget, " bytes (",
                  mib(options_.budget), " MiB) cannot be met: a step of this model needs at least ",
                  base + plan->least(), " bytes (", mib(base + plan->least()), " MiB), of which ",
                  base, " (", mib(base),
                  " MiB: weights, states and what else the process holds) live before it begins; "
                  "give that much, or a smaller batch, or policies that hold less");
    }
    plan_ = plan, refused_ = 0;
    plan_->choose(room, options_.budget, notches_);
    known_.resize(plan_->record().storages.size());
    for (std::size_t i = 0; i < known_.size(); ++i) known_[i] = !plan_->expects(i);
    step_->follow(known_.size());
  }

  /// The step has ended: what does it teach?
  void conclude() {
    const std::shared_ptr<Step> step = std::move(step_);
    ids_.clear();
    if (step == nullptr || (met_.empty() && met_blocks_.empty())) return;
    met_.clear(), met_blocks_.clear();
    last_ = {.base = step->base(), .peak_after = step->peak_after()};
    last_.peak = step->peak();
    watch_device(last_.peak);
    if (recording_) return remember(step->take_record());
    last_.predicted = last_.base + plan_->predicted();
    const bool whole = std::all_of(known_.begin(), known_.end(), [](bool met) { return met; });
    plan_->learn(last_.peak - last_.base, options_.budget - last_.base, whole);
    const std::vector<StoredAs> kinds = step->kinds();
    std::vector<std::size_t> failed;
    for (std::size_t i = 0; i < kinds.size(); ++i)
      if (known_[i] && plan_->expects(i) && plan_->way(i).kind == Way::Kind::kRebuild &&
          kinds[i] != StoredAs::kRebuilt && !plan_->foreseen(i))
        failed.push_back(i);
    plan_->cannot_rebuild(failed);
    // One in a hundred may hide behind another choice: a result on the way to a rebuilt one.
    std::int64_t all = 0;
    for (const StorageRecord& storage : plan_->record().storages) all += storage.bytes;
    record_next_ = plan_->strict && unknown_bytes_ > all / 100;
  }

  void remember(StepRecord record) {
    const std::size_t known = plans_.size();
    std::erase_if(plans_, [&](const std::shared_ptr<StepPlan>& plan) {
      return plan->record().same_storages(record);
    });
    const std::int64_t gradients = record.base_gradients;
    plan_ = std::make_shared<StepPlan>(std::move(record), gradients, options_.most_variance);
    plan_->strict = plans_.size() == known;  // what was unknown before stays unknown
    keep(plan_);
  }

  /// Others use the device too: the next plan that needs less, or the one before.
  void watch_device(std::int64_t peak) {
    if (options_.high_water <= 0) return;
    DeviceMemory device{.total = options_.device_bytes};
    const std::int64_t ours = door::counters().read().all.current;
    if (options_.device_used != nullptr) {
      if (device.total <= 0) device.total = machine_memory().total;
      device.used = options_.device_used();
    } else if (device.total > 0) {
      device.used = ours;
    } else {
      device = machine_memory();
    }
    if (device.total <= 0) return;
    const double used = static_cast<double>(std::max<std::int64_t>(device.used - ours, 0) + peak) /
                        static_cast<double>(device.total);
    if (used > options_.high_water)
      notches_ = std::min(notches_ + 1, StepPlan::kCurve - 1);
    else if (used < options_.low_water && notches_ > 0)
      --notches_;
  }

  mutable std::mutex mutex_;
  PlanOptions options_;
  const Means means_;
  std::vector<std::shared_ptr<StepPlan>> plans_;
  std::shared_ptr<StepPlan> plan_;  // of the last step
  std::shared_ptr<Step> step_;
  std::vector<Forward> forwards_;
  std::vector<Met> met_;
  std::vector<BlockId> met_blocks_;
  PointerMap<Known> ids_;
  std::vector<bool> known_;
  std::int64_t unknown_bytes_ = 0;
  bool recording_ = false, record_next_ = false;
  int notches_ = 0;
  std::int64_t refused_ = 0;  // what the step that was refused last needs; 0: none was
  StepBytes last_;
};

}  // namespace fourfold::inline v0::plan

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
/// one is recorded.
#include <c10/util/Exception.h>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/core/plan_options.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/plan/plan_report.hpp>
#include <fourfold/plan/step.hpp>
#include <fourfold/plan/step_plan.hpp>

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
  Planner(const PlanOptions& options, std::vector<Rung> rungs,
          std::shared_ptr<Offloading> offload = nullptr)
      : options_(options), rungs_(std::move(rungs)), offload_(std::move(offload)) {}

  void forward_began(std::uint64_t forward) override {
    const std::lock_guard lock(mutex_);
    if (step_ == nullptr || !step_->alive()) {
      conclude();
      step_ = std::make_shared<Step>();
    }
    forwards_.emplace_back(forward, step_->forward_began());
  }

  void forward_ended(std::uint64_t forward) noexcept override {
    const std::lock_guard lock(mutex_);
    std::erase_if(forwards_, [&](const auto& one) { return one.first == forward; });
    if (step_ != nullptr) step_->forward_ended();
  }

  Choice choose(const SavedStorage& storage) override {
    const std::lock_guard lock(mutex_);
    const auto forward = std::find_if(forwards_.begin(), forwards_.end(), [&](const auto& one) {
      return one.first == storage.forward;
    });
    if (forward == forwards_.end()) return {};  // the tape of an older scope
    const StorageId id = id_of(storage, forward->second);
    if (met_.empty()) start(id, storage);
    met_.push_back({id, storage.bytes, std::string(storage.producer)});
    Choice choice{.watch = step_, .item = kUnknown};
    if (recording_) {
      choice.item = step_->saving(id, storage);
      return choice;
    }
    std::ptrdiff_t at = plan_->find(id, storage.bytes, storage.producer);
    if (at < 0) {
      if (const std::shared_ptr<StepPlan> other = fitting(); other != nullptr) {
        follow(other);
        at = plan_->find(id, storage.bytes, storage.producer);
      } else {
        unknown_bytes_ += storage.bytes;
        return choice;
      }
    }
    choice.item = static_cast<std::uint32_t>(at);
    known_[static_cast<std::size_t>(at)] = true;
    const Way way = plan_->way(static_cast<std::size_t>(at));
    choice.keep = way.kind == Way::Kind::kKeep;
    choice.offload = way.kind == Way::Kind::kOffload;
    if (way.kind == Way::Kind::kPack && way.rung < rungs_.size())
      choice.pack = rungs_[way.rung].pack;
    return choice;
  }

  /// What is planned, measured and predicted, of the step that ended last.
  [[nodiscard]] PlanReport report() {
    const std::lock_guard lock(mutex_);
    if (step_ != nullptr && !step_->alive()) conclude();
    PlanReport out{.budget = options_.budget, .last = last_, .notches = notches_};
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

  /// One storage may be saved several times, first within the operator that makes it.
  StorageId id_of(const SavedStorage& saved, std::uint64_t forward) {
    const c10::Storage& storage = saved.values->storage();
    if (const Known* known = ids_.find(storage.unsafeGetStorageImpl())) return known->id;
    const StorageId id{forward, saved.operation, saved.place, saved.made};
    ids_.put(storage.unsafeGetStorageImpl(), {storage.getWeakStorageImpl(), id});
    return id;
  }

  /// The step's first storage: is it one that has a plan?
  void start(const StorageId& id, const SavedStorage& storage) {
    met_.push_back({id, storage.bytes, std::string(storage.producer)});
    const std::shared_ptr<StepPlan> known = record_next_ ? nullptr : fitting();
    met_.clear();
    unknown_bytes_ = 0;
    recording_ = known == nullptr;
    if (recording_) {
      record_next_ = false;
      step_->record(rungs_, offload_);
    } else {
      follow(known);
    }
  }

  /// A plan in which all that this step has met stands; the present one first. Where gradients are
  /// there when it begins (they are accumulated) and were not before, or the other way round, one is
  /// made of the same record.
  [[nodiscard]] std::shared_ptr<StepPlan> fitting() {
    const auto fits = [&](const std::shared_ptr<StepPlan>& plan) {
      return plan != nullptr && std::all_of(met_.begin(), met_.end(), [&](const Met& one) {
               return plan->find(one.id, one.bytes, one.producer) >= 0;
             });
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
      const auto mib = [](std::int64_t bytes) { return fourfold::detail::mib(bytes); };
      TORCH_CHECK(false, "fourfold: a budget of ", options_.budget, " bytes (",
                  mib(options_.budget), " MiB) cannot be met: a step of this model needs at least ",
                  base + plan->least(), " bytes (", mib(base + plan->least()), " MiB), of which ",
                  base, " (", mib(base),
                  " MiB: weights, states and what else the process holds) live before it begins; "
                  "give that much, or a smaller batch, or policies that hold less");
    }
    plan_ = plan;
    plan_->choose(room, options_.budget, notches_);
    known_.assign(plan_->record().storages.size(), false);
    step_->follow(known_.size());
  }

  /// The step has ended: what does it teach?
  void conclude() {
    const std::shared_ptr<Step> step = std::move(step_);
    ids_.clear();
    if (step == nullptr || met_.empty()) return;
    met_.clear();
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
      if (known_[i] && plan_->way(i).kind == Way::Kind::kRebuild && kinds[i] != StoredAs::kRebuilt)
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

  /// Others use the device too: the next cheaper plan, or the one before.
  void watch_device(std::int64_t used) {
    if (options_.device_bytes <= 0) return;
    const auto device = static_cast<double>(options_.device_bytes);
    if (static_cast<double>(used) > options_.high_water * device)
      ++notches_;
    else if (static_cast<double>(used) < options_.low_water * device && notches_ > 0)
      --notches_;
  }

  mutable std::mutex mutex_;
  PlanOptions options_;
  const std::vector<Rung> rungs_;
  const std::shared_ptr<Offloading> offload_;  // null: nothing leaves memory
  std::vector<std::shared_ptr<StepPlan>> plans_;
  std::shared_ptr<StepPlan> plan_;  // of the last step
  std::shared_ptr<Step> step_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> forwards_;  // as told; in the step
  std::vector<Met> met_;
  PointerMap<Known> ids_;
  std::vector<bool> known_;
  std::int64_t unknown_bytes_ = 0;
  bool recording_ = false, record_next_ = false;
  int notches_ = 0;
  StepBytes last_;
};

}  // namespace fourfold::inline v0::plan

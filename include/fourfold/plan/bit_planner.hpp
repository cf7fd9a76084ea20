// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Chooses the bits of each saved storage, and chooses again every so many forwards, from what one
/// forward and its backward showed (bit_study.hpp).
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/plan/bit_assignment.hpp>
#include <fourfold/plan/bit_report.hpp>
#include <fourfold/plan/bit_study.hpp>
#include <fourfold/plan/gradient_variance.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

struct BitOptions {
  double bits = 4;             ///< on average, over the values that are chosen for: 2 to 8
  double most_variance = 0.1;  ///< added to any gradient, as a share of its own
  int every = 100;             ///< forwards from one choice to the next
  int first = 10;              ///< forwards before the first: the gradients' variance must be known
};

/// Any thread. Two forwards at once, or several before one backward, share what was chosen; a storage
/// is known by the operator that made or saves it and by its bytes. One that is not known (before the
/// first choice, or when shapes have changed) gets the most bits that are not above the average.
class BitPlanner final : public SavedPlan, public std::enable_shared_from_this<BitPlanner> {
 public:
  using Packs = std::array<PackFunction, kBits.size()>;

  BitPlanner(const BitOptions& options, const Packs& packs)
      : options_(options), packs_(packs), next_(static_cast<std::uint64_t>(options.first)) {
    while (kBits[usual_] > options.bits && usual_ + 1 < kBits.size()) ++usual_;
  }

  /// These parameters' gradients are looked at as they come in, a sample of each.
  template <class = void>
  void follow(const std::vector<at::Tensor>& parameters) {
    for (const at::Tensor& parameter : parameters) {
      if (!parameter.requires_grad() || !parameter.is_leaf() || !parameter.has_storage()) continue;
      const std::lock_guard lock(mutex_);
      by_storage_.put(parameter.storage().unsafeGetStorageImpl(), variances_.size());
      parameter.register_hook(
          [weak = weak_from_this(), number = variances_.size()](const at::Tensor& gradient) {
            if (const auto self = weak.lock()) self->add_gradient(number, gradient);
          });
      variances_.emplace_back();
    }
  }

  void forward_began(std::uint64_t forward) override {
    const std::lock_guard lock(mutex_);
    if (study_ != nullptr && study_->complete()) choose_bits();
    if (++forwards_ < next_) return;  // else anew: the last one's backward may never have run
    study_ = std::make_shared<BitStudy>();
    watch_ = std::make_shared<Watch>(weak_from_this(), ++studies_);
    studied_ = forward;
    next_ = forwards_ + static_cast<std::uint64_t>(options_.every);
  }
  void forward_ended(std::uint64_t forward) noexcept override {
    const std::lock_guard lock(mutex_);
    if (study_ != nullptr && forward == studied_) study_->forward_ended();
  }
  bool listens(std::uint64_t forward) const override {
    const std::lock_guard lock(mutex_);
    return study_ != nullptr && forward == studied_;
  }

  Choice choose(const SavedStorage& storage) override {
    // Products of two activations keep their bits; the input of a block is saved by no operator.
    const bool ours = !storage.sensitive || storage.saver.empty();
    const std::lock_guard lock(mutex_);
    Choice choice{.watch = nobody_};
    if (ours) choice.pack = packs_[level_of(storage)], choice.even_sensitive = true;
    if (study_ != nullptr && storage.forward == studied_) {
      choice.item = study_->saving(storage, ours, packs_);
      choice.watch = watch_;
    }
    return choice;
  }

  void ran(const SavingOperator& one) override {
    std::vector<std::size_t> products;
    const std::lock_guard lock(mutex_);
    if (study_ == nullptr || one.forward != studied_ || !one.result->requires_grad()) return;
    products = study_->ran(one, [&](const at::Tensor& argument) -> std::optional<std::size_t> {
      const std::size_t* const known = by_storage_.find(argument.storage().unsafeGetStorageImpl());
      return known != nullptr ? std::optional(*known) : std::nullopt;
    });
    for (const std::size_t product : products)
      one.result->register_hook(
          [weak = weak_from_this(), study = studies_, product](const at::Tensor& gradient) {
            if (const auto self = weak.lock()) self->add_product(study, product, gradient);
          });
  }

  [[nodiscard]] BitReport report() const {
    const std::lock_guard lock(mutex_);
    return report_;
  }
  std::string explain() const override {
    std::ostringstream out;
    report().summarise(out);
    return out.str();
  }

 private:
  /// Tells a study what was rounded.
  struct Watch final : StoredWatch {
    Watch(std::weak_ptr<BitPlanner> of, std::uint64_t number)
        : planner(std::move(of)), study(number) {}
    void held(std::uint32_t item, StoredAs kind, std::int64_t, std::int64_t) override {
      const auto self = planner.lock();
      if (self == nullptr || study == 0) return;
      const std::lock_guard lock(self->mutex_);
      if (self->study_ != nullptr && self->studies_ == study) self->study_->held(item, kind);
    }
    void decoding(std::uint32_t) noexcept override {}
    void decoded(std::uint32_t, const c10::Storage&) noexcept override {}
    void released(std::uint32_t) noexcept override {}
    std::weak_ptr<BitPlanner> planner;
    std::uint64_t study;
  };
  struct Chosen {
    StorageId id;
    std::int64_t bytes;
    std::size_t level;
  };

  static bool before(const StorageId& a, const StorageId& b) {
    if (a.operation != b.operation) return a.operation < b.operation;
    if (a.place != b.place) return a.place < b.place;
    return a.made < b.made;
  }
  [[nodiscard]] std::size_t level_of(const SavedStorage& storage) const {
    const StorageId id{
        .operation = storage.operation, .place = storage.place, .made = storage.made};
    auto found = std::lower_bound(
        chosen_.begin(), chosen_.end(), id,
        [](const Chosen& one, const StorageId& other) { return before(one.id, other); });
    return found != chosen_.end() && found->id == id && found->bytes == storage.bytes ? found->level
                                                                                      : usual_;
  }
  void add_gradient(std::size_t number, const at::Tensor& gradient) {
    if (!gradient.defined() || gradient.layout() != at::kStrided) return;
    const std::lock_guard lock(mutex_);
    variances_[number].add(gradient);
  }
  void add_product(std::uint64_t study, std::size_t product, const at::Tensor& gradient) {
    if (!gradient.defined() || gradient.layout() != at::kStrided) return;
    const double squares = sum_of_squares(gradient);
    const std::lock_guard lock(mutex_);
    if (study_ == nullptr || studies_ != study) return;
    if (std::isfinite(squares))
      study_->gradient(product, squares);
    else
      study_.reset(), next_ = forwards_;  // a loss scale that was too large: the next forward, then
  }
  /// Of the gradient that the product's weight gets; over the rows, where its batches are not known.
  [[nodiscard]] double own_variance(const BitStudy::Product& product) const {
    const double between = product.parameter ? variances_[*product.parameter].variance() : 0.0;
    return between > 0 ? between : study_->variance_over_rows(product);
  }

  void choose_bits() {
    const std::shared_ptr<BitStudy> study = study_;
    const auto [items, gradients] =
        study->items([&](const BitStudy::Product& one) { return own_variance(one); });
    const BitAssignment made = assign_bits(items, gradients, options_.bits, options_.most_variance);
    chosen_.clear();
    report_ = BitReport{.wanted_bits = options_.bits,
                        .most_variance = options_.most_variance,
                        .bits = made.bits,
                        .guarded = made.guarded,
                        .forward = forwards_};
    for (const double share : made.share) report_.share = std::max(report_.share, share);
    double own = 0, added = 0;
    for (std::size_t p = 0; p < study->products().size(); ++p) {
      const double variance = own_variance(study->products()[p]);
      own += variance, added += made.share[p] * variance;
    }
    report_.whole_share = own > 0 ? added / own : 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      if (items[i].values == 0) continue;
      const BitStudy::Storage& storage = study->storages()[i];
      chosen_.push_back({storage.id, storage.bytes, made.level[i]});
      BitReport::Row row{.producer = storage.producer,
                         .saver = storage.saver,
                         .sizes = storage.sizes,
                         .values = items[i].values,
                         .bits = kBits[made.level[i]]};
      for (const BitEffect& effect : items[i].effects) {
        row.share = std::max(row.share, effect.share[made.level[i]]);
        if (effect.gradient >= study->products().size()) continue;
        const double variance = own_variance(study->products()[effect.gradient]);
        for (std::size_t k = 0; k < kBits.size(); ++k)
          row.variance[k] += effect.share[k] * variance;
      }
      report_.rows.push_back(std::move(row));
    }
    std::stable_sort(chosen_.begin(), chosen_.end(),
                     [](const Chosen& a, const Chosen& b) { return before(a.id, b.id); });
    study_ = nullptr, watch_ = nullptr;
  }

  const BitOptions options_;
  const Packs packs_;
  std::size_t usual_ = 0;  ///< index of kBits, for what is not known
  const std::shared_ptr<StoredWatch> nobody_ =
      std::make_shared<Watch>(std::weak_ptr<BitPlanner>(), 0);

  mutable std::mutex mutex_;
  PointerMap<std::size_t> by_storage_;
  std::vector<GradientVariance> variances_;
  std::uint64_t forwards_ = 0, next_ = 0, studies_ = 0, studied_ = 0;
  std::shared_ptr<BitStudy> study_;  ///< null: nothing is studied just now
  std::shared_ptr<StoredWatch> watch_;
  std::vector<Chosen> chosen_;
  BitReport report_;
};

}  // namespace fourfold::inline v0::plan

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Budget<>: one number of bytes, and the library decides how each saved storage is held.
///
///   #include <fourfold/fourfold.hpp>
///   #include <fourfold/plan/budget.hpp>
///   using namespace fourfold::literals;
///
///   using Pipeline = fourfold::CompressionPipeline<fourfold::Activations<fourfold::Int4>,
///                                                  fourfold::Recompute<>, fourfold::Budget<>>;
///   auto pipeline = Pipeline(*model, {.budget = 512_MiB});
///   ...
///   std::cout << pipeline.plan();
///
/// The other policies say what may be done: what Activations<Codec> packs and Recompute computes
/// again may also be kept, or packed by a finer codec, or offloaded as it is where the pipeline has
/// Offload<>. Without Activations every choice is exact.
/// Kept is what costs most time or variance for its bytes; see plan/planner.hpp for how, and
/// plan/record.hpp for what variance means. The choices rest on times that were measured, so two
/// runs may choose differently; losses are bit-equal where all choices are exact.
///
/// The peak counts all CPU tensors of the process in forward and backward. A budget that no choice
/// can meet is refused in the second step's forward, by an error that names the least that can be
/// met. The step that is recorded holds all as small as can be, and needs a few percent more.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/plan_options.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/plan/planner.hpp>
#include <fourfold/weights/module_tensors.hpp>  // NamedTensors

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// `Finer`: codecs that may be used in place of the policy's own, the finest first.
template <StochasticCodec... Finer>
struct BudgetWith {
  static constexpr Role role = Role::kBudget;
  using Report = plan::PlanReport;

  /// A plan for a store with these options; `Packing` is the pipeline's Activations, or void;
  /// `offload` may be null.
  template <class Packing>
  [[nodiscard]] static std::shared_ptr<SavedPlan> make(const PlanOptions& options,
                                                       const NamedTensors& parameters,
                                                       std::shared_ptr<Offloading> offload) {
    check(options, options.budget);
    std::int64_t weights = 0;
    for (const auto& [name, parameter] : parameters) {
      TORCH_CHECK(parameter.is_cpu(), "fourfold::Budget: parameter '", name, "' lies on ",
                  parameter.device(),
                  ", and bytes are counted and planned on the CPU alone so far; use the policies "
                  "without a budget there");
      if (parameter.requires_grad()) weights += static_cast<std::int64_t>(parameter.nbytes());
    }
    TORCH_CHECK(weights < options.budget, "fourfold::Budget: got a budget of ", options.budget,
                " bytes, and the model's trainable parameters alone are ", weights,
                "; give more, or pack them by Weights<...>");
    std::vector<plan::Rung> rungs;
    if constexpr (!std::is_void_v<Packing>) {
      using Own = typename Packing::Format;
      ((std::is_same_v<Finer, Own> ? void() : rungs.push_back({Finer::name(), pack_with<Finer>})),
       ...);
      rungs.push_back({Own::name(), pack_with<Own>});
    }
    return std::make_shared<plan::Planner>(options, std::move(rungs), std::move(offload));
  }
  [[nodiscard]] static Report report(SavedPlan& made) {
    return static_cast<plan::Planner&>(made).report();
  }
  /// Of the step that ended last, or none where it was recorded.
  [[nodiscard]] static std::optional<std::int64_t> predicted_peak_bytes(SavedPlan& made) {
    const std::int64_t predicted = static_cast<plan::Planner&>(made).last().predicted;
    return predicted > 0 ? std::optional(predicted) : std::nullopt;
  }
  static void set_budget(SavedPlan& made, std::int64_t budget) {
    auto& planner = static_cast<plan::Planner&>(made);
    check(planner.options(), budget);
    planner.set_budget(budget);
  }

 private:
  static void check(const PlanOptions& options, std::int64_t budget) {
    TORCH_CHECK(budget > 0, "fourfold::Budget: got a budget of ", budget,
                " bytes; give the most bytes that may live at once, as in {.budget = 512_MiB}, or "
                "make the pipeline without options for no budget at all");
    TORCH_CHECK(options.most_variance >= 0, "fourfold::Budget: most_variance is ",
                options.most_variance,
                "; give the share of the gradients' own variance that rounding may add, 0 or more");
    TORCH_CHECK(options.low_water > 0 && options.low_water <= options.high_water,
                "fourfold::Budget: low_water is ", options.low_water, " and high_water ",
                options.high_water,
                "; wanted is 0 < low_water <= high_water, as shares of the "
                "device");
    const std::int64_t device =
        options.device_bytes > 0
            ? options.device_bytes
            : static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
    TORCH_CHECK(device <= 0 || budget <= device, "fourfold::Budget: got a budget of ", budget,
                " bytes, and the device has ", device,
                "; give what it can hold, less what others hold of it");
  }
};

template <StochasticCodec... Finer>
using Budget = std::conditional_t<sizeof...(Finer) == 0, BudgetWith<Int8>, BudgetWith<Finer...>>;

static_assert(Policy<Budget<>>, "Budget must stay a policy");

}  // namespace fourfold::inline v0

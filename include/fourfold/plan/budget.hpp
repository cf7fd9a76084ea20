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
/// The other policies say what may be done. What Activations<Codec> packs and Recompute computes
/// again may also be kept, or packed by a finer codec, or offloaded as it is where the pipeline has
/// Offload<>. Beside Blocks<> a block may be computed again as a whole, its inputs kept, in 8 bits or
/// offloaded, or its storages be held one by one. Without Activations every choice is exact.
/// Kept is what costs most time or variance for its bytes; see plan/planner.hpp for how, and
/// plan/record.hpp for what variance means. The choices rest on times that were measured, so two
/// runs may choose differently; losses are bit-equal where all choices are exact.
///
/// The peak counts all CPU tensors of the process in forward and backward. A budget that no choice
/// can meet is refused in the second step's forward, by an error that names the least that can be
/// met. The step that is recorded holds each storage as small as can be and runs no block again: it
/// needs a few percent more than the least without Blocks<>, and may need more than a budget that
/// blocks alone can meet.
///
/// Others use the device too: above `high_water` of it the plan moves to the next that needs less,
/// step by step, and back below `low_water` (plan/device.hpp).
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/activations/detail/planned_blocks.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/plan_options.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/plan/device.hpp>
#include <fourfold/plan/planner.hpp>
#include <fourfold/weights/module_tensors.hpp>  // NamedTensors

#include <algorithm>
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
  /// `offload` may be null; `bytes_saved`: of the parameters, before the first step.
  template <class Packing>
  [[nodiscard]] static std::shared_ptr<SavedPlan> make(const PlanOptions& options,
                                                       const NamedTensors& parameters,
                                                       std::shared_ptr<Offloading> offload,
                                                       std::int64_t bytes_saved = 0) {
    check(options, options.budget);
    std::int64_t weights = -bytes_saved;
    std::vector<const void*> counted;  // of a module that is registered twice once
    for (const auto& [name, parameter] : parameters) {
      TORCH_CHECK(parameter.is_cpu(), "fourfold::Budget: parameter '", name, "' lies on ",
                  parameter.device(),
                  ", and bytes are counted and planned on the CPU alone so far; use the policies "
                  "without a budget there");
      const void* const impl = parameter.unsafeGetTensorImpl();
      if (!parameter.requires_grad() ||
          std::find(counted.begin(), counted.end(), impl) != counted.end())
        continue;
      counted.push_back(impl);
      weights += static_cast<std::int64_t>(parameter.nbytes());
    }
    TORCH_CHECK(weights < options.budget, "fourfold::Budget: got a budget of ", options.budget,
                " bytes, and the model's trainable parameters alone are ", weights,
                "; give more, or pack them by Weights<...>");
    plan::Means means{.offload = std::move(offload)};
    if constexpr (!std::is_void_v<Packing>) {
      using Own = typename Packing::Format;
      ((std::is_same_v<Finer, Own> ? void()
                                   : means.rungs.push_back({Finer::name(), pack_with<Finer>})),
       ...);
      means.rungs.push_back({Own::name(), pack_with<Own>});
      means.sensitive = pack_with<typename Packing::SensitiveFormat>;
    }
    return std::make_shared<plan::Planner>(options, std::move(means));
  }
  /// For the blocks that run in the scopes of a store with such a plan.
  [[nodiscard]] static std::shared_ptr<BlockPlan> blocks(std::shared_ptr<ActivationStore> store) {
    return std::make_shared<detail::PlannedBlocks>(std::move(store));
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
    TORCH_CHECK(options.high_water == 0 ||
                    (options.low_water > 0 && options.low_water <= options.high_water),
                "fourfold::Budget: low_water is ", options.low_water, " and high_water ",
                options.high_water,
                "; wanted is 0 < low_water <= high_water, as shares of the device, or "
                "high_water = 0 to watch nobody else");
    const std::int64_t device =
        options.device_bytes > 0 ? options.device_bytes : plan::machine_memory().total;
    TORCH_CHECK(device <= 0 || budget <= device, "fourfold::Budget: got a budget of ", budget,
                " bytes, and the device has ", device,
                "; give what it can hold, less what others hold of it");
  }
};

template <StochasticCodec... Finer>
using Budget = std::conditional_t<sizeof...(Finer) == 0, BudgetWith<Int8>, BudgetWith<Finer...>>;

static_assert(Policy<Budget<>>, "Budget must stay a policy");

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// ActivationsBySensitivity<Bits>: what autograd saves, in 8, 4 or 2 bits a value, whichever its
/// gradients bear, and Bits on average. In place of Activations<Int4>:
///
///   #include <fourfold/fourfold.hpp>
///   #include <fourfold/plan/by_sensitivity.hpp>
///
///   using Pipeline = fourfold::CompressionPipeline<fourfold::ActivationsBySensitivity<4>,
///                                                  fourfold::Recompute<>,
///                                                  fourfold::OptimizerStates<fourfold::Int8>>;
///   ...
///   std::cout << pipeline.report();   // says what the bits add to the gradients' variance
///   std::cout << pipeline.bits();     // storage by storage
///
/// Every hundredth forward (the tenth first) is studied: how large the gradients were that met each
/// storage, and what rounding does to its values (plan/bit_study.hpp). From then on storages hold
/// the bits that add least to the gradients' variance (plan/bit_assignment.hpp), while no weight's
/// gradient gets more than MostPercent of the variance that it has itself from batch to batch
/// (plan/gradient_variance.hpp); that goes first, so bits rise where it must. Until then, and where
/// shapes change, everything has the most of 8, 4 and 2 bits that is not above the average.
///
/// What is held, and what is not rounded, is as with Activations (activations/store.hpp); products of
/// two activations keep `Sensitive`. The inputs of blocks (Blocks<>) are chosen for, too. Rounding
/// stays unbiased: bits are chosen before a forward, from other batches than it sees. A run repeats
/// to the bit on any number of threads; one that is continued from saved weights chooses anew, ten
/// forwards after it began.
#include <c10/util/Exception.h>
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/plan/bit_planner.hpp>

#include <memory>
#include <vector>

namespace fourfold::inline v0 {

template <int Bits = 4, int MostPercent = 10, int Every = 100, StochasticCodec Sensitive = Int8>
struct ActivationsBySensitivity {
  static_assert(Bits >= 2 && Bits <= 8,
                "ActivationsBySensitivity<Bits> chooses among 8, 4 and 2 bits a value, so Bits, "
                "their average, is from 2 to 8");
  static_assert(MostPercent >= 0 && Every >= 2,
                "ActivationsBySensitivity<Bits, MostPercent, Every>: MostPercent is 0 or more, and "
                "Every, the forwards from one choice to the next, 2 or more");
  static constexpr Role role = Role::kActivations;
  using Format = Int4;
  using SensitiveFormat = Sensitive;
  using Report = plan::BitReport;

  static void configure(ActivationOptions& options) {
    TORCH_CHECK(options.plan == nullptr,
                "ActivationsBySensitivity chooses each storage's bits, and so does a budget; leave "
                "the budget out, or take Activations<Int4> beside it");
    options.pack = Bits >= 8 ? pack_with<Int8> : Bits >= 4 ? pack_with<Int4> : pack_with<Int2>;
    options.pack_sensitive = pack_with<Sensitive>;
    options.plan = std::make_shared<plan::BitPlanner>(
        plan::BitOptions{.bits = Bits, .most_variance = MostPercent / 100.0, .every = Every},
        plan::BitPlanner::Packs{pack_with<Int8>, pack_with<Int4>, pack_with<Int2>});
  }
  /// The parameters whose gradients bear the noise.
  static void follow(SavedPlan& made, const std::vector<at::Tensor>& parameters) {
    static_cast<plan::BitPlanner&>(made).follow(parameters);
  }
  [[nodiscard]] static Report report(SavedPlan& made) {
    return static_cast<plan::BitPlanner&>(made).report();
  }
};

static_assert(Policy<ActivationsBySensitivity<>>, "ActivationsBySensitivity must stay a policy");

}  // namespace fourfold::inline v0

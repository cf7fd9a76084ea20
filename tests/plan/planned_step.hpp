// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One step of a model under a pipeline, and its peak: what a budget is held against.
#include <fourfold/core/plan_options.hpp>
#include <fourfold/report/meter.hpp>

#include "../pipeline/models.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>

namespace plan_tests {

using fourfold::literals::operator""_GiB;
using pipeline_models::Case;

/// A budget that keeps everything.
constexpr std::int64_t kNoLimit = 4_GiB;

/// The same values each time.
inline Case seeded(const std::function<Case()>& make) {
  static const fourfold::Meter meter;  // inputs are counted, too
  torch::manual_seed(0);
  return make();
}

/// The peak of one step, gradients in and out.
template <class Pipeline>
std::int64_t step(Pipeline& pipeline, const Case& model) {
  for (const at::Tensor& parameter : pipeline.parameters()) parameter.mutable_grad() = at::Tensor();
  const fourfold::Meter meter;
  meter.restart_peak();
  pipeline.forward(model.loss).backward();
  return meter.bytes().peak;
}

/// From its first step on, under a budget; `within`: the prediction's error, as a share of the peak.
template <class Pipeline>
void expect_obeyed(Pipeline& pipeline, const Case& model, std::int64_t budget, int steps = 4,
                   double within = 0.03) {
  pipeline.set_budget(budget);
  for (int i = 0; i < steps; ++i) {
    const std::int64_t peak = step(pipeline, model);
    const auto plan = pipeline.plan();
    EXPECT_LE(peak, budget) << "step " << i;
    EXPECT_EQ(plan.last.peak, peak);
    EXPECT_NEAR(static_cast<double>(plan.last.predicted), peak, within * peak) << "step " << i;
    EXPECT_LE(plan.variance, 0.1);
  }
}

}  // namespace plan_tests

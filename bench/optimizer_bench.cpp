// SPDX-License-Identifier: Apache-2.0
/// Steps of AdamW by code (optimizer_step.hpp says what is measured); optimizer_rules_bench has other
/// rules.
#include <fourfold/optim/adamw.hpp>

#include "optimizer_step.hpp"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  using fourfold::Int4, fourfold::Int8, fourfold::optim::AdamWOf;
  declare<AdamWOf<Int8>>("adamw/int8/step");
  declare<AdamWOf<Int4>>("adamw/int4/step");
  declare<AdamWOf<Int8>>("adamw/int8/on_file/step", 1e-4, at::kFloat, /*on_file=*/true);
  benchmark::RunSpecifiedBenchmarks();
}

// SPDX-License-Identifier: Apache-2.0
/// Steps of every rule, and of AdamW with 16-bit weights (optimizer_step.hpp says what is measured).
#include <fourfold/optim/optim.hpp>

#include "optimizer_step.hpp"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  using fourfold::Int4, fourfold::Int8, fourfold::optim::AdamWOf;
  namespace optim = fourfold::optim;
  declare<AdamWOf<optim::BFloat16>>("adamw/bf16/step");
  declare<AdamWOf<optim::Fp32>>("adamw/fp32/step");
  declare<optim::AdamW<optim::Normal4, optim::Factored>>("adamw/int4_factored/step");
  declare<AdamWOf<Int4, optim::ErrorCorrection<8>>>("adamw/int4/bf16_weights_24_bits/step", 1e-4,
                                                    at::kBFloat16);
  declare<AdamWOf<Int4, optim::RoundStochastic>>("adamw/int4/bf16_weights_stochastic/step", 1e-4,
                                                 at::kBFloat16);
  declare<optim::LionOf<Int8>>("lion/int8/step");
  declare<optim::AdamMiniOf<Int8>>("adam_mini/int8/step");
  declare<optim::Adafactor<>>("adafactor/step");
  declare<optim::ScaleOf<Int8, optim::RoundStochastic>>("scale/bf16_weights_stochastic/step", 1e-4,
                                                        at::kBFloat16);
  declare<optim::ApolloMiniOf<optim::Fp32>>("apollo_mini/step");
  declare<optim::ApolloOf<Int8>>("apollo/rank64/step", optim::ApolloOptions(1e-2).rank(64));
  declare<optim::GaLoreOf<Int8>>("galore/rank64/step", optim::GaLoreOptions(1e-2).rank(64));
  declare<optim::MuonOf<Int8>>("muon/int8/step");
  benchmark::RunSpecifiedBenchmarks();
}

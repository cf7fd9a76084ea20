// SPDX-License-Identifier: Apache-2.0
#include "unit.hpp"

double unit_a() { return loss_after_a_step<fourfold::Balanced>(); }

at::Tensor* packed_by_a() {
  at::manual_seed(0);
  torch::nn::Linear linear(torch::nn::LinearOptions(64, 256).bias(false));
  fourfold::compress_weights<fourfold::Int8>(linear);
  return new at::Tensor(linear->weight);
}

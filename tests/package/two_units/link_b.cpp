// SPDX-License-Identifier: Apache-2.0
#include "unit.hpp"

#include <memory>

double unit_b() { return loss_after_a_step<fourfold::Exact>(); }

/// This unit's own door sees the codes, and an operator reads them. Takes `packed`.
bool read_by_b(at::Tensor* packed) {
  const std::unique_ptr<at::Tensor> owned(packed);
  if (!fourfold::door::is_packed(*packed)) return false;
  at::manual_seed(0);
  const torch::nn::Linear plain(torch::nn::LinearOptions(64, 256).bias(false));
  const at::Tensor values = fourfold::decompress(*packed);
  // Half a step of a group's range; its minimum and step are bf16, of 8 bits.
  const double bound = 0.5 * (2.0 / 8) / 255 + (2.0 / 8) / 256;  // Linear draws from +-1 / sqrt(64)
  if ((values - plain->weight).abs().max().item<double>() > bound) return false;
  const at::Tensor eye = at::eye(64);
  return at::equal(at::matmul(eye, packed->t()), values.t());
}

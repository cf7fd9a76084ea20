// SPDX-License-Identifier: Apache-2.0
#include "optimizer_step.cuh"

#include "table.hpp"

namespace fourfold::cuda {

cudaError_t optimizer_step(const FourfoldStep& step, cudaStream_t stream) {
  return step_by_rule(step, stream);
}

}  // namespace fourfold::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an optimizer's noise goes by: the default generator's seed, and what its parameters are when
/// it is made. So two optimizers of one program, of a generator and a discriminator say, share none
/// unless their weights begin alike, and a run of the same program has the same.
#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fourfold/core/random.hpp>

#include <torch/optim/optimizer.h>
#include <bit>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Of trained parameters their numbers of values and their first values, since initial weights are
/// random. The same on every device, in every memory format, and in bf16 as in fp32 that is bf16's.
template <class = void>
std::uint64_t noise_seed(const std::vector<::torch::optim::OptimizerParamGroup>& groups) {
  std::uint64_t seed = [] {
    at::Generator generator = at::detail::getDefaultCPUGenerator();  // a handle
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.current_seed();
  }();
  for (const auto& group : groups)
    for (const at::Tensor& p : group.params()) {
      if (!p.defined() || !p.requires_grad()) continue;
      float first = 0;
      if (p.numel() > 0 && p.has_storage() && !p.is_meta())
        first = p.detach().as_strided({1}, {1}).to(at::kCPU, at::kFloat).item<float>();
      seed = mix(mix(seed ^ static_cast<std::uint64_t>(p.numel())) ^
                 std::bit_cast<std::uint32_t>(first));
    }
  return seed;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

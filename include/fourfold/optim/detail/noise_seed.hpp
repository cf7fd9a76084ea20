// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an optimizer's noise goes by: the default generator's seed, and what its parameters are when
/// it is made. So two optimizers of one program, of a generator and a discriminator say, share none,
/// and a run of the same program has the same.
#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fourfold/core/random.hpp>

#include <torch/optim/optimizer.h>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Of trained parameters their numbers of values and their first bytes, since initial weights are
/// random. The same on every device.
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
      std::uint64_t first = 0;
      const auto values = static_cast<std::int64_t>(sizeof(first) / p.element_size());
      if (values > 0 && p.numel() >= values && p.has_storage() && !p.is_meta() &&
          p.is_non_overlapping_and_dense())
        std::memcpy(&first, p.detach().as_strided({values}, {1}).cpu().const_data_ptr(),
                    sizeof(first));
      seed = mix(mix(seed ^ static_cast<std::uint64_t>(p.numel())) ^ first);
    }
  return seed;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Python keeps a group's rate from before all schedules in the group itself, as 'initial_lr', so
/// that schedulers of one optimizer agree on it. LibTorch's groups have no room for it: it lives as
/// long as one of the schedulers of that optimizer does. An optimizer outlives its schedulers, so an
/// address is never taken for that of an optimizer that stood there before. Schedulers in two shared
/// libraries that hide their symbols do not know each other.
#include <torch/optim/optimizer.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Those of the live schedulers of `optimizer`; without any, the rates that its groups have now.
inline std::shared_ptr<std::vector<double>> initial_lrs(::torch::optim::Optimizer& optimizer) {
  static std::mutex mutex;
  static std::map<const ::torch::optim::Optimizer*, std::weak_ptr<std::vector<double>>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  std::erase_if(all, [](const auto& entry) { return entry.second.expired(); });
  auto lrs = all[&optimizer].lock();
  if (!lrs) all[&optimizer] = lrs = std::make_shared<std::vector<double>>();
  const auto& groups = optimizer.param_groups();
  for (std::size_t g = lrs->size(); g < groups.size(); ++g)
    lrs->push_back(groups[g].options().get_lr());
  return lrs;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

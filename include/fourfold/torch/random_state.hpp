// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The states of the default generators, kept and given back, so that dropout draws the same mask
/// when its block is computed again. 5056 bytes for the CPU's (mt19937), 16 for a CUDA device's.
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::door {

/// The default generators of the CPU and of each device given (each once; CPU devices are ignored).
template <class = void>
class BasicRandomState {
 public:
  BasicRandomState() = default;
  explicit BasicRandomState(const std::vector<at::Device>& devices) {
    add(at::Device(at::kCPU));
    for (const at::Device& device : devices)
      if (!device.is_cpu()) add(device);
  }

  /// Sets the default generators to what they were.
  void restore() const {
    for (const auto& [device, state] : states_) {
      at::Generator generator = at::globalContext().defaultGenerator(device);
      const std::scoped_lock lock(generator.mutex());
      generator.set_state(state);
    }
  }
  /// The same generators as they stand now.
  [[nodiscard]] BasicRandomState now() const {
    BasicRandomState current;
    for (const auto& [device, state] : states_) current.add(device);
    return current;
  }
  [[nodiscard]] bool empty() const { return states_.empty(); }

 private:
  void add(at::Device device) {
    for (const auto& [known, state] : states_)
      if (known == device) return;
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::scoped_lock lock(generator.mutex());
    states_.emplace_back(device, generator.get_state());
  }

  std::vector<std::pair<at::Device, at::Tensor>> states_;
};
using RandomState = BasicRandomState<>;

/// The default generators are in `state` while it lives, and as before afterwards.
template <class = void>
class [[nodiscard]] BasicRandomStateGuard {
 public:
  explicit BasicRandomStateGuard(const RandomState& state) : before_(state.now()) {
    state.restore();
  }
  ~BasicRandomStateGuard() { before_.restore(); }
  BasicRandomStateGuard(const BasicRandomStateGuard&) = delete;
  BasicRandomStateGuard& operator=(const BasicRandomStateGuard&) = delete;

 private:
  RandomState before_;
};
using RandomStateGuard = BasicRandomStateGuard<>;

}  // namespace fourfold::door

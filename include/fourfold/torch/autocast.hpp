// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Autocast as it stood, and as it stands again: what runs later (a recompute in backward, a record
/// replayed) must cast as its forward did. Thread-local, as LibTorch's own state is.
#include <c10/core/DeviceType.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/ScalarType.h>
#include <c10/macros/Export.h>

#include <array>

// ATen/autocast_mode.h brings every operator with it (7 s alone); these are its declarations.
namespace at::autocast {
TORCH_API bool is_autocast_enabled(c10::DeviceType device_type);
TORCH_API void set_autocast_enabled(c10::DeviceType device_type, bool enabled);
TORCH_API c10::ScalarType get_autocast_dtype(c10::DeviceType device_type);
TORCH_API void set_autocast_dtype(c10::DeviceType device_type, c10::ScalarType dtype);
TORCH_API bool is_autocast_cache_enabled();
TORCH_API void set_autocast_cache_enabled(bool enabled);
TORCH_API void clear_cache();
TORCH_API int increment_nesting();
TORCH_API int decrement_nesting();
}  // namespace at::autocast

namespace fourfold::door {

/// Whether autocast is on, on this thread, for a device of these: where its key, which every tensor
/// has, is not excluded. (Nobody includes it.)
template <class = void>
[[nodiscard]] bool autocasting(c10::DispatchKeySet keys = c10::autocast_dispatch_keyset) {
  return !c10::impl::tls_local_dispatch_key_set().excluded_.isSupersetOf(keys);
}

/// Per device type: whether autocast is on and to which dtype; and whether casts of leaves are
/// cached.
template <class = void>
struct BasicAutocastState {
  static constexpr std::array kDevices{c10::DeviceType::CPU, c10::DeviceType::CUDA,
                                       c10::DeviceType::XPU, c10::DeviceType::MPS,
                                       c10::DeviceType::PrivateUse1};
  struct OfDevice {
    bool enabled = false;
    c10::ScalarType dtype = c10::ScalarType::Undefined;
    friend bool operator==(const OfDevice&, const OfDevice&) = default;
  };
  std::array<OfDevice, kDevices.size()> devices{};
  bool cache = true;

  /// This thread's.
  [[nodiscard]] static BasicAutocastState current() {
    BasicAutocastState state;
    for (std::size_t i = 0; i < kDevices.size(); ++i)
      state.devices[i] = {at::autocast::is_autocast_enabled(kDevices[i]),
                          at::autocast::get_autocast_dtype(kDevices[i])};
    state.cache = at::autocast::is_autocast_cache_enabled();
    return state;
  }
  /// Sets this thread's. Casts that are cached already stay so until the outermost autocast region
  /// ends; with `cache` off none is looked up or added.
  void apply() const {
    for (std::size_t i = 0; i < kDevices.size(); ++i) {
      at::autocast::set_autocast_enabled(kDevices[i], devices[i].enabled);
      at::autocast::set_autocast_dtype(kDevices[i], devices[i].dtype);
    }
    at::autocast::set_autocast_cache_enabled(cache);
  }
  [[nodiscard]] bool any() const {
    for (const OfDevice& device : devices)
      if (device.enabled) return true;
    return false;
  }
  friend bool operator==(const BasicAutocastState&, const BasicAutocastState&) = default;
};
using AutocastState = BasicAutocastState<>;

/// This thread's autocast is `state` while it lives, and what it was before afterwards.
class [[nodiscard]] AutocastGuard {
 public:
  explicit AutocastGuard(const AutocastState& state) : before_(AutocastState::current()) {
    state.apply();
  }
  ~AutocastGuard() { before_.apply(); }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  AutocastState before_;
};

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Mixed precision: Python's torch.autocast as a guard, and as a pipeline's policy.
///
///   {
///     const fourfold::AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
///     loss = criterion(model->forward(x), y);        // matrix products in bf16, sums in fp32
///   }
///   loss.backward();                                 // outside; each node as its forward was
///
///   using Mine = CompressionPipeline<Precision<BFloat16>, OptimizerStates<Int8>>;   // in its scopes
///
/// With fp16 take a GradScaler too: gradients/grad_scaler.hpp.
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <fourfold/core/policy.hpp>
#include <fourfold/torch/autocast.hpp>

#include <algorithm>
#include <memory>
#include <thread>
#include <type_traits>

namespace fourfold::inline v0 {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

/// What Python's torch.autocast takes.
struct AutocastOptions {
  bool enabled = true;  ///< false: operators run in the types they are given, within another region
  bool cache = true;    ///< a parameter's cast is made once in the outermost region, not once a use
};

/// Autocast of one device type, on the thread that made it, while it lives; afterwards as before,
/// also when an exception passes. Regions nest, and are left in turn. Casts that LibTorch keeps for
/// the outermost region (a copy of each weight) go when it ends, and when a region in it has another
/// dtype, which LibTorch would not notice. Errors: a device type without autocast; a dtype other
/// than BFloat16 or Half.
class [[nodiscard]] AutocastGuard {
 public:
  AutocastGuard(c10::DeviceType device, c10::ScalarType dtype, const AutocastOptions& options = {})
      : before_(door::AutocastState::current()), thread_(std::this_thread::get_id()) {
    auto now = before_;
    const auto found = std::find(door::AutocastState::kDevices.begin(),
                                 door::AutocastState::kDevices.end(), device);
    TORCH_CHECK(found != door::AutocastState::kDevices.end(),
                "AutocastGuard: there is no autocast for ", device,
                "; give the device type that the model is on, as torch::kCPU");
    TORCH_CHECK(!options.enabled || dtype == at::kBFloat16 || dtype == at::kHalf,
                "AutocastGuard casts to BFloat16 or Half, but was given ", dtype,
                "; for fp32 leave it out, or give {.enabled = false}");
    auto& mine =
        now.devices[static_cast<std::size_t>(found - door::AutocastState::kDevices.begin())];
    other_dtype_ =
        options.enabled && mine.dtype != dtype;  // a disabled one's casts may be kept too
    mine.enabled = options.enabled;
    if (options.enabled) mine.dtype = dtype;
    now.cache = options.cache;
    at::autocast::increment_nesting();
    if (other_dtype_) at::autocast::clear_cache();
    now.apply();
  }
  /// To the dtype that the device type has by default: BFloat16 on a CPU, Half on CUDA.
  explicit AutocastGuard(c10::DeviceType device, const AutocastOptions& options = {})
      : AutocastGuard(device, at::autocast::get_autocast_dtype(device), options) {}

  ~AutocastGuard() {
    if (std::this_thread::get_id() != thread_) return;  // its state died with its thread, or will
    if (at::autocast::decrement_nesting() == 0 || other_dtype_) at::autocast::clear_cache();
    before_.apply();
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  door::AutocastState before_;
  std::thread::id thread_;
  bool other_dtype_ = false;
};

/// A pipeline's scopes compute in T, BFloat16 or Half, where autocast does; weights, gradients and
/// the optimizer stay in the types they have.
template <class T>
struct Precision {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>,
                "Precision<> takes the type to compute in: BFloat16 or Half");
  static constexpr Role role = Role::kPrecision;
  static constexpr c10::ScalarType kType = std::is_same_v<T, Half> ? at::kHalf : at::kBFloat16;

  /// What a scope calls to enter the region of a device type.
  static std::shared_ptr<void> (*on(c10::DeviceType device))() {
    if (device == c10::DeviceType::CPU) return enter<c10::DeviceType::CPU>;
    if (device == c10::DeviceType::CUDA) return enter<c10::DeviceType::CUDA>;
    TORCH_CHECK(false, "Precision<> computes on a CPU or on CUDA, but the model is on ", device,
                "; hold a fourfold::AutocastGuard for that device type yourself");
  }

 private:
  template <c10::DeviceType Device>
  static std::shared_ptr<void> enter() {
    return std::make_shared<AutocastGuard>(Device, kType);
  }
};
static_assert(Policy<Precision<BFloat16>>, "Precision must stay a Policy");

}  // namespace fourfold::inline v0

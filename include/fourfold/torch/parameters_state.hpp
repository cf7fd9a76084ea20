// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The parameters' door's state: one in a process, however many translation units and shared
/// libraries include it, built with whatever visibility.
///
/// The key is TESTING_ONLY_GenericWrapper: LibTorch puts nothing of its own there, it stands above
/// functorch, autocast and autograd, and it may be carried by a tensor (c10/core/DispatchKey.h).
#include <ATen/core/stack.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <fourfold/core/payload.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/door_state.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::door {

inline constexpr c10::DispatchKey kPackedKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;
/// What an operator meets below our key: functorch, autocast, autograd, the backend.
inline constexpr c10::DispatchKeySet kBelowPackedKey{c10::DispatchKeySet::FULL_AFTER, kPackedKey};

/// What stands behind a packed tensor's storage, so that every alias and view sees a write.
class [[gnu::visibility("default")]] PackedHolder {
 public:
  explicit PackedHolder(std::shared_ptr<const Payload> payload) : payload_(std::move(payload)) {}

  [[nodiscard]] std::shared_ptr<const Payload> payload() const {
    const std::lock_guard lock(mutex_);
    return payload_;
  }
  void replace(std::shared_ptr<const Payload> payload) {
    const std::lock_guard lock(mutex_);
    payload_ = std::move(payload);
  }

  /// Whether decompress(module) gives requires_grad back.
  std::atomic<bool> was_trainable{false};

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Payload> payload_;
};

/// Storages that hold what a payload decompresses to, weakly on both sides.
struct DenseRecord {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::weak_ptr<const Payload> payload;
  std::int64_t version = 0;  ///< of the dense tensor; once written to, it is no payload's
};

/// One in a process (door_state.hpp).
struct [[gnu::visibility("default")]] ParametersState {
  static constexpr std::uint32_t kAbi = 5;
  static constexpr const char* kName = "packed parameters";
  /// Marks storages that are ours: the same function's address in every library.
  void (*delete_holder)(void*) = [](void* holder) { delete static_cast<PackedHolder*>(holder); };
  std::atomic<bool> open{false};     ///< to packed parameters
  std::atomic<bool> reading{false};  ///< to packed saved tensors: what both register
  /// Of packed parameters: null until that door is open.
  std::atomic<void (*)(const c10::OperatorHandle&, c10::DispatchKeySet, c10::Stack*)> fallback{};
  std::atomic<at::Tensor (*)(c10::DispatchKeySet, const at::Tensor&, const at::Tensor&)> mm{};
  /// Values of a saved tensor that are decoded at once.
  std::atomic<std::int64_t> piece{std::int64_t{1} << 18};
  std::mutex opening, registering;
  std::vector<std::shared_ptr<void>> registrations;  ///< of kernels; they live with the process
  std::mutex dense_mutex;
  PointerMap<DenseRecord> dense;
  std::size_t sweep_at = 64;  ///< forget dead records when there are so many
};

inline ParametersState& parameters_state() { return door_state<ParametersState>(); }

}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Memory of a GPU that is written on one stream and read on another. LibTorch runs each node of
/// backward on the stream of its forward and knows nothing of a payload that two nodes share. No
/// header of CUDA, so that a CPU-only program includes it too.
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <optional>

namespace fourfold::cuda {

/// This thread's current stream on a GPU; on a CPU, where all is done in the program's order, none.
inline std::optional<c10::Stream> current_stream(at::Device device) {
  if (!device.is_cuda()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

/// This thread's current stream may read `storage` from now on: it waits for what `written` has been
/// given so far, and the memory is used anew after what it has been given itself. Costs nothing where
/// both are one, as they nearly always are.
inline void read_on_current_stream(const c10::Storage& storage,
                                   const std::optional<c10::Stream>& written) {
  if (!written) return;
  const auto now = current_stream(written->device());
  if (*now == *written) return;
  c10::Event event(written->device_type());
  event.record(*written);
  event.block(*now);
  if (storage.data() != nullptr)
    c10::impl::VirtualGuardImpl(written->device_type())
        .recordDataPtrOnStream(storage.data_ptr(), *now);
}

/// What the current stream was given reads `storage`, which may go before that is done. Costs nothing
/// on the stream that it was allocated on.
inline void used_on_current_stream(const c10::Storage& storage) {
  if (!storage.device().is_cuda() || storage.data() == nullptr) return;
  c10::impl::VirtualGuardImpl(storage.device_type())
      .recordDataPtrOnStream(storage.data_ptr(), *current_stream(storage.device()));
}

}  // namespace fourfold::cuda

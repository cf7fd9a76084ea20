// SPDX-License-Identifier: Apache-2.0
#pragma once
/// From tensors on a GPU to the kernels of fourfold::cuda: their device, their current stream,
/// their pointers. No header of CUDA or c10/cuda, so that a CPU-only program includes it too.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>
#include <fourfold/core/random.hpp>
#include <fourfold/cuda/kernels.hpp>

#include <optional>
#include <utility>

namespace fourfold::cuda {

inline std::optional<FourfoldDtype> kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return kFourfoldFloat;
    case at::kBFloat16: return kFourfoldBf16;
    case at::kHalf: return kFourfoldHalf;
    default: return std::nullopt;
  }
}

/// Calls launch(table, stream) on `where` and its current stream. False where there is nothing to
/// call: fourfold::cuda is not linked, the device is no GPU, or no kernel knows the format
/// (cudaErrorInvalidValue). Any other error of CUDA is thrown.
template <class Launch>
bool run_kernel(at::Device where, const Launch& launch) {
  constexpr int kSuccess = 0, kInvalidValue = 1;  // cudaError_t
  const FourfoldKernels* const table = where.is_cuda() ? kernels() : nullptr;
  if (table == nullptr) return false;
  const c10::DeviceGuard guard(where);
  const c10::impl::VirtualGuardImpl device(where.type());
  const int error = launch(*table, device.getStream(where).native_handle());
  TORCH_CHECK(error == kSuccess || error == kInvalidValue,
              "a kernel of fourfold::cuda failed with CUDA error ", error, " on ", where,
              "; run with CUDA_LAUNCH_BLOCKING=1 to see where");
  return error == kSuccess;
}
/// launch(table, dtype, stream) on the device of `tensor`. False also where no kernel knows its
/// dtype.
template <class Launch>
bool run_kernel(const at::Tensor& tensor, const Launch& launch) {
  const auto dtype = kernel_dtype(tensor.scalar_type());
  return dtype && run_kernel(tensor.device(), [&](const FourfoldKernels& table, void* stream) {
           return launch(table, *dtype, stream);
         });
}

inline std::optional<FourfoldKey> kernel_key(const std::optional<Key>& key) {
  if (!key) return std::nullopt;
  return FourfoldKey{key->seed, key->step, key->forward, key->storage};
}

}  // namespace fourfold::cuda

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

namespace fourfold::door {

inline std::optional<FourfoldDtype> kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return kFourfoldFloat;
    case at::kBFloat16: return kFourfoldBf16;
    case at::kHalf: return kFourfoldHalf;
    default: return std::nullopt;
  }
}

/// Calls launch(table, dtype, stream) on the device and current stream of `tensor`. False where
/// there is nothing to call: fourfold::cuda is not linked, the tensor is not on a GPU, or no kernel
/// knows its dtype or the format (cudaErrorInvalidValue). Any other error of CUDA is thrown.
template <class Launch>
bool run_kernel(const at::Tensor& tensor, const Launch& launch) {
  constexpr int kSuccess = 0, kInvalidValue = 1;  // cudaError_t
  const FourfoldKernels* const table = tensor.is_cuda() ? cuda::kernels() : nullptr;
  const auto dtype = kernel_dtype(tensor.scalar_type());
  if (table == nullptr || !dtype) return false;
  const c10::DeviceGuard guard(tensor.device());
  const c10::impl::VirtualGuardImpl device(tensor.device().type());
  const int error = launch(*table, *dtype, device.getStream(tensor.device()).native_handle());
  TORCH_CHECK(error == kSuccess || error == kInvalidValue,
              "a kernel of fourfold::cuda failed with CUDA "
              "error ",
              error, " on ", tensor.device(), "; run with CUDA_LAUNCH_BLOCKING=1 to see where");
  return error == kSuccess;
}

inline std::optional<FourfoldKey> kernel_key(const std::optional<Key>& key) {
  if (!key) return std::nullopt;
  return FourfoldKey{key->seed, key->step, key->forward, key->storage};
}

}  // namespace fourfold::door

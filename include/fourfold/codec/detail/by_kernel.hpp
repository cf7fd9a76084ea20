// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The seam between codecs and the kernels of fourfold::cuda: buffers of a CUDA tensor by one
/// launch, and a warning where it must go a slower way.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <fourfold/core/random.hpp>
#include <fourfold/cuda/run_kernel.hpp>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace fourfold::inline v0::detail {

/// A buffer that a kernel fills.
struct KernelBuffer {
  std::int64_t numel;
  at::ScalarType dtype;
};

/// {codes, scales} of contiguous `values`, rounded to nearest without a key. Nothing where
/// run_kernel has nothing to call. Double goes through float, as it does on the CPU. What is not
/// finite shows in the scales; it is for the caller to refuse.
template <class = void>
std::optional<std::vector<at::Tensor>> compress_by_kernel(const FourfoldFormat& format,
                                                          const at::Tensor& values,
                                                          const KernelBuffer& codes,
                                                          const KernelBuffer& scales,
                                                          const std::optional<Key>& key) {
  if (!values.is_cuda() || cuda::kernels() == nullptr) return std::nullopt;
  const at::Tensor dense =
      values.scalar_type() == at::kDouble ? values.to(at::kFloat) : values;  // a copy for a moment
  const auto options = at::TensorOptions(dense.device());
  std::vector<at::Tensor> out{at::empty({codes.numel}, options.dtype(codes.dtype)),
                              at::empty({scales.numel}, options.dtype(scales.dtype))};
  const auto named = cuda::kernel_key(key);
  if (!cuda::run_kernel(dense, [&](const FourfoldKernels& kernels, FourfoldDtype dtype, void* s) {
        return kernels.compress(format, out[0].mutable_data_ptr(), out[1].mutable_data_ptr(),
                                dense.const_data_ptr(), dtype, dense.numel(),
                                named ? &*named : nullptr, s);
      }))
    return std::nullopt;
  return out;
}

template <class = void>
std::optional<at::Tensor> decompress_by_kernel(const FourfoldFormat& format,
                                               const at::Tensor& codes, const at::Tensor& scales,
                                               at::IntArrayRef sizes, at::ScalarType dtype) {
  if (!codes.is_cuda() || cuda::kernels() == nullptr) return std::nullopt;
  const bool wide = dtype == at::kDouble;
  const at::Tensor out = at::empty(sizes, codes.options().dtype(wide ? at::kFloat : dtype));
  if (!cuda::run_kernel(out, [&](const FourfoldKernels& kernels, FourfoldDtype type, void* s) {
        return kernels.decompress(format, out.mutable_data_ptr(), type, codes.const_data_ptr(),
                                  scales.const_data_ptr(), out.numel(), s);
      }))
    return std::nullopt;
  return wide ? out.to(dtype) : out;
}

/// Whether a group held what is not finite (for Sqrt: or is negative), by its fp32 scales. Waits for
/// the device.
template <class = void>
bool any_nan(const at::Tensor& scales) {
  if (!scales.is_cpu()) return scales.isnan().any().item<bool>();
  const float* first = scales.const_data_ptr<float>();
  return std::any_of(first, first + scales.numel(), [](float scale) { return scale != scale; });
}

/// "Nf4 packs tensors" "on cuda" "by way of the CPU", and why; once for each `what`. Silent where
/// there is a kernel and it is linked: then the slow way only looks for what is to be refused.
template <class = void>
void warn_without_kernel(const std::string& what, at::Device device, const std::string& how,
                         bool has_kernel) {
  const bool for_it = has_kernel && device.is_cuda();
  if (for_it && cuda::kernels() != nullptr) return;
  {
    static std::mutex mutex;
    static std::set<std::string> told;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!told.insert(what).second) return;
  }
  TORCH_WARN(what, " on ", device.type(), " ", how, ", which is correct but slow, because ",
             !for_it ? "fourfold::cuda has no kernel for it"
             : fourfold_cuda_kernels == nullptr
                 ? "fourfold::cuda is not linked; link it to use its kernels"
                 : "the fourfold::cuda that is linked belongs to other headers; build both from "
                   "one version");
}

/// `tensor` on the CPU, with that warning if it is not there.
template <class = void>
at::Tensor by_way_of_cpu(const at::Tensor& tensor, const std::string& codec, bool has_kernel) {
  if (tensor.is_cpu()) return tensor;
  warn_without_kernel(codec + " packs tensors", tensor.device(), "by way of the CPU", has_kernel);
  return tensor.cpu();
}

}  // namespace fourfold::inline v0::detail

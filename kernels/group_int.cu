// SPDX-License-Identifier: Apache-2.0
#include "group_int.cuh"

#include "table.hpp"
#include "visit.cuh"

namespace fourfold::cuda {

cudaError_t compress_groups(FourfoldFormat format, void* codes, void* words, const void* x,
                            FourfoldDtype dtype, std::int64_t n, const Key* key,
                            cudaStream_t stream) {
  return visit_groups(format, [&]<class F>(F) {
    return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
      auto* const code = static_cast<std::uint8_t*>(codes);
      auto* const word = static_cast<std::uint32_t*>(words);
      const auto* const from = static_cast<const T*>(x);
      return key == nullptr ? quantize_groups<F::value>(code, word, from, n, stream)
                            : quantize_groups<F::value>(code, word, from, n, *key, stream);
    });
  });
}

cudaError_t decompress_groups(FourfoldFormat format, void* out, FourfoldDtype dtype,
                              const void* codes, const void* words, std::int64_t n,
                              cudaStream_t stream) {
  return visit_groups(format, [&]<class F>(F) {
    return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
      return dequantize_groups<F::value>(static_cast<T*>(out),
                                         static_cast<const std::uint8_t*>(codes),
                                         static_cast<const std::uint32_t*>(words), n, stream);
    });
  });
}

}  // namespace fourfold::cuda

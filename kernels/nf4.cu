// SPDX-License-Identifier: Apache-2.0
#include "nf4.cuh"
#include "nf4_scales.cuh"

#include "packed_matmul.cuh"
#include "table.hpp"
#include "visit.cuh"

namespace fourfold::cuda {

cudaError_t compress_nf4(bool given, void* codes, void* scales, const void* x, FourfoldDtype dtype,
                         std::int64_t n, const Key* key, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
    const auto compress = given ? nf4_compress<true, T> : nf4_compress<false, T>;
    return compress(static_cast<std::uint8_t*>(codes), static_cast<float*>(scales),
                    static_cast<const T*>(x), n, key, stream);
  });
}

cudaError_t compress_nf4_scales(void* codes, void* steps, void* scales, std::int64_t blocks,
                                bool up, cudaStream_t stream) {
  return nf4_compress_scales(static_cast<std::uint8_t*>(codes), static_cast<float*>(steps),
                             static_cast<float*>(scales), blocks, up, stream);
}

cudaError_t decompress_nf4_scales(void* scales, const void* codes, const void* steps,
                                  std::int64_t blocks, cudaStream_t stream) {
  return nf4_decompress_scales(static_cast<float*>(scales), static_cast<const std::uint8_t*>(codes),
                               static_cast<const float*>(steps), blocks, stream);
}

cudaError_t decompress_nf4(void* out, FourfoldDtype dtype, const void* codes, const void* scales,
                           std::int64_t n, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
    return nf4_decompress(static_cast<T*>(out), static_cast<const std::uint8_t*>(codes),
                          static_cast<const float*>(scales), n, stream);
  });
}

cudaError_t matmul_nf4(bool transposed, void* y, const void* x, FourfoldDtype dtype,
                       const void* codes, const void* scales, std::int64_t rows_x,
                       std::int64_t rows, std::int64_t columns, cudaStream_t stream) {
  const Nf4Source weight{static_cast<const std::uint8_t*>(codes),
                         static_cast<const float*>(scales)};
  return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
    auto* const out = static_cast<T*>(y);
    const auto* const in = static_cast<const T*>(x);
    return transposed ? packed_matmul(out, in, weight, rows_x, rows, columns, stream)
                      : packed_linear(out, in, weight, rows_x, rows, columns, stream);
  });
}

}  // namespace fourfold::cuda

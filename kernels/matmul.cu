// SPDX-License-Identifier: Apache-2.0
#include "factor_matmul.cuh"
#include "packed_matmul.cuh"

#include "table.hpp"
#include "visit.cuh"

namespace fourfold::cuda {

cudaError_t matmul_groups(FourfoldFormat format, bool transposed, void* y, const void* x,
                          FourfoldDtype dtype, const void* codes, const void* words,
                          std::int64_t rows_x, std::int64_t rows, std::int64_t columns,
                          cudaStream_t stream) {
  return visit_groups(format, [&]<class F>(F) {
    const GroupIntSource<F::value.bits, F::value.group, F::value.symmetric> weight{
        static_cast<const std::uint8_t*>(codes), static_cast<const std::uint32_t*>(words)};
    return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
      auto* const out = static_cast<T*>(y);
      const auto* const in = static_cast<const T*>(x);
      return transposed ? packed_matmul(out, in, weight, rows_x, rows, columns, stream)
                        : packed_linear(out, in, weight, rows_x, rows, columns, stream);
    });
  });
}

cudaError_t matmul_factors(void* y, const void* x, const void* left, const void* right,
                           FourfoldDtype dtype, std::int64_t rows_x, std::int64_t rows,
                           std::int64_t columns, std::int64_t rank, cudaStream_t stream) {
  return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
    return factor_matmul(static_cast<T*>(y), static_cast<const T*>(x), static_cast<const T*>(left),
                         static_cast<const T*>(right), rows_x, rows, columns, rank, stream);
  });
}

}  // namespace fourfold::cuda

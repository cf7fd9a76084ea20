// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One entry point a kind of codec; kernels.cu chooses among them.
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/random.hpp>
#include <fourfold/cuda/kernels.hpp>

#include <cuda_runtime.h>

namespace fourfold::cuda {

cudaError_t compress_groups(FourfoldFormat, void* codes, void* words, const void* x, FourfoldDtype,
                            std::int64_t n, const Key*, cudaStream_t);
cudaError_t decompress_groups(FourfoldFormat, void* out, FourfoldDtype, const void* codes,
                              const void* words, std::int64_t n, cudaStream_t);
cudaError_t compress_companded(FourfoldFormat, void* codes, void* scales, const void* x,
                               FourfoldDtype, std::int64_t n, const Key*, cudaStream_t);
cudaError_t decompress_companded(FourfoldFormat, void* out, FourfoldDtype, const void* codes,
                                 const void* scales, std::int64_t n, cudaStream_t);
cudaError_t matmul_groups(FourfoldFormat, bool transposed, void* y, const void* x, FourfoldDtype,
                          const void* codes, const void* words, std::int64_t rows_x,
                          std::int64_t rows, std::int64_t columns, cudaStream_t);
cudaError_t compress_nf4(bool given, void* codes, void* scales, const void* x, FourfoldDtype,
                         std::int64_t n, const Key*, cudaStream_t);
cudaError_t compress_nf4_scales(void* codes, void* steps, void* scales, std::int64_t blocks,
                                bool up, cudaStream_t);
cudaError_t decompress_nf4_scales(void* scales, const void* codes, const void* steps,
                                  std::int64_t blocks, cudaStream_t);
cudaError_t decompress_nf4(void* out, FourfoldDtype, const void* codes, const void* scales,
                           std::int64_t n, cudaStream_t);
cudaError_t matmul_nf4(bool transposed, void* y, const void* x, FourfoldDtype, const void* codes,
                       const void* scales, std::int64_t rows_x, std::int64_t rows,
                       std::int64_t columns, cudaStream_t);
cudaError_t matmul_factors(void* y, const void* x, const void* left, const void* right,
                           FourfoldDtype, std::int64_t rows_x, std::int64_t rows,
                           std::int64_t columns, std::int64_t rank, cudaStream_t);
cudaError_t compress_bit_mask(std::int32_t width, void* bits, void* other, std::int64_t* found,
                              const void* x, std::int64_t n, cudaStream_t);
cudaError_t decompress_bit_mask(std::int32_t width, void* out, const void* bits, const void* other,
                                std::int64_t n, cudaStream_t);
cudaError_t optimizer_step(const FourfoldStep&, cudaStream_t);

}  // namespace fourfold::cuda

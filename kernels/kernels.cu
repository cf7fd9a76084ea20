// SPDX-License-Identifier: Apache-2.0
/// The table that include/fourfold/cuda/kernels.hpp declares.
#include "table.hpp"

namespace {

using namespace fourfold;

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

constexpr std::int32_t kNf4 = 1, kNf4WithScales = 4;
bool is_nf4(const FourfoldFormat& format) { return format.kind == kNf4 && format.group == 64; }

int compress(FourfoldFormat format, void* codes, void* scales, const void* x, FourfoldDtype dtype,
             std::int64_t n, const FourfoldKey* key, void* stream) {
  Key named;
  if (key != nullptr) named = {key->seed, key->step, key->forward, key->storage};
  const Key* const noise = key == nullptr ? nullptr : &named;
  if (format.kind == 0)
    return cuda::compress_groups(format, codes, scales, x, dtype, n, noise, as_stream(stream));
  if (is_nf4(format) || format.kind == kNf4WithScales)
    return cuda::compress_nf4(/*given=*/!is_nf4(format), codes, scales, x, dtype, n, noise,
                              as_stream(stream));
  return cuda::compress_companded(format, codes, scales, x, dtype, n, noise, as_stream(stream));
}

int decompress(FourfoldFormat format, void* out, FourfoldDtype dtype, const void* codes,
               const void* scales, std::int64_t n, void* stream) {
  if (format.kind == 0)
    return cuda::decompress_groups(format, out, dtype, codes, scales, n, as_stream(stream));
  if (is_nf4(format)) return cuda::decompress_nf4(out, dtype, codes, scales, n, as_stream(stream));
  return cuda::decompress_companded(format, out, dtype, codes, scales, n, as_stream(stream));
}

int matmul(FourfoldFormat format, bool transposed, void* y, const void* x, FourfoldDtype dtype,
           const void* codes, const void* scales, std::int64_t rows_x, std::int64_t rows,
           std::int64_t columns, void* stream) {
  if (is_nf4(format))
    return cuda::matmul_nf4(transposed, y, x, dtype, codes, scales, rows_x, rows, columns,
                            as_stream(stream));
  return cuda::matmul_groups(format, transposed, y, x, dtype, codes, scales, rows_x, rows, columns,
                             as_stream(stream));
}

int factor_matmul(void* y, const void* x, const void* left, const void* right, FourfoldDtype dtype,
                  std::int64_t rows_x, std::int64_t rows, std::int64_t columns, std::int64_t rank,
                  void* stream) {
  return cuda::matmul_factors(y, x, left, right, dtype, rows_x, rows, columns, rank,
                              as_stream(stream));
}

int compress_mask(std::int32_t width, void* bits, void* other, std::int64_t* found, const void* x,
                  std::int64_t n, void* stream) {
  return cuda::compress_bit_mask(width, bits, other, found, x, n, as_stream(stream));
}

int decompress_mask(std::int32_t width, void* out, const void* bits, const void* other,
                    std::int64_t n, void* stream) {
  return cuda::decompress_bit_mask(width, out, bits, other, n, as_stream(stream));
}

int compress_scales(void* codes, void* steps, void* scales, std::int64_t blocks, bool up,
                    void* stream) {
  return cuda::compress_nf4_scales(codes, steps, scales, blocks, up, as_stream(stream));
}

int decompress_scales(void* scales, const void* codes, const void* steps, std::int64_t blocks,
                      void* stream) {
  return cuda::decompress_nf4_scales(scales, codes, steps, blocks, as_stream(stream));
}

int step(const FourfoldStep* one, void* stream) {
  return cuda::optimizer_step(*one, as_stream(stream));
}

}  // namespace

extern "C" const FourfoldKernels* fourfold_cuda_kernels() {
  static constexpr FourfoldKernels kTable{
      cuda::kKernelsVersion, compress,      decompress,      matmul,
      factor_matmul,         compress_mask, decompress_mask, compress_scales,
      decompress_scales,     step};
  return &kTable;
}

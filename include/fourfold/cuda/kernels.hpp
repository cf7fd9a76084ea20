// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What the headers may call of kernels/: one table of C functions, found by a weak symbol, so that
/// a program without fourfold::cuda links as well and no translation unit differs from another. All
/// pointers are device pointers; nothing allocates, nothing waits; each returns a cudaError_t, 0
/// for success, cudaErrorInvalidValue (1) for a format that has no kernel.
#include <cstdint>

extern "C" {

/// Of values outside of codes.
enum FourfoldDtype : std::int32_t { kFourfoldFloat = 0, kFourfoldBf16 = 1, kFourfoldHalf = 2 };

/// Of a packed tensor. `kind` 0: integer groups (bits, group, symmetric); 1: NormalFloat of 4 bits
/// (group); 2: companded by softsign; 3: companded by square root; 4: 1 with scales that are given.
struct FourfoldFormat {
  std::int32_t kind, bits, group, symmetric;
};

/// fourfold::Key, or a null pointer for nearest rounding.
struct FourfoldKey {
  std::uint64_t seed, step, forward, storage;
};

/// A moment of an optimizer. `code` 0: none; 1: fp32; 2: bf16; 3: companded by softsign; 4: companded
/// by square root; 5: Normal4; 6: Log4 (optim/state_codes.hpp; scales of the last two are bf16).
struct FourfoldMoment {
  std::int32_t code;
  bool stochastic;  ///< rounded by `key`, else to nearest
  void* values;     ///< or codes
  void* scales;
  FourfoldKey key;
};

/// One parameter's step by an elementwise rule. `rule` 0: AdamW, and Adam, whose weight decay is the
/// ninth number; 1: SGD; 2: with momentum; 3: Nesterov's; 4: Lion. `numbers`: those of
/// optim/detail/update_code.hpp, in its order. `master`, of 16-bit weights, 0: nearest; 1: stochastic;
/// 2, 3: error correction of 8 and 16 bits; 4: Kahan; 5: fp32 (optim/master_codec.hpp).
struct FourfoldStep {
  std::int32_t rule, master;
  float numbers[9];
  FourfoldDtype dtype;  ///< of weights and gradient
  bool maximize;        ///< along the gradient, not against it
  void* weights;        ///< (n)
  const void* gradient;
  void* error;  ///< what the master codec keeps of each weight, or null
  FourfoldMoment first, second;
  FourfoldKey key;  ///< of the master's noise
  std::int64_t n;
};

struct FourfoldKernels {
  std::int32_t version;  ///< kKernelsVersion of the library that was linked
  /// codes and scales as the format's codec documents them; x (n).
  int (*compress)(FourfoldFormat, void* codes, void* scales, const void* x, FourfoldDtype,
                  std::int64_t n, const FourfoldKey*, void* stream);
  int (*decompress)(FourfoldFormat, void* out, FourfoldDtype, const void* codes, const void* scales,
                    std::int64_t n, void* stream);
  /// y (rows_x, rows) = x (rows_x, columns) W^T; transposed: y (rows_x, columns) = x (rows_x, rows)
  /// W.
  int (*matmul)(FourfoldFormat, bool transposed, void* y, const void* x, FourfoldDtype,
                const void* codes, const void* scales, std::int64_t rows_x, std::int64_t rows,
                std::int64_t columns, void* stream);
  /// y (rows_x, rows) = x (rows_x, columns) V^T U^T; rank 256 at most.
  int (*factor_matmul)(void* y, const void* x, const void* left, const void* right, FourfoldDtype,
                       std::int64_t rows_x, std::int64_t rows, std::int64_t columns,
                       std::int64_t rank, void* stream);
  /// The bits and the other value of n patterns of `width` (1, 2, 4 or 8) bytes. found (2): the
  /// index of the first that is not 0, and of the first that is a third one; n where there is none.
  /// With a third one the bits are not all written.
  int (*compress_mask)(std::int32_t width, void* bits, void* other, std::int64_t* found,
                       const void* x, std::int64_t n, void* stream);
  int (*decompress_mask)(std::int32_t width, void* out, const void* bits, const void* other,
                         std::int64_t n, void* stream);
  /// NormalFloat's fp32 scales (blocks) in 8 bits, with one fp32 step for 256 of them; up: none
  /// becomes smaller. `scales` become what the codes say.
  int (*compress_scales)(void* codes, void* steps, void* scales, std::int64_t blocks, bool up,
                         void* stream);
  int (*decompress_scales)(void* scales, const void* codes, const void* steps, std::int64_t blocks,
                           void* stream);
  int (*step)(const FourfoldStep*, void* stream);
};

[[gnu::weak]] const FourfoldKernels* fourfold_cuda_kernels();

}  // extern "C"

namespace fourfold::cuda {

inline constexpr std::int32_t kKernelsVersion = 4;

/// The linked kernels, or null: without fourfold::cuda, or with another version of it.
inline const FourfoldKernels* kernels() {
  const FourfoldKernels* table =
      fourfold_cuda_kernels != nullptr ? fourfold_cuda_kernels() : nullptr;
  return table != nullptr && table->version == kKernelsVersion ? table : nullptr;
}

}  // namespace fourfold::cuda

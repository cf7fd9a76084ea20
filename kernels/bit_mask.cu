// SPDX-License-Identifier: Apache-2.0
#include "bit_mask.cuh"

#include "table.hpp"
#include "visit.cuh"

namespace fourfold::cuda {
namespace {

/// f(std::type_identity<U>) for the patterns of `width` bytes.
template <class F>
cudaError_t visit_width(std::int32_t width, const F& f) {
  switch (width) {
    case 1: return f(std::type_identity<std::uint8_t>{});
    case 2: return f(std::type_identity<std::uint16_t>{});
    case 4: return f(std::type_identity<std::uint32_t>{});
    case 8: return f(std::type_identity<std::uint64_t>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t compress_bit_mask(std::int32_t width, void* bits, void* other, std::int64_t* found,
                              const void* x, std::int64_t n, cudaStream_t stream) {
  return visit_width(width, [&]<class U>(std::type_identity<U>) {
    return compress_mask(static_cast<std::uint8_t*>(bits), static_cast<U*>(other),
                         reinterpret_cast<MaskIndex*>(found), static_cast<const U*>(x), n, stream);
  });
}

cudaError_t decompress_bit_mask(std::int32_t width, void* out, const void* bits, const void* other,
                                std::int64_t n, cudaStream_t stream) {
  return visit_width(width, [&]<class U>(std::type_identity<U>) {
    return decompress_mask(static_cast<U*>(out), static_cast<const std::uint8_t*>(bits),
                           static_cast<const U*>(other), n, stream);
  });
}

}  // namespace fourfold::cuda

// SPDX-License-Identifier: Apache-2.0
#include "companded.cuh"

#include "table.hpp"
#include "visit.cuh"

namespace fourfold::cuda {
namespace {

template <class F>
cudaError_t visit_curve(const FourfoldFormat& format, const F& f) {
  if (format.kind == 2) return f(Softsign{});
  if (format.kind == 3) return f(Sqrt{});
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t compress_companded(FourfoldFormat format, void* codes, void* scales, const void* x,
                               FourfoldDtype dtype, std::int64_t n, const Key* key,
                               cudaStream_t stream) {
  return visit_curve(format, [&]<class C>(C) {
    return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
      return compand<C>(static_cast<CompandedCode<C>*>(codes), static_cast<float*>(scales),
                        static_cast<const T*>(x), n, key, stream);
    });
  });
}

cudaError_t decompress_companded(FourfoldFormat format, void* out, FourfoldDtype dtype,
                                 const void* codes, const void* scales, std::int64_t n,
                                 cudaStream_t stream) {
  return visit_curve(format, [&]<class C>(C) {
    return visit_dtype(dtype, [&]<class T>(std::type_identity<T>) {
      return expand<C>(static_cast<T*>(out), static_cast<const CompandedCode<C>*>(codes),
                       static_cast<const float*>(scales), n, stream);
    });
  });
}

}  // namespace fourfold::cuda

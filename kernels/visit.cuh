// SPDX-License-Identifier: Apache-2.0
#pragma once
/// From the table's run-time formats and dtypes to template arguments.
#include <fourfold/cuda/kernels.hpp>

#include <type_traits>

#include "launch.cuh"

namespace fourfold::cuda {

/// f(std::type_identity<T>) for the storage type of `dtype`.
template <class F>
cudaError_t visit_dtype(FourfoldDtype dtype, const F& f) {
  switch (dtype) {
    case kFourfoldFloat: return f(std::type_identity<float>{});
    case kFourfoldBf16: return f(std::type_identity<Bf16>{});
    case kFourfoldHalf: return f(std::type_identity<Half>{});
  }
  return cudaErrorInvalidValue;
}

template <int Bits, int Group, bool Symmetric>
struct GroupFormat {
  static constexpr IntFormat value{.bits = Bits, .group = Group, .symmetric = Symmetric};
};

/// f(GroupFormat<...>{}) for the formats that the headers name; others are the headers' to compose.
template <class F>
cudaError_t visit_groups(const FourfoldFormat& format, const F& f) {
  const auto is = [&](int bits, int group) { return format.bits == bits && format.group == group; };
  if (format.kind != 0) return cudaErrorInvalidValue;
  if (format.symmetric != 0) {
    if (is(8, 128)) return f(GroupFormat<8, 128, true>{});
    if (is(4, 64)) return f(GroupFormat<4, 64, true>{});
    return cudaErrorInvalidValue;
  }
  if (is(8, 128)) return f(GroupFormat<8, 128, false>{});
  if (is(4, 64)) return f(GroupFormat<4, 64, false>{});
  if (is(2, 64)) return f(GroupFormat<2, 64, false>{});
  return cudaErrorInvalidValue;
}

}  // namespace fourfold::cuda

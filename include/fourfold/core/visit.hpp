// SPDX-License-Identifier: Apache-2.0
#pragma once
/// From a dtype known at run time to a C++ type, once, at the border.
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <string_view>
#include <type_traits>
#include <utility>

namespace fourfold::inline v0 {

/// Calls f(std::type_identity<T>{}) with the C++ type of a real floating dtype: float,
/// c10::BFloat16, c10::Half or double. Any other dtype is a caller's mistake; `who` speaks in the
/// message.
template <class F>
decltype(auto) visit_float(at::ScalarType dtype, std::string_view who, F&& f) {
  switch (dtype) {
    case at::kFloat: return std::forward<F>(f)(std::type_identity<float>{});
    case at::kBFloat16: return std::forward<F>(f)(std::type_identity<c10::BFloat16>{});
    case at::kHalf: return std::forward<F>(f)(std::type_identity<c10::Half>{});
    case at::kDouble: return std::forward<F>(f)(std::type_identity<double>{});
    default: break;
  }
  TORCH_CHECK(false, who, " takes Float, BFloat16, Half or Double values, but was given ", dtype,
              "; keep such a tensor as it is, or convert it first with to(torch::kFloat)");
}

}  // namespace fourfold::inline v0

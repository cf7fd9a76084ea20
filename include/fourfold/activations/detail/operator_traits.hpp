// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What the tape needs to know of an operator, looked up once for each.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKey.h>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace fourfold::inline v0::detail {

template <class = void>
struct BasicOperatorTraits {
  std::string_view name;  ///< "aten::gelu"
  std::size_t arguments = 0, results = 0;
  std::vector<std::size_t> written;  ///< arguments that it writes to, by its schema
  bool cheap = false;                ///< may run again in place of keeping its result
  bool cheap_in_place = false;       ///< the same of relu_, add_, ...: on a copy
  c10::DispatchKeySet casts{};       ///< autocast of these devices changes its arithmetic
  bool assembles = false;            ///< its result is filled by later writes (empty, zeros, ...)
  bool draws_two_values = false;     ///< bernoulli_
  bool scales_in_place = false;      ///< mul_, div_: two values stay two values
  bool batch_norm = false;           ///< writes running statistics that its schema does not name
  bool copies = false;               ///< its result has its argument's values, rounded at most
  bool sensitive = false;            ///< backward reads what it saved through exp: softmax
  bool multiplies = false;           ///< mm, bmm, ...: backward multiplies by what it saved
  bool adds = false;                 ///< addmm, ...: its first argument is added to a product
  bool divides = false;              ///< by its last argument, and so does its backward
  bool singular = false;             ///< its derivative has no bound: log, sqrt, ...
  bool powers = false;               ///< pow: as its exponent is
  bool reads_nonzero = false;        ///< backward asks of what it saved whether it is 0: relu
  bool reads_positive = false;       ///< ... whether it is positive: leaky_relu
  enum class Gate { kNone, kThreshold, kInterval };
  Gate gate = Gate::kNone;  ///< backward asks whether it lies in an interval: hardtanh
  int pools = 0;            ///< max_pool with indices, of so many dimensions
  [[nodiscard]] bool gates() const { return gate != Gate::kNone; }

  BasicOperatorTraits() = default;
  BasicOperatorTraits(const c10::OperatorHandle& op,
                      const std::vector<std::string_view>& cheap_names) {
    const c10::FunctionSchema& schema = op.schema();
    name = schema.name();
    arguments = schema.arguments().size(), results = schema.returns().size();
    for (std::size_t i = 0; i < arguments; ++i)
      if (const c10::AliasInfo* alias = schema.arguments()[i].alias_info())
        if (alias->isWrite()) written.push_back(i);
    if (!name.starts_with("aten::")) {
      cheap = allowed(op, name, cheap_names);
      return;
    }
    const std::string_view name = this->name.substr(6);
    cheap = allowed(op, name, cheap_names);
    if (name.ends_with('_') && results == 1 && written == std::vector<std::size_t>{0})
      cheap_in_place =
          repeats(op) && (listed(name.substr(0, name.size() - 1), cheap_names) ||
                          listed(this->name.substr(0, this->name.size() - 1), cheap_names));
    const bool composed = op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
    for (const c10::DispatchKey key : c10::autocast_dispatch_keyset)
      if (composed || op.hasKernelForDispatchKey(key)) casts = casts.add(key);
    for (std::string_view stem : {"empty", "zeros", "ones", "full", "new_", "resize"})
      assembles = assembles || name.starts_with(stem);
    draws_two_values = name == "bernoulli_";
    scales_in_place = name == "mul_" || name == "div_";
    batch_norm = name == "native_batch_norm";
    copies = name == "_to_copy" || name == "clone";
    sensitive =
        one_of(name, {"_softmax", "_safe_softmax", "_log_softmax", "logsumexp", "logaddexp"}) ||
        name.find("attention_forward") != name.npos || name.starts_with("_scaled_dot_product");
    adds = one_of(
        name, {"addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addmv", "_addmm_activation"});
    multiplies = adds || one_of(name, {"mm", "bmm", "mv", "dot", "_trilinear", "convolution"});
    const std::string_view stem = name.ends_with('_') ? name.substr(0, name.size() - 1) : name;
    divides = one_of(stem, {"div", "addcdiv"});
    powers = stem == "pow";
    singular = one_of(stem, {"log",
                             "log2",
                             "log10",
                             "log1p",
                             "sqrt",
                             "rsqrt",
                             "reciprocal",
                             "acos",
                             "asin",
                             "acosh",
                             "atanh",
                             "atan2",
                             "logit",
                             "xlogy",
                             "prod",
                             "cumprod",
                             "hypot",
                             "erfinv",
                             "lgamma",
                             "digamma",
                             "polygamma",
                             "special_entr",
                             "special_xlog1py",
                             "binary_cross_entropy"});
    reads_nonzero = name == "relu" || name == "relu_";
    reads_positive = name == "leaky_relu" || name == "leaky_relu_";
    if (name == "threshold" || name == "threshold_") gate = Gate::kThreshold;
    if (name == "hardtanh" || name == "hardtanh_") gate = Gate::kInterval;
    pools = name == "max_pool2d_with_indices" ? 2 : name == "max_pool3d_with_indices" ? 3 : 0;
  }

 private:
  static bool one_of(std::string_view name, std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  }
  /// Named, without an argument that it writes to, and the same each time it runs.
  bool allowed(const c10::OperatorHandle& op, std::string_view name,
               const std::vector<std::string_view>& names) const {
    if (!written.empty() || !repeats(op)) return false;
    for (const c10::Argument& result : op.schema().returns())
      if (result.alias_info() != nullptr) return false;  // a view
    return listed(name, names) || listed(op.schema().name(), names);
  }
  static bool repeats(const c10::OperatorHandle& op) {
    return !op.hasTag(at::Tag::nondeterministic_seeded);
  }
  static bool listed(std::string_view name, const std::vector<std::string_view>& names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  }
};
using OperatorTraits = BasicOperatorTraits<>;

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Parameters that share memory: found by storage, so that each value is packed once.
#include <ATen/core/Tensor.h>
#include <fourfold/weights/module_tensors.hpp>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// A parameter that is packed, and others that are views of its values.
struct TiedParameters {
  struct View {
    at::Tensor parameter;
    std::int64_t offset;  ///< of its first value in the owner
    bool whole;           ///< all of the owner's values, in the same order
  };
  std::pair<std::string, at::Tensor> owner;
  std::vector<View> views;
  const void* storage = nullptr;  ///< where the owner's plain values were

  [[nodiscard]] bool trainable() const {
    return owner.second.requires_grad() || std::any_of(views.begin(), views.end(), [](auto& view) {
             return view.parameter.requires_grad();
           });
  }
};

/// First and one past the last value that a tensor touches in its storage.
inline std::pair<std::int64_t, std::int64_t> extent(const at::Tensor& tensor) {
  std::int64_t last = tensor.storage_offset();
  if (tensor.numel() == 0) return {last, last};
  for (std::int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return {tensor.storage_offset(), last + 1};
}

/// By identity: is_alias_of looks at data pointers, which a packed storage refuses.
inline bool same_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.has_storage() && b.has_storage() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

inline bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto [a_first, a_last] = extent(a);
  const auto [b_first, b_last] = extent(b);
  return same_storage(a, b) && a_first < b_last && b_first < a_last;
}

template <class = void>
std::vector<TiedParameters> tied_parameters(const std::string& what, const NamedTensors& chosen,
                                            const NamedTensors& staying) {
  for (const auto& [name, parameter] : chosen)
    for (const auto& [other_name, other] : staying)
      TORCH_CHECK(!overlap(parameter, other), what, ": parameter '", name, "' shares values with '",
                  other_name,
                  "', which the filter does not choose, so they would come apart; choose both or "
                  "neither");
  std::vector<TiedParameters> ties;
  const auto adopt = [&](const std::string& name, const at::Tensor& parameter) {
    for (TiedParameters& tie : ties) {
      const at::Tensor& owner = tie.owner.second;
      if (!overlap(owner, parameter)) continue;
      const bool same = owner.sizes() == parameter.sizes() &&
                        owner.strides() == parameter.strides() &&
                        owner.storage_offset() == parameter.storage_offset();
      const auto [first, last] = extent(parameter);
      const bool within =
          owner.is_contiguous() && first >= extent(owner).first && last <= extent(owner).second;
      TORCH_CHECK(
          same || within, what, ": parameters '", tie.owner.first, "' and '", name,
          "' share a part of their values, and neither holds all of the other's; leave them "
          "out by a filter, or give each its own values with clone()");
      tie.views.push_back({parameter, parameter.storage_offset() - owner.storage_offset(), same});
      return;
    }
    ties.push_back({{name, parameter}, {}, parameter.storage().unsafeGetStorageImpl()});
  };
  // The one that holds the others comes first; otherwise the module's order.
  std::vector<std::size_t> order(chosen.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto rank = [&](std::size_t i) {
    return std::pair(-chosen[i].second.numel(), !chosen[i].second.is_contiguous());
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return rank(a) < rank(b); });
  for (const std::size_t i : order) adopt(chosen[i].first, chosen[i].second);
  std::stable_sort(ties.begin(), ties.end(), [&](const auto& a, const auto& b) {
    const auto position = [&](const std::string& name) {
      return std::find_if(chosen.begin(), chosen.end(),
                          [&](const auto& one) { return one.first == name; });
    };
    return position(a.owner.first) < position(b.owner.first);
  });
  return ties;
}

template <class = void>
bool shares_storage_with_packed(const std::vector<TiedParameters>& ties,
                                const at::Tensor& parameter) {
  return parameter.has_storage() &&
         std::any_of(ties.begin(), ties.end(), [&](const TiedParameters& tie) {
           return tie.storage == parameter.storage().unsafeGetStorageImpl();
         });
}

/// Copies what these hold to memory of their own; those that share values still do.
template <class = void>
void move_to_own_storage(const NamedTensors& parameters) {
  std::vector<at::Tensor> rest;
  for (const auto& [name, parameter] : parameters) rest.push_back(parameter);
  while (!rest.empty()) {
    std::vector<at::Tensor> together{rest.back()};
    rest.pop_back();
    for (std::size_t i = 0; i < together.size(); ++i)  // which grows
      for (std::size_t j = rest.size(); j-- > 0;)
        if (overlap(together[i], rest[j])) {
          together.push_back(rest[j]);
          rest.erase(rest.begin() + static_cast<std::ptrdiff_t>(j));
        }
    auto [first, last] = extent(together[0]);
    for (const at::Tensor& one : together) {
      first = std::min(first, extent(one).first);
      last = std::max(last, extent(one).second);
    }
    const at::Tensor values = together[0].detach().as_strided({last - first}, {1}, first).clone();
    for (const at::Tensor& one : together)
      one.set_data(values.as_strided(one.sizes(), one.strides(), one.storage_offset() - first));
  }
}

}  // namespace fourfold::inline v0::detail

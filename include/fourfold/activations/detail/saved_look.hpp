// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a checkpoint remembers of a tensor that it drops, to know it when it comes again.
#include <ATen/core/Tensor.h>
#include <fourfold/core/random.hpp>  // mix

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace fourfold::inline v0::detail {

/// What a saved tensor must look like when it comes again.
template <class = void>
struct BasicSavedLook {
  std::optional<std::vector<std::int64_t>> sizes;  // none: nested
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  std::optional<std::uint64_t> hash;

  /// `attached` tells apart what is computed (hashed) and a buffer that its operator has yet to
  /// fill.
  BasicSavedLook(const at::Tensor& tensor, const at::Tensor& attached, bool with_hash)
      : dtype(tensor.scalar_type()), device(tensor.device()) {
    if (!tensor.is_nested()) sizes = tensor.sizes().vec();
    if (with_hash && tensor.layout() == at::kStrided && sizes && !tensor.is_meta() &&
        !tensor.is_quantized() && (attached.requires_grad() || !at::isFloatingType(dtype)))
      hash = hash_of(tensor.detach().cpu().contiguous());
  }
  bool operator==(const BasicSavedLook&) const = default;

  [[nodiscard]] std::string text() const {
    std::ostringstream out;
    out << dtype;
    if (sizes) out << at::IntArrayRef(*sizes);
    out << " on " << device;
    if (hash) out << " (values hash to " << std::hex << *hash << ")";
    return out.str();
  }

 private:
  static std::uint64_t hash_of(const at::Tensor& bytes) {
    const auto* data = static_cast<const char*>(bytes.const_data_ptr());
    std::uint64_t hash = bytes.nbytes();
    for (std::size_t i = 0; i < bytes.nbytes(); i += sizeof(hash)) {
      std::uint64_t word = 0;
      std::memcpy(&word, data + i, std::min(sizeof(word), bytes.nbytes() - i));
      hash = mix(hash ^ word);
    }
    return hash;
  }
};
using SavedLook = BasicSavedLook<>;

}  // namespace fourfold::inline v0::detail

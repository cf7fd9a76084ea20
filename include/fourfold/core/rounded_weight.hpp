// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Where a conversion of weights meets the optimizer that keeps more bits of them than they have.
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fourfold::inline v0 {

/// A weight that was fp32 and is bf16 or fp16 now, and what this took from it.
struct RoundedWeight {
  at::Tensor weight;
  /// Of the weight's type, sizes and strides. Beside bf16: 16 bits, signed, that added to the bits of
  /// the weight widened to fp32 give the fp32 that it was. Beside fp16: the difference, in fp16.
  at::Tensor rest;
  at::Tensor memory;         ///< the weight's, then; of no use where it is another's since
  std::int64_t version = 0;  ///< of the weight, then

  /// Nobody has written to it or given it other values, by set_data() or by a move to another device.
  [[nodiscard]] bool is_as_it_was() const {
    return weight._version() == version && weight.scalar_type() == rest.scalar_type() &&
           weight.sizes() == rest.sizes() && memory.defined() && weight.is_alias_of(memory);
  }
};

}  // namespace fourfold::inline v0

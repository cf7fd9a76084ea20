// SPDX-License-Identifier: Apache-2.0
/// A user's program, small on purpose: packs a tensor in 8 bits and holds the codec to its own bound.
#include <fourfold/codec/group_int.hpp>

#include <ATen/ops/linspace.h>

#include <iostream>

int main() {
  const at::Tensor values = at::linspace(-3, 5, 1000);
  const fourfold::Int8 codec;
  const auto packed = codec.compress(values);
  const at::Tensor error = values.sub(codec.decompress(packed)).abs();
  const bool within = error.le(codec.error_bound(values)).all().item<bool>();
  const bool smaller = packed.nbytes() * 3 < static_cast<std::int64_t>(values.nbytes());
  std::cout << fourfold::Int8::name() << ": " << values.nbytes() << " bytes in " << packed.nbytes()
            << (within ? ", within" : ", BEYOND") << " the bound\n";
  return within && smaller ? 0 : 1;
}

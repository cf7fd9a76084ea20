// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an optimizer keeps of a bf16 or fp16 weight beyond the weight itself. Updates are computed
/// in fp32 whatever is kept; fp32 and fp64 weights are exact as they are, and nothing is kept.
///   RoundNearest      nothing: the new weight is rounded to nearest
#include <cstdint>
#include <string>

namespace fourfold::inline v0 {
namespace optim {

/// An update smaller than half a unit in the weight's last place is lost.
struct RoundNearest {
  static std::string name() { return "RoundNearest"; }
};

}  // namespace optim
}  // namespace fourfold::inline v0

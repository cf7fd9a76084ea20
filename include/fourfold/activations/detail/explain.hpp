// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a store says of what was saved.
#include <fourfold/activations/saved_bytes.hpp>
#include <fourfold/torch/saved_tensors.hpp>  // tensors_saved_outside_scopes

#include <cstdint>
#include <sstream>
#include <string>

namespace fourfold::inline v0::detail {

/// In words: what became of what was saved in so many forwards, or why nothing was. `packs`: there
/// is a codec.
template <class = void>
std::string explain(const SavedTotals& totals, std::uint64_t forwards, bool packs) {
  const SavedCounts n = totals.counts();
  std::ostringstream out;
  if (n.tensors() == 0) {
    out << "activations: no tensor passed: forward ran outside the scope, on another thread, or "
           "without gradients";
    if (forwards == 0) out << " (no scope was ever entered)";
    if (const std::int64_t outside = door::tensors_saved_outside_scopes(); outside > 0)
      out << "; " << outside << " tensors were saved on threads that had no scope";
    return out.str();
  }
  const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  out.precision(1);
  out << std::fixed << "activations: " << n.tensors() << " tensors saved in " << forwards
      << " forwards: " << n.packed << " packed, " << n.masks << " in an exact code, "
      << n.recomputed << " computed again, " << n.offloaded << " offloaded, " << n.kept
      << " held as they are, " << n.parameters << " the model's own; at most "
      << mib(totals.held.bytes().peak) << " MiB held at once, plain "
      << "LibTorch would have held " << mib(totals.plain.bytes().peak) << " MiB";
  if (n.materialised > 0)
    out << "; " << n.materialised
        << " were to be computed again, but an in-place operator wrote to their input first";
  if (n.packed == 0 && packs)
    out << "; nothing was packed: all tensors were small, not of a floating dtype, or constants";
  return out.str();
}

}  // namespace fourfold::inline v0::detail

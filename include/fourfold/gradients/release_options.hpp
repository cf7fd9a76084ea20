// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How a GradientRelease (gradients/release.hpp) clips, accumulates and unscales.
#include <c10/util/Exception.h>

#include <cstdint>

namespace fourfold::inline v0 {

class GradScaler;

/// By which norm gradients are clipped to max_norm.
enum class ClipGradients {
  kNone,
  kGlobalNorm,  ///< of all gradients of this step, as clip_grad_norm_: two passes, by backward()
  kLastNorm,    ///< of all gradients of the step before; the first step is not clipped
  kLocalNorm,   ///< of each gradient by itself
};

/// Where gradients of micro-batches wait for the step.
enum class AccumulateGradients {
  kBuffers,  ///< in sums, held in codes
  kMoments,  ///< nowhere: AdamW's moments take up each at once, v as a sum of squares (AdamA, Zhang
             ///< et al., arXiv 2305.19982, algorithm 1). Not to be clipped or undone by reset()
};

struct GradientReleaseOptions {
  ClipGradients clip = ClipGradients::kNone;
  double max_norm = 1;
  std::int64_t micro_batches = 1;  ///< backward passes a step; divide their losses yourself
  AccumulateGradients accumulate = AccumulateGradients::kBuffers;
  std::int64_t min_packed_elements = 4096;  ///< smaller sums of micro-batches stay as they are
  /// Its scale is divided out of gradients, and a step whose gradients are not all finite is left
  /// out. Needs kGlobalNorm (max_norm may be infinite): before the first parameter steps, the last
  /// gradient must be known. Call update() after each backward(); outlives this.
  GradScaler* scaler = nullptr;
};

namespace detail {
/// Throws what is wrong with them.
template <class = void>
void check_release(const GradientReleaseOptions& options) {
  TORCH_CHECK(options.max_norm > 0, "GradientRelease: max_norm is ", options.max_norm,
              "; give the largest norm that gradients may have, above 0");
  TORCH_CHECK(options.micro_batches >= 1, "GradientRelease: micro_batches is ",
              options.micro_batches, "; give the number of backward passes a step, 1 or more");
  TORCH_CHECK(
      options.accumulate == AccumulateGradients::kBuffers || options.clip == ClipGradients::kNone,
      "GradientRelease: AccumulateGradients::kMoments takes up each gradient before the "
      "others are known, so none is clipped or unscaled; leave clip at kNone, or accumulate "
      "in kBuffers");
  TORCH_CHECK(options.scaler == nullptr || options.clip == ClipGradients::kGlobalNorm,
              "GradientRelease was given a scaler, whose step is left out if any gradient is not "
              "finite: that is known before the first parameter steps after two passes alone; set "
              "clip to ClipGradients::kGlobalNorm (max_norm may be infinite)");
}
}  // namespace detail

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Who holds saved values elsewhere than in memory until backward asks for them (offload.hpp).
#include <ATen/core/Tensor.h>
#include <fourfold/core/payload.hpp>

#include <cstdint>
#include <memory>
#include <string>

namespace fourfold::inline v0 {

class Offloading {
 public:
  virtual ~Offloading() = default;
  /// `values`, dense, which are `source`'s at the version that it has now. They may be read until
  /// the payload is told that its source changes. Null: they stay in memory.
  [[nodiscard]] virtual std::shared_ptr<const Payload> offload(const at::Tensor& values,
                                                               const at::Tensor& source) = 0;
  /// The same codes, held elsewhere; `codes` itself where they stay in memory.
  [[nodiscard]] virtual std::shared_ptr<const Payload> offload(
      std::shared_ptr<const Payload> codes) = 0;
  /// What it takes to write so many bytes and read them back, in milliseconds, as measured; below 0
  /// where they stay in memory.
  [[nodiscard]] virtual double cost_ms(std::int64_t bytes) = 0;
  /// A forward has ended: sources may be written to out of sight. Returns when none is being read.
  virtual void settle() noexcept = 0;
  /// What its user should know of it, in words; empty where all is well.
  [[nodiscard]] virtual std::string note() const { return {}; }
};

}  // namespace fourfold::inline v0

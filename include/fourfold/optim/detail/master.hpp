// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's weights as a step sees them: decoded to fp32 tile by tile, and encoded again.
#include <ATen/core/Tensor.h>
#include <fourfold/core/random.hpp>
#include <fourfold/optim/detail/vectorised.hpp>
#include <fourfold/optim/master_codec.hpp>

#include <optional>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

template <class C>
class Master {
 public:
  Master() = default;
  explicit Master(const at::Tensor& p) { static_cast<void>(p); }

  [[nodiscard]] const std::vector<at::Tensor>& buffers() const { return buffers_; }
  [[nodiscard]] std::int64_t nbytes() const {
    std::int64_t bytes = 0;
    for (const at::Tensor& buffer : buffers_) bytes += static_cast<std::int64_t>(buffer.nbytes());
    return bytes;
  }

  void adopt(const std::vector<at::Tensor>& buffers) {
    for (std::size_t i = 0; i < buffers.size(); ++i) buffers_[i].copy_(buffers[i]);
  }

  template <class T>
  void load(std::int64_t begin, std::int64_t n, const T* weights, float* values, Isa isa) {
    static_cast<void>(begin);
    run_vectorised<Widen>(isa, values, weights, n);
  }
  template <class T>
  void store(std::int64_t begin, std::int64_t n, const float* values, T* weights,
             const std::optional<Key>& key, Isa isa) {
    static_cast<void>(begin), static_cast<void>(key);
    run_vectorised<Narrow>(isa, weights, values, n);
  }

 private:
  std::vector<at::Tensor> buffers_;
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

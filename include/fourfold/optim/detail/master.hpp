// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One parameter's weights as a step sees them: decoded to fp32 tile by tile, and encoded again.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <fourfold/codec/detail/random16.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/random.hpp>
#include <fourfold/optim/detail/master_loops.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

template <class C>
class Master {
 public:
  Master() = default;
  /// `strides`: the order in which a step takes p's values, `device`: where.
  Master(const at::Tensor& p, const std::vector<std::int64_t>& strides,
         at::Device device = at::kCPU) {
    if constexpr (kKeepsError<C>) {
      if (!is_rounded(p)) return;
      const PlaceGuard place(Place::kOptimizer);
      if constexpr (std::is_same_v<C, Fp32>)  // a copy
        buffers_ = {
            at::empty_strided(p.sizes(), strides, p.options().device(device).dtype(at::kFloat))
                .copy_(p.detach())
                .as_strided({p.numel()}, {1})};
      else
        buffers_ = {at::zeros({p.numel()}, at::TensorOptions(device).dtype(C::kError))};
    }
    static_cast<void>(p), static_cast<void>(strides), static_cast<void>(device);
  }
  /// Whether it was made for weights of p's dtype.
  [[nodiscard]] bool fits(const at::Tensor& p) const {
    return !kKeepsError<C> || buffers_.empty() != is_rounded(p);
  }
  /// Throws where C cannot keep the error of such weights.
  static void check(const at::Tensor& p, const std::string& rule, std::int64_t index) {
    TORCH_CHECK(
        !kIsErrorCorrection<C> || p.scalar_type() != at::kHalf, rule, ": parameter ", index,
        " is Half, and ", C::name(),
        " keeps the lower bits of BFloat16 weights; use optim::Kahan, or to(torch::kBFloat16)");
  }

  [[nodiscard]] const std::vector<at::Tensor>& buffers() const { return buffers_; }
  std::vector<at::Tensor>& buffers() { return buffers_; }
  [[nodiscard]] std::int64_t nbytes() const {
    std::int64_t bytes = 0;
    for (const at::Tensor& buffer : buffers_) bytes += static_cast<std::int64_t>(buffer.nbytes());
    return bytes;
  }
  void adopt(const std::vector<at::Tensor>& buffers) {
    for (std::size_t i = 0; i < buffers.size(); ++i) buffers_[i].copy_(buffers[i]);
  }

  void to(at::Device device) {
    const PlaceGuard place(Place::kOptimizer);
    for (at::Tensor& buffer : buffers_) buffer = buffer.to(device);
  }

  /// On a CPU: weights [begin, begin + n), of which `weights` is the first.
  template <class T>
  void load(std::int64_t begin, std::int64_t n, const T* weights, float* values, Isa isa) {
    static_cast<void>(begin);
    if constexpr (!kKeepsError<C>)
      run_vectorised<Widen>(isa, values, weights, n);
    else if constexpr (kTakes<T>)
      run_vectorised<typename MasterLoops<C>::Decode>(isa, values, weights, error(begin), n);
  }
  template <class T>
  void store(std::int64_t begin, std::int64_t n, const float* values, T* weights,
             const std::optional<Key>& key, Isa isa) {
    static_cast<void>(begin), static_cast<void>(key);
    if constexpr (std::is_same_v<C, RoundStochastic>) {
      constexpr std::int64_t kDraws = fourfold::detail::kRandomTile;
      const PhiloxStream stream = philox_stream(key.value_or(Key{}));
      std::uint16_t random[kDraws];
      for (std::int64_t i = 0; i < n; i += kDraws) {
        fourfold::detail::random16(stream, (begin + i) / kDraws, random, isa);
        run_vectorised<RoundByRandom>(isa, weights + i, values + i,
                                      static_cast<const std::uint16_t*>(random),
                                      std::min(kDraws, n - i));
      }
    } else if constexpr (!kKeepsError<C>) {
      run_vectorised<Narrow>(isa, weights, values, n);
    } else if constexpr (kTakes<T>) {
      run_vectorised<typename MasterLoops<C>::Encode>(isa, weights, error(begin), values, n);
    }
  }

 private:
  static bool is_rounded(const at::Tensor& p) {
    return p.scalar_type() == at::kBFloat16 || p.scalar_type() == at::kHalf;
  }
  template <class T>
  static constexpr bool kTakes = !kIsErrorCorrection<C> || std::is_same_v<T, c10::BFloat16>;

  auto* error(std::int64_t begin) {
    using Error = typename MasterLoops<C>::Error;
    return buffers_[0].template mutable_data_ptr<Error>() + begin;
  }

  std::vector<at::Tensor> buffers_;
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

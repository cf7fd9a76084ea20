// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One moment of one parameter: codes, or fp32 where the parameter is small or the codec is Fp32.
/// Values lie in the order of the parameter's memory.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <fourfold/core/isa.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/optim/state_codec.hpp>

#include <algorithm>
#include <optional>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

/// Values that a step decodes, updates and encodes at a time.
inline constexpr std::int64_t kTile = 1024;

/// The packed form of Fp32 is never made.
struct NoPacked {
  std::vector<at::Tensor> buffers;
};
template <class C>
struct PackedOf {
  using type = typename C::Packed;
};
template <>
struct PackedOf<Fp32> {
  using type = NoPacked;
};

template <class C>
class Moment {
  static constexpr bool kCodes = !std::is_same_v<C, Fp32>;

 public:
  /// Of a rule that has none.
  Moment() = default;
  /// n zeros.
  Moment(std::int64_t n, bool packed, at::Device device = at::kCPU)
      : n_(n), packed_(n > 0 && packed && kCodes) {
    if (n == 0) return;
    const PlaceGuard place(Place::kOptimizer);
    if constexpr (kCodes)
      if (packed_) codes_ = C{}.zeros({n});
    if (!packed_) codes_.buffers = {at::zeros({n}, at::TensorOptions(device).dtype(at::kFloat))};
    to(device);
    if constexpr (kCodes) {
      static_assert(StateCodec<C>,
                    "an optimizer holds moments in a code that it can rewrite tile by tile "
                    "(optim::StateCodec): use Companded<8, Softsign> for the first moment, "
                    "Companded<8, Sqrt> for the second, or optim::Fp32");
      static_assert(kTile % C::kTile == 0);
    }
  }

  [[nodiscard]] std::int64_t numel() const { return n_; }
  [[nodiscard]] bool packed() const { return packed_; }
  [[nodiscard]] const std::vector<at::Tensor>& buffers() const { return codes_.buffers; }
  std::vector<at::Tensor>& buffers() { return codes_.buffers; }
  [[nodiscard]] std::int64_t nbytes() const {
    std::int64_t bytes = 0;
    for (const at::Tensor& buffer : buffers()) bytes += static_cast<std::int64_t>(buffer.nbytes());
    return bytes;
  }
  /// Buffers of the shapes and dtypes that this moment has, from a file.
  void adopt(const std::vector<at::Tensor>& buffers) {
    const PlaceGuard place(Place::kOptimizer);
    for (std::size_t i = 0; i < buffers.size(); ++i) codes_.buffers[i].copy_(buffers[i]);
  }

  void to(at::Device device) {
    const PlaceGuard place(Place::kOptimizer);
    for (at::Tensor& buffer : codes_.buffers) buffer = buffer.to(device);
  }

  /// On a CPU: values [begin, begin + n) as fp32: in place, or decoded into `scratch`; null where there are
  /// none.
  float* load(std::int64_t begin, std::int64_t n, float* scratch, Isa isa) {
    if constexpr (kCodes)
      if (packed_) {
        C{}.decode(codes_, begin, begin + n, scratch, isa);
        return scratch;
      }
    static_cast<void>(scratch), static_cast<void>(isa), static_cast<void>(n);
    if (n_ == 0) return nullptr;
    return codes_.buffers[0].template mutable_data_ptr<float>() + begin;
  }
  /// What load gave, changed.
  void store(std::int64_t begin, std::int64_t n, const float* values, const std::optional<Key>& key,
             Isa isa) {
    if constexpr (kCodes)
      if (packed_) C{}.encode(codes_, begin, begin + n, values, key, isa);
    static_cast<void>(begin), static_cast<void>(n), static_cast<void>(values);
    static_cast<void>(key), static_cast<void>(isa);
  }

  /// All of it anew from another codec's values, rounded to nearest, tile by tile.
  template <class From>
  void assign(Moment<From>& from) {
    float scratch[kTile];
    for (std::int64_t begin = 0; begin < n_; begin += kTile) {
      const std::int64_t n = std::min(kTile, n_ - begin);
      const float* values = from.load(begin, n, scratch, fourfold::isa());
      if (packed_)
        store(begin, n, values, std::nullopt, fourfold::isa());
      else
        std::copy_n(values, n, codes_.buffers[0].template mutable_data_ptr<float>() + begin);
    }
  }

 private:
  std::int64_t n_ = 0;
  bool packed_ = false;
  typename PackedOf<C>::type codes_;
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0

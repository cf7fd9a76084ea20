// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A tensor held in fewer bytes, its codec forgotten: what the doors and the four places exchange.
#include <fourfold/core/codec.hpp>

#include <memory>
#include <optional>

namespace fourfold::inline v0 {

/// Immutable once made, so it may be shared between aliases and read from any thread.
class Payload {
 public:
  virtual ~Payload() = default;

  [[nodiscard]] virtual at::Tensor decompress() const = 0;  ///< dense and contiguous
  /// Values [begin, end) in row-major order as fp32; CPU payloads only.
  virtual void decode(std::int64_t begin, std::int64_t end, float* out) const = 0;
  /// The same values, dense, on the payload's device and on all threads. `begin` is a multiple of
  /// granule(), which is 0 where only the whole can be read.
  [[nodiscard]] virtual at::Tensor decompress(std::int64_t begin, std::int64_t end) const {
    TORCH_CHECK(false, codec(), " cannot be read in pieces, here values [", begin, ", ", end,
                "); use decompress() for the whole tensor");
  }
  [[nodiscard]] virtual std::int64_t granule() const { return 0; }
  /// The same codec on other values (a write into a packed parameter); rounds to nearest.
  [[nodiscard]] virtual std::shared_ptr<const Payload> compress(const at::Tensor& values) const = 0;
  /// The same codes elsewhere, and with another logical dtype.
  [[nodiscard]] virtual std::shared_ptr<const Payload> to(at::Device device,
                                                          at::ScalarType dtype) const = 0;

  /// The same codec, sizes and dtype over other buffers of the same shapes (a clone, a saved file).
  [[nodiscard]] virtual std::shared_ptr<const Payload> with_buffers(
      std::vector<at::Tensor> buffers) const {
    static_cast<void>(buffers);
    TORCH_CHECK(false, codec(), " cannot be made again from its buffers");
  }

  [[nodiscard]] virtual at::IntArrayRef sizes() const = 0;
  [[nodiscard]] virtual at::ScalarType dtype() const = 0;
  [[nodiscard]] virtual at::Device device() const = 0;
  [[nodiscard]] virtual std::int64_t nbytes() const = 0;
  [[nodiscard]] virtual std::string codec() const = 0;  ///< Codec::name()
  /// Whether the tensor is buffers()[0] times buffers()[1], both trainable (LowRank).
  [[nodiscard]] virtual bool factorised() const = 0;
  [[nodiscard]] virtual const std::vector<at::Tensor>& buffers() const = 0;
  /// Whether values that were not finite made others NaN, as far as the codec knows.
  [[nodiscard]] virtual bool holds_nan() const { return false; }
  /// For payloads that are not done with reading the tensor that they were made of: it is about to
  /// be written to. Returns when they need it no more.
  virtual void before_source_changes() const {}
};

template <Codec C>
class CodecPayload final : public Payload {
 public:
  explicit CodecPayload(typename C::Packed packed) : packed_(std::move(packed)) {}

  [[nodiscard]] const typename C::Packed& packed() const { return packed_; }

  at::Tensor decompress() const override { return C{}.decompress(packed_); }
  void decode(std::int64_t begin, std::int64_t end, float* out) const override {
    if constexpr (TileCodec<C>) {
      C{}.decode(packed_, begin, end, out);
    } else {
      TORCH_CHECK(false, C::name(),
                  " cannot be read tile by tile; use decompress() for the whole tensor");
    }
  }
  at::Tensor decompress(std::int64_t begin, std::int64_t end) const override {
    if constexpr (SliceCodec<C>)
      return C{}.decompress(C::slice(packed_, begin, end));
    else
      return Payload::decompress(begin, end);
  }
  std::int64_t granule() const override {
    if constexpr (SliceCodec<C>) return C::kGranule;
    return 0;
  }
  std::shared_ptr<const Payload> compress(const at::Tensor& values) const override {
    return std::make_shared<CodecPayload>(C{}.compress(values));
  }
  std::shared_ptr<const Payload> to(at::Device device, at::ScalarType dtype) const override {
    typename C::Packed moved = packed_;
    for (at::Tensor& buffer : moved.buffers) buffer = buffer.to(device);
    moved.dtype = dtype;
    return std::make_shared<CodecPayload>(std::move(moved));
  }
  std::shared_ptr<const Payload> with_buffers(std::vector<at::Tensor> buffers) const override {
    typename C::Packed same = packed_;
    same.buffers = std::move(buffers);
    return std::make_shared<CodecPayload>(std::move(same));
  }

  at::IntArrayRef sizes() const override { return packed_.sizes; }
  at::ScalarType dtype() const override { return packed_.dtype; }
  at::Device device() const override { return packed_.buffers.front().device(); }
  std::int64_t nbytes() const override { return packed_.nbytes(); }
  std::string codec() const override { return C::name(); }
  bool factorised() const override {
    return requires { C::kFactorised; };
  }
  const std::vector<at::Tensor>& buffers() const override { return packed_.buffers; }
  bool holds_nan() const override {
    if constexpr (requires { C::holds_nan(packed_); }) return C::holds_nan(packed_);
    return false;
  }

 private:
  typename C::Packed packed_;
};

/// `values` held by C, rounded to nearest.
template <Codec C>
[[nodiscard]] std::shared_ptr<const Payload> make_payload(const at::Tensor& values) {
  return std::make_shared<CodecPayload<C>>(C{}.compress(values));
}
/// `values` held by C, rounded stochastically.
template <StochasticCodec C>
[[nodiscard]] std::shared_ptr<const Payload> make_payload(const at::Tensor& values, Key key) {
  return std::make_shared<CodecPayload<C>>(C{}.compress(values, key));
}

}  // namespace fourfold::inline v0

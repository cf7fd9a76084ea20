// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How a payload is made, and made again from its parts: a codec as a value, its type forgotten.
#include <fourfold/core/payload.hpp>
#include <fourfold/torch/door_state.hpp>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

struct PayloadFormat {
  std::string codec;  ///< Codec::name()
  bool factorised = false;
  std::shared_ptr<const Payload> (*compress)(const at::Tensor& values) = nullptr;
  std::shared_ptr<const Payload> (*restore)(std::vector<at::Tensor> buffers,
                                            std::vector<std::int64_t> sizes,
                                            at::ScalarType dtype) = nullptr;
};

template <Codec C>
[[nodiscard]] PayloadFormat payload_format() {
  PayloadFormat format{.codec = C::name()};
  format.factorised = requires { C::kFactorised; };
  format.compress = [](const at::Tensor& values) { return make_payload<C>(values); };
  format.restore = [](std::vector<at::Tensor> buffers, std::vector<std::int64_t> sizes,
                      at::ScalarType dtype) -> std::shared_ptr<const Payload> {
    typename C::Packed packed;
    packed.buffers = std::move(buffers);
    packed.sizes = std::move(sizes);
    packed.dtype = dtype;
    return std::make_shared<CodecPayload<C>>(std::move(packed));
  };
  return format;
}

namespace detail {

struct [[gnu::visibility("default")]] PayloadFormats {
  static constexpr std::uint32_t kAbi = 1;
  static constexpr const char* kName = "payload_formats";
  std::mutex mutex;
  std::vector<PayloadFormat> all;  // few
};

}  // namespace detail

/// Lets load() meet these codecs in a file. compress_weights<C> does it too.
template <Codec... C>
void register_codecs() {
  detail::PayloadFormats& formats = door::door_state<detail::PayloadFormats>();
  const std::lock_guard lock(formats.mutex);
  const auto add = [&](PayloadFormat format) {
    for (const PayloadFormat& known : formats.all)
      if (known.codec == format.codec) return;
    formats.all.push_back(std::move(format));
  };
  (add(payload_format<C>()), ...);
}

template <class = void>
[[nodiscard]] std::optional<PayloadFormat> registered_codec(const std::string& name) {
  detail::PayloadFormats& formats = door::door_state<detail::PayloadFormats>();
  const std::lock_guard lock(formats.mutex);
  for (const PayloadFormat& known : formats.all)
    if (known.codec == name) return known;
  return std::nullopt;
}

}  // namespace fourfold::inline v0

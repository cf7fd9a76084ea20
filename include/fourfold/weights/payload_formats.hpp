// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How a payload is made, and made again from its parts: a codec as a value, its type forgotten.
#include <fourfold/core/payload.hpp>

#include <map>
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

struct PayloadFormats {
  std::mutex mutex;
  std::map<std::string, PayloadFormat> by_name;
};

[[gnu::visibility("default")]] inline PayloadFormats& payload_formats() {
  static PayloadFormats formats;
  return formats;
}

}  // namespace detail

/// Lets load() meet these codecs in a file. compress_weights<C> does it too.
template <Codec... C>
void register_codecs() {
  detail::PayloadFormats& formats = detail::payload_formats();
  const std::lock_guard lock(formats.mutex);
  (formats.by_name.insert_or_assign(C::name(), payload_format<C>()), ...);
}

[[nodiscard]] inline std::optional<PayloadFormat> registered_codec(const std::string& name) {
  detail::PayloadFormats& formats = detail::payload_formats();
  const std::lock_guard lock(formats.mutex);
  const auto found = formats.by_name.find(name);
  return found == formats.by_name.end() ? std::nullopt : std::optional(found->second);
}

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The bytes of a saved model. Little-endian, as every machine that we build for is.
///
///   "FOURFOLD"  u32 version  u64 bytes of body  body  u64 checksum of body
///   body:    u64 n, n entries;  u64 n, n payloads;  u64 n, n tensors
///   entry:   u8 kind (0 parameter, 1 buffer), text name, u8 packed, u64 index of its payload or
///            tensor, list sizes, list strides, i64 offset   (a packed one is a view of its
///            payload)
///   payload: text codec, u8 dtype, list sizes, u64 n, n tensors
///   tensor:  u8 dtype (c10::ScalarType), list sizes, its values in row-major order
///   text:    u64 n, n bytes;   list: u64 n, n times i64
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fourfold/core/random.hpp>  // mix

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace fourfold::inline v0::detail {

static_assert(std::endian::native == std::endian::little, "saved files are little-endian");

inline constexpr std::string_view kSaveMagic = "FOURFOLD";
inline constexpr std::uint32_t kSaveVersion = 1;

/// Of a stream of bytes, however it is cut: eight at a time through SplitMix64's finalizer. Finds
/// damage; no defence against malice.
class Checksum {
 public:
  void add(const void* data, std::size_t n) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    length_ += n;
    for (; n > 0 && held_ > 0; --n) push(*bytes++);
    for (; n >= 8; n -= 8, bytes += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes, 8);
      sum_ = mix(sum_ ^ word);
    }
    for (; n > 0; --n) push(*bytes++);
  }
  [[nodiscard]] std::uint64_t value() const { return mix(mix(sum_ ^ word_) ^ length_); }

 private:
  void push(unsigned char byte) {
    word_ |= std::uint64_t{byte} << (8 * held_);
    if (++held_ == 8) sum_ = mix(sum_ ^ word_), word_ = 0, held_ = 0;
  }
  std::uint64_t sum_ = 0, word_ = 0, length_ = 0;
  int held_ = 0;
};

/// Writes to `out`, or only counts where that is null.
class SaveWriter {
 public:
  explicit SaveWriter(std::ostream* out) : out_(out) {}

  void bytes(const void* data, std::size_t n) {
    if (n == 0) return;
    if (out_ != nullptr) {
      sum_.add(data, n);
      out_->write(static_cast<const char*>(data), static_cast<std::streamsize>(n));
    }
    written_ += n;
  }
  template <class T>
  void number(T value) {
    bytes(&value, sizeof value);
  }
  void text(std::string_view text) {
    number(std::uint64_t{text.size()});
    bytes(text.data(), text.size());
  }
  void list(at::IntArrayRef values) {
    number(std::uint64_t{values.size()});
    bytes(values.data(), values.size() * sizeof(std::int64_t));
  }
  void tensor(const at::Tensor& tensor) {
    number(static_cast<std::uint8_t>(tensor.scalar_type()));
    list(tensor.sizes());
    if (out_ == nullptr) {
      written_ += static_cast<std::uint64_t>(tensor.numel()) * tensor.element_size();
      return;
    }
    const at::Tensor values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous();
    bytes(values.const_data_ptr(), values.nbytes());
  }
  [[nodiscard]] std::uint64_t written() const { return written_; }
  [[nodiscard]] std::uint64_t checksum() const { return sum_.value(); }

 private:
  std::ostream* out_;
  Checksum sum_;
  std::uint64_t written_ = 0;
};

/// Reads at most the body; never allocates more than is left of it.
class SaveReader {
 public:
  SaveReader(std::istream& in, std::string what, std::uint64_t left)
      : in_(in), what_(std::move(what)), left_(left) {}

  void bytes(void* data, std::uint64_t n) {
    claim(n);
    in_.read(static_cast<char*>(data), static_cast<std::streamsize>(n));
    if (static_cast<std::uint64_t>(in_.gcount()) != n) damaged("it ends too early");
    sum_.add(data, n);
    left_ -= n;
  }
  template <class T>
  T number() {
    T value{};
    bytes(&value, sizeof value);
    return value;
  }
  /// A count of things that take `each` bytes or more.
  std::uint64_t count(std::uint64_t each) {
    const auto n = number<std::uint64_t>();
    if (n > left_ / each) damaged("it counts more than it holds");
    return n;
  }
  std::string text() {
    std::string text(count(1), '\0');
    bytes(text.data(), text.size());
    return text;
  }
  std::vector<std::int64_t> list() {
    std::vector<std::int64_t> values(count(sizeof(std::int64_t)));
    bytes(values.data(), values.size() * sizeof(std::int64_t));
    return values;
  }
  /// Sizes of a tensor whose number of values fits 63 bits.
  std::vector<std::int64_t> sizes() {
    std::vector<std::int64_t> values = list();
    std::int64_t n = 1;
    for (const std::int64_t size : values)
      if (size < 0 || __builtin_mul_overflow(n, std::max<std::int64_t>(size, 1), &n))
        damaged("a tensor has impossible sizes");
    return values;
  }
  at::ScalarType dtype() {
    constexpr std::array known{at::kByte,         at::kChar,          at::kShort, at::kInt,
                               at::kLong,         at::kHalf,          at::kFloat, at::kDouble,
                               at::kComplexFloat, at::kComplexDouble, at::kBool,  at::kBFloat16};
    const auto code = number<std::uint8_t>();
    for (const at::ScalarType one : known)
      if (static_cast<std::uint8_t>(one) == code) return one;
    damaged("a tensor has an unknown dtype");
  }
  at::Tensor tensor() {
    const at::ScalarType type = dtype();
    const std::vector<std::int64_t> shape = sizes();
    const auto n = static_cast<std::uint64_t>(c10::multiply_integers(shape));
    if (n > left_ / c10::elementSize(type)) damaged("a tensor is larger than what is left");
    at::Tensor values = at::empty(shape, type);
    bytes(values.mutable_data_ptr(), values.nbytes());
    return values;
  }
  [[noreturn]] void damaged(const char* how) const {
    TORCH_CHECK(false, what_, " is damaged: ", how,
                ". The module was left as it was; load another copy of the file");
  }
  [[nodiscard]] std::uint64_t left() const { return left_; }
  [[nodiscard]] std::uint64_t checksum() const { return sum_.value(); }

 private:
  void claim(std::uint64_t n) const {
    if (n > left_) damaged("it ends too early");
  }
  std::istream& in_;
  std::string what_;
  std::uint64_t left_;
  Checksum sum_;
};

}  // namespace fourfold::inline v0::detail

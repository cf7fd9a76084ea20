// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Integer codes in groups: `group` consecutive values, in row-major order, share a scale.
///   auto packed = Int4{}.compress(weight);       // 4.5 bits a value, rounded to nearest
///   auto again  = Int4{}.decompress(packed);     // |weight - again| <= error_bound(weight)
///   auto noisy  = Int4{}.compress(saved, key);   // stochastic: the mean over keys is `saved`
///
/// Layout and arithmetic: int_code.hpp. buffers = {codes uint8 (ceil(n * bits / 8)), words int32
/// (ceil(n / group))}, so n values take ceil(n * bits / 8) + 4 * ceil(n / group) bytes. A last
/// group may be short. Float, BFloat16 and Half are read as they are; Double goes through float.
///
/// Stochastic rounding draws 16 bits a value by its index (core/random.hpp): the same key gives the
/// same codes on any number of threads. The mean over keys is the value itself, up to 2^-17 of a
/// step and fp32 rounding (derived in int_code.hpp), plus the rounding of a 16-bit output dtype.
///
/// A NaN or an infinity: refused by compress(values), which names its index; carried through by
/// compress(values, key), where its whole group decodes to NaN.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <fourfold/codec/detail/group_int_cuda.hpp>
#include <fourfold/codec/detail/group_int_loops.hpp>
#include <fourfold/codec/detail/tile_io.hpp>
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/visit.hpp>

#include <optional>
#include <string>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

/// "Int4", "Int8Symmetric"; with the group if it is not the usual one: "Int4/32".
inline std::string group_int_name(IntFormat f) {
  std::string name = "Int" + std::to_string(f.bits) + (f.symmetric ? "Symmetric" : "");
  return f.group == (f.bits == 8 ? 128 : 64) ? name : name + "/" + std::to_string(f.group);
}

inline const std::uint32_t* group_words(const at::Tensor& words) {
  return reinterpret_cast<const std::uint32_t*>(words.const_data_ptr<std::int32_t>());
}
/// Whether a group's word says that it held a NaN or an infinity.
template <class = void>
bool any_nan_word(const at::Tensor& words) {
  constexpr std::uint32_t kNan = kNanWord;
  if (!words.is_cpu()) return words.eq(static_cast<std::int64_t>(kNan)).any().item<bool>();
  const std::uint32_t* first = group_words(words);
  return std::find(first, first + words.numel(), kNan) != first + words.numel();
}

template <class = void>
std::vector<at::Tensor> group_int_compress(IntFormat f, const at::Tensor& values,
                                           const std::optional<Key>& key,
                                           Isa isa = fourfold::isa()) {
  const std::string name = group_int_name(f);
  TORCH_CHECK(values.defined(), name, " was given an undefined tensor; give it values to pack");
  TORCH_CHECK(values.layout() == at::kStrided && (values.is_cpu() || values.is_cuda()), name,
              " packs dense tensors on a CPU or a CUDA device, but was given a ", values.layout(),
              " tensor on ", values.device(), "; keep such a tensor as it is, or convert it first");
  visit_float(values.scalar_type(), name, [](auto) {});
  const c10::NoGradGuard no_grad;
  const std::int64_t n = values.numel();
  const at::Tensor flat = values.resolve_neg().contiguous().view({-1});
  const auto options = at::TensorOptions(values.device());
  if (values.is_cuda() && n > 0) {
    std::vector<at::Tensor> buffers = cuda_compress(f, flat, key);
    if (!key && any_nan_word(buffers[1])) refuse_not_finite(flat, 0, name);
    return buffers;
  }
  at::Tensor codes = at::empty({ceil_div(n * f.bits, 8)}, options.dtype(at::kByte));
  at::Tensor words = at::empty({ceil_div(n, f.group)}, options.dtype(at::kInt));
  const PhiloxRounds rounds(philox_stream(key.value_or(Key{})));
  const at::Tensor input = flat.scalar_type() == at::kDouble ? flat.to(at::kFloat) : flat;
  visit_float(input.scalar_type(), name, [&]<class T>(std::type_identity<T>) {
    if constexpr (!std::is_same_v<T, double>) {
      const std::int64_t refused =
          encode_all(f, input.const_data_ptr<T>(), n, key ? &rounds : nullptr,
                     codes.mutable_data_ptr<std::uint8_t>(),
                     reinterpret_cast<std::uint32_t*>(words.mutable_data_ptr<std::int32_t>()), isa);
      if (!key && refused < words.numel()) refuse_not_finite(flat, 0, name);
    }
  });
  return {std::move(codes), std::move(words)};
}

template <class = void>
at::Tensor group_int_decompress(IntFormat f, const std::vector<at::Tensor>& buffers,
                                at::IntArrayRef sizes, std::int64_t n, at::ScalarType dtype,
                                Isa isa = fourfold::isa()) {
  const at::Tensor& codes = buffers.at(0);
  const at::Tensor& words = buffers.at(1);
  if (codes.is_cuda() && n > 0) return cuda_decompress(f, codes, words, n, dtype).reshape(sizes);
  const bool wide = dtype == at::kDouble;
  at::Tensor out = at::empty(sizes, codes.options().dtype(wide ? at::kFloat : dtype));
  visit_float(out.scalar_type(), group_int_name(f), [&]<class T>(std::type_identity<T>) {
    if constexpr (!std::is_same_v<T, double>)
      decode_all(f, codes.const_data_ptr<std::uint8_t>(), group_words(words), n,
                 out.mutable_data_ptr<T>(), isa);
  });
  return wide ? out.to(dtype) : out;
}

/// Half a step, what fp32 and the output dtype round, and the distance to the codes where they
/// saturate (int_code.hpp). Fp32, on the CPU's arithmetic whatever the device.
template <class = void>
at::Tensor group_int_error_bound(IntFormat f, const at::Tensor& values) {
  const c10::NoGradGuard no_grad;
  const at::Tensor input = values.detach().to(at::kCPU, at::kFloat).contiguous();
  const double unit = values.scalar_type() == at::kBFloat16 ? 0x1p-8
                      : values.scalar_type() == at::kHalf   ? 0x1p-11
                                                            : 0.0;
  const double smallest = values.scalar_type() == at::kHalf ? 0x1p-25 : 0x1p-132;
  at::Tensor bound = at::empty(input.sizes(), input.options());
  const float* x = input.const_data_ptr<float>();
  float* out = bound.mutable_data_ptr<float>();
  for (std::int64_t begin = 0, n = input.numel(); begin < n; begin += f.group) {
    const std::int64_t end = std::min<std::int64_t>(n, begin + f.group);
    const GroupDecoder group = group_decoder(f, group_word_scalar(f, x + begin, end - begin));
    const double bottom =
        decode(group, static_cast<std::uint32_t>(zero_code(f) - levels(f) * f.symmetric));
    const double top = decode(group, static_cast<std::uint32_t>(zero_code(f) + levels(f)));
    for (std::int64_t i = begin; i < end; ++i) {
      const double value = x[i], outside = std::max({0.0, bottom - value, value - top});
      const double inside = group.scale * (0.5 + 0x1p-14) + 0x1p-23 * std::abs(value) + outside;
      out[i] = static_cast<float>((inside + unit * (std::abs(value) + inside) + smallest) *
                                  (1 + 0x1p-20));
    }
  }
  return bound.to(values.device());
}

}  // namespace detail

template <IntFormat F>
class GroupQuantizer {
  static_assert(F.bits == 8 || F.bits == 4 || F.bits == 2,
                "GroupQuantizer stores 8, 4 or 2 bits a value, so IntFormat::bits is one of these");
  static_assert(
      F.group > 0 && F.group % 8 == 0,
      "a group starts on a whole byte and a whole random block: IntFormat::group must be a "
      "multiple of 8");

 public:
  static constexpr IntFormat kFormat = F;
  using Packed = PackedAs<GroupQuantizer>;

  static std::string name() { return detail::group_int_name(F); }

  /// Rounds to nearest; a value that is not finite in fp32 is an error.
  [[nodiscard]] Packed compress(const at::Tensor& values) const {
    return {detail::group_int_compress(F, values, std::nullopt), values.sizes().vec(),
            values.scalar_type()};
  }
  /// Rounds stochastically; a group with a value that is not finite decodes to NaN.
  [[nodiscard]] Packed compress(const at::Tensor& values, Key key) const {
    return {detail::group_int_compress(F, values, key), values.sizes().vec(), values.scalar_type()};
  }
  /// Contiguous, in the sizes and the dtype that came.
  [[nodiscard]] at::Tensor decompress(const Packed& packed) const {
    return detail::group_int_decompress(F, packed.buffers, packed.sizes, packed.numel(),
                                        packed.dtype);
  }
  /// Values [begin, end) in row-major order as fp32, of CPU codes, on the calling thread.
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out) const {
    TORCH_CHECK(packed.buffers.at(0).is_cpu(), name(),
                " decodes tiles of CPU codes only, and these are on ", packed.buffers[0].device(),
                "; use decompress()");
    TORCH_CHECK(0 <= begin && begin <= end && end <= packed.numel(), name(),
                " was asked for values [", begin, ", ", end, ") of ", packed.numel(),
                "; ask for a range inside");
    detail::decode_values(F, packed.buffers[0].template const_data_ptr<std::uint8_t>(),
                          detail::group_words(packed.buffers[1]), begin, end, out, isa());
  }
  /// Whole groups, but for the tensor's last.
  static constexpr std::int64_t kGranule = F.group;
  [[nodiscard]] static Packed slice(const Packed& packed, std::int64_t begin, std::int64_t end) {
    TORCH_CHECK(0 <= begin && begin <= end && end <= packed.numel() && begin % F.group == 0, name(),
                " was asked for a slice [", begin, ", ", end, ") of ", packed.numel(),
                " values; ask for a range inside that begins with a group of ", F.group);
    const std::int64_t first = begin / F.group, last = detail::ceil_div(end, F.group);
    const std::int64_t byte = begin * F.bits / 8, stop = detail::ceil_div(end * F.bits, 8);
    return {{packed.buffers.at(0).narrow(0, byte, stop - byte),
             packed.buffers.at(1).narrow(0, first, last - first)},
            {end - begin},
            packed.dtype};
  }
  /// Whether a group was given a value that is not finite, so that all of it decodes to NaN.
  [[nodiscard]] static bool holds_nan(const Packed& packed) {
    return detail::any_nan_word(packed.buffers.at(1));
  }
  /// Elementwise bound of |values - decompress(compress(values))|, fp32; twice it bounds the
  /// stochastic one.
  [[nodiscard]] at::Tensor error_bound(const at::Tensor& values) const {
    return detail::group_int_error_bound(F, values);
  }
};

using Int8 = GroupQuantizer<IntFormat{.bits = 8, .group = 128}>;  ///< 8.25 bits a value
using Int4 = GroupQuantizer<IntFormat{.bits = 4, .group = 64}>;   ///< 4.5 bits a value
using Int2 = GroupQuantizer<IntFormat{.bits = 2, .group = 64}>;   ///< 2.5 bits a value
using Int8Symmetric = GroupQuantizer<IntFormat{.bits = 8, .group = 128, .symmetric = true}>;
using Int4Symmetric = GroupQuantizer<IntFormat{.bits = 4, .group = 64, .symmetric = true}>;
using Int2Symmetric = GroupQuantizer<IntFormat{.bits = 2, .group = 64, .symmetric = true}>;

static_assert(StochasticCodec<Int8> && TileCodec<Int8>, "GroupQuantizer must stay a Codec");
static_assert(SliceCodec<Int8> && SliceCodec<Int4>);
static_assert(StochasticCodec<Int4Symmetric> && TileCodec<Int4Symmetric>);

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One bit a value for tensors that hold only two: 0 and one other, as dropout's noise {0, 1 / (1 -
/// p)}, the mask of a relu, an additive attention mask {0, -inf}, or any bool tensor. Lossless.
///   if (auto packed = BitMask::try_compress(saved)) keep(*packed);   // one pass, no error
///
/// buffers = {bits uint8 (ceil(n / 8)), low bit first; other value (1), in the values' dtype}: n
/// values take ceil(n / 8) bytes and one value. The two are told apart by their bits, so that
/// whatever stands for the other value (-0, an infinity, a NaN) comes back as it was. Float,
/// BFloat16, Half, Double, Bool.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <fourfold/codec/detail/bit_mask_loops.hpp>
#include <fourfold/core/codec.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/visit.hpp>
#include <fourfold/cuda/run_kernel.hpp>

#include <bit>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

/// Calls f(std::type_identity<U>{}) with the unsigned integer as wide as the dtype. False if
/// BitMask does not take it.
template <class F>
bool visit_pattern(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat: f(std::type_identity<std::uint32_t>{}); return true;
    case at::kBFloat16:
    case at::kHalf: f(std::type_identity<std::uint16_t>{}); return true;
    case at::kDouble: f(std::type_identity<std::uint64_t>{}); return true;
    case at::kBool: f(std::type_identity<std::uint8_t>{}); return true;
    default: return false;
  }
}

template <class U>
at::ScalarType pattern_dtype() {
  return sizeof(U) == 1   ? at::kByte
         : sizeof(U) == 2 ? at::kShort
         : sizeof(U) == 4 ? at::kInt
                          : at::kLong;
}

/// What became of the values: buffers, or the index of the first that is a third value.
struct BitMaskResult {
  std::vector<at::Tensor> buffers;
  std::int64_t third = 0;
};

/// By ATen operators, on any device; not empty. The pattern of a bool is 0 or 1.
template <class U>
BitMaskResult bit_mask_aten(const at::Tensor& flat) {
  const at::Tensor patterns = flat.view(pattern_dtype<U>()), some = patterns.ne(0);
  const at::Tensor other = patterns.take(some.to(at::kByte).argmax()).reshape({1});
  const at::Tensor strange = some.logical_and(patterns.ne(other)).to(at::kByte);
  const std::int64_t n = flat.numel();
  if (strange.any().template item<bool>())
    return {{}, strange.argmax().template item<std::int64_t>()};
  const at::Tensor bits =
      at::constant_pad_nd(some.to(at::kByte), {0, (8 - n % 8) % 8}).reshape({-1, 8});
  at::Tensor bytes = bits.select(1, 0);
  for (int i = 1; i < 8; ++i) bytes = bytes.bitwise_or(bits.select(1, i).__lshift__(i));
  return {{bytes.contiguous(), other.view(flat.scalar_type())}, n};
}

/// By the kernels of fourfold::cuda, on a GPU; nothing without them.
template <class U>
std::optional<BitMaskResult> bit_mask_by_kernel(const at::Tensor& flat) {
  if (!flat.is_cuda() || cuda::kernels() == nullptr) return std::nullopt;
  const std::int64_t n = flat.numel();
  const auto options = at::TensorOptions(flat.device());
  at::Tensor bits = at::empty({(n + 7) / 8}, options.dtype(at::kByte));
  at::Tensor other = at::empty({1}, options.dtype(flat.scalar_type()));
  const at::Tensor found = at::empty({2}, options.dtype(at::kLong));
  if (!cuda::run_kernel(flat.device(), [&](const FourfoldKernels& kernels, void* stream) {
        return kernels.compress_mask(sizeof(U), bits.mutable_data_ptr(), other.mutable_data_ptr(),
                                     found.mutable_data_ptr<std::int64_t>(), flat.const_data_ptr(),
                                     n, stream);
      }))
    return std::nullopt;
  // A bool is 0 or not: the program need not wait for the device, once for each dropout.
  const std::int64_t third = sizeof(U) == 1 ? n : found[1].item<std::int64_t>();
  if (third < n) return BitMaskResult{{}, third};
  return BitMaskResult{{std::move(bits), std::move(other)}, n};
}

/// Dense values of a dtype that visit_pattern takes.
template <class = void>
BitMaskResult bit_mask_compress(const at::Tensor& values, Isa isa = fourfold::isa()) {
  const c10::NoGradGuard no_grad;
  const std::int64_t n = values.numel();
  const at::Tensor flat = values.resolve_neg().contiguous().view({-1});
  BitMaskResult result;
  visit_pattern(values.scalar_type(), [&]<class U>(std::type_identity<U>) {
    if (!values.is_cpu() && n > 0) {
      auto by_kernel = bit_mask_by_kernel<U>(flat);
      result = by_kernel ? *std::move(by_kernel) : bit_mask_aten<U>(flat);
      return;
    }
    at::Tensor bits =
        at::empty({(n + 7) / 8}, values.options().dtype(at::kByte).requires_grad(false));
    at::Tensor other = at::zeros({1}, values.options().requires_grad(false));
    if (values.is_cpu())
      result.third = mask_to_bits(static_cast<const U*>(flat.const_data_ptr()), n,
                                  bits.mutable_data_ptr<std::uint8_t>(),
                                  *static_cast<U*>(other.mutable_data_ptr()), isa, parallel_for);
    result.buffers = {std::move(bits), std::move(other)};
  });
  return result;
}

template <class = void>
at::Tensor bit_mask_decompress(const std::vector<at::Tensor>& buffers, at::IntArrayRef sizes,
                               std::int64_t n, at::ScalarType dtype, Isa isa = fourfold::isa()) {
  const c10::NoGradGuard no_grad;
  const at::Tensor& bits = buffers.at(0);
  const at::Tensor other = buffers.at(1).to(dtype);
  at::Tensor out = at::empty(sizes, other.options());
  visit_pattern(dtype, [&]<class U>(std::type_identity<U>) {
    if (!bits.is_cpu()) {
      if (cuda::run_kernel(bits.device(), [&](const FourfoldKernels& kernels, void* stream) {
            return kernels.decompress_mask(sizeof(U), out.mutable_data_ptr(), bits.const_data_ptr(),
                                           other.const_data_ptr(), n, stream);
          }))
        return;
      const at::Tensor place = at::arange(8, bits.options());
      const at::Tensor set = bits.unsqueeze(1).__rshift__(place).bitwise_and(1);
      const at::Tensor flags = set.reshape({-1}).narrow(0, 0, n).to(pattern_dtype<U>());
      out = flags.mul(other.view(pattern_dtype<U>())).view(dtype).reshape(sizes);
      return;
    }
    U* to = static_cast<U*>(out.mutable_data_ptr());
    const auto* from = bits.const_data_ptr<std::uint8_t>();
    const U value = *static_cast<const U*>(other.const_data_ptr());
    parallel_for(0, (n + 63) / 64, kBitMaskGrain, [&](std::int64_t first, std::int64_t last) {
      bits_to_mask(from, 64 * first, std::min(n, 64 * last), value, to + 64 * first, isa);
    });
  });
  return out;
}

}  // namespace detail

template <class = void>
class BasicBitMask {
 public:
  using Packed = PackedAs<BasicBitMask>;

  static std::string name() { return "BitMask"; }

  /// Nothing if the values are more than two, or none of them is 0, or the tensor is of another
  /// kind. Reads up to the first value that does not fit.
  [[nodiscard]] static std::optional<Packed> try_compress(const at::Tensor& values) {
    if (!takes(values)) return std::nullopt;
    detail::BitMaskResult result = detail::bit_mask_compress(values);
    if (result.third < values.numel()) return std::nullopt;
    return Packed{std::move(result.buffers), values.sizes().vec(), values.scalar_type()};
  }
  /// The same; an error where there is nothing.
  [[nodiscard]] Packed compress(const at::Tensor& values) const {
    TORCH_CHECK(values.defined(), name(), " was given an undefined tensor; give it values to pack");
    TORCH_CHECK(takes(values), name(),
                " packs dense Float, BFloat16, Half, Double or Bool tensors, but was given a ",
                values.layout(), " tensor of ", values.scalar_type(),
                "; keep such a tensor as it is, or convert it first");
    detail::BitMaskResult result = detail::bit_mask_compress(values);
    TORCH_CHECK(result.third >= values.numel(), name(), ": value ", result.third, " of ",
                values.numel(),
                " is neither 0 nor the tensor's first other value, and one bit tells "
                "only two apart; ask try_compress() first, or choose Int2, Int4 or Int8");
    return {std::move(result.buffers), values.sizes().vec(), values.scalar_type()};
  }
  /// Contiguous, in the sizes and the dtype that came.
  [[nodiscard]] at::Tensor decompress(const Packed& packed) const {
    return detail::bit_mask_decompress(packed.buffers, packed.sizes, packed.numel(), packed.dtype);
  }
  /// Values [begin, end) in row-major order as fp32, of CPU bits, on the calling thread.
  void decode(const Packed& packed, std::int64_t begin, std::int64_t end, float* out) const {
    TORCH_CHECK(packed.buffers.at(0).is_cpu(), name(),
                " decodes tiles of CPU bits only, and these are on ", packed.buffers[0].device(),
                "; use decompress()");
    TORCH_CHECK(0 <= begin && begin <= end && end <= packed.numel(), name(),
                " was asked for values [", begin, ", ", end, ") of ", packed.numel(),
                "; ask for a range inside");
    const auto other = packed.buffers.at(1).template item<float>();
    detail::bits_to_mask(packed.buffers[0].template const_data_ptr<std::uint8_t>(), begin, end,
                         std::bit_cast<std::uint32_t>(other), reinterpret_cast<std::uint32_t*>(out),
                         isa());
  }
  /// Whole words of 64 bits, but for the tensor's last.
  static constexpr std::int64_t kGranule = 64;
  [[nodiscard]] static Packed slice(const Packed& packed, std::int64_t begin, std::int64_t end) {
    TORCH_CHECK(0 <= begin && begin <= end && end <= packed.numel() && begin % kGranule == 0,
                name(), " was asked for a slice [", begin, ", ", end, ") of ", packed.numel(),
                " values; ask for a range inside that begins with a word of ", kGranule);
    return {{packed.buffers.at(0).narrow(0, begin / 8, (end + 7) / 8 - begin / 8),
             packed.buffers.at(1)},
            {end - begin},
            packed.dtype};
  }
  [[nodiscard]] at::Tensor error_bound(const at::Tensor& values) const {
    return at::zeros(values.sizes(), values.options().dtype(at::kFloat).requires_grad(false));
  }

 private:
  static bool takes(const at::Tensor& values) {
    return values.defined() && values.layout() == at::kStrided &&
           (values.is_cpu() || values.is_cuda()) &&
           detail::visit_pattern(values.scalar_type(), [](auto) {});
  }
};
using BitMask = BasicBitMask<>;

static_assert(Codec<BitMask> && TileCodec<BitMask> && SliceCodec<BitMask>,
              "BitMask must stay a Codec");

}  // namespace fourfold::inline v0

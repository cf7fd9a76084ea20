// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The seam between GroupQuantizer and the kernels: what happens to a tensor that is not on the
/// CPU. Composed of ATen operators, it is right on any device, and slow.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <fourfold/codec/detail/by_kernel.hpp>
#include <fourfold/codec/int_code.hpp>
#include <fourfold/core/random.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// {groups, group} fp32, the tail filled up with its group's last value.
template <class = void>
at::Tensor rows_of_groups(IntFormat f, const at::Tensor& values) {
  at::Tensor flat = values.contiguous().reshape({-1}).to(at::kFloat);
  const std::int64_t missing = (f.group - flat.numel() % f.group) % f.group;
  if (missing > 0) flat = at::cat({flat, flat.narrow(0, flat.numel() - 1, 1).expand({missing})});
  return flat.reshape({-1, f.group});
}

/// 16 random bits for each of n values (a multiple of 8), as random_bits16 draws them; int64 (n).
/// Only the low halves of the counter's words count, so they are masked where they are shifted.
template <class = void>
at::Tensor random_bits16_aten(const Key& key, std::int64_t n, at::Device device) {
  const PhiloxStream stream = philox_stream(key);
  const std::int64_t low_half = 0xFFFFFFFF;
  const auto high_half = [&](const at::Tensor& product) {
    return product.__rshift__(32).bitwise_and(low_half);
  };
  const at::Tensor index = at::arange(n / 8, at::TensorOptions(device).dtype(at::kLong));
  at::Tensor c0 = index.bitwise_and(low_half), c1 = high_half(index);
  at::Tensor c2 = at::full_like(c0, static_cast<std::int64_t>(stream.high & low_half));
  at::Tensor c3 = at::full_like(c0, static_cast<std::int64_t>(stream.high >> 32));
  auto k0 = static_cast<std::uint32_t>(stream.key);
  auto k1 = static_cast<std::uint32_t>(stream.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const at::Tensor a = c0.mul(std::int64_t{0xD2511F53}), b = c2.mul(std::int64_t{0xCD9E8D57});
    c0 = high_half(b).bitwise_xor(c1).bitwise_xor(static_cast<std::int64_t>(k0));
    c2 = high_half(a).bitwise_xor(c3).bitwise_xor(static_cast<std::int64_t>(k1));
    c1 = b.bitwise_and(low_half), c3 = a.bitwise_and(low_half);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const at::Tensor words = at::stack({c0, c1, c2, c3}, 1).reshape({-1});
  return at::stack({words.bitwise_and(0xFFFF), words.__rshift__(16)}, 1).reshape({-1});
}

/// {codes uint8, words int32} of `values` (not empty) on any device. Without a key, groups of NaN
/// or infinite values are for the caller to find by their word.
template <class = void>
std::vector<at::Tensor> encode_aten(IntFormat f, const at::Tensor& values,
                                    const std::optional<Key>& key) {
  const at::Tensor rows = rows_of_groups(f, values);
  const at::Tensor poison = rows.mul(0).sum(1);
  const at::Tensor lo = rows.amin(1).add(poison).cpu(), hi = rows.amax(1).add(poison).cpu();
  const std::int64_t groups = rows.size(0);
  const auto cpu = at::TensorOptions(at::kCPU);
  at::Tensor words = at::empty({groups}, cpu.dtype(at::kInt));
  at::Tensor encoders = at::empty({3, groups}, cpu.dtype(at::kFloat));
  GroupEncoder encoder;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::uint32_t word =
        group_word(f, lo.const_data_ptr<float>()[g], hi.const_data_ptr<float>()[g]);
    words.mutable_data_ptr<int>()[g] = static_cast<int>(word);
    encoder = group_encoder(f, word, key.has_value());
    float* out = encoders.mutable_data_ptr<float>() + g;
    out[0] = encoder.spread, out[groups] = encoder.offset, out[2 * groups] = encoder.inverse;
  }
  encoders = encoders.to(values.device()).unsqueeze(2);
  at::Tensor codes = rows.mul(encoders[0])
                         .add(encoders[1])
                         .mul(encoders[2])
                         .nan_to_num(0.0, 0.0, 0.0)
                         .clamp(encoder.lowest, encoder.highest)
                         .round()
                         .to(at::kInt)
                         .add_(encoder.zero)
                         .reshape({-1});
  if (key)
    codes = codes.add(random_bits16_aten(*key, codes.numel(), codes.device())).__rshift__(16);
  codes = codes.narrow(0, 0, values.numel());
  const std::int64_t per_byte = 8 / f.bits;
  const std::int64_t missing = (per_byte - codes.numel() % per_byte) % per_byte;
  codes = at::constant_pad_nd(codes, {0, missing}).reshape({-1, per_byte});
  at::Tensor bytes = codes.select(1, 0);
  for (std::int64_t i = 1; i < per_byte; ++i)
    bytes = bytes.bitwise_or(codes.select(1, i).__lshift__(i * f.bits));
  return {bytes.to(at::kByte), words.to(values.device())};
}

/// All n values, flat, fp32.
template <class = void>
at::Tensor decode_aten(IntFormat f, const at::Tensor& codes, const at::Tensor& words,
                       std::int64_t n) {
  const at::Tensor bytes = codes.to(at::kInt);
  std::vector<at::Tensor> parts;
  for (int bit = 0; bit < 8; bit += f.bits)
    parts.push_back(bytes.__rshift__(bit).bitwise_and((1 << f.bits) - 1));
  at::Tensor steps =
      at::stack(parts, 1).reshape({-1}).narrow(0, 0, n).sub(zero_code(f)).to(at::kFloat);
  const std::int64_t missing = (f.group - n % f.group) % f.group;
  steps = at::constant_pad_nd(steps, {0, missing}).reshape({-1, f.group});
  at::Tensor scale = words.view(at::kFloat).unsqueeze(1), minimum = at::zeros_like(scale);
  if (!f.symmetric) {
    scale = words.__lshift__(16).view(at::kFloat).unsqueeze(1);
    minimum = words.bitwise_and(-65536).view(at::kFloat).unsqueeze(1);
  }
  return steps.mul(scale).add(minimum).reshape({-1}).narrow(0, 0, n);
}

template <class = void>
FourfoldFormat kernel_format(IntFormat f) {
  return {.kind = 0, .bits = f.bits, .group = f.group, .symmetric = f.symmetric ? 1 : 0};
}

/// Formats without a kernel are told from others by asking for one, so where fourfold::cuda is
/// linked and nothing came of it, there is none.
template <class = void>
void warn_composed(IntFormat f, at::Device device) {
  warn_without_kernel("GroupQuantizer of " + std::to_string(f.bits) + " bits in groups of " +
                          std::to_string(f.group) + " packs tensors",
                      device, "by composed ATen operators, with dense copies for a moment",
                      /*has_kernel=*/cuda::kernels() == nullptr);
}

/// The two calls that a CUDA tensor comes through: by a kernel where there is one.
template <class = void>
std::vector<at::Tensor> cuda_compress(IntFormat f, const at::Tensor& values,
                                      const std::optional<Key>& key) {
  const at::Tensor dense = values.contiguous();
  const std::int64_t n = dense.numel();
  if (auto made = compress_by_kernel(kernel_format(f), dense, {(n * f.bits + 7) / 8, at::kByte},
                                     {(n + f.group - 1) / f.group, at::kInt}, key))
    return *std::move(made);
  warn_composed(f, values.device());
  return encode_aten(f, values, key);
}
template <class = void>
at::Tensor cuda_decompress(IntFormat f, const at::Tensor& codes, const at::Tensor& words,
                           std::int64_t n, at::ScalarType dtype) {
  if (auto out = decompress_by_kernel(kernel_format(f), codes, words, {n}, dtype))
    return *std::move(out);
  warn_composed(f, codes.device());
  at::Tensor values = decode_aten(f, codes, words, n);
  if (dtype == at::kHalf) values = values.clamp(-65504.0, 65504.0);  // as store_as saturates
  if (dtype == at::kBFloat16) values = values.clamp(-0x1.FEp127, 0x1.FEp127);
  return values.to(dtype);
}

}  // namespace fourfold::inline v0::detail

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// NF4 of whole tensors: buffers, threads, messages. The format is a value here, so that formats
/// are not copies of this code.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fourfold/codec/detail/by_kernel.hpp>
#include <fourfold/codec/detail/nf4_loops.hpp>
#include <fourfold/codec/detail/random16.hpp>
#include <fourfold/codec/detail/tile_io.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/visit.hpp>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace nf4::detail {

using fourfold::detail::kRandomTile;

template <class = void>
std::string format_name(Nf4Format f) {
  std::string name = "Nf4";
  if (f.double_quant) name += "DoubleQuant";
  if (f.search) name += "Search";
  return f.block == 64 ? name : name + "/" + std::to_string(f.block);
}

constexpr std::int64_t blocks_of(Nf4Format f, std::int64_t n) {
  return (n + f.block - 1) / f.block;
}
/// Blocks that must be packed together: those of one scale group, or of one tile of random bits.
constexpr std::int64_t blocks_per_unit(Nf4Format f) {
  return f.double_quant ? kScalesPerGroup : std::max<std::int64_t>(1, kRandomTile / f.block);
}

/// Scale of one block; `buffers` as in nf4.hpp.
class Scales {
 public:
  Scales(Nf4Format f, const std::vector<at::Tensor>& buffers)
      : codes_(f.double_quant ? buffers[1].const_data_ptr<std::uint8_t>() : nullptr),
        values_(buffers[f.double_quant ? 2 : 1].const_data_ptr<float>()) {}
  float operator[](std::int64_t block) const {
    return codes_ == nullptr ? values_[block]
                             : decode_scale(codes_[block], values_[block / kScalesPerGroup]);
  }

 private:
  const std::uint8_t* codes_;
  const float* values_;
};

/// Packs unit `unit` of n values. Returns whether all of it was finite.
template <class T>
bool compress_unit(Nf4Format f, const T* values, std::int64_t n, std::int64_t unit,
                   const PhiloxStream* stream, std::vector<at::Tensor>& buffers, Isa isa) {
  const std::int64_t first = unit * blocks_per_unit(f);
  const std::int64_t count = std::min(blocks_per_unit(f), blocks_of(f, n) - first);
  std::array<float, kScalesPerGroup> scales;
  std::array<float, kLargestBlock> buffer;
  const auto block = [&](std::int64_t b) {
    const std::int64_t begin = (first + b) * f.block;
    return fourfold::detail::load_group(values, begin, std::min<std::int64_t>(f.block, n - begin),
                                        f.block, buffer.data());
  };
  float largest = 0;
  bool finite = true;
  for (std::int64_t b = 0; b < count; ++b) {
    const float* from = block(b);
    float scale = largest_magnitude(from, f.block, isa);
    if (f.search && stream == nullptr) scale = search_scale(from, f.block, scale, isa);
    scales[static_cast<std::size_t>(b)] = scale;
    finite = finite && !std::isnan(scale);
    largest = std::max(largest, scale);
  }
  if (f.double_quant) {
    const float step = finite ? scale_step(largest) : std::numeric_limits<float>::quiet_NaN();
    buffers[2].mutable_data_ptr<float>()[unit] = step;
    std::uint8_t* codes = buffers[1].mutable_data_ptr<std::uint8_t>() + first;
    for (std::int64_t b = 0; b < count; ++b) {
      float& scale = scales[static_cast<std::size_t>(b)];
      codes[b] =
          static_cast<std::uint8_t>(finite ? encode_scale(scale, step, stream != nullptr) : 0);
      scale = decode_scale(codes[b], step);
    }
  } else {
    std::copy_n(scales.data(), count, buffers[1].mutable_data_ptr<float>() + first);
  }
  std::uint8_t* codes = buffers[0].mutable_data_ptr<std::uint8_t>();
  std::array<std::uint16_t, kLargestBlock> random;
  std::array<std::uint8_t, kLargestBlock / 2> tail;
  for (std::int64_t b = 0; b < count; ++b) {
    const std::int64_t begin = (first + b) * f.block;
    const std::int64_t size = std::min<std::int64_t>(f.block, n - begin);
    if (stream != nullptr && begin % kRandomTile == 0)
      for (std::int64_t i = 0; i < std::max<std::int64_t>(f.block, kRandomTile); i += kRandomTile)
        fourfold::detail::random16(*stream, (begin + i) / kRandomTile, random.data() + i, isa);
    const std::uint16_t* bits = stream == nullptr ? nullptr : random.data() + begin % kRandomTile;
    std::uint8_t* to = size < f.block ? tail.data() : codes + begin / 2;
    encode_block(block(b), f.block, scales[static_cast<std::size_t>(b)], bits, to, isa);
    if (size < f.block) std::copy_n(to, (size + 1) / 2, codes + begin / 2);
  }
  return finite;
}

/// What kernels/ has of NF4: its usual layout. The scale search alone is for the CPU.
constexpr bool has_kernel(Nf4Format f) { return f.block == 64 && !f.double_quant; }
constexpr bool has_kernel_to_compress(Nf4Format f, bool stochastic) {
  return has_kernel(f) && (!f.search || stochastic);
}
inline constexpr FourfoldFormat kKernelFormat{.kind = 1, .bits = 4, .group = 64, .symmetric = 0};

template <class = void>
std::vector<at::Tensor> compress(Nf4Format f, const at::Tensor& values,
                                 const std::optional<Key>& key, Isa isa = fourfold::isa()) {
  const std::string name = format_name(f);
  fourfold::detail::check_dense(values, name);
  const at::Tensor given = values.detach().resolve_neg().contiguous();
  const bool has_one = has_kernel_to_compress(f, key.has_value());
  if (has_one) {
    const std::int64_t n = given.numel();
    auto made = fourfold::detail::compress_by_kernel(kKernelFormat, given, {(n + 1) / 2, at::kByte},
                                                     {blocks_of(f, n), at::kFloat}, key);
    // What nearest rounding refuses is named below.
    if (made && (key || !fourfold::detail::any_nan((*made)[1]))) return *std::move(made);
  }
  return visit_float(values.scalar_type(), name, [&]<class T>(std::type_identity<T>) {
    const at::Tensor dense = fourfold::detail::by_way_of_cpu(given, name, has_one);
    const T* from = dense.const_data_ptr<T>();
    const std::int64_t n = dense.numel(), blocks = blocks_of(f, n), units_of = blocks_per_unit(f);
    std::vector<at::Tensor> buffers{at::empty({(n + 1) / 2}, at::kByte),
                                    at::empty({blocks}, f.double_quant ? at::kByte : at::kFloat)};
    const std::int64_t units = (blocks + units_of - 1) / units_of;
    if (f.double_quant) buffers.push_back(at::empty({units}, at::kFloat));
    const PhiloxStream stream = philox_stream(key.value_or(Key{}));
    fourfold::detail::FirstIndex misfit;
    parallel_for(0, units, fourfold::detail::groups_per_task(units_of * f.block),
                 [&](std::int64_t a, std::int64_t b) {
                   for (std::int64_t unit = a; unit < b; ++unit)
                     if (!compress_unit(f, from, n, unit, key ? &stream : nullptr, buffers, isa))
                       misfit.report(unit);
                 });
    if (!key && misfit.found())
      fourfold::detail::refuse_not_finite(dense, misfit.value() * units_of * f.block, name);
    for (at::Tensor& buffer : buffers) buffer = buffer.to(values.device());
    return buffers;
  });
}

template <class = void>
void decode(Nf4Format f, const std::vector<at::Tensor>& buffers, std::int64_t n, std::int64_t begin,
            std::int64_t end, float* out, Isa isa = fourfold::isa()) {
  const std::uint8_t* codes = buffers[0].const_data_ptr<std::uint8_t>();
  const Scales scales(f, buffers);
  constexpr std::int64_t kRun = 32;  // shortest run of the vector loops
  float whole[kRun];
  std::uint8_t tail[kRun / 2];
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t block = at / f.block;
    const std::int64_t stop = std::min({end, (block + 1) * f.block, n});
    const std::int64_t run = at % kRun == 0 ? (stop - at) / kRun * kRun : 0;
    if (run > 0) {
      decode_block(codes + at / 2, run, scales[block], out + (at - begin), isa);
      at += run;
      continue;
    }
    const std::int64_t first = at / kRun * kRun, last = std::min(stop, first + kRun);
    std::fill_n(tail, kRun / 2, std::uint8_t{0});
    std::copy(codes + first / 2, codes + (std::min(n, first + kRun) + 1) / 2, tail);
    decode_block(tail, kRun, scales[block], whole, isa);
    std::copy(whole + (at - first), whole + (last - first), out + (at - begin));
    at = last;
  }
}

template <class = void>
at::Tensor decompress(Nf4Format f, const std::vector<at::Tensor>& buffers, at::IntArrayRef sizes,
                      at::ScalarType dtype) {
  if (has_kernel(f))
    if (auto out = fourfold::detail::decompress_by_kernel(kKernelFormat, buffers[0], buffers[1],
                                                          sizes, dtype))
      return *std::move(out);
  const at::Device device = buffers[0].device();
  std::vector<at::Tensor> here;
  for (const at::Tensor& buffer : buffers)
    here.push_back(fourfold::detail::by_way_of_cpu(buffer, format_name(f), has_kernel(f)));
  const at::Tensor out = at::empty(sizes, dtype);
  const std::int64_t n = out.numel();
  visit_float(dtype, format_name(f), [&]<class T>(std::type_identity<T>) {
    T* to = out.mutable_data_ptr<T>();
    fourfold::detail::decode_to(to, n, f.block,
                                [&](std::int64_t begin, std::int64_t end, float* part) {
                                  decode(f, here, n, begin, end, part);
                                });
  });
  return out.to(device);
}

/// What the nearest of the levels around v may err at this scale.
template <class = void>
double half_gap(double v, double scale) {
  if (!(scale > 0)) return std::fabs(v);
  const double x = std::clamp(v / scale, -1.0, 1.0);
  double widest =
      0;  // a value on a level belongs to the gaps on both sides: it may round into either
  for (std::size_t k = 0; k < 15; ++k)
    if (x >= kLevels[k] - 0x1p-23 && x <= kLevels[k + 1] + 0x1p-23)
      widest = std::max(widest, double{kGaps[k]});
  return 0.5 * widest * scale + std::max(0.0, std::fabs(v) - scale);
}

template <class = void>
at::Tensor error_bound(Nf4Format f, const at::Tensor& values) {
  const at::Tensor here = values.detach().cpu();
  const std::vector<at::Tensor> nearest = compress(f, here, std::nullopt);
  // Stochastic codes have scales of their own: never searched for, and rounded up.
  const bool same = !f.search && !f.double_quant;
  const std::vector<at::Tensor> stochastic = same ? nearest : compress(f, here, Key{});
  const at::Tensor exact = here.to(at::kFloat).contiguous();
  const at::Tensor bound = at::empty(values.sizes(), at::kFloat);
  const Scales scales(f, nearest), wide(f, stochastic);
  const float* value = exact.const_data_ptr<float>();
  float* out = bound.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < bound.numel(); ++i) {
    double half = half_gap(value[i], scales[i / f.block]);
    if (!same) half = std::max(half, half_gap(value[i], wide[i / f.block]));
    out[i] = fourfold::detail::with_rounding(half, value[i], values.scalar_type());
  }
  return bound.to(values.device());
}

}  // namespace nf4::detail
}  // namespace fourfold::inline v0

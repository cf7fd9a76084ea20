// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Convolutions with a packed weight, a tile of its rows (dimension 0: output channels; input
/// channels where it is transposed) dense at a time. Differentiable in the input: a convolution and
/// its transpose are each other's gradient, so neither needs x.
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/zeros.h>
#include <fourfold/torch/parameters_products.hpp>

#include <algorithm>

namespace fourfold::door {

/// Most weights that a convolution holds dense at once (1 MiB of fp32), or one row if that is more.
inline constexpr std::int64_t kConvolutionTile = std::int64_t{1} << 18;

struct ConvolutionShape {
  std::vector<std::int64_t> stride, padding, dilation, output_padding;
  bool transposed = false;
  std::int64_t groups = 1;
};

namespace detail {

template <class = void>
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const ConvolutionShape& shape,
                    std::int64_t groups) {
  return at::convolution(x, weight, {}, shape.stride, shape.padding, shape.dilation,
                         shape.transposed, shape.output_padding, groups);
}

/// Rows [first, last) of W, dense.
template <class = void>
at::Tensor weight_rows(const std::shared_ptr<const Payload>& weight, std::int64_t first,
                       std::int64_t last) {
  std::vector<std::int64_t> sizes = weight->sizes().vec();
  const std::int64_t row = numel(*weight) / sizes[0];
  sizes[0] = last - first;
  if (!weight->device().is_cpu()) return weight->decompress().narrow(0, first, last - first);
  return PayloadRange(weight, first * row, std::move(sizes)).decompress();
}

/// x (B, in, ...), weight (out, in / groups, ...), or (in, out / groups, ...) where transposed.
template <class = void>
at::Tensor plain_convolution(const at::Tensor& x, const std::shared_ptr<const Payload>& weight,
                             const ConvolutionShape& shape) {
  const std::int64_t rows = weight->sizes()[0], in_group = rows / shape.groups;
  const std::int64_t row = numel(*weight) / rows;
  const std::int64_t most =
      std::max<std::int64_t>(1, kConvolutionTile / std::max<std::int64_t>(row, 1));
  if (rows <= most || !x.device().is_cpu())
    return convolve(x, weight_rows(weight, 0, rows), shape, shape.groups);

  // A tile is a few whole groups, or a part of one. Channels of x that it meets, of the result that
  // it makes: in proportion.
  const bool whole_groups = in_group <= most;
  const std::int64_t step = whole_groups ? most / in_group * in_group : most;
  const std::int64_t x_group = x.size(1) / shape.groups;
  std::vector<at::Tensor> made;
  at::Tensor sum;  // of the parts of one group, transposed
  for (std::int64_t first = 0; first < rows;) {
    const std::int64_t group = first / in_group;
    const std::int64_t end = whole_groups ? rows : (group + 1) * in_group;
    const std::int64_t last = std::min(first + step, end);
    const std::int64_t groups = whole_groups ? (last - first) / in_group : 1;
    const at::Tensor tile = weight_rows(weight, first, last);
    const at::Tensor met = shape.transposed ? x.narrow(1, first, last - first)
                                            : x.narrow(1, group * x_group, groups * x_group);
    const at::Tensor part = convolve(met, tile, shape, groups);
    if (!shape.transposed || whole_groups) {
      made.push_back(part);
    } else {
      if (sum.defined())
        sum.add_(part);
      else
        sum = part;
      if (last == end) made.push_back(std::exchange(sum, at::Tensor()));
    }
    first = last;
  }
  return at::cat(made, 1);
}

template <class = void>
ConvolutionShape transpose_of(const ConvolutionShape& shape, at::IntArrayRef x, at::IntArrayRef y,
                              at::IntArrayRef weight) {
  ConvolutionShape back = shape;
  back.transposed = !shape.transposed;
  // The positions of x that the strides left over belong to no window; they get zeros.
  for (std::size_t i = 0; i < shape.stride.size(); ++i)
    back.output_padding[i] =
        shape.transposed ? 0
                         : x[i + 2] - ((y[i + 2] - 1) * shape.stride[i] - 2 * shape.padding[i] +
                                       shape.dilation[i] * (weight[i + 2] - 1) + 1);
  return back;
}

template <class = void>
at::Tensor convolution(const at::Tensor& x, const std::shared_ptr<const Payload>& weight,
                       const ConvolutionShape& shape) {
  return linear_map(
      "PackedConvolutionBackward", x,
      [&](const at::Tensor& plain) { return plain_convolution(plain, weight, shape); },
      [weight, shape, sizes = x.sizes().vec()](const at::Tensor& gradient) {
        return convolution(gradient, weight,
                           transpose_of(shape, sizes, gradient.sizes(), weight->sizes()));
      });
}

/// Two convolutions, one for each factor; both differentiable by LibTorch.
template <class = void>
at::Tensor factorised_convolution(const at::Tensor& x, const Payload& weight,
                                  const ConvolutionShape& shape) {
  const std::size_t spatial = shape.stride.size();
  const at::Tensor left = weight.buffers()[0].to(x.scalar_type());   // (rows, R)
  const at::Tensor right = weight.buffers()[1].to(x.scalar_type());  // (R, columns)
  const std::int64_t rank = right.size(0), groups = shape.groups, rows = left.size(0);
  const std::vector<std::int64_t> ones(spatial, 1), zeros(spatial, 0);
  std::vector<std::int64_t> kernel = weight.sizes().vec();
  kernel[0] = rank;
  std::vector<std::int64_t> repeats(kernel.size(), 1);
  repeats[0] = groups;
  const at::Tensor wide = groups == 1 ? right.view(kernel) : right.view(kernel).repeat(repeats);
  const auto point = [&](const at::Tensor& input, at::Tensor matrix) {
    for (std::size_t i = 0; i < spatial; ++i) matrix = matrix.unsqueeze(-1);
    return at::convolution(input, matrix, {}, ones, zeros, ones, false, zeros, groups);
  };
  if (!shape.transposed) return point(convolve(x, wide, shape, groups), left);
  const at::Tensor turned = left.view({groups, rows / groups, rank})
                                .transpose(1, 2)
                                .reshape({groups * rank, rows / groups});
  return convolve(point(x, turned), wide, shape, groups);
}

}  // namespace detail
}  // namespace fourfold::door

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A loss by pieces of its rows, so that what is large in it (the logits of a vocabulary) exists for
/// one piece at a time, in forward and in backward:
///
///   auto loss = fourfold::chunked([&](const auto& hidden, const auto& target) {
///     return F::cross_entropy(head(hidden), target);
///   }, 16);
///   loss(hidden, target).backward();
///
/// Each piece is a checkpoint (checkpoint.hpp): backward computes it once more. For the linear layer
/// and cross entropy as above, linear_cross_entropy.hpp does without.
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <fourfold/activations/checkpoint.hpp>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// A callable of one tensor or more, each with the same number of rows (its first dimension), which
/// calls `loss` on `chunks` pieces of them and joins the results as `reduction` says: values of
/// pieces are averaged by their numbers of rows (Mean: `loss` is a mean over rows), added (Sum), or
/// put one behind the other (None: `loss` gives one value a row). A mean that leaves rows out
/// (ignore_index) or weighs them is not a mean over rows: use Sum, and divide.
template <class Loss>
[[nodiscard]] auto chunked(Loss loss, std::int64_t chunks,
                           at::Reduction::Reduction reduction = at::Reduction::Mean) {
  TORCH_CHECK(chunks >= 1, "chunked(loss, n): n is ", chunks,
              ", and a loss has one piece at least; give the number of pieces");
  return [loss = std::move(loss), chunks, reduction](const at::Tensor& first, const auto&... rest) {
    const auto rows_of = [](const at::Tensor& tensor) {
      TORCH_CHECK(tensor.dim() >= 1,
                  "chunked(loss, n) splits tensors by rows, and was given one "
                  "without dimensions; capture it in the loss instead");
      return tensor.size(0);
    };
    const std::int64_t rows = rows_of(first);
    [[maybe_unused]] const auto check = [&](const at::Tensor& tensor) {
      TORCH_CHECK(rows_of(tensor) == rows, "chunked(loss, n): the first tensor has ", rows,
                  " rows and another ", rows_of(tensor),
                  "; all are split alike, so capture in the loss what is not by rows");
    };
    (check(rest), ...);
    const std::int64_t size = std::max<std::int64_t>(1, (rows + chunks - 1) / chunks);
    std::vector<at::Tensor> values;
    for (std::int64_t begin = 0; begin < std::max<std::int64_t>(rows, 1); begin += size) {
      const std::int64_t count = std::min(size, rows - begin);
      at::Tensor value =
          checkpoint(loss, first.narrow(0, begin, count), rest.narrow(0, begin, count)...);
      TORCH_CHECK(value.dim() == (reduction == at::Reduction::None ? 1 : 0),
                  "chunked(loss, n): the loss gave sizes ", value.sizes(), " for ", count,
                  " rows; Mean and Sum want one value, None one a row");
      const double share = static_cast<double>(count) / static_cast<double>(rows);
      values.push_back(reduction == at::Reduction::Mean && rows > 0 ? value * share : value);
    }
    return reduction == at::Reduction::None ? at::cat(values) : at::stack(values).sum();
  };
}

}  // namespace fourfold::inline v0

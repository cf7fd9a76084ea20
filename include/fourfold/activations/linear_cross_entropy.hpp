// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The last linear layer and its cross entropy in one: logits exist for a few rows at a time. With
/// a vocabulary of 10,000 and more they are the largest tensor of a language model, three times
/// over: logits, their log-softmax and its gradient.
///
///   auto loss = F::cross_entropy(head(hidden), target, options);                            // plain
///   auto loss = fourfold::linear_cross_entropy(hidden, head->weight, target,
///                                              {.bias = head->bias, .loss = options});
///
/// Where there is something to train, forward computes the gradients of hidden, weight and bias
/// along with the loss, a piece of rows at a time, in place of the piece's logits (as Liger Kernel
/// does, arXiv 2410.10989, section 3.2): no product is computed twice, and between forward and
/// backward stand these gradients alone. They have no second derivative, and say so.
#include <ATen/core/Tensor.h>
#include <torch/nn/options/loss.h>
#include <fourfold/activations/chunked.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/autocast.hpp>
#include <fourfold/torch/known_gradients.hpp>
#include <fourfold/torch/parameters_tensor.hpp>

#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstdint>
#include <variant>
#include <vector>

namespace fourfold::inline v0 {

struct LinearCrossEntropyOptions {
  at::Tensor bias = {};                          ///< (classes), of the linear layer
  torch::nn::CrossEntropyLossOptions loss = {};  ///< class weights, ignore_index, label smoothing
  std::int64_t rows =
      0;  ///< whose logits exist at once; 0: as many bytes as hidden has, from 8 MiB
};

namespace detail {

/// What linear_cross_entropy was given, checked, in two dimensions.
template <class = void>
struct LinearCrossEntropy {
  at::Tensor hidden, weight, target;  ///< (n, width), (classes, width), (n)
  at::Tensor bias, class_weight;      ///< (classes) or none
  at::Reduction::Reduction reduction;
  std::int64_t ignore_index, rows;
  double smoothing;

  LinearCrossEntropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                     const LinearCrossEntropyOptions& options);

  /// By pieces that autograd sees and backward computes again: any derivative, any weight.
  [[nodiscard]] at::Tensor recomputed() const;
  /// Together with gradients, of what they are asked.
  struct Result {
    at::Tensor loss, hidden, weight, bias;
    at::Tensor factor;  ///< of the gradients: 1 / (weight of the rows) for a mean, else 1
  };
  [[nodiscard]] Result with_gradients(bool of_hidden, bool of_weight, bool of_bias) const;
};

template <class V>
LinearCrossEntropy<V>::LinearCrossEntropy(const at::Tensor& all_hidden, const at::Tensor& of_weight,
                                          const at::Tensor& all_target,
                                          const LinearCrossEntropyOptions& options)
    : weight(of_weight),
      bias(options.bias),
      class_weight(options.loss.weight()),
      reduction(std::holds_alternative<torch::enumtype::kNone>(options.loss.reduction())
                    ? at::Reduction::None
                : std::holds_alternative<torch::enumtype::kSum>(options.loss.reduction())
                    ? at::Reduction::Sum
                    : at::Reduction::Mean),
      ignore_index(options.loss.ignore_index()),
      rows(options.rows),
      smoothing(options.loss.label_smoothing()) {
  constexpr const char* what = "linear_cross_entropy";
  TORCH_CHECK(all_hidden.defined() && weight.defined() && all_target.defined(), what,
              " was given an undefined tensor; it takes hidden (..., width), weight (classes, "
              "width) and target (...)");
  TORCH_CHECK(weight.dim() == 2 && all_hidden.dim() >= 1 && all_hidden.size(-1) == weight.size(1),
              what, ": hidden has sizes ", all_hidden.sizes(), " and weight ", weight.sizes(),
              "; they are (..., width) and (classes, width), as nn::Linear has them");
  TORCH_CHECK(all_hidden.is_floating_point() && weight.is_floating_point(), what, ": hidden is ",
              all_hidden.scalar_type(), " and weight ", weight.scalar_type(),
              ", and both are floating; convert them first");
  TORCH_CHECK(all_target.scalar_type() == at::kLong, what, ": target is ", all_target.scalar_type(),
              ", and classes are Long: convert it by to(torch::kLong), or, where it holds "
              "probabilities of classes, use fourfold::chunked");
  TORCH_CHECK(all_target.sizes() == all_hidden.sizes().slice(0, all_hidden.dim() - 1), what,
              ": target has sizes ", all_target.sizes(), " and hidden ", all_hidden.sizes(),
              "; give one class for each of hidden's rows, ",
              all_hidden.sizes().slice(0, all_hidden.dim() - 1));
  const auto of_classes = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(!tensor.defined() || (tensor.dim() == 1 && tensor.size(0) == weight.size(0)), what,
                ": ", name, " has sizes ", tensor.sizes(), ", and there are ", weight.size(0),
                " classes; give one value a class");
  };
  of_classes(bias, "bias");
  of_classes(class_weight, "the class weight");
  TORCH_CHECK(0 <= smoothing && smoothing <= 1, what, ": label_smoothing is ", smoothing,
              ", and lies in [0, 1]");
  TORCH_CHECK(rows >= 0, what, ": rows is ", rows,
              "; give a positive number, or 0 for the default");
  hidden = all_hidden.reshape({-1, weight.size(1)});
  target = all_target.reshape({-1});
  if (target.is_cpu()) {  // elsewhere the device itself complains
    const at::Tensor wrong =
        target.ne(ignore_index).logical_and_(target.lt(0).logical_or_(target.ge(weight.size(0))));
    TORCH_CHECK_INDEX(!wrong.any().item<bool>(), what, ": target ",
                      target.masked_select(wrong)[0].item<std::int64_t>(), " is out of bounds of ",
                      weight.size(0), " classes; mend it, or name it as ignore_index");
  }
  if (rows == 0) {
    const std::int64_t bytes =
        std::max<std::int64_t>(std::int64_t{8} << 20, static_cast<std::int64_t>(hidden.nbytes()));
    rows = bytes / std::max<std::int64_t>(1, 4 * weight.size(0));
  }
  rows = std::clamp<std::int64_t>(rows, 1, std::max<std::int64_t>(1, hidden.size(0)));
}

template <class V>
at::Tensor LinearCrossEntropy<V>::recomputed() const {
  const std::int64_t n = hidden.size(0);
  const auto sum_or_none =
      reduction == at::Reduction::None ? at::Reduction::None : at::Reduction::Sum;
  const auto piece = [=, *this](const at::Tensor& x, const at::Tensor& y) {
    return at::cross_entropy_loss(at::linear(x, weight, bias), y, class_weight, sum_or_none,
                                  ignore_index, smoothing);
  };
  at::Tensor loss =
      chunked(piece, std::max<std::int64_t>(1, (n + rows - 1) / rows), sum_or_none)(hidden, target);
  if (reduction != at::Reduction::Mean) return loss;
  const at::Tensor counted = target.ne(ignore_index);
  return loss / (class_weight.defined()
                     ? class_weight.index_select(0, target.masked_select(counted)).sum()
                     : counted.sum());
}

template <class V>
typename LinearCrossEntropy<V>::Result LinearCrossEntropy<V>::with_gradients(bool of_hidden,
                                                                             bool of_weight,
                                                                             bool of_bias) const {
  const at::NoGradGuard no_grad;
  // Autocast would cast the weight for each piece, and remember a cast that has no gradient.
  auto autocast = door::AutocastState::current();
  const at::DeviceType device = hidden.device().type();
  const bool cast =
      at::autocast::is_autocast_enabled(device) && hidden.scalar_type() != at::kDouble;
  const at::ScalarType dtype =
      cast ? at::autocast::get_autocast_dtype(device) : hidden.scalar_type();
  for (auto& each : autocast.devices) each.enabled = false;
  const door::AutocastGuard plain(autocast);

  const at::Tensor w = weight.detach().to(dtype),
                   b = bias.defined() ? bias.detach().to(dtype) : bias;
  const at::ScalarType exact = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const std::int64_t n = hidden.size(0), classes = weight.size(0);
  const at::Tensor ignored = target.eq(ignore_index), known = target.masked_fill(ignored, 0);
  const at::Tensor of_class =
      class_weight.defined() ? class_weight.detach().to(exact) : at::Tensor();
  // Row i adds sum over c of a[i][c] * -logp[i][c]: a is own[i] at its class, and everywhere
  // evenly[i] * of_class[c].
  const auto options = hidden.options().dtype(exact);
  at::Tensor weight_of_row =
      of_class.defined() ? of_class.index_select(0, known) : at::ones({n}, options);
  weight_of_row.masked_fill_(ignored, 0);
  const at::Tensor total =
      reduction == at::Reduction::Mean ? weight_of_row.sum() : at::ones({}, options);
  // The factor 1 / total waits for backward, lest gradients of a long mean underflow in fp16.
  const at::Tensor own = weight_of_row.mul_(1 - smoothing);  // 0 where the row is ignored
  const double even = smoothing / static_cast<double>(classes);
  const at::Tensor evenly = at::full({n}, even, options).masked_fill_(ignored, 0);
  const at::Tensor all_classes =
      of_class.defined() ? of_class.sum() : at::full({}, static_cast<double>(classes), options);

  Result result;
  {
    const PlaceGuard place(Place::kGradients);
    if (of_hidden) result.hidden = at::empty_like(hidden, at::MemoryFormat::Contiguous);
    if (of_weight) result.weight = at::zeros_like(w, options, at::MemoryFormat::Contiguous);
    if (of_bias) result.bias = at::zeros({classes}, options);
  }
  at::Tensor sum = at::zeros({}, options);
  for (std::int64_t begin = 0; begin < n; begin += rows) {
    const std::int64_t count = std::min(rows, n - begin);
    const auto piece = [&](const at::Tensor& tensor) { return tensor.narrow(0, begin, count); };
    const auto column = [&](const at::Tensor& tensor) { return tensor.unsqueeze(1); };
    const at::Tensor x = piece(hidden).detach().to(dtype), y = column(piece(known));
    at::Tensor z = at::linear(x, w, b).to(exact);  // logits; from here on one buffer
    z.sub_(z.amax(1, /*keepdim=*/true));
    const at::Tensor at_class = z.gather(1, y).squeeze(1);
    const at::Tensor at_all = even == 0            ? at::Tensor()
                              : of_class.defined() ? z.mv(of_class)
                                                   : z.sum(1);
    const at::Tensor powers = z.exp_().sum(1), log_of_sum = powers.log();
    at::Tensor losses = piece(own) * (log_of_sum - at_class);
    if (even != 0) losses += (all_classes * log_of_sum - at_all).mul_(even);
    sum += losses.masked_fill_(piece(ignored), 0).sum();  // also where such a row is not finite
    if (!of_hidden && !of_weight && !of_bias) continue;

    // d (total * loss) / d logits = (sum over c of a) * softmax - a; 0 where the row is ignored
    z.mul_(column((piece(own) + all_classes * piece(evenly)).div_(powers)));
    z.scatter_add_(1, y, column(piece(own)).neg());
    if (even != 0 && of_class.defined()) z.addr_(piece(evenly), of_class, 1, -1);
    if (even != 0 && !of_class.defined()) z.sub_(column(piece(evenly)));
    if (of_bias) result.bias += z.sum(0);
    z = z.to(dtype);
    if (of_hidden) piece(result.hidden).copy_(at::mm(z, w));
    if (of_weight && dtype == exact) result.weight.addmm_(z.t(), x);
    if (of_weight &&
        dtype != exact) {  // add_ makes an fp32 copy of what it adds: few classes' alone
      const std::int64_t most = std::max<std::int64_t>(1, rows * classes / (4 * w.size(1)));
      for (std::int64_t c = 0; c < classes; c += most) {
        const std::int64_t some = std::min(most, classes - c);
        result.weight.narrow(0, c, some).add_(at::mm(z.narrow(1, c, some).t(), x));
      }
    }
  }
  result.loss = (sum / total).to(cast ? at::kFloat : hidden.scalar_type());
  result.factor = total.reciprocal().masked_fill_(total.eq(0), 0);
  return result;
}

}  // namespace detail

/// F::cross_entropy(F::linear(hidden, weight, options.bias), target, options.loss). hidden (...,
/// width), weight (classes, width), target (...) of classes. What LibTorch reduces in the same
/// dtype it reduces here in fp32, so losses and gradients are its own up to rounding. Reduction
/// None and packed weights compute each piece again in backward (chunked.hpp), and have derivatives
/// of any order.
template <class = void>
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& target,
                                const LinearCrossEntropyOptions& options = {}) {
  const detail::LinearCrossEntropy<> problem(hidden, weight, target, options);
  if (problem.reduction == at::Reduction::None || door::is_packed(weight)) {
    const at::Tensor loss = problem.recomputed();
    return loss.dim() == 0 ? loss : loss.view(target.sizes());
  }
  const auto trained = [](const at::Tensor& tensor) {
    return at::GradMode::is_enabled() && tensor.defined() && tensor.requires_grad();
  };
  auto result = problem.with_gradients(trained(hidden), trained(weight), trained(options.bias));
  if (!trained(hidden) && !trained(weight) && !trained(options.bias)) return result.loss;
  return door::with_gradients("linear_cross_entropy", result.loss,
                              {problem.hidden, weight, options.bias}, result.factor,
                              {result.hidden, result.weight, result.bias});
}

}  // namespace fourfold::inline v0

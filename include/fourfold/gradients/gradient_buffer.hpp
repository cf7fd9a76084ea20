// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A sum of gradients held in few bits, with error feedback: what the code of the sum leaves over
/// is held too, in fewer bits, and goes into the next sum (1-bit SGD of Seide et al., Interspeech
/// 2014; a residual in 4 bits as in MicroAdam, arXiv 2405.15593).
///   GradientBuffer<Int8> buffer;          // 12.75 bits a value, in place of fp32's 32
///   buffer.add(gradient);                 // once a micro-batch
///   buffer.add_to(last_gradient);         // last_gradient += the sum
///
/// With s the step of Code in a value's group, each add() rounds by s / 30 at most (half a step of
/// Error = Int4, whose range is one s), so n of them by n s / 30, and no sum is ever stuck: a
/// gradient smaller than s reaches the sum through the residual. Without feedback it would be lost.
///
/// 1024 values at a time: no dense copy. NaN and infinities make their group NaN.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fourfold/codec/detail/coded_values.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/visit.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fourfold::inline v0 {
template <class Code = Int8, class Error = Int4>
class GradientBuffer {
  static_assert(detail::kIsGroupInt<Code> && detail::kIsGroupInt<Error>,
                "a GradientBuffer holds its sum and the error of it in integer codes: "
                "GradientBuffer<Int8>, GradientBuffer<Int4>, or GradientBuffer<Int4, Int8>");
  static constexpr std::int64_t kTile = 1024;
  static_assert(kTile % Code::kFormat.group == 0 && kTile % Error::kFormat.group == 0,
                "1024 values are coded at a time: a group of both codes must divide 1024");

 public:
  /// The first gradient sets sizes, strides and dtype. Errors, the sum as it was: another gradient
  /// is of other sizes or dtype; one that is not dense, floating, and on a CPU.
  void add(const at::Tensor& gradient) {
    check(gradient);
    if (empty()) begin(gradient);
    const at::Tensor given = in_order(gradient);
    each_tile(given, [this]<class T>(const T* from, std::int64_t begin, std::int64_t n) {
      alignas(64) float sum[kTile], part[kTile];
      const Isa use = isa();
      code_.decode(Code::kFormat, begin, n, sum, use);
      error_.decode(Error::kFormat, begin, n, part, use);
      for (std::int64_t i = 0; i < n; ++i) sum[i] += part[i] + static_cast<float>(from[i]);
      code_.encode(Code::kFormat, begin, n, sum, {}, use);
      code_.decode(Code::kFormat, begin, n, part, use);
      for (std::int64_t i = 0; i < n; ++i) sum[i] -= part[i];
      error_.encode(Error::kFormat, begin, n, sum, {}, use);
    });
  }

  /// gradient += the sum, in place; nothing where empty(). Errors as add()'s.
  void add_to(const at::Tensor& gradient) const {
    if (empty()) return;
    check(gradient);
    const at::Tensor ordered = in_order(gradient);
    each_tile(ordered, [this]<class T>(const T* values, std::int64_t begin, std::int64_t n) {
      alignas(64) float sum[kTile], part[kTile];
      const Isa use = isa();
      code_.decode(Code::kFormat, begin, n, sum, use);
      error_.decode(Error::kFormat, begin, n, part, use);
      T* to = const_cast<T*>(values);  // NOLINT: of a tensor that is ours to write
      for (std::int64_t i = 0; i < n; ++i)
        to[i] = static_cast<T>(static_cast<float>(to[i]) + (sum[i] + part[i]));
    });
    const c10::NoGradGuard no_grad;
    if (!ordered.is_same(gradient)) gradient.detach().copy_(ordered);
  }

  /// The sum as a dense tensor; undefined where empty().
  [[nodiscard]] at::Tensor value() const {
    if (empty()) return {};
    const at::Tensor sum = at::empty_strided(sizes_, strides_, dtype_).zero_();
    add_to(sum);
    return sum;
  }

  [[nodiscard]] bool empty() const { return !code_.codes.defined(); }
  void clear() { code_ = {}, error_ = {}; }
  [[nodiscard]] std::int64_t nbytes() const { return code_.nbytes() + error_.nbytes(); }

 private:
  void check(const at::Tensor& gradient) const {
    TORCH_CHECK(gradient.defined() && gradient.layout() == at::kStrided && gradient.is_cpu() &&
                    gradient.is_floating_point(),
                "a GradientBuffer adds dense floating gradients on a CPU, but was given ",
                gradient.defined() ? c10::str("a ", gradient.layout(), " ", gradient.scalar_type(),
                                              " one on ", gradient.device())
                                   : "an undefined one",
                "; accumulate such a gradient in its parameter, without a buffer");
    TORCH_CHECK(empty() || (gradient.sizes() == sizes_ && gradient.scalar_type() == dtype_),
                "a GradientBuffer of ", dtype_, " ", at::IntArrayRef(sizes_), " was given a ",
                gradient.scalar_type(), " gradient of sizes ", gradient.sizes(),
                "; clear() it before a parameter changes its shape");
  }
  void begin(const at::Tensor& gradient) {
    const PlaceGuard place(Place::kGradients);
    sizes_ = gradient.sizes().vec(), dtype_ = gradient.scalar_type();
    strides_ = gradient.is_non_overlapping_and_dense() ? gradient.strides().vec()
                                                       : gradient.contiguous().strides().vec();
    code_ = detail::CodedValues(Code::kFormat, gradient.numel());
    error_ = detail::CodedValues(Error::kFormat, gradient.numel());
  }
  /// `gradient`, or a copy whose values lie in memory as those of the sum.
  at::Tensor in_order(const at::Tensor& gradient) const {
    if (gradient.strides() == at::IntArrayRef(strides_)) return gradient;
    const c10::NoGradGuard no_grad;
    return at::empty_strided(sizes_, strides_, dtype_).copy_(gradient);
  }
  template <class F>
  void each_tile(const at::Tensor& values, const F& f) const {
    visit_float(dtype_, "GradientBuffer", [&]<class T>(std::type_identity<T>) {
      const T* first = values.const_data_ptr<T>();
      const std::int64_t n = values.numel();
      parallel_for(0, detail::ceil_div(n, kTile), 16, [&](std::int64_t a, std::int64_t b) {
        for (std::int64_t begin = a * kTile; begin < std::min(n, b * kTile); begin += kTile)
          f(first + begin, begin, std::min(kTile, n - begin));
      });
    });
  }

  std::vector<std::int64_t> sizes_, strides_;
  at::ScalarType dtype_ = at::kFloat;
  detail::CodedValues code_, error_;
};

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Midpoint-radius arithmetic: tensors of which is known that each value lies in [mid - rad, mid +
/// rad]. What an fp32 program computes from values in balls lies in the result's ball: each
/// operation adds what fp32 may round to what its arguments bring. Slow on purpose, in double,
/// whose own rounding is 2^29 times smaller than what is added here.
#include <fourfold/codec/int_code.hpp>  // IntFormat, levels

#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fourfold::reference {

/// Twice fp32's unit roundoff: also covers products of (1 + unit), as many as there are terms here.
inline constexpr double kRounding = 0x1p-23;

struct Ball {
  at::Tensor mid, rad;
};

inline Ball exactly(const at::Tensor& values) {
  const at::Tensor mid = values.detach().to(at::kDouble);
  return {mid, at::zeros_like(mid)};
}
/// Of the ball's values, the largest magnitude.
inline at::Tensor reach(const Ball& x) { return x.mid.abs() + x.rad; }
inline Ball rounded(Ball x, double roundings = 1) {
  x.rad = x.rad + roundings * kRounding * reach(x);
  return x;
}
inline bool holds(const Ball& ball, const at::Tensor& values) {
  return ((values.to(at::kDouble) - ball.mid).abs() <= ball.rad).all().item<bool>();
}

/// For what only moves values: view, transpose, chunk, ...
template <class F>
Ball moved(const Ball& x, const F& f) {
  return {f(x.mid), f(x.rad)};
}
inline Ball joined(const std::vector<Ball>& parts, std::int64_t dim) {
  std::vector<at::Tensor> mid, rad;
  for (const Ball& part : parts) mid.push_back(part.mid), rad.push_back(part.rad);
  return {at::cat(mid, dim), at::cat(rad, dim)};
}

inline Ball operator+(const Ball& a, const Ball& b) {
  return rounded({a.mid + b.mid, a.rad + b.rad});
}
inline Ball operator-(const Ball& a, const Ball& b) {
  return rounded({a.mid - b.mid, a.rad + b.rad});
}
inline Ball operator*(const Ball& x, double by) { return rounded({x.mid * by, x.rad * by}); }

/// f is bilinear without negative coefficients and sums `terms` products, in any order:
/// |f(a', b') - f(a, b)| <= f(|a|, rb) + f(ra, |b| + rb), and terms * unit * f(|a'|, |b'|).
template <class F>
Ball bilinear(const F& f, const Ball& a, const Ball& b, std::int64_t terms) {
  return {f(a.mid, b.mid), f(a.mid.abs(), b.rad) + f(a.rad, reach(b)) +
                               static_cast<double>(terms) * kRounding * f(reach(a), reach(b))};
}
inline Ball operator*(const Ball& a, const Ball& b) {
  return bilinear([](const auto& x, const auto& y) { return x * y; }, a, b, 1);
}
inline Ball matmul(const Ball& a, const Ball& b) {
  return bilinear([](const auto& x, const auto& y) { return at::matmul(x, y); }, a, b,
                  a.mid.size(-1) + 1);
}
inline Ball transposed(const Ball& x) {
  return moved(x, [](const auto& t) { return t.transpose(-2, -1); });
}
inline Ball sum(const Ball& x, std::int64_t dim, bool keep = false) {
  const double terms = static_cast<double>(x.mid.size(dim));
  return {x.mid.sum(dim, keep), x.rad.sum(dim, keep) + terms * kRounding * reach(x).sum(dim, keep)};
}
inline Ball mean(const Ball& x, std::int64_t dim) {
  return sum(x, dim, true) * (1.0 / static_cast<double>(x.mid.size(dim)));
}

/// A smooth function of each value, by Taylor: |f(x') - f(x)| <= |f'(x)| r + max|f''| / 2 r^2. Four
/// units for the function's own fp32 arithmetic, of its result and of its argument.
inline Ball smooth(const Ball& x, const at::Tensor& value, const at::Tensor& slope,
                   double curvature) {
  const at::Tensor r = x.rad + 4 * kRounding * reach(x);
  return rounded({value, slope.abs() * r + 0.5 * curvature * r.square()}, 4);
}
inline Ball sigmoid(const Ball& x) {  // |s''| = |s (1 - s) (1 - 2 s)| <= sqrt(3) / 18
  const at::Tensor s = x.mid.sigmoid();
  return smooth(x, s, s * (1 - s), 0.0963);
}
inline Ball tanh(const Ball& x) {  // |t''| = |2 t (1 - t^2)| <= 4 sqrt(3) / 9
  const at::Tensor t = x.mid.tanh();
  return smooth(x, t, 1 - t.square(), 0.7699);
}
/// The slopes of both, from their results.
inline Ball sigmoid_slope(const Ball& s) {
  return smooth(s, s.mid * (1 - s.mid), 1 - 2 * s.mid, 2);
}
inline Ball tanh_slope(const Ball& t) { return smooth(t, 1 - t.mid.square(), 2 * t.mid, 2); }
/// x s(x). With s' = s (1 - s): first derivative s + x s', second s' (2 + x (1 - 2 s)), at most 1/2
/// (at 0); the third is at most 0.31 (near 1.2 in magnitude).
inline Ball silu(const Ball& x) {
  const at::Tensor s = x.mid.sigmoid();
  return smooth(x, x.mid * s, s + x.mid * s * (1 - s), 0.5);
}
inline Ball silu_slope(const Ball& x) {
  const at::Tensor s = x.mid.sigmoid(), ds = s * (1 - s);
  return smooth(x, s + x.mid * ds, ds * (2 + x.mid * (1 - 2 * s)), 0.31);
}
/// (x - mean) and 1 / sqrt(variance + eps), of rows. Centring is a projection and a row's deviation
/// its length over sqrt(n): errors of r move it by sqrt(mean r^2) at most.
inline Ball centred(const Ball& x) { return x - mean(x, 1); }
inline Ball inverse_deviation(const Ball& x, double eps) {
  const Ball c = centred(x);
  const at::Tensor deviation = c.mid.square().mean(1, true).sqrt();
  const double roundings = static_cast<double>(4 + x.mid.size(1)) * kRounding;
  const at::Tensor r = (x.rad + roundings * reach(x)).square().mean(1, true).sqrt();
  const auto inverse = [&](const at::Tensor& d) { return (d.square() + eps).rsqrt(); };
  const at::Tensor mid = inverse(deviation);
  return rounded({mid, inverse((deviation - r).clamp_min(0)) - mid}, roundings / kRounding);
}
/// Along the last dimension. If all arguments move by r at most, exponentials and their sum move by
/// a factor of exp(r) at most, in opposite directions at worst.
inline Ball softmax(const Ball& x) {
  const at::Tensor mid = x.mid.softmax(-1);
  const at::Tensor r = (x.rad + 4 * kRounding * reach(x)).amax(-1, true);
  return rounded({mid, mid * (2 * r).expm1()}, 8 + static_cast<double>(x.mid.size(-1)));
}
/// 1 where x is positive, else 0; [0, 1] where the ball does not say.
inline Ball positive(const Ball& x) {
  const at::Tensor low = (x.mid > x.rad).to(at::kDouble), high = (x.mid > -x.rad).to(at::kDouble);
  return {(low + high) / 2, (high - low) / 2};
}

/// What an asymmetric code makes of it, whatever it draws: a value moves to one of the two codes
/// around it, by one step at most. The step (codec/int_code.hpp) is the group's range over the
/// number of levels, where the minimum is a bf16 rounded down (2^-7 of it at most) and the scale
/// one rounded up, or the next (two times 2^-7); 2^-12 for the rounding to units of 2^-16 of a step
/// and for fp32. Of values in balls the range is at most that of the balls.
inline Ball packed(const Ball& x, IntFormat format) {
  const std::int64_t n = x.mid.numel(), groups = (n + format.group - 1) / format.group;
  const auto in_groups = [&](const at::Tensor& values, double beyond) {
    return at::constant_pad_nd(values.reshape({n}), {0, groups * format.group - n}, beyond)
        .view({groups, format.group});
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const at::Tensor low = in_groups(x.mid - x.rad, kInfinity).amin(1, true);
  const at::Tensor high = in_groups(x.mid + x.rad, -kInfinity).amax(1, true);
  const at::Tensor step = (high - low + 0x1p-7 * low.abs()) / levels(format) *
                              ((1 + 0x1p-7) * (1 + 0x1p-7) * (1 + 0x1p-12)) +
                          2 * kRounding * at::maximum(low.abs(), high.abs());
  return {x.mid, x.rad + step.expand({groups, format.group})
                             .reshape({groups * format.group})
                             .slice(0, 0, n)
                             .view_as(x.mid)};
}

}  // namespace fourfold::reference

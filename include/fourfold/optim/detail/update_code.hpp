// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The arithmetic by which rules update one value. Shared by the plain loops, the vector loops and
/// the CUDA kernel.
#include <fourfold/core/host_device.hpp>

#include <cmath>
#include <cstdint>

namespace fourfold::inline v0 {
namespace optim::detail {

struct AdamWNumbers {
  float decay = 1;        ///< 1 - lr * weight_decay
  float keep_first = 0;   ///< beta1
  float take_first = 0;   ///< 1 - beta1
  float keep_second = 0;  ///< beta2
  float take_second = 0;  ///< 1 - beta2
  float root = 1;         ///< 1 / sqrt(1 - beta2^step)
  float eps = 0;
  float rate = 0;  ///< -lr / (1 - beta1^step)
};

/// One parameter group's numbers at one step, computed in double as LibTorch does, then rounded.
struct AdamWFactors : AdamWNumbers {
  AdamWFactors(double lr, double beta1, double beta2, double epsilon, double weight_decay,
               std::int64_t step)
      : AdamWNumbers{
            .decay = static_cast<float>(1 - lr * weight_decay),
            .keep_first = static_cast<float>(beta1),
            .take_first = static_cast<float>(1 - beta1),
            .keep_second = static_cast<float>(beta2),
            .take_second = static_cast<float>(1 - beta2),
            .root =
                static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
            .eps = static_cast<float>(epsilon),
            .rate = static_cast<float>(-(lr / (1 - std::pow(beta1, static_cast<double>(step)))))} {}

  /// Those of one of a step's gradients: moments decay with the first, the weight moves with the
  /// last, so that m takes up their sum and v the sum of their squares.
  [[nodiscard]] AdamWFactors folded(bool first, bool last) const {
    AdamWFactors k = *this;
    if (!first) k.keep_first = k.keep_second = 1;
    if (!last) k.decay = 1, k.rate = 0, k.eps = 1;
    return k;
  }
};

/// p * decay and the quotient are added by an fma with 1, so that no compiler contracts the product
/// into the sum: LibTorch rounds it first.
FOURFOLD_ONE_VALUE void update_adamw(float& p, float g, float& m, float& v, const AdamWNumbers& k) {
  m = fma(g, k.take_first, m * k.keep_first);
  v = fma(k.take_second * g, g, v * k.keep_second);
  const float denominator = fma(std::sqrt(v), k.root, k.eps);
  p = fma(k.rate * m / denominator, 1.0F, p * k.decay);
}

/// What Adam and SGD make of a gradient: weight decay is added to it.
template <class T>
FOURFOLD_ONE_VALUE T add_weight_decay(T g, T p, T weight_decay) {
  return fma(p, weight_decay, g);
}

/// keep and take are momentum and 1 - dampening, rate is -lr.
template <class T>
struct SGDNumbers {
  T weight_decay = 0, momentum = 0, keep = 0, take = 1, rate = 0;
};
template <bool Momentum, class T>
FOURFOLD_ONE_VALUE void update_sgd(T& p, T g, float& m, bool nesterov, const SGDNumbers<T>& k) {
  T step = add_weight_decay(g, p, k.weight_decay);
  if constexpr (Momentum) {
    const T buffer = fma(step, k.take, static_cast<T>(m) * k.keep);
    m = static_cast<float>(buffer);
    step = nesterov ? fma(buffer, k.momentum, step) : buffer;
  }
  p = fma(step, k.rate, p);
}

/// beta1, 1 - beta1, beta2, 1 - beta2, -lr, 1 - lr * weight_decay.
template <class T>
struct LionNumbers {
  T keep_step = 0, take_step = 0, keep = 0, take = 0, rate = 0, decay = 1;
};
template <class T>
FOURFOLD_ONE_VALUE void update_lion(T& p, T g, float& m, const LionNumbers<T>& k) {
  const T moment = static_cast<T>(m);
  const T c = fma(g, k.take_step, moment * k.keep_step);
  const T sign = c > 0 ? T{1} : c < 0 ? T{-1} : c;  // of 0 it is 0, of NaN it is NaN
  m = static_cast<float>(fma(g, k.take, moment * k.keep));
  p = fma(sign, k.rate, p * k.decay);
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

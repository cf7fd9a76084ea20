// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What an update rule is: a struct of static functions, and the type of its options. A rule of your
/// own composes with every codec by optim::Optimizer<YourRule, MomentCodec, SecondMomentCodec>.
///
///   struct SignRule {                              // theta -= lr * sign(g)
///     using Options = torch::optim::SGDOptions;    // a parameter group's, LibTorch's where it has one
///     struct Factors { float lr; };                // the options at one step, as the loop wants them
///     static std::string name() { return "Sign"; } // in messages and files
///     static void check(const Options& options, const std::string& whose);   // throws what is wrong
///     static optim::MomentSizes moments(const at::Tensor& p, const Options& options);
///     static Factors factors(const Options& options, const optim::StepCount& count);
///     // n values of a tile: p is float or double; m and v are null where moments() says 0
///     template <class T> static void update(T* p, const T* g, float* m, float* v, std::int64_t n,
///                                           const Factors& factors, Isa isa);
///     // optional: that a kernel of fourfold::cuda does the same, with what numbers
///     static optim::KernelUpdate in_kernel(const Factors& factors, const optim::MomentSizes& sizes);
///   };
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/core/isa.hpp>

#include <array>
#include <concepts>
#include <cstdint>
#include <string>

namespace fourfold::inline v0 {
namespace optim {

/// Numbers of values that a rule keeps for a parameter, from one step to the next.
struct MomentSizes {
  std::int64_t first = 0, second = 0;
};

/// Which of fourfold::cuda's updates a rule is, and its numbers (FourfoldStep).
struct KernelUpdate {
  std::int32_t rule;
  std::array<float, 9> numbers;
};

struct StepCount {
  std::int64_t step = 1;  ///< of this parameter, counted from 1
  bool fresh = true;      ///< its moments were made for this step, and are zeros
};

template <class R>
concept UpdateRule = requires(const typename R::Options& options, const std::string& whose,
                              const at::Tensor& p) {
  { R::name() } -> std::convertible_to<std::string>;
  R::check(options, whose);
  { R::moments(p, options) } -> std::same_as<MomentSizes>;
};

/// Each value is updated from its own gradient and moments alone.
template <class R>
concept ElementwiseRule = UpdateRule<R> &&
    requires(const typename R::Options& options, const StepCount& count, float* values,
             const float* grad, std::int64_t n, const typename R::Factors& factors, Isa isa) {
  { R::factors(options, count) } -> std::same_as<typename R::Factors>;
  R::update(values, grad, values, values, n, factors, isa);
};

/// Its moments are sums over gradients, so that they may take up a step's gradients one by one:
/// factors have folded(first, last).
template <class R>
inline constexpr bool kFolds = requires(const typename R::Factors& factors) {
  { factors.folded(true, true) } -> std::same_as<typename R::Factors>;
};

/// A rule that looks at whole rows or at the whole matrix. Rows are dimension 0, one output each in
/// LibTorch's layers; what follows is one row's values. In place of factors and update it has
///   static constexpr bool kByRows = true;
///   step(p, grad, state, options, count, keys, maximize)   // detail/matrix_step.hpp walks the tiles
///   extra(p, options)             // optional: sizes of what it keeps in fp32 beside the moments
///   check_parameter(p, index)     // optional: throws where it cannot step such a parameter
template <class R>
inline constexpr bool kByRows = requires {
  requires R::kByRows;
};

namespace detail {

/// Throws that an option is out of range, in LibTorch's words.
template <class T>
void check_option(bool good, const char* option, const T& value, const std::string& whose,
                  const char* range) {
  TORCH_CHECK(good, "Invalid ", option, ": ", value, " in ", whose, "; it ", range);
}
template <class = void>
void check_learning_rate(double lr, const std::string& whose) {
  check_option(lr >= 0, "learning rate", lr, whose, "is 0 or more");
}
template <class = void>
void check_weight_decay(double weight_decay, const std::string& whose) {
  check_option(weight_decay >= 0, "weight_decay value", weight_decay, whose, "is 0 or more");
}
template <class = void>
void check_betas(double beta1, double beta2, const std::string& whose) {
  check_option(0 <= beta1 && beta1 < 1, "beta parameter at index 0", beta1, whose,
               "lies in [0, 1)");
  check_option(0 <= beta2 && beta2 < 1, "beta parameter at index 1", beta2, whose,
               "lies in [0, 1)");
}

}  // namespace detail
}  // namespace optim
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// An exponential moving average of a model's weights, held in 8 bits or on the host: Python's
/// torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn, without the second model.
///
///   fourfold::ExponentialMovingAverage<Int8> average(*model, {.decay = 0.999});
///   for (...) { ...; optimizer->step(); average.update(); }
///   {
///     const auto averaged = average.applied();      // the model's weights are the averages
///     validate(*model);
///   }                                               // and its own again
///
/// The first update() takes the weights themselves; each further one brings the average nearer to
/// them: average += (1 - decay) * (weight - average), Python's lerp. Codes are rounded
/// stochastically: an average moves by a thousandth of a difference, which nearest rounding would
/// never let pass. What that costs is noise: with s the step of a group's code and d the mean
/// distance of weight and average, sqrt(s d / 2) a value, or half of s where `every` is
/// 1 / (1 - decay) updates.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <fourfold/codec/detail/coded_values.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/visit.hpp>
#include <fourfold/torch/parameters.hpp>
#include <fourfold/weights/module_tensors.hpp>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// An average that is a tensor like the weight, on its device, or on the CPU: Python's bits.
struct OnDevice {};
struct OnHost {};

struct ExponentialMovingAverageOptions {
  double decay = 0.999;      ///< 0 to 1
  std::int64_t every = 1;    ///< of so many update() calls one counts, by decay^every
  bool use_buffers = false;  ///< floating buffers (running statistics) too; others are copied
  std::int64_t min_packed_elements = 4096;  ///< smaller weights' averages are tensors
};

namespace detail {

/// average += weight * (value - average) for one tensor, held as C says.
template <class C>
class AverageOf {
  static constexpr bool kCodes = kIsGroupInt<C>;
  static constexpr std::int64_t kTile = 1024;

 public:
  AverageOf(std::string name, const at::Tensor& of, std::int64_t min_packed_elements)
      : name_(std::move(name)), of_(of) {
    packed_ = kCodes && of.is_floating_point() && of.is_cpu() &&
              of.is_non_overlapping_and_dense() && of.numel() >= min_packed_elements;
  }
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] const at::Tensor& weight() const { return of_; }
  [[nodiscard]] std::int64_t nbytes() const {
    return packed_            ? codes_.nbytes()
           : dense_.defined() ? static_cast<std::int64_t>(dense_.nbytes())
                              : 0;
  }

  /// `share` of the weight, 1 takes it whole.
  void update(double share, const Key& key) {
    const c10::NoGradGuard no_grad;
    const PlaceGuard place(Place::kWeights);
    const at::Tensor now = of_.detach();
    if constexpr (kCodes)
      if (packed_) return update_codes(now, share, key);
    const at::Tensor here = std::is_same_v<C, OnHost> ? now.to(at::kCPU) : now;
    if (share == 1 || !dense_.defined() || !here.is_floating_point())
      dense_ = here.clone();
    else
      dense_.lerp_(here, share);
  }
  /// Like the weight, on its device.
  [[nodiscard]] at::Tensor value() const {
    const c10::NoGradGuard no_grad;
    if constexpr (kCodes)
      if (packed_) {
        const at::Tensor out = at::empty_like(of_.detach());
        visit_float(out.scalar_type(), "ExponentialMovingAverage",
                    [&]<class T>(std::type_identity<T>) {
                      T* to = out.mutable_data_ptr<T>();
                      each_tile(out.numel(), [&](std::int64_t begin, std::int64_t n) {
                        alignas(64) float tile[kTile];
                        codes_.decode(C::kFormat, begin, n, tile, isa());
                        for (std::int64_t i = 0; i < n; ++i)
                          to[begin + i] = static_cast<T>(tile[i]);
                      });
                    });
        return out;
      }
    return dense_.to(of_.device(), /*non_blocking=*/false, /*copy=*/true);
  }

 private:
  void update_codes(const at::Tensor& now, double share, const Key& key) {
    const bool first = !codes_.codes.defined();
    if (first) codes_ = CodedValues(C::kFormat, now.numel());
    const auto weight = static_cast<float>(share);
    visit_float(now.scalar_type(), "ExponentialMovingAverage", [&]<class T>(std::type_identity<T>) {
      const T* from = now.const_data_ptr<T>();
      each_tile(now.numel(), [&](std::int64_t begin, std::int64_t n) {
        alignas(64) float tile[kTile] = {};
        const Isa use = isa();
        if (!first) codes_.decode(C::kFormat, begin, n, tile, use);
        for (std::int64_t i = 0; i < n; ++i) {
          const auto value = static_cast<float>(from[begin + i]);
          tile[i] = share == 1 ? value : std::fma(weight, value - tile[i], tile[i]);
        }
        codes_.encode(C::kFormat, begin, n, tile, key, use);
      });
    });
  }
  template <class F>
  static void each_tile(std::int64_t n, const F& f) {
    parallel_for(0, ceil_div(n, kTile), 16, [&](std::int64_t a, std::int64_t b) {
      for (std::int64_t begin = a * kTile; begin < std::min(n, b * kTile); begin += kTile)
        f(begin, std::min(kTile, n - begin));
    });
  }

  std::string name_;
  at::Tensor of_;
  bool packed_ = false;
  CodedValues codes_;
  at::Tensor dense_;
};

}  // namespace detail

/// C: Int8, Int4, ... for codes; OnHost; OnDevice. Holds the model's tensors, not the module.
/// Packed weights are frozen and have no average.
template <class C = Int8>
class ExponentialMovingAverage {
  static_assert(detail::kIsGroupInt<C> || std::is_same_v<C, OnHost> || std::is_same_v<C, OnDevice>,
                "ExponentialMovingAverage<C> holds averages in an integer code (Int8), on the host "
                "(OnHost) or as plain tensors (OnDevice)");

 public:
  template <ModuleLike M>
  explicit ExponentialMovingAverage(M&& model, const ExponentialMovingAverageOptions& options = {})
      : options_(options),
        seed_(mix(at::detail::getDefaultCPUGenerator().current_seed() ^ 0x454D41u)) {
    TORCH_CHECK(options.decay >= 0 && options.decay <= 1,
                "ExponentialMovingAverage: Invalid decay value ", options.decay,
                " provided. Please provide a value in [0,1] range.");
    TORCH_CHECK(options.every >= 1, "ExponentialMovingAverage: every is ", options.every,
                "; give how many updates count as one, 1 or more");
    std::unordered_set<const at::TensorImpl*> seen;
    const auto add = [&](const NamedTensors& tensors) {
      for (const auto& [name, tensor] : tensors)
        if (!door::is_packed(tensor) && seen.insert(tensor.unsafeGetTensorImpl()).second)
          averages_.emplace_back(name, tensor, options.min_packed_elements);
    };
    add(parameters_of(model, "ExponentialMovingAverage"));
    if (options.use_buffers) add(buffers_of(model, "ExponentialMovingAverage"));
    TORCH_CHECK(!averages_.empty(),
                "ExponentialMovingAverage: the module has no parameters to average; hand over the "
                "module that holds them, after they are registered");
  }

  /// After each optimizer step.
  void update() {
    if (calls_++ % options_.every != 0) return;
    const double share =
        n_averaged_ == 0 ? 1 : 1 - std::pow(options_.decay, static_cast<double>(options_.every));
    for (std::size_t i = 0; i < averages_.size(); ++i)
      averages_[i].update(share, Key{.seed = seed_,
                                     .step = static_cast<std::uint64_t>(n_averaged_),
                                     .forward = 0,
                                     .storage = i});
    ++n_averaged_;
  }
  /// Updates that counted.
  [[nodiscard]] std::int64_t n_averaged() const { return n_averaged_; }
  [[nodiscard]] std::int64_t nbytes() const {
    std::int64_t bytes = 0;
    for (const auto& one : averages_) bytes += one.nbytes();
    return bytes;
  }
  /// The averages by name, dense, of the weights' dtypes.
  [[nodiscard]] NamedTensors averages() const {
    check_begun("averages()");
    NamedTensors all;
    for (const auto& one : averages_) all.emplace_back(one.name(), one.value());
    return all;
  }
  /// The model's weights become the averages, for good.
  void copy_to_model() const {
    check_begun("copy_to_model()");
    const c10::NoGradGuard no_grad;
    for (const auto& one : averages_) one.weight().detach().copy_(one.value());
  }

  /// Gives the weights back when it dies; meanwhile it holds them.
  class [[nodiscard]] Applied {
   public:
    explicit Applied(const ExponentialMovingAverage& from) {
      const c10::NoGradGuard no_grad;
      for (const auto& one : from.averages_)
        kept_.emplace_back(one.weight(), one.weight().detach().clone());
      from.copy_to_model();
    }
    ~Applied() {
      const c10::NoGradGuard no_grad;
      for (const auto& [weight, values] : kept_) weight.detach().copy_(values);
    }
    Applied(const Applied&) = delete;
    Applied& operator=(const Applied&) = delete;

   private:
    std::vector<std::pair<at::Tensor, at::Tensor>> kept_;
  };
  /// The model has the averages while the result lives. Not while a backward is to come: weights
  /// change, which LibTorch notices.
  Applied applied() const {
    check_begun("applied()");
    return Applied(*this);
  }

 private:
  void check_begun(const char* what) const {
    TORCH_CHECK(n_averaged_ > 0, "ExponentialMovingAverage::", what,
                " was called before the first update(): there is no average yet");
  }

  ExponentialMovingAverageOptions options_;
  std::uint64_t seed_;
  std::vector<detail::AverageOf<C>> averages_;
  std::int64_t calls_ = 0, n_averaged_ = 0;
};

}  // namespace fourfold::inline v0

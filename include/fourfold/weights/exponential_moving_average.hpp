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
#include <c10/util/Exception.h>
#include <fourfold/core/buffer_holder.hpp>
#include <fourfold/torch/archive.hpp>
#include <fourfold/torch/parameters.hpp>
#include <fourfold/weights/detail/average_of.hpp>
#include <fourfold/weights/module_tensors.hpp>

#include <cmath>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

struct ExponentialMovingAverageOptions {
  double decay = 0.999;      ///< 0 to 1
  std::int64_t every = 1;    ///< of so many update() calls one counts, by decay^every
  bool use_buffers = false;  ///< floating buffers (running statistics) too; others are copied
  std::int64_t min_packed_elements = 4096;  ///< smaller weights' averages are tensors
  /// Who holds averages on the CPU elsewhere than in memory: on_file() of core/mapped_file.hpp.
  std::shared_ptr<BufferHolder> offload{};
};

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
          averages_.emplace_back(name, tensor, options.min_packed_elements, options.offload);
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
    for (std::size_t i = 0; i < averages_.size(); ++i) {
      if (i + 1 < averages_.size()) averages_[i + 1].read_ahead();
      averages_[i].update(share, Key{.seed = seed_,
                                     .step = static_cast<std::uint64_t>(n_averaged_),
                                     .forward = 0,
                                     .storage = i});
    }
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
  /// All that update() needs to go on as if nothing had happened.
  void save(::torch::serialize::OutputArchive& archive) const {
    check_begun("save()");
    archive.write("fourfold_average", c10::IValue(std::int64_t{1}));
    archive.write("code", c10::IValue(detail::AverageOf<C>::code()));
    archive.write("seed", c10::IValue(static_cast<std::int64_t>(seed_)));
    archive.write("calls", c10::IValue(calls_));
    archive.write("n_averaged", c10::IValue(n_averaged_));
    archive.write("tensors", c10::IValue(static_cast<std::int64_t>(averages_.size())));
    for (std::size_t i = 0; i < averages_.size(); ++i) {
      ::torch::serialize::OutputArchive part(archive.compilation_unit());
      averages_[i].save(part);
      archive.write("average" + std::to_string(i), part);
    }
  }
  /// Errors, nothing changed: a newer version, another model, another code, a damaged file.
  void load(::torch::serialize::InputArchive& archive) {
    const char* const what = "the file of an ExponentialMovingAverage";
    const door::ArchiveReader file(archive, what);
    file.read_version("fourfold_average", 1, "an ExponentialMovingAverage");
    const std::string code = file.read_string("code");
    TORCH_CHECK(code == detail::AverageOf<C>::code(), what, " is in ", code, ", and this one in ",
                detail::AverageOf<C>::code(), "; load it into an ExponentialMovingAverage<", code,
                ">");
    const std::int64_t tensors = file.read_int("tensors");
    TORCH_CHECK(tensors == static_cast<std::int64_t>(averages_.size()), what, " holds ", tensors,
                " tensors, and this model has ", averages_.size(),
                ": it is of another model, or of other use_buffers");
    std::vector<detail::AverageOf<C>> loaded;
    for (std::size_t i = 0; i < averages_.size(); ++i) {
      ::torch::serialize::InputArchive part;
      file.read_part("average" + std::to_string(i), part);
      loaded.push_back(averages_[i].loaded(part));
    }
    const std::int64_t seed = file.read_int("seed"), calls = file.read_int("calls");
    n_averaged_ = file.read_int("n_averaged");
    seed_ = static_cast<std::uint64_t>(seed), calls_ = calls;
    averages_ = std::move(loaded);
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
    explicit Applied(const ExponentialMovingAverage& from) : Applied() {  // so that an error undoes
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
    Applied() = default;
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

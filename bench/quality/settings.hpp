// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How bench/quality trains: one line a setting, the first one being what the others are held
/// against. To add one, give its name, its limit, and who makes its trainer.
#include <fourfold/fourfold.hpp>
#include <fourfold/gradients/quantised.hpp>
#include <fourfold/gradients/release.hpp>
#include <fourfold/plan/by_sensitivity.hpp>
#include <fourfold/precision.hpp>
#include <fourfold/presets_release.hpp>

#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace quality {

/// Does one step of training at a learning rate, and gives the loss before it.
class Trainer {
 public:
  virtual ~Trainer() = default;
  virtual double step(const std::function<torch::Tensor()>& loss, double learning_rate) = 0;
  /// What `loss` gives, in the precision of training.
  virtual double validation(const std::function<double()>& loss) { return loss(); }
};

inline void set_learning_rate(torch::optim::Optimizer& optimizer, double rate) {
  for (auto& group : optimizer.param_groups()) group.options().set_lr(rate);
}

/// forward within the pipeline, backward, the pipeline's own AdamW.
template <class Pipeline>
class PipelineTrainer final : public Trainer {
 public:
  explicit PipelineTrainer(torch::nn::Module& model)
      : pipeline_(model), optimizer_(pipeline_.optimizer(torch::optim::AdamWOptions())) {}

  double step(const std::function<torch::Tensor()>& loss, double learning_rate) override {
    set_learning_rate(*optimizer_, learning_rate);
    if constexpr (!Pipeline::kReleases) optimizer_->zero_grad();
    const torch::Tensor value = pipeline_.forward(loss);
    value.backward();
    if constexpr (!Pipeline::kReleases) optimizer_->step();
    return value.template item<double>();
  }
  double validation(const std::function<double()>& loss) override {
    return pipeline_.forward(loss);
  }

 private:
  Pipeline pipeline_;
  std::shared_ptr<torch::optim::Optimizer> optimizer_;
};

/// The same with gradients released: backward is the step. `Way` says how they are clipped.
template <class Pipeline, fourfold::ClipGradients Way = fourfold::ClipGradients::kNone>
class ReleasedTrainer final : public Trainer {
 public:
  explicit ReleasedTrainer(torch::nn::Module& model)
      : pipeline_(model),
        optimizer_(pipeline_.parameters(), torch::optim::AdamWOptions()),
        release_(optimizer_, {.clip = Way}) {}

  double step(const std::function<torch::Tensor()>& loss, double learning_rate) override {
    set_learning_rate(optimizer_, learning_rate);
    const torch::Tensor value = pipeline_.forward(loss);
    release_.backward(value);
    return value.template item<double>();
  }

 private:
  Pipeline pipeline_;
  fourfold::optim::AdamWOf<fourfold::Int8> optimizer_;
  fourfold::GradientRelease<> release_;
};

template <class T>
std::unique_ptr<Trainer> make(torch::nn::Module& model) {
  return std::make_unique<T>(model);
}

/// The baseline from weights that differ in their last bits, by a factor of 1 + 2^-20 or 1 - 2^-20:
/// how far apart two runs come to lie by chaos alone, which no difference below can be told from.
inline std::unique_ptr<Trainer> perturbed(torch::nn::Module& model) {
  const torch::NoGradGuard no_grad;
  for (auto& parameter : model.parameters())
    parameter.mul_(1 + 0x1p-20 * (2 * torch::randint(2, parameter.sizes()) - 1));
  return make<PipelineTrainer<fourfold::CompressionPipeline<>>>(model);
}

struct Setting {
  const char* name;
  const char* about;
  std::optional<double> limit;  ///< of the mean paired difference to the baseline, per cent
  std::unique_ptr<Trainer> (*trainer)(torch::nn::Module& model);
};

template <class... Policies>
using Training = PipelineTrainer<fourfold::CompressionPipeline<Policies...>>;

/// Weights of matrix products in bf16, and what `Master` keeps of their rounding.
template <class States, class Master>
using LowWeights = Training<fourfold::Precision<fourfold::BFloat16, fourfold::ProductWeights>,
                            fourfold::OptimizerStates<States, Master>>;

inline std::span<const Setting> settings() {
  using namespace fourfold;
  static const Setting all[] = {
      {"plain", "torch::optim::AdamW, fp32", {}, make<Training<>>},
      {"perturbed", "plain from weights moved by 2^-20: chaos alone", {}, perturbed},
      {"exact", "the preset Exact", 0, make<PipelineTrainer<Exact>>},
      {"adamw8", "8-bit moments", 0.1, make<Training<OptimizerStates<Int8>>>},
      {"adamw4", "4-bit moments", 0.3, make<Training<OptimizerStates<Int4>>>},
      {"master32",
       "bf16 weights with fp32 masters, fp32 moments: what bf16 alone costs",
       {},
       make<LowWeights<optim::Fp32, optim::Fp32>>},
      {"master24", "bf16 weights and 8 bits of error, fp32 moments", 0.05,
       make<LowWeights<optim::Fp32, optim::ErrorCorrection<8>>>},
      {"master24_adamw4",
       "bf16 weights and 8 bits of error, 4-bit moments",
       {},
       make<LowWeights<Int4, optim::ErrorCorrection<8>>>},
      {"stochastic",
       "bf16 weights rounded stochastically, 8-bit moments",
       {},
       make<LowWeights<Int8, optim::RoundStochastic>>},
      {"balanced", "the preset Balanced", 0.5, make<PipelineTrainer<Balanced>>},
      {"smallest", "the preset Smallest", 0.5, make<PipelineTrainer<Smallest>>},
      {"by_sensitivity", "Balanced with 8, 4 or 2 bits by sensitivity, 4 on average", 0.5,
       make<Training<ActivationsBySensitivity<4>, Recompute<>, OptimizerStates<Int8>>>},
      {"by_sensitivity3",
       "the same, 3 bits on average",
       {},
       make<Training<ActivationsBySensitivity<3>, Recompute<>, OptimizerStates<Int8>>>},
      {"by_sensitivity_blocks", "Smallest with 8, 4 or 2 bits by sensitivity, 4 on average", 0.5,
       make<Training<ActivationsBySensitivity<4>, Recompute<>, Blocks<>, OptimizerStates<Int8>>>},
      {"balanced_release", "the preset BalancedRelease", 0.5,
       make<PipelineTrainer<BalancedRelease>>},
      {"smallest_release", "the preset SmallestRelease", 0.5,
       make<PipelineTrainer<SmallestRelease>>},
      {"smallest_release24", "the preset SmallestRelease24", 0.5,
       make<PipelineTrainer<SmallestRelease24>>},
      {"bf16", "forward in bf16, by autocast", {}, make<Training<Precision<BFloat16>>>},
      {"bf16_adamw8",
       "forward in bf16, 8-bit moments",
       {},
       make<Training<Precision<BFloat16>, OptimizerStates<Int8>>>},
      {"bf16_balanced", "Balanced, forward in bf16", 0.5,
       make<Training<Precision<BFloat16>, Activations<Int4>, Recompute<CheapOps>,
                     OptimizerStates<Int8>>>},
      {"gradients4", "gradients passed through 4 bits", {}, make<Training<Gradients<Int4>>>},
      {"release8", "8-bit moments, gradients released", 0.1,
       make<ReleasedTrainer<CompressionPipeline<>>>},
  };
  return all;
}

}  // namespace quality

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Mixed precision: Python's torch.autocast as a guard, and as a pipeline's policy.
///
///   {
///     const fourfold::AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
///     loss = criterion(model->forward(x), y);        // matrix products in bf16, sums in fp32
///   }
///   loss.backward();                                 // outside; each node as its forward was
///
///   using Mine = CompressionPipeline<Precision<BFloat16>, OptimizerStates<Int8>>;   // in its scopes
///
/// With fp16 take a GradScaler too: gradients/grad_scaler.hpp.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <fourfold/core/place.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/core/rounded_weight.hpp>
#include <fourfold/torch/autocast.hpp>
#include <fourfold/torch/parameters_tensor.hpp>  // is_packed

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>
#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

/// What Python's torch.autocast takes.
struct AutocastOptions {
  bool enabled = true;  ///< false: operators run in the types they are given, within another region
  bool cache = true;    ///< a parameter's cast is made once in the outermost region, not once a use
};

/// Autocast of one device type, on the thread that made it, while it lives; afterwards as before,
/// also when an exception passes. Regions nest, and are left in turn. Casts that LibTorch keeps for
/// the outermost region (a copy of each weight) go when it ends, and when a region in it has another
/// dtype, which LibTorch would not notice. Errors: a device type without autocast; a dtype other
/// than BFloat16 or Half.
class [[nodiscard]] AutocastGuard {
 public:
  AutocastGuard(c10::DeviceType device, c10::ScalarType dtype, const AutocastOptions& options = {})
      : before_(door::AutocastState::current()), thread_(std::this_thread::get_id()) {
    auto now = before_;
    const auto found = std::find(door::AutocastState::kDevices.begin(),
                                 door::AutocastState::kDevices.end(), device);
    TORCH_CHECK(found != door::AutocastState::kDevices.end(),
                "AutocastGuard: there is no autocast for ", device,
                "; give the device type that the model is on, as torch::kCPU");
    TORCH_CHECK(!options.enabled || dtype == at::kBFloat16 || dtype == at::kHalf,
                "AutocastGuard casts to BFloat16 or Half, but was given ", dtype,
                "; for fp32 leave it out, or give {.enabled = false}");
    auto& mine =
        now.devices[static_cast<std::size_t>(found - door::AutocastState::kDevices.begin())];
    other_dtype_ =
        options.enabled && mine.dtype != dtype;  // a disabled one's casts may be kept too
    mine.enabled = options.enabled;
    if (options.enabled) mine.dtype = dtype;
    now.cache = options.cache;
    at::autocast::increment_nesting();
    if (other_dtype_) at::autocast::clear_cache();
    now.apply();
  }
  /// To the dtype that the device type has by default: BFloat16 on a CPU, Half on CUDA.
  explicit AutocastGuard(c10::DeviceType device, const AutocastOptions& options = {})
      : AutocastGuard(device, at::autocast::get_autocast_dtype(device), options) {}

  ~AutocastGuard() {
    if (std::this_thread::get_id() != thread_) return;  // its state died with its thread, or will
    if (at::autocast::decrement_nesting() == 0 || other_dtype_) at::autocast::clear_cache();
    before_.apply();
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  door::AutocastState before_;
  std::thread::id thread_;
  bool other_dtype_ = false;
};

/// Which weights Precision<T, ...> holds in T, where all computing in bf16 reads them: those of
/// modules that have a matrix (Linear, Conv2d, LSTM, MultiheadAttention: biases too), not of norms.
struct NoWeights {};  ///< none: autocast casts each, and keeps the cast for backward
struct ProductWeights {
};  ///< all but embeddings, so that what embeddings begin (residual sums) is fp32
struct AllWeights {};  ///< embeddings too

/// A pipeline's scopes compute in T, BFloat16 or Half, where autocast does. `Held` are converted to T
/// in place and for good when the pipeline is made, and their gradients come in T: give
/// OptimizerStates something to keep of what T rounds away (optim/master_codec.hpp; with
/// ErrorCorrection<16> weights are fp32 in two halves, and no cast of them exists). What this first
/// rounding takes waits, in 2 bytes a weight, for pipeline.optimizer() (for ever, if you make another
/// one), so that training is as with fp32 weights from the first step on; move the model before. The model then runs in a scope, or under an AutocastGuard,
/// alone: evaluate it there too.
/// Error, nothing changed: such a parameter has a gradient, which would be of another type.
template <class T, class Held = NoWeights>
struct Precision {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>,
                "Precision<> takes the type to compute in: BFloat16 or Half");
  static_assert(std::is_same_v<Held, NoWeights> || std::is_same_v<Held, ProductWeights> ||
                    std::is_same_v<Held, AllWeights>,
                "Precision<T, Held> holds NoWeights, ProductWeights or AllWeights in T");
  static constexpr Role role = Role::kPrecision;
  static constexpr c10::ScalarType kType = std::is_same_v<T, Half> ? at::kHalf : at::kBFloat16;

  /// What a scope calls to enter the region of a device type.
  static std::shared_ptr<void> (*on(c10::DeviceType device))() {
    if (device == c10::DeviceType::CPU) return enter<c10::DeviceType::CPU>;
    if (device == c10::DeviceType::CUDA) return enter<c10::DeviceType::CUDA>;
    TORCH_CHECK(false, "Precision<> computes on a CPU or on CUDA, but the model is on ", device,
                "; hold a fourfold::AutocastGuard for that device type yourself");
  }

  /// Converts what `model` holds in T. Gives what that took from the weights, if `keep` says so.
  static std::vector<RoundedWeight> convert(torch::nn::Module& model, bool keep = false) {
    std::vector<RoundedWeight> rounded;
    auto chosen = held(model);
    for (const auto& [name, p] : chosen)
      TORCH_CHECK(!p.grad().defined(), "Precision<> holds weights in ", kType, ", but '", name,
                  "' has a gradient of ", p.scalar_type(),
                  " already; make the pipeline before the first backward, or call zero_grad()");
    for (auto& [name, p] : chosen) {
      const at::Tensor before = p.detach();
      if (!keep) {
        p.set_data(before.to(kType));
        continue;
      }
      const PlaceGuard place(Place::kWeights);
      const RoundedWeight one = split(before.to(at::kFloat));
      p.set_data(one.weight);
      rounded.push_back({p, one.rest, p.detach(), p._version()});
    }
    return rounded;
  }
  /// Of the trainable weights' bytes, by convert().
  [[nodiscard]] static std::int64_t bytes_saved(const torch::nn::Module& model) {
    std::int64_t bytes = 0;
    for (const auto& [name, p] : held(model))
      if (p.requires_grad())
        bytes += p.numel() * static_cast<std::int64_t>(p.element_size() - sizeof(T));
    return bytes;
  }

 private:
  /// x as T and the rest. In bf16 a tie is rounded away from zero, as ErrorCorrection has it.
  static RoundedWeight split(const at::Tensor& x) {
    if constexpr (std::is_same_v<T, Half>) {
      const at::Tensor weight = x.to(at::kHalf);
      return {weight, x.sub(weight).to(at::kHalf), {}, 0};
    } else {
      const at::Tensor bits = x.view(at::kInt);
      const at::Tensor upper = bits.add(0x8000).bitwise_and_(static_cast<std::int64_t>(-0x10000));
      const at::Tensor weight = upper.view(at::kFloat).to(at::kBFloat16);  // exact
      return {weight, bits.sub(upper).to(at::kShort).view(at::kBFloat16), {}, 0};
    }
  }
  /// Each parameter once, whatever it is tied to.
  [[nodiscard]] static std::vector<std::pair<std::string, at::Tensor>> held(
      const torch::nn::Module& model) {
    std::vector<std::pair<std::string, at::Tensor>> chosen;
    if constexpr (std::is_same_v<Held, NoWeights>) return chosen;
    std::vector<at::Tensor> kept;  // a weight tied to an embedding's is the embedding's
    choose(model, "", chosen, kept);
    std::erase_if(chosen, [&](const auto& one) {
      return std::any_of(kept.begin(), kept.end(),
                         [&](const at::Tensor& p) { return p.is_same(one.second); });
    });
    return chosen;
  }
  static void choose(const torch::nn::Module& module, const std::string& prefix,
                     std::vector<std::pair<std::string, at::Tensor>>& chosen,
                     std::vector<at::Tensor>& kept) {
    const bool embeds = dynamic_cast<const torch::nn::EmbeddingImpl*>(&module) != nullptr ||
                        dynamic_cast<const torch::nn::EmbeddingBagImpl*>(&module) != nullptr;
    const bool normalises = dynamic_cast<const torch::nn::LayerNormImpl*>(&module) != nullptr;
    const auto own = module.named_parameters(/*recurse=*/false);
    const bool multiplies = !normalises && std::any_of(own.begin(), own.end(), [](const auto& one) {
      return one.value().defined() && one.value().dim() >= 2;
    });
    for (const auto& one : own) {
      const at::Tensor& p = one.value();
      if (!p.defined() || door::is_packed(p)) continue;
      if (embeds && !std::is_same_v<Held, AllWeights>) kept.push_back(p);
      const bool known = std::any_of(chosen.begin(), chosen.end(),
                                     [&](const auto& other) { return other.second.is_same(p); });
      if (multiplies && !known && (p.scalar_type() == at::kFloat || p.scalar_type() == at::kDouble))
        chosen.emplace_back(prefix + one.key(), p);
    }
    for (const auto& child : module.named_children())
      choose(*child.value(), prefix + child.key() + ".", chosen, kept);
  }
  template <c10::DeviceType Device>
  static std::shared_ptr<void> enter() {
    return std::make_shared<AutocastGuard>(Device, kType);
  }
};
static_assert(Policy<Precision<BFloat16>> && Policy<Precision<BFloat16, AllWeights>>,
              "Precision must stay a Policy");

}  // namespace fourfold::inline v0

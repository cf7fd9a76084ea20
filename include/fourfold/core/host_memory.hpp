// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Optimizer states in the host's memory for parameters on a GPU: each step is computed on the CPU,
/// while the next parameter and its gradient are copied from the GPU, and the one before is copied
/// back.
///
///   #include <fourfold/core/host_memory.hpp>
///   optim::AdamWOf<Int8> optimizer(model->parameters(), 1e-3, {.offload = on_host()});
///
/// Copies are pinned, one parameter's beside the next one's: all else that the host needs is the
/// states. Parameters that are on the CPU are stepped as ever.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fourfold/core/buffer_holder.hpp>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

template <class = void>
class BasicHostMemory : public BufferHolder {
 public:
  at::Tensor hold(const at::Tensor& values) override { return values; }
  void will_need(const at::Tensor&) noexcept override {}
  void need(const at::Tensor&) noexcept override {}
  void done_with(const at::Tensor&) noexcept override {}

  void will_copy(const at::Tensor& parameter) override {
    if (!is_elsewhere(parameter) || !parameter.grad().defined()) return;
    Copies begun(parameter);
    const std::lock_guard lock(mutex_);
    std::erase_if(begun_, [&](const Copies& one) { return one.of.is_same(parameter); });
    begun_.push_back(std::move(begun));
  }
  std::pair<at::Tensor, at::Tensor> copies(const at::Tensor& parameter) override {
    if (!is_elsewhere(parameter)) return {};
    std::optional<Copies> copies;
    {
      const std::lock_guard lock(mutex_);
      for (std::size_t i = 0; i < begun_.size(); ++i)
        if (begun_[i].of.is_same(parameter)) {
          copies = std::move(begun_[i]);
          begun_.erase(begun_.begin() + static_cast<std::ptrdiff_t>(i));
          break;
        }
    }
    // What was written to since (a step that failed in the middle, and another backward) is stale.
    if (!copies || !copies->are_of_now()) copies.emplace(parameter);
    if (copies->done) copies->done->synchronize();
    return {std::move(copies->values), std::move(copies->gradient)};
  }

 protected:
  [[nodiscard]] virtual bool is_elsewhere(const at::Tensor& parameter) const {
    return !parameter.is_cpu();
  }

 private:
  struct Copies {
    explicit Copies(const at::Tensor& parameter)
        : of(parameter),
          of_gradient(parameter.grad()),
          versions{version(of), version(of_gradient)},
          values(begin(of)),
          gradient(begin(of_gradient)) {
      if (of.is_cpu()) return;
      done.emplace(of.device().type());
      done->record(c10::impl::VirtualGuardImpl(of.device().type()).getStream(of.device()));
    }
    [[nodiscard]] bool are_of_now() const {
      return of.grad().is_same(of_gradient) &&
             versions == std::pair(version(of), version(of_gradient));
    }
    static std::uint32_t version(const at::Tensor& x) {
      return x.is_inference() ? 0 : x.unsafeGetTensorImpl()->version_counter().current_version();
    }
    static at::Tensor begin(const at::Tensor& x) {
      const c10::NoGradGuard no_grad;
      if (x.is_sparse()) return x.cpu();  // waits
      return at::empty(x.sizes(), at::TensorOptions(x.scalar_type()).pinned_memory(x.is_cuda()))
          .copy_(x, /*non_blocking=*/true);
    }
    at::Tensor of, of_gradient;
    std::pair<std::uint32_t, std::uint32_t> versions;
    at::Tensor values, gradient;
    std::optional<c10::Event> done;  // on the stream that had written both
  };

  std::mutex mutex_;
  std::vector<Copies> begun_;
};
using HostMemory = BasicHostMemory<>;

/// For an `offload` option.
template <class = void>
[[nodiscard]] std::shared_ptr<BufferHolder> on_host() {
  return std::make_shared<HostMemory>();
}

}  // namespace fourfold::inline v0

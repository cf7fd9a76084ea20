// SPDX-License-Identifier: Apache-2.0
#pragma once
/// block() asks a SavedPlan whether a block is recomputed.
#include <fourfold/activations/blocks.hpp>
#include <fourfold/activations/detail/ask_plan.hpp>
#include <fourfold/activations/store.hpp>
#include <fourfold/core/random.hpp>  // mix

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

/// For the scopes of one store, whose tape says where a block's inputs come from.
template <class T = void>
class BasicPlannedBlocks final : public BlockPlan {
  using Store = BasicActivationStore<T>;
  using Tape = BasicTape<T>;

 public:
  explicit BasicPlannedBlocks(std::shared_ptr<Store> store) : store_(std::move(store)) {}

  [[nodiscard]] BlockChoice began(const std::vector<at::Tensor>& inputs) override {
    Tape* const tape = store_->tape();
    if (tape == nullptr) return {.recompute = true};  // another pipeline's scope is the innermost
    tape->begin_part();
    const door::OperatorsPause pause;
    std::vector<at::Tensor> detached;
    std::uint64_t look = inputs.size();
    for (const at::Tensor& input : inputs) {
      if (!input.defined()) continue;
      look = mix(look ^ static_cast<std::uint64_t>(input.scalar_type()));
      if (!input.is_nested())
        for (const std::int64_t size : input.sizes())
          look = mix(look ^ static_cast<std::uint64_t>(size));
      if (asked_about(input, *tape)) detached.push_back(input.detach());
    }
    std::vector<SavedStorage> storages;
    for (std::size_t i = 0; i < detached.size(); ++i) {
      SavedStorage storage = saved_storage(detached[i], *tape);
      if (!storage.made)  // no operator of the forward tells it from another one
        storage.operation = tape->operators(), storage.place = kFirstPlace + i;
      storages.push_back(storage);
    }
    return store_->plan()->block_began(tape->forward(), look, storages);
  }
  void ended() noexcept override {
    Tape* const tape = store_->tape();
    if (tape == nullptr) return;
    tape->begin_part();
    store_->plan()->block_ended(tape->forward());
  }

 private:
  static constexpr std::uint64_t kFirstPlace = 128;  // beyond an operator's arguments

  /// As the store asks a plan; what it holds as it is would be held anyway.
  [[nodiscard]] bool asked_about(const at::Tensor& input, const Tape& tape) const {
    if (!is_plain(input) || !at::isFloatingType(input.scalar_type()) || door::is_parameter(input))
      return false;
    c10::StorageImpl* const key = input.storage().unsafeGetStorageImpl();
    const auto* const origin = tape.origin(key);
    const bool made_here = origin != nullptr && origin->time != 0;
    return !store_->holds_small(input) && !tape.index()->is_exact(key) &&
           (made_here || !input.is_leaf());
  }

  const std::shared_ptr<Store> store_;
};
using PlannedBlocks = BasicPlannedBlocks<>;

}  // namespace fourfold::inline v0::detail

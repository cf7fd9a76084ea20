// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The policy Blocks: which blocks of a model a pipeline computes again in place of keeping what
/// they save. A model names its blocks in one of two ways:
///
///   x = fourfold::block(layer, x);        // in its forward; the plain call where no pipeline asks
///   torch::nn::Sequential layers(...);    // nothing to write: a Sequential's children are blocks
///
/// (A ModuleList's children are called by the model itself: name them by block, or run the list by
/// checkpoint_sequential.) Beside Budget<> a block may be recomputed: the plan chooses which are.
#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/torch/any_module.hpp>
#include <fourfold/torch/door_state.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// Recompute every `Every`-th block, the first one first.
template <int Every = 1>
struct Blocks {
  static_assert(Every >= 1, "Blocks<Every> recomputes every Every-th block, so Every is 1 or more");
  static constexpr Role role = Role::kBlocks;
  static constexpr int every = Every;
};
static_assert(Policy<Blocks<>>, "Blocks must stay a Policy");

/// The same in words: `Checkpoint<EveryNth<2>>` recomputes every second block.
template <int N>
struct EveryNth {
  static constexpr int every = N;
};
template <class Which = EveryNth<1>>
using Checkpoint = Blocks<Which::every>;

namespace detail {

struct OpenBlocks {
  int every = 1;
  CheckpointOptions options{};
  std::shared_ptr<BlockPlan> plan{};  ///< says which of them are recomputed; null: all
  bool inside = false;                ///< a block runs: blocks in it belong to it
  std::int64_t met = 0, recomputed = 0;
  std::atomic<bool> closed{false};  ///< by a scope that was left on another thread, or out of order
  std::shared_ptr<OpenBlocks> outer;
};

/// The thread's innermost scope: through a pointer, so that every library uses the same variable.
struct [[gnu::visibility("default")]] BlocksState {
  static constexpr std::uint32_t kAbi = 1;
  static constexpr const char* kName = "blocks";
  std::shared_ptr<OpenBlocks>& (*innermost)() = []() -> std::shared_ptr<OpenBlocks>& {
    static thread_local std::shared_ptr<OpenBlocks> top;
    return top;
  };
};

template <class = void>
std::shared_ptr<OpenBlocks>& innermost_blocks() {
  std::shared_ptr<OpenBlocks>& top = door::door_state<BlocksState>().innermost();
  while (top != nullptr && top->closed.load(std::memory_order_acquire)) top = top->outer;
  return top;
}

/// Those that a checkpoint would hold.
template <class... Inputs>
std::vector<at::Tensor> tensors_in(Inputs&... inputs) {
  std::vector<at::Tensor> tensors;
  std::tuple<std::remove_const_t<Inputs>&...> all(  // read alone
      const_cast<std::remove_const_t<Inputs>&>(inputs)...);
  for_each_tensor(all, [&](at::Tensor& tensor) { tensors.push_back(tensor); });
  return tensors;
}

}  // namespace detail

/// Blocks met on the thread that made it are checkpoints while it lives, or those that `plan` says.
/// The innermost one counts.
template <class = void>
class [[nodiscard]] BasicBlocksScope {
 public:
  explicit BasicBlocksScope(int every = 1, const CheckpointOptions& options = {},
                            std::shared_ptr<BlockPlan> plan = nullptr)
      : open_(std::make_shared<detail::OpenBlocks>()) {
    TORCH_CHECK(every >= 1, "BlocksScope: got every = ", every,
                "; give 1 to recompute each block, 2 for every second");
    open_->every = every;
    open_->options = options;
    open_->plan = std::move(plan);
    open_->outer = std::exchange(detail::innermost_blocks(), open_);
  }
  ~BasicBlocksScope() {
    open_->closed.store(true, std::memory_order_release);
    detail::innermost_blocks();
  }
  BasicBlocksScope(const BasicBlocksScope&) = delete;
  BasicBlocksScope& operator=(const BasicBlocksScope&) = delete;

  [[nodiscard]] std::int64_t met() const { return open_->met; }  ///< blocks that ran in it
  [[nodiscard]] std::int64_t recomputed() const { return open_->recomputed; }  ///< of them

 private:
  std::shared_ptr<detail::OpenBlocks> open_;
};
using BlocksScope = BasicBlocksScope<>;

/// fn(inputs...), as a block: a checkpoint within a BlocksScope (what a pipeline with Blocks
/// opens) if its turn has come; the plain call elsewhere, within another block and where a block is
/// computed again. `fn` and `inputs` as checkpoint() takes them.
template <class Fn, class... Inputs>
auto block(Fn&& fn, Inputs&&... inputs) -> detail::BlockResult<Fn, Inputs...> {
  const auto plain = [&]() -> detail::BlockResult<Fn, Inputs...> {
    return detail::call_block(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
  };
  if (is_recomputing() || !at::GradMode::is_enabled()) return plain();
  const std::shared_ptr<detail::OpenBlocks> open = detail::innermost_blocks();
  if (open == nullptr || open->inside) return plain();
  struct Inside {
    explicit Inside(detail::OpenBlocks& blocks) : of(blocks) { of.inside = true; }
    ~Inside() { of.inside = false; }
    detail::OpenBlocks& of;
  } const inside(*open);
  if (open->met++ % open->every != 0) return plain();
  CheckpointOptions options = open->options;
  std::unique_ptr<BlockPlan, void (*)(BlockPlan*)> planned(nullptr,
                                                           [](BlockPlan* plan) { plan->ended(); });
  if (open->plan != nullptr) {
    const BlockChoice choice = open->plan->began(detail::tensors_in(inputs...));
    planned.reset(open->plan.get());
    if (!choice.recompute) return plain();
    options.reference_recomputed = choice.reference, options.token = choice.token;
  }
  ++open->recomputed;
  return checkpoint(options, std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
}

/// Undoes wrap_sequential_blocks when it dies. Outlives the model without harm.
template <class = void>
class [[nodiscard]] BasicSequentialBlocks {
 public:
  BasicSequentialBlocks() = default;
  BasicSequentialBlocks(BasicSequentialBlocks&&) = default;
  BasicSequentialBlocks& operator=(BasicSequentialBlocks&& other) noexcept {
    if (this != &other) {
      undo();
      wrapped_ = std::move(other.wrapped_);
      blocks_ = std::exchange(other.blocks_, 0);
    }
    return *this;
  }
  ~BasicSequentialBlocks() { undo(); }

  /// Children that became blocks.
  [[nodiscard]] std::int64_t blocks() const { return blocks_; }

  void undo() {
    for (const auto& [weak, children] : wrapped_)
      if (const auto sequential = weak.lock())
        for (const std::size_t child : children)
          if (child < sequential->size())
            door::release(*(sequential->begin() + static_cast<std::ptrdiff_t>(child)));
    wrapped_.clear();
    blocks_ = 0;
  }

 private:
  template <class M>
  friend BasicSequentialBlocks wrap_sequential_blocks(M& root);
  /// Whose children, and which of them: others may be another handle's.
  std::vector<std::pair<std::weak_ptr<torch::nn::SequentialImpl>, std::vector<std::size_t>>>
      wrapped_;
  std::int64_t blocks_ = 0;
};
using SequentialBlocks = BasicSequentialBlocks<>;

/// Makes the children of each outermost Sequential in `root` (itself included) blocks, whatever
/// their forward takes and returns. Names, parameters, types and clones of the model are as before;
/// children added later are no blocks. A Sequential that is wrapped already stays with who wrapped
/// it. `root`, if it is a Sequential itself, must be owned by a shared_ptr (as
/// torch::nn::Sequential is).
template <class M>
SequentialBlocks wrap_sequential_blocks(M& root) {
  SequentialBlocks handle;
  const auto visit = [&](const auto& self, torch::nn::Module& module) -> void {
    auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(&module);
    if (sequential == nullptr) {
      for (const auto& child : module.children()) self(self, *child);
      return;
    }
    std::shared_ptr<torch::nn::SequentialImpl> owner;
    try {
      owner = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(module.shared_from_this());
    } catch (const std::bad_weak_ptr&) {
      TORCH_CHECK(false,
                  "wrap_sequential_blocks: got a SequentialImpl that no shared_ptr owns; make it a "
                  "torch::nn::Sequential");
    }
    std::vector<std::size_t> children;
    std::size_t number = 0;
    for (torch::nn::AnyModule& child : *sequential) {
      if (door::intercept(child, [](const door::AnyForward& forward, door::AnyArguments arguments) {
            return block(forward, std::move(arguments));
          }))
        children.push_back(number);
      ++number;
    }
    handle.blocks_ += static_cast<std::int64_t>(children.size());
    if (!children.empty()) handle.wrapped_.emplace_back(owner, std::move(children));
  };
  visit(visit, root);
  return handle;
}

}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The policy Blocks: which blocks of a model a pipeline computes again in place of keeping what
/// they save. A model names its blocks in one of two ways:
///
///   x = fourfold::block(layer, x);        // in its forward: the plain call wherever no pipeline
///   asks torch::nn::Sequential layers(...);    // nothing to write: a Sequential's children are
///   its blocks
///
/// (A ModuleList's children are called by the model itself: name them by block.)
#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/core/policy.hpp>
#include <fourfold/torch/any_module.hpp>

#include <cstdint>
#include <memory>
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

/// Blocks met on this thread while it lives are checkpoints. The innermost one counts.
class [[nodiscard]] BlocksScope {
 public:
  explicit BlocksScope(int every = 1, const CheckpointOptions& options = {})
      : every_(every), options_(options), outer_(innermost()) {
    TORCH_CHECK(every >= 1, "BlocksScope: got every = ", every,
                "; give 1 to recompute each block, 2 for every second");
    innermost() = this;
  }
  ~BlocksScope() { innermost() = outer_; }
  BlocksScope(const BlocksScope&) = delete;
  BlocksScope& operator=(const BlocksScope&) = delete;

  /// This thread's, or null; also null within a block: blocks inside it belong to it.
  static BlocksScope* current() {
    return innermost() && !innermost()->inside_ ? innermost() : nullptr;
  }

  /// fn(inputs...), checkpointed if its turn has come.
  template <class Fn, class... Inputs>
  auto run(Fn&& fn, Inputs&&... inputs) -> detail::BlockResult<Fn, Inputs...> {
    ++met_;
    struct Inside {
      explicit Inside(BlocksScope& s) : scope(s) { scope.inside_ = true; }
      ~Inside() { scope.inside_ = false; }
      BlocksScope& scope;
    } const inside(*this);
    if ((met_ - 1) % every_ != 0)
      return detail::call_block(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
    ++recomputed_;
    return checkpoint(options_, std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
  }
  [[nodiscard]] std::int64_t met() const { return met_; }                ///< blocks that ran in it
  [[nodiscard]] std::int64_t recomputed() const { return recomputed_; }  ///< of them, checkpoints

 private:
  static BlocksScope*& innermost() {
    static thread_local BlocksScope* scope = nullptr;
    return scope;
  }

  const int every_;
  const CheckpointOptions options_;
  BlocksScope* const outer_;
  bool inside_ = false;
  std::int64_t met_ = 0, recomputed_ = 0;
};

/// fn(inputs...), as a block: a checkpoint within a BlocksScope (what a pipeline with Blocks
/// opens), the plain call elsewhere, within another block and where a block is computed again. `fn`
/// and `inputs` as checkpoint() takes them.
template <class Fn, class... Inputs>
auto block(Fn&& fn, Inputs&&... inputs) -> detail::BlockResult<Fn, Inputs...> {
  BlocksScope* scope = is_recomputing() ? nullptr : BlocksScope::current();
  if (scope == nullptr || !at::GradMode::is_enabled())
    return detail::call_block(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
  return scope->run(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
}

/// Undoes wrap_sequential_blocks when it dies. Outlives the model without harm.
class [[nodiscard]] SequentialBlocks {
 public:
  SequentialBlocks() = default;
  SequentialBlocks(SequentialBlocks&&) = default;
  SequentialBlocks& operator=(SequentialBlocks&& other) noexcept {
    if (this != &other) {
      undo();
      wrapped_ = std::move(other.wrapped_);
      blocks_ = std::exchange(other.blocks_, 0);
    }
    return *this;
  }
  ~SequentialBlocks() { undo(); }

  /// Children that became blocks.
  [[nodiscard]] std::int64_t blocks() const { return blocks_; }

  void undo() {
    for (const auto& weak : wrapped_)
      if (const auto sequential = weak.lock())
        for (torch::nn::AnyModule& child : *sequential) door::release(child);
    wrapped_.clear();
    blocks_ = 0;
  }

 private:
  friend SequentialBlocks wrap_sequential_blocks(torch::nn::Module& root);
  std::vector<std::weak_ptr<torch::nn::SequentialImpl>> wrapped_;
  std::int64_t blocks_ = 0;
};

/// Makes the children of each outermost Sequential in `root` (itself included) blocks, whatever
/// their forward takes and returns. Names, parameters, types and clones of the model are as before;
/// children added later are no blocks. A Sequential that is wrapped already stays with who wrapped
/// it. `root`, if it is a Sequential itself, must be owned by a shared_ptr (as
/// torch::nn::Sequential is).
inline SequentialBlocks wrap_sequential_blocks(torch::nn::Module& root) {
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
    bool any = false;
    for (torch::nn::AnyModule& child : *sequential) {
      const bool done =
          door::intercept(child, [](const door::AnyForward& forward, door::AnyArguments arguments) {
            return block(forward, std::move(arguments));
          });
      handle.blocks_ += done;
      any = any || done;
    }
    if (any) handle.wrapped_.push_back(owner);
  };
  visit(visit, root);
  return handle;
}

}  // namespace fourfold::inline v0

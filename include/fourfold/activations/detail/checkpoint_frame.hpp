// SPDX-License-Identifier: Apache-2.0
#pragma once
/// One checkpointed block: what it dropped, and how to compute it again. Users call checkpoint().
///
/// The rules are those of torch.utils.checkpoint without reentrant autograd (the comment "Nestable
/// Checkpoint" in torch/utils/checkpoint.py):
///  1. The innermost frame owns a saved tensor.
///  2. A frame's inputs are saved by what stands around it.
///  3. A recompute starts as if no frame were open; frames that it meets are respected.
///  4. Recomputed tensors belong to one backward pass and go as they are unpacked, also under
///     retain_graph; a later pass computes again, and so does a second unpack in the same pass.
///  5. A recompute stops when the last tensor that is still needed was saved; before it is even made,
///     where the packer around would compute it again from what its operator saved.
///  6. Backward inside the block works.
/// Ownership goes graph node -> Holder -> frame -> packed inputs; frames know holders weakly.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <fourfold/activations/detail/saved_look.hpp>
#include <fourfold/torch/autocast.hpp>
#include <fourfold/torch/graph_task.hpp>
#include <fourfold/torch/operators.hpp>  // OperatorsPause
#include <fourfold/torch/random_state.hpp>
#include <fourfold/torch/saved_tensors.hpp>
#include <fourfold/torch/state_writes.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

struct CheckpointOptions {
  bool preserve_random_state = true;  ///< dropout draws the same mask when the block runs again
  bool early_stop = true;             ///< stop the second run once nothing more is needed
  bool check_determinism = false;     ///< compare values too, by a hash; for debugging, slow
  /// What the second run saves is kept as it is until backward has read it, whatever packer is
  /// around: quicker, and larger for as long as the block's own backward takes.
  bool reference_recomputed = false;
  std::shared_ptr<void> token{};  ///< lives as long as backward may need the block
};

namespace detail {

template <class T>  // void, and compiled where a checkpoint is made
class CheckpointFrame final : public door::SavedTensors,
                              public std::enable_shared_from_this<CheckpointFrame<T>> {
  using SavedLook = BasicSavedLook<T>;
  using StateWrites = BasicStateWrites<T>;
  using Scope = door::BasicSavedTensorsScope<T>;

 public:
  using Run = std::function<void(const std::vector<at::Tensor>& inputs)>;

  /// Packs `inputs` with what stands around; `run` gets them back in this order, to run the block
  /// again.
  CheckpointFrame(const CheckpointOptions& options, const std::vector<at::Tensor>& inputs, Run run)
      : options_(options), run_(std::move(run)), autocast_(door::AutocastState::current()) {
    autocast_.cache = false;  // casts of a second run would stay cached after it
    const door::OperatorsPause pause;
    const std::shared_ptr<door::SavedTensors> parent = door::active_saved_tensors();
    payloads_ = parent && parent->recomputes() ? parent->around() : parent;
    std::vector<at::Device> devices;
    for (const at::Tensor& tensor : inputs) {
      if (!tensor.defined()) {
        inputs_.emplace_back();
        continue;
      }
      const bool plain = parent == nullptr || tensor.is_inference();
      inputs_.push_back({plain ? door::saved_reference(tensor)
                               : door::detail::pack_with(*parent, tensor, /*block_input=*/true),
                         tensor.requires_grad(), tensor.is_leaf(), false});
      if (!tensor.is_cpu() && !tensor.is_meta()) devices.push_back(tensor.device());
    }
    if (!devices.empty()) device_ = c10::impl::VirtualGuardImpl(devices.front().type()).getDevice();
    if (options_.preserve_random_state) random_ = door::RandomState(devices);
  }

  /// While it lives, the block runs for the first time: the frame is the packer.
  class [[nodiscard]] FirstRun {
   public:
    FirstRun(const std::shared_ptr<CheckpointFrame>& frame, const std::vector<at::Tensor>& inputs)
        : frame_(*frame),
          inputs_(inputs),
          scope_(frame, /*in_backward=*/true),
          writes_(frame_.written_) {
      for (const at::Tensor& tensor : inputs_) versions_.push_back(version(tensor));
    }
    ~FirstRun() {  // also of a block that throws: what it saved may live on in what it kept
      const std::lock_guard lock(frame_.mutex_);
      frame_.complete_ = true;
      if (frame_.last_.known.result == nullptr) frame_.last_ = {};
      for (std::size_t i = 0; i < inputs_.size(); ++i)
        frame_.inputs_[i].written = version(inputs_[i]) != versions_[i];
    }
    FirstRun(const FirstRun&) = delete;
    FirstRun& operator=(const FirstRun&) = delete;

   private:
    static std::int64_t version(const at::Tensor& tensor) {
      return tensor.defined() && !tensor.is_inference() ? tensor._version() : 0;
    }
    CheckpointFrame& frame_;
    const std::vector<at::Tensor>& inputs_;
    std::vector<std::int64_t> versions_;
    const Scope scope_;  // keeps the frame
    const StateWrites writes_;
  };

  std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    return pack_attached(tensor, tensor);
  }
  std::shared_ptr<door::Saved> pack_attached(const at::Tensor& tensor,
                                             const at::Tensor& attached) override {
    const std::lock_guard lock(mutex_);
    auto holder = std::make_shared<Holder>(this->shared_from_this(), holders_.size());
    if (packs()) note_last(holder->index, tensor, attached);
    holders_.push_back(holder);
    looks_.emplace_back(tensor, attached, options_.check_determinism);
    return holder;
  }
  bool recomputes() const override { return true; }
  std::shared_ptr<door::SavedTensors> around() const override { return payloads_; }

 private:
  struct Input {
    std::shared_ptr<door::Saved> saved;  // null: undefined
    bool requires_grad = false, leaf = true;
    bool written = false;  // by the block itself: it gets a copy each time
  };

  /// Whether the packer around holds what the second run saves; else it is referenced.
  bool packs() const { return payloads_ != nullptr && !options_.reference_recomputed; }

  /// The last tensor that is saved and is no parameter: where its operator made it of what it saved
  /// itself, the second run may stop there. Parameters that are saved after it are there without a
  /// run (of a leaf that the block itself made, a copy lives as long as the block's graph).
  struct Last {
    std::size_t index = 0, before = 0;  ///< `before`: of the one before it
    door::Foreseen known;
    /// Saved since `before`.
    std::vector<std::pair<std::size_t, std::shared_ptr<door::Saved>>> parameters{};
  };
  void note_last(std::size_t index, const at::Tensor& tensor, const at::Tensor& attached) {
    const door::OperatorsPause pause;  // the program's operators are counted
    if (door::is_parameter(attached)) {
      last_.parameters.emplace_back(index, door::saved_reference(tensor));
      return;
    }
    last_.known = payloads_->foresee(tensor, attached, last_.known.saver);
    last_.before = std::exchange(last_.index, index);
    std::erase_if(last_.parameters, [&](const auto& one) { return one.first < last_.before; });
  }

  /// In the graph, in place of one tensor.
  struct Holder final : door::Saved {
    Holder(std::shared_ptr<CheckpointFrame> f, std::size_t i) : frame(std::move(f)), index(i) {}
    at::Tensor unpack() override { return frame->unpack(*this, /*packed=*/false); }
    at::Tensor unpack_packed() override { return frame->unpack(*this, /*packed=*/true); }

    std::shared_ptr<door::Saved> take(int task) {
      const auto found = std::find_if(recomputed.begin(), recomputed.end(),
                                      [&](const auto& one) { return one.first == task; });
      if (found == recomputed.end()) return nullptr;
      std::shared_ptr<door::Saved> saved = std::move(found->second);
      recomputed.erase(found);
      return saved;
    }

    const std::shared_ptr<CheckpointFrame> frame;
    const std::size_t index;
    std::vector<std::pair<int, std::shared_ptr<door::Saved>>> recomputed;  // by graph task
  };

  /// Ends a second run early. Not a std::exception: a block that catches those must not see it.
  struct Stop {};

  /// The packer of a second run.
  struct Recompute final : door::SavedTensors {
    Recompute(CheckpointFrame& f, int t, const Holder* o) : frame(f), task(t), only(o) {
      for (std::size_t i = frame.holders_.size(); i > 0 && end == 0; --i)
        if (only ? i == only->index + 1 : !frame.holders_[i - 1].expired()) end = i;
    }
    std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
      return pack_attached(tensor, tensor);
    }
    std::shared_ptr<door::Saved> pack_attached(const at::Tensor& tensor,
                                               const at::Tensor& attached) override {
      return hold(tensor, attached, /*block_input=*/false);
    }
    std::shared_ptr<door::Saved> pack_block_input(const at::Tensor& tensor,
                                                  const at::Tensor& attached) override {
      return hold(tensor, attached, /*block_input=*/true);
    }
    std::shared_ptr<door::Saved> hold(const at::Tensor& tensor, const at::Tensor& attached,
                                      bool block_input) {
      if (stopping) throw Stop{};
      const std::size_t index = count++;
      if (index >= frame.holders_.size()) {
        // A backward inside the block runs the block again before its first run is complete.
        TORCH_CHECK(!frame.complete_,
                    "fourfold::checkpoint: a block saved more tensors when it was "
                    "computed again than in its forward, which saved ",
                    frame.holders_.size(), "; the next one is ",
                    SavedLook(tensor, attached, false).text(), kAdvice);
        return door::saved_reference(tensor);
      }
      const std::shared_ptr<Holder> holder = frame.holders_[index].lock();
      std::shared_ptr<door::Saved> saved;
      if (holder == nullptr || (only != nullptr && holder.get() != only)) {
        saved = door::saved_reference(tensor);
      } else {
        const SavedLook look(tensor, attached, frame.options_.check_determinism);
        TORCH_CHECK(look == frame.looks_[index], "fourfold::checkpoint: saved tensor ", index,
                    " of a block came back different when the block was computed again: it is ",
                    look.text(), ", its forward saved ", frame.looks_[index].text(), kAdvice);
        saved = frame.packs() ? door::detail::pack_with(*frame.payloads_, attached, block_input)
                              : door::saved_reference(tensor);
        holder->recomputed.emplace_back(task, saved);
      }
      // What has a gradient has its value. What has none may be a buffer that its operator is about
      // to fill (rrelu saves its noise so): let the operator run whose node it belongs to.
      if (!attached.requires_grad()) unfilled = door::nodes_made();
      if (give_last(index)) throw Stop{};
      if (frame.options_.early_stop && count == end) {
        if (unfilled != door::nodes_made()) throw Stop{};
        stopping = true;
      }
      return saved;
    }
    /// `index` was saved. Where its operator's result is all that is still needed, beside parameters:
    /// hands these out, the result to be computed when it is asked for. False: the run must go on.
    bool give_last(std::size_t index) {
      const Last& last = frame.last_;
      if (last.known.result == nullptr || index != last.before || end <= last.index ||
          !frame.options_.early_stop || frame.options_.check_determinism)
        return false;
      const std::shared_ptr<door::Saved> saved = frame.payloads_->pack_foreseen(last.known.result);
      if (saved == nullptr) return false;
      const auto give = [&](std::size_t to, const std::shared_ptr<door::Saved>& one) {
        const std::shared_ptr<Holder> holder = frame.holders_[to].lock();
        if (holder != nullptr && (only == nullptr || holder.get() == only))
          holder->recomputed.emplace_back(task, one);
      };
      give(last.index, saved);
      for (const auto& [parameter, reference] : last.parameters) give(parameter, reference);
      count = end;
      return true;
    }
    bool recomputes() const override { return true; }
    std::shared_ptr<door::SavedTensors> around() const override { return frame.payloads_; }

    CheckpointFrame& frame;
    const int task;
    const Holder* const only;
    std::size_t count = 0, end = 0;
    std::uint64_t unfilled =
        ~std::uint64_t{0};  // nodes made when a tensor without gradient was saved
    bool stopping = false;
  };

  static constexpr const char* kAdvice =
      ". A checkpointed function must do the same each time it runs: give it what it depends on as "
      "inputs, and leave the model's mode (train, eval) as it was until backward is done";

  at::Tensor unpack(Holder& holder, bool packed) {
    const std::lock_guard lock(mutex_);
    const int task = door::current_graph_task();
    std::shared_ptr<door::Saved> saved = holder.take(task);
    if (saved == nullptr) {
      const bool again =
          task == -1 || std::find(filled_.begin(), filled_.end(), task) != filled_.end();
      recompute(task, again ? &holder : nullptr);
      saved = holder.take(task);
      TORCH_INTERNAL_ASSERT(saved != nullptr);
    }
    return packed ? saved->unpack_packed() : saved->unpack();
  }

  void recompute(int task, const Holder* only) {
    Recompute packer_of_this_run(*this, task, only);
    auto packer = std::shared_ptr<Recompute>(std::shared_ptr<void>(), &packer_of_this_run);
    try {
      second_run(packer);
    } catch (const Stop&) {
    } catch (...) {
      forget(task);
      throw;
    }
    if (packer->count < packer->end) {
      forget(task);
      TORCH_CHECK(false,
                  "fourfold::checkpoint: a block saved fewer tensors when it was computed again (",
                  packer->count, ") than in its forward (", holders_.size(), ")", kAdvice);
    }
    if (task == -1 || only != nullptr) return;
    filled_.push_back(task);
    door::at_end_of_graph_task([frame = this->weak_from_this(), task] {
      if (const auto strong = frame.lock()) {
        const std::lock_guard lock(strong->mutex_);
        strong->forget(task);
      }
    });
  }

  void second_run(const std::shared_ptr<Recompute>& packer) {
    std::vector<at::Tensor> inputs;
    for (std::size_t i = 0; i < inputs_.size(); ++i) inputs.push_back(input(i));
    const at::AutoGradMode grad(true);
    const door::AutocastGuard autocast(autocast_);
    const c10::OptionalDeviceGuard device(device_);
    const door::RandomStateGuard random(random_);
    const typename StateWrites::Rewind state(written_);
    const std::shared_ptr<void> active = packs() ? payloads_->activate() : nullptr;
    struct Depth {
      int& depth = door::detail::saved_tensors_engine().recomputing();
      Depth() { ++depth; }
      ~Depth() { --depth; }
    } const recomputing;
    const Scope scope(packer, /*in_backward=*/true);
    run_(inputs);
  }

  at::Tensor input(std::size_t index) {
    const Input& input = inputs_[index];
    if (input.saved == nullptr) return {};
    at::Tensor tensor;
    try {
      tensor = door::detail::unpack_from(*input.saved);
    } catch (const c10::Error& error) {
      TORCH_CHECK(
          false, error.what_without_backtrace(), " It is input ", index,
          " of a fourfold::checkpoint, needed to compute the block again: do not write to it "
          "before backward, or hand a clone of it to the checkpoint");
    }
    if (input.written) tensor = tensor.clone();
    return input.requires_grad ? door::with_gradient(tensor, input.leaf) : tensor.detach();
  }

  void forget(int task) {
    std::erase(filled_, task);
    for (const std::weak_ptr<Holder>& weak : holders_)
      if (const auto holder = weak.lock()) holder->take(task);
  }

  const CheckpointOptions options_;
  const Run run_;
  door::AutocastState autocast_;
  std::optional<c10::Device> device_;
  door::RandomState random_;
  std::shared_ptr<door::SavedTensors> payloads_;  // holds recomputed tensors; null: referenced
  std::vector<Input> inputs_;
  std::vector<typename StateWrites::Written> written_;

  std::recursive_mutex
      mutex_;  // a block that runs backward inside itself unpacks under its own lock
  bool complete_ = false;
  std::vector<std::weak_ptr<Holder>> holders_;
  std::vector<SavedLook> looks_;
  Last last_;
  std::vector<int> filled_;  // graph tasks for which every live holder was filled
};

}  // namespace detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What autograd saves, held small: one payload for one storage, exactly where a codec would hurt.
///
///   ActivationOptions options;
///   options.pack = pack_with<Int4>;                      // null: nothing is rounded
///   options.recompute = operator_names<CheapOps>();      // empty: nothing is computed again
///   auto store = ActivationStore::make(std::move(options));
///   {
///     const door::SavedTensorsScope scope(store);
///     const auto active = store->activate();             // the operators' tape
///     loss = model->forward(x);
///   }
///   loss.backward();                                     // inside or outside of the scope
///
/// A saved tensor is, in this order:
///  1. held as it is and not counted: what is not dense (sparse, quantised, meta, packed, ...), empty;
///     a parameter (a leaf that asks for gradients, a view of one, `keep_storages`);
///  2. held as it is: what its operator has yet to write;
///  3. held by what holds its storage already, or by what it was decoded from;
///  4. held as it is: complex; what `keep` says; a constant from outside of the scope (a batch and its
///     targets, which somebody holds); statistics (an eighth of its operator's largest argument or
///     less); small (under `min_numel` values or `min_bytes`; of a large storage that piece alone);
///  5. held as it is or offloaded, and 6 to 10 as far as they are open, where the plan says so;
///  6. held in one bit: dropout's noise, boolean masks;
///  7. not held, but computed again from what is held anyway (`recompute`);
///  8. held exactly in fewer bits: max_pool's indices in 8; other Long and Int values in as few bytes
///     as their range needs; what the backward of relu, leaky_relu, hardtanh, relu6 and threshold
///     asks of it, in one;
///  9. packed, rounded stochastically: what attention, softmax and matrix products of two activations
///     save and the inputs of checkpoints by `pack_sensitive`, the rest by `pack` (detail/tolerance.hpp).
///     Float, BFloat16 and Half only. Not what a backward divides by or takes the root or the
///     logarithm of; nor what holds an infinity or a NaN, whose neighbours would be lost;
/// 10. written to a file, codes and what else is held (`offload`); else held as it is.
/// Without `pack` all of it is exact, and gradients are equal to the bit.
///
/// A view comes back with its sizes, strides and dtype. Its offset is counted from the first value
/// that is held, where a piece of a storage is held. What is packed is a value as it was saved;
/// writing to it by a raw pointer afterwards is not seen (an operator's write is: the door throws
/// LibTorch's error at unpacking, as without us).
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/activations/detail/ask_plan.hpp>
#include <fourfold/activations/detail/encoder.hpp>
#include <fourfold/activations/detail/explain.hpp>
#include <fourfold/activations/detail/foreseen.hpp>
#include <fourfold/activations/detail/saved_views.hpp>
#include <fourfold/activations/detail/tape.hpp>
#include <fourfold/activations/detail/tolerance.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/cuda/stream_order.hpp>
#include <fourfold/torch/operators.hpp>
#include <fourfold/torch/saved_tensors.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

template <class T = void>
class BasicActivationStore final : public door::SavedTensors,
                                   public std::enable_shared_from_this<BasicActivationStore<T>> {
  using Tape = detail::BasicTape<T>;
  using StorageIndex = detail::BasicStorageIndex<T>;

 public:
  [[nodiscard]] static std::shared_ptr<BasicActivationStore> make(ActivationOptions options = {}) {
    return std::shared_ptr<BasicActivationStore>(new BasicActivationStore(std::move(options)));
  }

  /// The model's parameters and buffers: never packed, nor what is made of them alone.
  void keep_storages(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors)
      if (detail::is_plain(tensor)) index_->mark_exact(tensor.storage());
  }
  /// The optimizer's steps so far: part of the noise's key.
  void set_step(std::uint64_t step) { encoder_.set_step(step); }

  /// Turns the operators' tape on, on this thread, until the result goes; also within backward,
  /// for a recompute. Null where nothing is packed or recomputed.
  [[nodiscard]] inline std::shared_ptr<void> activate() override;

  [[nodiscard]] std::shared_ptr<door::Saved> pack(const at::Tensor& tensor) override {
    return pack_attached(tensor, tensor);
  }
  // Inline here already: GCC emits a class's table in each unit where its first virtual function
  // that is not inline in the class is defined inline below.
  [[nodiscard]] inline std::shared_ptr<door::Saved> pack_attached(
      const at::Tensor& tensor, const at::Tensor& attached) override;
  [[nodiscard]] inline std::shared_ptr<door::Saved> pack_block_input(
      const at::Tensor& tensor, const at::Tensor& attached) override;
  [[nodiscard]] inline door::Foreseen foresee(const at::Tensor& tensor, const at::Tensor& attached,
                                              std::uint64_t maker) override;
  [[nodiscard]] inline std::shared_ptr<door::Saved> pack_foreseen(
      const std::shared_ptr<const void>& result) override;

  /// What LibTorch would hold: distinct storages, the model's own apart.
  [[nodiscard]] PeakBytes plain_bytes() const { return totals_->plain.bytes(); }
  [[nodiscard]] PeakBytes held_bytes() const { return totals_->held.bytes(); }
  [[nodiscard]] SavedCounts counts() const { return totals_->counts(); }
  [[nodiscard]] std::uint64_t forwards() const { return forwards_.load(); }
  /// Who decides, or null.
  [[nodiscard]] const std::shared_ptr<SavedPlan>& plan() const { return options_.plan; }
  /// Who holds what leaves memory, or null.
  [[nodiscard]] const std::shared_ptr<Offloading>& offload() const { return options_.offload; }
  /// What this thread's operators are noted on, if this store was activated on it; else null.
  [[nodiscard]] Tape* tape() const;
  /// Too small to do anything about.
  [[nodiscard]] bool holds_small(const at::Tensor& tensor) const {
    return tensor.numel() < options_.min_numel ||
           static_cast<std::int64_t>(tensor.nbytes()) < options_.min_bytes;
  }
  void restart_peaks() { totals_->plain.restart_peak(), totals_->held.restart_peak(); }
  /// In words: what was saved and what became of it, or why nothing was saved.
  [[nodiscard]] std::string explain() const {
    return detail::explain(*totals_, forwards(), options_.pack != nullptr);
  }

 private:
  using Stored = std::shared_ptr<detail::BasicStored<T>>;
  struct Active;

  explicit BasicActivationStore(ActivationOptions options) : options_(std::move(options)) {}

  [[nodiscard]] bool active() const {
    return options_.pack != nullptr || !options_.recompute.empty() || options_.offload != nullptr;
  }
  std::shared_ptr<door::Saved> keep(const at::Tensor& tensor, const Tape* tape = nullptr,
                                    bool written = true, const SavedPlan::Choice& choice = {});
  std::shared_ptr<door::Saved> uncounted(const at::Tensor& tensor, std::atomic<std::int64_t>& kind);
  std::shared_ptr<door::Saved> as(const Stored& stored, detail::StorageView view);
  std::shared_ptr<door::Saved> hold(const at::Tensor& tensor, const at::Tensor& attached,
                                    PackFunction pack);

  const ActivationOptions options_;
  const std::shared_ptr<detail::SavedTotals> totals_ = std::make_shared<detail::SavedTotals>();
  const std::shared_ptr<StorageIndex> index_ = std::make_shared<StorageIndex>(totals_);
  detail::BasicEncoder<T> encoder_{options_, index_};
  std::atomic<std::uint64_t> forwards_{0};
  std::mutex mutex_;
  std::vector<std::unique_ptr<Tape>> tapes_;  // idle ones, which know operators already
};
using ActivationStore = BasicActivationStore<>;

// ---------------------------------------------------------------------------------------------

/// The tape of one activation.
template <class T>
struct BasicActivationStore<T>::Active {
  Active(std::shared_ptr<BasicActivationStore> of, std::uint64_t forward)
      : store(std::move(of)), tape(take()) {
    tape->begin(forward);
    const bool in_backward = torch::autograd::get_current_graph_task_id() != -1;
    scope.emplace(*tape, in_backward);
    planned = store->options_.plan != nullptr && !in_backward;
    if (!planned) return;
    SavedPlan& plan = *store->options_.plan;
    plan.forward_began(forward);
    if (plan.listens(forward)) tape->told_to(&plan);
  }
  ~Active() {
    scope.reset();
    if (store->options_.offload != nullptr) store->options_.offload->settle();
    if (planned) store->options_.plan->forward_ended(tape->forward());
    tape->told_to(nullptr);
    tape->clear();
    const std::lock_guard lock(store->mutex_);
    store->tapes_.push_back(std::move(tape));
  }
  std::unique_ptr<Tape> take() {
    const std::lock_guard lock(store->mutex_);
    if (store->tapes_.empty())
      return std::make_unique<Tape>(store->index_, store->options_.recompute);
    std::unique_ptr<Tape> idle = std::move(store->tapes_.back());
    store->tapes_.pop_back();
    return idle;
  }

  std::shared_ptr<BasicActivationStore> store;
  std::unique_ptr<Tape> tape;
  bool planned = false;
  std::optional<door::OperatorsScope> scope;
};

template <class T>
std::shared_ptr<void> BasicActivationStore<T>::activate() {
  const std::uint64_t forward = forwards_.fetch_add(1, std::memory_order_relaxed) + 1;
  if (!active()) return nullptr;
  return std::make_shared<Active>(this->shared_from_this(), forward);
}

template <class T>
detail::BasicTape<T>* BasicActivationStore<T>::tape() const {
  auto* tape = dynamic_cast<Tape*>(door::current_operator_observer());
  return tape != nullptr && tape->index() == index_ ? tape : nullptr;
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::uncounted(const at::Tensor& tensor,
                                                                std::atomic<std::int64_t>& kind) {
  kind.fetch_add(1, std::memory_order_relaxed);
  return std::make_shared<detail::BasicSavedAsIs<T>>(tensor);
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::keep(const at::Tensor& tensor,
                                                           const Tape* tape, bool written,
                                                           const SavedPlan::Choice& choice) {
  const auto values = static_cast<std::int64_t>(tensor.storage().nbytes() / tensor.element_size());
  auto kept = std::make_shared<detail::BasicKept<T>>(index_->use(tensor.storage()), tensor, values);
  if (tape != nullptr && tape->frame() != nullptr) kept->note_saver(tape->frame()->time);
  if (choice.watch != nullptr) kept->watch(choice.watch, choice.item);
  kept->use()->note_saved();
  if (written) index_->add(kept);
  totals_->kept.fetch_add(1, std::memory_order_relaxed);
  return std::make_shared<detail::BasicSavedAsIs<T>>(tensor, std::move(kept));
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::as(const Stored& stored,
                                                         detail::StorageView view) {
  std::atomic<std::int64_t>& count = [&]() -> std::atomic<std::int64_t>& {
    switch (stored->kind()) {
      case StoredAs::kKept: return totals_->kept;
      case StoredAs::kPacked: return totals_->packed;
      case StoredAs::kMask: return totals_->masks;
      case StoredAs::kRebuilt: return totals_->recomputed;
      case StoredAs::kOffloaded: return totals_->offloaded;
    }
    TORCH_INTERNAL_ASSERT(false);
  }();
  count.fetch_add(1, std::memory_order_relaxed);
  stored->use()->note_saved();
  return std::make_shared<detail::BasicSavedView<T>>(stored, std::move(view));
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::pack_attached(const at::Tensor& tensor,
                                                                    const at::Tensor& attached) {
  return hold(tensor, attached, options_.pack);
}
template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::pack_block_input(const at::Tensor& tensor,
                                                                       const at::Tensor& attached) {
  return hold(tensor, attached, options_.pack_sensitive);
}

/// A result is foreseen where hold() would have it computed again, were its inputs held.
template <class T>
door::Foreseen BasicActivationStore<T>::foresee(const at::Tensor& tensor,
                                                const at::Tensor& attached, std::uint64_t maker) {
  const Tape* const tape = this->tape();
  if (tape == nullptr || tape->frame() == nullptr) return {};
  door::Foreseen foreseen{.saver = tape->frame()->time};
  const auto* const origin = detail::fresh_result(*tape, tensor);
  if (origin == nullptr || origin->call->time != maker || holds_small(tensor) ||
      encoder_.stays(tensor, attached, tape))
    return foreseen;
  const detail::Tolerance tolerance =
      detail::tolerance(tape, tensor.storage().unsafeGetStorageImpl());
  const bool may_round = detail::pack_within(tolerance, options_.pack, options_) != nullptr;
  foreseen.result = std::make_shared<detail::ForeseenResult>(
      detail::ForeseenResult{origin->call, origin->result, detail::StorageView(tensor), may_round});
  return foreseen;
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::pack_foreseen(
    const std::shared_ptr<const void>& result) {
  const Tape* const tape = this->tape();
  if (tape == nullptr) return nullptr;
  const door::OperatorsPause pause;
  const PlaceGuard place(Place::kActivations);
  const auto& foreseen = *static_cast<const detail::ForeseenResult*>(result.get());
  const Stored stored = detail::rebuild_foreseen(*tape, foreseen, options_.recompute_depth);
  return stored != nullptr ? as(stored, foreseen.view) : nullptr;
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::hold(const at::Tensor& tensor,
                                                           const at::Tensor& attached,
                                                           PackFunction pack) {
  const door::OperatorsPause pause;
  if (!detail::is_plain(tensor) || tensor.numel() == 0) return uncounted(tensor, totals_->kept);
  c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
  if (door::is_parameter(attached) || index_->is_exact(key))
    return uncounted(tensor, totals_->parameters);
  if (!active() && !options_.payload_of) return keep(tensor);

  Tape* const tape = this->tape();
  const std::int64_t version = tensor._version();
  if (tape != nullptr && tape->frame() != nullptr && tape->frame()->unwritten(key, version))
    return keep(tensor, tape, /*written=*/false);
  detail::StorageView view(tensor);
  const detail::Extent extent(view);
  const detail::Tolerance tolerance = detail::tolerance(tape, key);
  const bool exact = tolerance == detail::Tolerance::kExact;
  if (Stored found = index_->find(key, version, view.dtype, extent);
      found != nullptr && (!exact || found->exact())) {
    if (tape != nullptr) tape->note_saved(found);
    if (tape != nullptr && tape->frame() != nullptr) found->note_saver(tape->frame()->time);
    if (found->kind() != StoredAs::kKept) {
      found->note_again();
      return as(found, std::move(view));
    }
    found->note_again();
    totals_->kept.fetch_add(1, std::memory_order_relaxed);
    return std::make_shared<detail::BasicSavedAsIs<T>>(tensor, std::move(found));
  }
  if (Stored source = encoder_.decoded(tensor, extent)) return as(source, std::move(view));
  if (options_.payload_of && extent.dense())
    if (Stored lent = encoder_.borrowed(tensor, extent)) return as(lent, std::move(view));
  if (!active()) return keep(tensor);
  if (encoder_.stays(tensor, attached, tape)) return keep(tensor, tape);
  // Autograd would hold it until backward; from here on the program may let it go at once.
  cuda::used_on_current_stream(tensor.storage());
  const PlaceGuard place(Place::kActivations);
  if (holds_small(tensor)) {
    const auto bytes = static_cast<std::int64_t>(tensor.nbytes());
    const auto around = static_cast<std::int64_t>(tensor.storage().nbytes());
    if (around < (1 << 16) || around < 16 * bytes) return keep(tensor, tape);
    totals_->kept.fetch_add(1, std::memory_order_relaxed);
    return std::make_shared<detail::BasicSavedPiece<T>>(tensor, index_->use(tensor.storage()));
  }
  pack = detail::pack_within(tolerance, pack, options_);
  SavedPlan::Choice choice;
  if (options_.plan != nullptr && tape != nullptr && !exact)
    choice =
        detail::ask_plan(*options_.plan, tensor, pack != options_.pack, pack != nullptr, *tape);
  if (choice.pack != nullptr) pack = choice.pack;
  // A plan that was not asked (of what is exact, or is saved in backward) has counted it in memory.
  const bool may_offload = options_.plan == nullptr || choice.watch != nullptr;
  const Stored stored = choice.keep      ? nullptr
                        : choice.offload ? encoder_.offloaded(tensor, extent)
                                         : encoder_.encode(tensor, extent, pack, tape, may_offload,
                                                           /*may_rebuild=*/!choice.code);
  if (stored == nullptr) return keep(tensor, tape, /*written=*/true, choice);
  if (choice.watch != nullptr) stored->watch(std::move(choice.watch), choice.item);
  if (tape != nullptr) tape->note_saved(stored);
  if (tape != nullptr && tape->frame() != nullptr) stored->note_saver(tape->frame()->time);
  return as(stored, std::move(view));
}

}  // namespace fourfold::inline v0

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
///  1. held as it is and not counted: a parameter (a leaf that asks for gradients, a view of one,
///     `keep_storages`), what is not dense (sparse, quantised, meta, packed, ...), empty;
///  2. held as it is: integers, complex; what its operator has yet to write; small (under
///     `min_numel` values or `min_bytes`); a constant from outside of the scope; statistics (an
///     eighth of its operator's largest argument or less); what `keep` says;
///  3. held by what holds its storage already, or by what it was decoded from;
///  4. held exactly in one bit a value: dropout's noise and boolean masks, and what the backward of
///     relu and leaky_relu asks of it;
///  5. not held, but computed again from what is held anyway (`recompute`);
///  6. packed, rounded stochastically: softmax results and inputs of checkpoints by
///     `pack_sensitive`, the rest by `pack`.
///     Float, BFloat16 and Half only; a Double is held as it is, and so is what holds an infinity
///     or a NaN, whose neighbours would be lost.
/// Without `pack` all of it is exact, and gradients are equal to the bit.
///
/// A view comes back with its sizes, strides and dtype. Its offset is counted from the first value
/// that is held, where a piece of a storage is held. What is packed is a value as it was saved;
/// writing to it by a raw pointer afterwards is not seen (an operator's write is: the door throws
/// LibTorch's error at unpacking, as without us).
#include <ATen/core/grad_mode.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/all.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ne.h>
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/activations/rebuild.hpp>
#include <fourfold/activations/saved_bytes.hpp>
#include <fourfold/activations/stored.hpp>
#include <fourfold/activations/tape.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/operators.hpp>
#include <fourfold/torch/saved_tensors.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

template <class = void>
class BasicActivationStore final : public door::SavedTensors,
                                   public std::enable_shared_from_this<BasicActivationStore<>> {
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
  void set_step(std::uint64_t step) { step_.store(step, std::memory_order_relaxed); }

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

  /// What LibTorch would hold: distinct storages, the model's own apart.
  [[nodiscard]] PeakBytes plain_bytes() const { return totals_->plain.bytes(); }
  [[nodiscard]] PeakBytes held_bytes() const { return totals_->held.bytes(); }
  [[nodiscard]] SavedCounts counts() const { return totals_->counts(); }
  [[nodiscard]] std::uint64_t forwards() const { return forwards_.load(); }
  void restart_peaks() { totals_->plain.restart_peak(), totals_->held.restart_peak(); }
  /// In words: what was saved and what became of it, or why nothing was saved.
  [[nodiscard]] std::string explain() const;

 private:
  using Stored = std::shared_ptr<detail::Stored>;
  struct Active;

  explicit BasicActivationStore(ActivationOptions options) : options_(std::move(options)) {}

  [[nodiscard]] bool active() const {
    return options_.pack != nullptr || !options_.recompute.empty();
  }
  /// What this thread's operators are noted on, if this store was activated on it.
  [[nodiscard]] detail::Tape* tape() const;

  std::shared_ptr<door::Saved> keep(const at::Tensor& tensor, const detail::Tape* tape = nullptr,
                                    bool written = true);
  std::shared_ptr<door::Saved> uncounted(const at::Tensor& tensor, std::atomic<std::int64_t>& kind);
  std::shared_ptr<door::Saved> as(const Stored& stored, detail::StorageView view);
  std::shared_ptr<door::Saved> hold(const at::Tensor& tensor, const at::Tensor& attached,
                                    PackFunction pack);
  Stored choose(const at::Tensor& tensor, const detail::Extent& extent, PackFunction pack,
                detail::Tape* tape);
  Stored decoded(const at::Tensor& tensor, const detail::Extent& extent);
  Stored borrowed(const at::Tensor& tensor, const detail::Extent& extent);
  Stored mask(const at::Tensor& tensor, const detail::Extent& extent);
  Stored sign(const at::Tensor& tensor, const detail::Extent& extent, bool positive);
  Stored packed(const at::Tensor& tensor, detail::Extent extent, PackFunction pack,
                detail::Tape* tape);
  [[nodiscard]] bool stays(const at::Tensor& tensor, const at::Tensor& attached,
                           const detail::Tape* tape) const;

  const ActivationOptions options_;
  const std::shared_ptr<detail::SavedTotals> totals_ = std::make_shared<detail::SavedTotals>();
  const std::shared_ptr<detail::StorageIndex> index_ =
      std::make_shared<detail::StorageIndex>(totals_);
  std::atomic<std::uint64_t> step_{0}, forwards_{0}, numbers_{0};
  std::mutex mutex_;
  std::vector<std::unique_ptr<detail::Tape>> tapes_;  // idle ones, which know operators already
};
using ActivationStore = BasicActivationStore<>;

// ---------------------------------------------------------------------------------------------

/// The tape of one activation.
template <class T>
struct BasicActivationStore<T>::Active {
  Active(std::shared_ptr<ActivationStore> of, std::uint64_t forward)
      : store(std::move(of)), tape(take()) {
    tape->begin(forward);
    scope.emplace(*tape, torch::autograd::get_current_graph_task_id() != -1);
  }
  ~Active() {
    scope.reset();
    tape->clear();
    const std::lock_guard lock(store->mutex_);
    store->tapes_.push_back(std::move(tape));
  }
  std::unique_ptr<detail::Tape> take() {
    const std::lock_guard lock(store->mutex_);
    if (store->tapes_.empty())
      return std::make_unique<detail::Tape>(store->index_, store->options_.recompute);
    std::unique_ptr<detail::Tape> idle = std::move(store->tapes_.back());
    store->tapes_.pop_back();
    return idle;
  }

  std::shared_ptr<ActivationStore> store;
  std::unique_ptr<detail::Tape> tape;
  std::optional<door::OperatorsScope> scope;
};

template <class T>
std::shared_ptr<void> BasicActivationStore<T>::activate() {
  const std::uint64_t forward = forwards_.fetch_add(1, std::memory_order_relaxed) + 1;
  if (!active()) return nullptr;
  return std::make_shared<Active>(shared_from_this(), forward);
}

template <class T>
detail::Tape* BasicActivationStore<T>::tape() const {
  auto* tape = dynamic_cast<detail::Tape*>(door::current_operator_observer());
  return tape != nullptr && tape->index() == index_ ? tape : nullptr;
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::uncounted(const at::Tensor& tensor,
                                                                std::atomic<std::int64_t>& kind) {
  kind.fetch_add(1, std::memory_order_relaxed);
  return std::make_shared<detail::SavedAsIs>(tensor);
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::keep(const at::Tensor& tensor,
                                                           const detail::Tape* tape, bool written) {
  const auto values = static_cast<std::int64_t>(tensor.storage().nbytes() / tensor.element_size());
  auto kept = std::make_shared<detail::Kept>(index_->use(tensor.storage()), tensor, values);
  if (tape != nullptr && tape->frame() != nullptr) kept->note_saver(tape->frame()->time);
  kept->use()->note_saved();
  if (written) index_->add(kept);
  totals_->kept.fetch_add(1, std::memory_order_relaxed);
  return std::make_shared<detail::SavedAsIs>(tensor, std::move(kept));
}

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::as(const Stored& stored,
                                                         detail::StorageView view) {
  std::atomic<std::int64_t>& count = [&]() -> std::atomic<std::int64_t>& {
    switch (stored->kind()) {
      case detail::StoredAs::kKept: return totals_->kept;
      case detail::StoredAs::kPacked: return totals_->packed;
      case detail::StoredAs::kMask: return totals_->masks;
      case detail::StoredAs::kRebuilt: return totals_->recomputed;
    }
    TORCH_INTERNAL_ASSERT(false);
  }();
  count.fetch_add(1, std::memory_order_relaxed);
  stored->use()->note_saved();
  return std::make_shared<detail::SavedView>(stored, std::move(view));
}

template <class T>
bool BasicActivationStore<T>::stays(const at::Tensor& tensor, const at::Tensor& attached,
                                    const detail::Tape* tape) const {
  const bool bits = tensor.scalar_type() == at::kBool && tensor.is_cpu();
  if (!at::isFloatingType(tensor.scalar_type()) && !bits) return true;
  if (options_.keep && options_.keep(tensor)) return true;
  c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
  const detail::Tape::Origin* origin = tape ? tape->origin(key) : nullptr;
  const bool made_here = origin != nullptr && origin->time != 0;
  if (attached.is_leaf() && !made_here) return true;  // a constant, which somebody holds
  const detail::Tape::Frame* frame = tape ? tape->frame() : nullptr;
  if (frame == nullptr || frame->argument(key) != nullptr) return false;
  for (const at::Tensor& argument : frame->tensors)
    if (8 * tensor.numel() <= argument.numel()) return true;  // mean, rstd, logsumexp
  return false;
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

template <class T>
std::shared_ptr<door::Saved> BasicActivationStore<T>::hold(const at::Tensor& tensor,
                                                           const at::Tensor& attached,
                                                           PackFunction pack) {
  const door::OperatorsPause pause;
  if (!detail::is_plain(tensor) || tensor.numel() == 0) return uncounted(tensor, totals_->kept);
  c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
  if (detail::Tape::is_parameter(attached) || index_->is_exact(key))
    return uncounted(tensor, totals_->parameters);
  if (!active() && !options_.payload_of) return keep(tensor);

  detail::Tape* const tape = this->tape();
  const std::int64_t version = tensor._version();
  if (tape != nullptr && tape->frame() != nullptr && tape->frame()->unwritten(key, version))
    return keep(tensor, tape, /*written=*/false);
  detail::StorageView view(tensor);
  const detail::Extent extent(view);
  if (Stored found = index_->find(key, version, view.dtype, extent)) {
    if (found->kind() != detail::StoredAs::kKept) return as(found, std::move(view));
    if (tape != nullptr && tape->frame() != nullptr)
      static_cast<detail::Kept&>(*found).note_saver(tape->frame()->time);
    found->use()->note_saved();
    totals_->kept.fetch_add(1, std::memory_order_relaxed);
    return std::make_shared<detail::SavedAsIs>(tensor, std::move(found));
  }
  if (Stored source = decoded(tensor, extent)) return as(source, std::move(view));
  if (options_.payload_of && extent.dense())
    if (Stored lent = borrowed(tensor, extent)) return as(lent, std::move(view));
  if (!active()) return keep(tensor);
  if (stays(tensor, attached, tape)) return keep(tensor, tape);
  const PlaceGuard place(Place::kActivations);
  const auto bytes = static_cast<std::int64_t>(tensor.nbytes());
  if (tensor.numel() < options_.min_numel || bytes < options_.min_bytes) {
    const auto around = static_cast<std::int64_t>(tensor.storage().nbytes());
    if (around < (1 << 16) || around < 16 * bytes) return keep(tensor, tape);
    totals_->kept.fetch_add(1, std::memory_order_relaxed);
    return std::make_shared<detail::SavedPiece>(tensor, index_->use(tensor.storage()));
  }
  const Stored stored = choose(tensor, extent, pack, tape);
  return stored == nullptr ? keep(tensor, tape) : as(stored, std::move(view));
}

template <class T>
std::shared_ptr<detail::Stored> BasicActivationStore<T>::decoded(const at::Tensor& tensor,
                                                                 const detail::Extent& extent) {
  const c10::Storage& storage = tensor.storage();
  Stored source = index_->decoded_from(storage.unsafeGetStorageImpl());
  if (source == nullptr) return nullptr;
  auto stored = std::make_shared<detail::Decoded>(index_->use(storage), std::move(source));
  if (!stored->has(tensor._version(), tensor.scalar_type(), extent)) return nullptr;
  index_->add(stored);
  return stored;
}

template <class T>
std::shared_ptr<detail::Stored> BasicActivationStore<T>::borrowed(const at::Tensor& tensor,
                                                                  const detail::Extent& extent) {
  std::shared_ptr<const Payload> payload = options_.payload_of(tensor);
  if (payload == nullptr || payload->dtype() != tensor.scalar_type() ||
      c10::multiply_integers(payload->sizes()) != extent.span)
    return nullptr;
  auto stored = std::make_shared<detail::Packed>(index_->use(tensor.storage()), tensor._version(),
                                                 tensor.scalar_type(), extent, std::move(payload),
                                                 /*exact=*/false, /*borrowed=*/true);
  index_->add(stored);
  return stored;
}

template <class T>
std::shared_ptr<detail::Stored> BasicActivationStore<T>::choose(const at::Tensor& tensor,
                                                                const detail::Extent& extent,
                                                                PackFunction pack,
                                                                detail::Tape* tape) {
  c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
  const detail::Tape::Origin* origin = tape ? tape->origin(key) : nullptr;
  if (tensor.scalar_type() == at::kBool) return mask(tensor, extent);
  if (origin != nullptr && origin->two_values)
    if (Stored stored = mask(tensor, extent)) return stored;
  if (origin != nullptr && origin->call != nullptr)
    if (Stored stored =
            detail::rebuild(*tape, *origin, tensor._version(), options_.recompute_depth))
      return stored;
  const at::ScalarType dtype = tensor.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) return nullptr;
  const detail::Tape::Frame* frame = tape ? tape->frame() : nullptr;
  const bool result = frame != nullptr && frame->argument(key) == nullptr;
  const bool reads_sign =
      frame != nullptr && (frame->traits->reads_nonzero || frame->traits->reads_positive);
  // Without a codec only where the values themselves, a relu's result, can be computed again.
  if (reads_sign && (pack != nullptr || (result && frame->traits->cheap)))
    if (Stored stored = sign(tensor, extent, frame->traits->reads_positive)) return stored;
  if (pack == nullptr) return nullptr;
  if (result && frame->traits->sensitive)
    return options_.pack_sensitive ? packed(tensor, extent, options_.pack_sensitive, tape)
                                   : nullptr;
  return packed(tensor, extent, pack, tape);
}

template <class T>
std::shared_ptr<detail::Stored> BasicActivationStore<T>::mask(const at::Tensor& tensor,
                                                              const detail::Extent& extent) {
  if (options_.pack_mask == nullptr || !extent.dense()) return nullptr;
  std::shared_ptr<const Payload> payload =
      options_.pack_mask(extent.view(tensor.scalar_type()).on(tensor.storage()));
  if (payload == nullptr) return nullptr;
  auto stored = std::make_shared<detail::Packed>(index_->use(tensor.storage()), tensor._version(),
                                                 tensor.scalar_type(), extent, std::move(payload),
                                                 /*exact=*/true);
  index_->add(stored);
  return stored;
}

/// What relu's backward asks, exactly: in few bits small values would round to 0. For its node
/// alone, since these are not the tensor's values.
template <class T>
std::shared_ptr<detail::Stored> BasicActivationStore<T>::sign(const at::Tensor& tensor,
                                                              const detail::Extent& extent,
                                                              bool positive) {
  if (options_.pack_mask == nullptr || !extent.dense()) return nullptr;
  const at::ScalarType dtype = tensor.scalar_type();
  const at::Tensor values = extent.view(dtype).on(tensor.storage());
  const std::shared_ptr<const Payload> bits =
      options_.pack_mask(positive ? at::gt(values, 0) : at::ne(values, 0));
  if (bits == nullptr) return nullptr;
  return std::make_shared<detail::Packed>(index_->use(tensor.storage()), tensor._version(), dtype,
                                          extent, bits->to(tensor.device(), dtype),
                                          /*exact=*/true);
}

template <class T>
std::shared_ptr<detail::Stored> BasicActivationStore<T>::packed(const at::Tensor& tensor,
                                                                detail::Extent extent,
                                                                PackFunction pack,
                                                                detail::Tape* tape) {
  const c10::Storage& storage = tensor.storage();
  const auto values = static_cast<std::int64_t>(storage.nbytes() / tensor.element_size());
  const detail::Tape::Origin* origin =
      tape ? tape->origin(storage.unsafeGetStorageImpl()) : nullptr;
  // q, k and v are pieces of one storage: it is packed whole, once. Not where parts of it may hold
  // anything, which would spoil the scales of their neighbours.
  if (!extent.dense() && 4 * extent.numel() >= values && origin != nullptr && !origin->assembled)
    extent = detail::Extent::whole(values);
  const Key key{.seed = at::detail::getDefaultCPUGenerator().current_seed(),
                .step = step_.load(std::memory_order_relaxed),
                .forward = tape ? tape->forward() : 0,
                .storage = tape ? tape->next_storage() : numbers_.fetch_add(1)};
  std::shared_ptr<const Payload> payload = pack(extent.view(tensor.scalar_type()).on(storage), key);
  const bool holds_nan = payload->holds_nan();
  auto stored = std::make_shared<detail::Packed>(index_->use(storage), tensor._version(),
                                                 tensor.scalar_type(), std::move(extent),
                                                 std::move(payload), /*exact=*/false);
  if (holds_nan) {  // of the tensor itself, or of what lies between its values?
    detail::StorageView view(tensor);
    const detail::Extent own(view);
    if (!detail::SavedView(stored, std::move(view)).unpack().isfinite().all().item<bool>())
      return mask(tensor, own);
  }
  index_->add(stored);
  return stored;
}

template <class T>
std::string BasicActivationStore<T>::explain() const {
  const SavedCounts n = counts();
  std::ostringstream out;
  if (n.tensors() == 0) {
    out << "activations: no tensor passed: forward ran outside the scope, on another thread, or "
           "without gradients";
    if (forwards() == 0) out << " (no scope was ever entered)";
    if (const std::int64_t outside = door::tensors_saved_outside_scopes(); outside > 0)
      out << "; " << outside << " tensors were saved on threads that had no scope";
    return out.str();
  }
  const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  out.precision(1);
  out << std::fixed << "activations: " << n.tensors() << " tensors saved in " << forwards()
      << " forwards: " << n.packed << " packed, " << n.masks << " as bits, " << n.recomputed
      << " computed again, " << n.kept << " held as they are, " << n.parameters
      << " the model's own; at most " << mib(held_bytes().peak) << " MiB held at once, plain "
      << "LibTorch would have held " << mib(plain_bytes().peak) << " MiB";
  if (n.materialised > 0)
    out << "; " << n.materialised
        << " were to be computed again, but an in-place operator wrote to their input first";
  if (n.packed == 0 && options_.pack != nullptr)
    out << "; nothing was packed: all tensors were small, not of a floating dtype, or constants";
  return out.str();
}

}  // namespace fourfold::inline v0

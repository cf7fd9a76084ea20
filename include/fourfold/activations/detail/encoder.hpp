// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The ways in which one saved tensor may be held, in the order in which they are tried (store.hpp).
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/all.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ne.h>
#include <fourfold/activations/activation_options.hpp>
#include <fourfold/activations/detail/exact_codes.hpp>
#include <fourfold/activations/detail/rebuild.hpp>
#include <fourfold/activations/detail/saved_views.hpp>
#include <fourfold/activations/detail/stored.hpp>
#include <fourfold/activations/detail/tape.hpp>
#include <fourfold/cuda/kernels.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace fourfold::inline v0::detail {

/// Each function returns null where its way is not open to the tensor.
template <class T = void>
class BasicEncoder {
  using Stored = BasicStored<T>;
  using StorageIndex = BasicStorageIndex<T>;
  using Tape = BasicTape<T>;

 public:
  BasicEncoder(const ActivationOptions& options, std::shared_ptr<StorageIndex> index)
      : options_(options), index_(std::move(index)) {}

  /// The optimizer's steps so far: part of the noise's key.
  void set_step(std::uint64_t step) { step_.store(step, std::memory_order_relaxed); }

  /// Whether it is held as it is, whatever else is open: of no dtype for it, a constant that somebody
  /// holds, statistics, or named by `keep`. `attached`: the same tensor in the graph.
  [[nodiscard]] bool stays(const at::Tensor& tensor, const at::Tensor& attached,
                           const Tape* tape) const {
    const at::ScalarType dtype = tensor.scalar_type();
    // On a GPU dropout's mask is a bool tensor; without our kernel its bits would take several passes.
    const bool bits =
        dtype == at::kBool && (tensor.is_cpu() || fourfold::cuda::kernels() != nullptr);
    const bool integers = dtype == at::kLong || dtype == at::kInt;
    if (!at::isFloatingType(dtype) && !bits && !integers) return true;
    if (options_.keep && options_.keep(tensor)) return true;
    c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
    const auto* origin = tape ? tape->origin(key) : nullptr;
    const auto* frame = tape ? tape->frame() : nullptr;
    const bool result = frame != nullptr && frame->argument(key) == nullptr;
    const bool made_here =
        (origin != nullptr && origin->time != 0) || ((integers || bits) && result);
    if (attached.is_leaf() && !made_here) return true;  // a constant, which somebody holds
    if (integers) return false;
    if (!result) return false;
    for (const at::Tensor& argument : frame->tensors)
      if (8 * tensor.numel() <= argument.numel()) return true;  // mean, rstd, logsumexp
    return false;
  }

  /// The first that is open: an exact code, computed again, packed by `pack` (null: exact ways
  /// alone), offloaded. `tape` may be null.
  std::shared_ptr<Stored> encode(const at::Tensor& tensor, const Extent& extent, PackFunction pack,
                                 Tape* tape, bool may_offload, bool may_rebuild = true) {
    if (std::shared_ptr<Stored> stored = coded(tensor, extent, pack, tape, may_rebuild))
      return stored;
    return may_offload ? offloaded(tensor, extent) : nullptr;
  }

  /// Its values as they are, but not in memory.
  std::shared_ptr<Stored> offloaded(const at::Tensor& tensor, Extent extent) {
    if (options_.offload == nullptr) return nullptr;
    const auto values =
        static_cast<std::int64_t>(tensor.storage().nbytes() / tensor.element_size());
    if (4 * extent.numel() >= values) extent = Extent::whole(values);  // of all its views
    at::Tensor dense = extent.view(tensor.scalar_type()).on(tensor.storage()).contiguous();
    if (dense.storage_offset() != 0) dense = dense.clone();
    return shared(
        by(options_.offload->offload(dense, tensor), tensor, extent, StoredAs::kOffloaded));
  }

  /// By the payload that it was decoded from.
  std::shared_ptr<Stored> decoded(const at::Tensor& tensor, const Extent& extent) {
    const c10::Storage& storage = tensor.storage();
    std::shared_ptr<Stored> source = index_->decoded_from(storage.unsafeGetStorageImpl());
    if (source == nullptr) return nullptr;
    auto stored = std::make_shared<BasicDecoded<T>>(index_->use(storage), std::move(source));
    if (!stored->has(tensor._version(), tensor.scalar_type(), extent)) return nullptr;
    index_->add(stored);
    return stored;
  }

  /// By somebody else's payload: a packed parameter's.
  std::shared_ptr<Stored> borrowed(const at::Tensor& tensor, const Extent& extent) {
    std::shared_ptr<const Payload> payload = options_.payload_of(tensor);
    if (payload == nullptr || payload->dtype() != tensor.scalar_type() ||
        c10::multiply_integers(payload->sizes()) != extent.span)
      return nullptr;
    return shared(by(std::move(payload), tensor, extent, StoredAs::kPacked, /*borrowed=*/true));
  }

 private:
  /// By `payload`, if there is one.
  std::shared_ptr<Stored> by(std::shared_ptr<const Payload> payload, const at::Tensor& tensor,
                             const Extent& extent, StoredAs kind, bool borrowed = false) {
    if (payload == nullptr) return nullptr;
    return std::make_shared<BasicPacked<T>>(index_->use(tensor.storage()), tensor._version(),
                                            tensor.scalar_type(), extent, std::move(payload), kind,
                                            borrowed);
  }
  /// For other nodes that save the same values, too.
  std::shared_ptr<Stored> shared(std::shared_ptr<Stored> stored) {
    if (stored != nullptr) index_->add(stored);
    return stored;
  }

  std::shared_ptr<Stored> coded(const at::Tensor& tensor, const Extent& extent, PackFunction pack,
                                Tape* tape, bool may_rebuild) {
    c10::StorageImpl* const key = tensor.storage().unsafeGetStorageImpl();
    const auto* origin = tape ? tape->origin(key) : nullptr;
    if (tensor.scalar_type() == at::kBool) return mask(tensor, extent);
    if (origin != nullptr && origin->two_values)
      if (std::shared_ptr<Stored> stored = mask(tensor, extent)) return stored;
    if (may_rebuild && origin != nullptr && origin->call != nullptr)
      if (std::shared_ptr<Stored> stored =
              rebuild(*tape, *origin, tensor._version(), options_.recompute_depth))
        if (pack != nullptr || stored->exact()) return stored;
    const at::ScalarType dtype = tensor.scalar_type();
    const auto* frame = tape ? tape->frame() : nullptr;
    const bool result = frame != nullptr && frame->argument(key) == nullptr;
    if (at::isIntegralType(dtype, /*includeBool=*/false))
      return integers(tensor, extent, result ? frame : nullptr);
    if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) return nullptr;
    const bool reads_sign =
        frame != nullptr && (frame->traits->reads_nonzero || frame->traits->reads_positive);
    // Without a codec only where the values themselves, a relu's result, can be computed again.
    if (reads_sign && (pack != nullptr || (result && frame->traits->cheap) ||
                       repeats_in_place(*tape, *frame, options_.recompute_depth)))
      if (std::shared_ptr<Stored> stored = sign(tensor, extent, frame->traits->reads_positive))
        return stored;
    const bool gated = frame != nullptr && frame->traits->gates();
    if (gated && (pack != nullptr || !frame->traits->cheap))
      if (std::shared_ptr<Stored> stored = gate(tensor, extent, *frame)) return stored;
    return pack != nullptr ? packed(tensor, extent, pack, tape) : nullptr;
  }

  /// Exactly, if there are two values.
  std::shared_ptr<Stored> mask(const at::Tensor& tensor, const Extent& extent) {
    if (options_.pack_mask == nullptr || !extent.dense()) return nullptr;
    return shared(by(options_.pack_mask(extent.view(tensor.scalar_type()).on(tensor.storage())),
                     tensor, extent, StoredAs::kMask));
  }

  /// What relu's backward asks, exactly: in few bits small values would round to 0. For its node
  /// alone, since these are not the tensor's values.
  std::shared_ptr<Stored> sign(const at::Tensor& tensor, const Extent& extent, bool positive) {
    if (options_.pack_mask == nullptr || !extent.dense()) return nullptr;
    const at::ScalarType dtype = tensor.scalar_type();
    const at::Tensor values = extent.view(dtype).on(tensor.storage());
    const std::shared_ptr<const Payload> bits =
        options_.pack_mask(positive ? at::gt(values, 0) : at::ne(values, 0));
    if (bits == nullptr) return nullptr;
    return by(bits->to(tensor.device(), dtype), tensor, extent, StoredAs::kMask);
  }

  /// Whether hardtanh's or threshold's backward lets a gradient pass. For its node alone, too.
  std::shared_ptr<Stored> gate(const at::Tensor& tensor, const Extent& extent,
                               const Tape::Frame& frame) {
    if (options_.pack_mask == nullptr || !extent.dense()) return nullptr;
    const at::Tensor values = extent.view(tensor.scalar_type()).on(tensor.storage());
    return by(pack_gate(values, frame, options_.pack_mask), tensor, extent, StoredAs::kMask);
  }

  /// In fewer bytes, exactly. `frame`: of the operator whose result they are, or null.
  std::shared_ptr<Stored> integers(const at::Tensor& tensor, const Extent& extent,
                                   const Tape::Frame* frame) {
    if (options_.pack_integers == nullptr) return nullptr;
    std::shared_ptr<const Payload> payload;
    if (frame != nullptr && frame->traits->pools > 0 && extent.dense() &&
        tensor.numel() == extent.span)
      payload = pack_pool(tensor, *frame);
    if (payload == nullptr)
      payload = options_.pack_integers(extent.view(tensor.scalar_type()).on(tensor.storage()));
    return shared(by(std::move(payload), tensor, extent, StoredAs::kMask));
  }

  std::shared_ptr<Stored> packed(const at::Tensor& tensor, Extent extent, PackFunction pack,
                                 Tape* tape) {
    const c10::Storage& storage = tensor.storage();
    const auto values = static_cast<std::int64_t>(storage.nbytes() / tensor.element_size());
    const auto* origin = tape ? tape->origin(storage.unsafeGetStorageImpl()) : nullptr;
    // q, k and v are pieces of one storage: it is packed whole, once. Not where parts of it may hold
    // anything, which would spoil the scales of their neighbours.
    if (!extent.dense() && 4 * extent.numel() >= values && origin != nullptr && !origin->assembled)
      extent = Extent::whole(values);
    const Key key{.seed = at::detail::getDefaultCPUGenerator().current_seed(),
                  .step = step_.load(std::memory_order_relaxed),
                  .forward = tape ? tape->forward() : 0,
                  .storage = tape ? tape->next_storage() : numbers_.fetch_add(1)};
    std::shared_ptr<const Payload> payload =
        pack(extent.view(tensor.scalar_type()).on(storage), key);
    const bool holds_nan = payload->holds_nan();
    if (options_.offload != nullptr && !holds_nan)
      payload = options_.offload->offload(std::move(payload));
    std::shared_ptr<Stored> stored = by(std::move(payload), tensor, extent, StoredAs::kPacked);
    if (holds_nan) {  // of the tensor itself, or of what lies between its values?
      StorageView view(tensor);
      const Extent own(view);
      const at::Tensor values = BasicSavedView<T>(stored, std::move(view)).unpack();
      if (!values.isfinite().all().item<bool>()) return mask(tensor, own);
    }
    return shared(std::move(stored));
  }

  const ActivationOptions& options_;
  const std::shared_ptr<StorageIndex> index_;
  std::atomic<std::uint64_t> step_{0}, numbers_{0};
};
using Encoder = BasicEncoder<>;

}  // namespace fourfold::inline v0::detail

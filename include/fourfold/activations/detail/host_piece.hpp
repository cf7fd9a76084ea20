// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Values of a GPU that wait for backward in pinned memory of the host. Copies run on a stream beside
/// the program's own, in both directions; nothing waits on the host, streams wait for each other.
///
/// As with a file (offloader.hpp), the newest pieces stay where they are, `bytes_in_flight` at most,
/// and the oldest of them are copied while they are more than half of that: what backward wants first
/// never moves. A piece's memory is given back once the program's stream has been told to wait for its
/// copy; a piece that is taken has those before it brought back, within the same bytes. Memory for what
/// comes back is of the stream that will read it, so that no second pool grows.
///
/// On a CPU, whose copies are done at once, all of it works as well: that is how it is tested.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/detail/offload_piece.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/cuda/stream_order.hpp>
#include <fourfold/torch/operators.hpp>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

class HostPiece;

/// The stream beside the program's on one GPU, and marks on streams.
class SideStream {
 public:
  explicit SideStream(at::Device device) {
    if (device.is_cuda())
      stream_ = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
  }
  /// f() on it, after all that `current` was given so far; the result marks f's end.
  template <class F>
  std::optional<c10::Event> run(const std::optional<c10::Stream>& current, const F& f) const {
    if (!stream_) return f(), std::nullopt;
    const c10::impl::VirtualGuardImpl device(stream_->device_type());
    c10::Event begin(stream_->device_type()), end(stream_->device_type());
    begin.record(*current), begin.block(*stream_);
    struct Exchanged {
      const c10::impl::VirtualGuardImpl& of;
      const c10::Stream before;
      ~Exchanged() { of.exchangeStream(before); }
    } const exchanged{device, device.exchangeStream(*stream_)};
    f();
    end.record(*stream_);
    return end;
  }

 private:
  std::optional<c10::Stream> stream_;
};

/// Shared by a HostOffloader and its pieces, which may outlive it.
struct HostState {
  explicit HostState(std::int64_t bytes_in_flight) : most(bytes_in_flight) {}

  const std::int64_t most;
  std::mutex mutex;
  std::map<std::uint64_t, std::weak_ptr<HostPiece>> pieces;  // that live, by number
  std::deque<std::weak_ptr<HostPiece>> waiting, copying;
  std::map<at::Device, SideStream, bool (*)(at::Device, at::Device)> sides{
      [](at::Device a, at::Device b) { return a.index() < b.index(); }};
  std::uint64_t next = 0;
  std::int64_t waiting_bytes = 0, copying_bytes = 0, ahead_bytes = 0;
  bool failed = false;  // the host had no memory, and nobody was told yet
  OffloadCounts counts;

  const SideStream& side(at::Device device) {
    return sides.try_emplace(device, device).first->second;
  }
};

class HostPiece final : public HeldElsewhere {
 public:
  HostPiece(std::shared_ptr<HostState> state, at::Tensor values, const at::Tensor& source)
      : state_(std::move(state)),
        values_(std::move(values)),
        numel_(values_.numel()),
        bytes_(static_cast<std::int64_t>(values_.nbytes())),
        options_(values_.options()),
        made_on_(cuda::current_stream(values_.device())) {
    if (!source.defined()) return;
    counter_ = source.unsafeGetTensorImpl()->version_counter();
    version_ = counter_.current_version();
  }
  ~HostPiece() override {
    const std::lock_guard lock(state_->mutex);
    state_->pieces.erase(number_);
    if (where_ == Where::kWaiting) state_->waiting_bytes -= bytes_;
    if (where_ == Where::kCopying) state_->copying_bytes -= bytes_;
    if (ahead_.defined()) state_->ahead_bytes -= bytes_;
    try {  // what a copy still reads or writes is used anew after it
      if (where_ == Where::kCopying) wait(copied_, made_on_);
      if (ahead_.defined()) wait(loaded_, allocated_on_);
    } catch (const c10::Error&) {  // the GPU has failed, and whoever waits for it will say so
    }
  }
  HostPiece(const HostPiece&) = delete;
  HostPiece& operator=(const HostPiece&) = delete;

  at::Tensor get() override {
    std::vector<std::shared_ptr<HostPiece>> touched;  // let go after the lock
    const std::lock_guard lock(state_->mutex);
    const c10::DeviceGuard device(options_.device());
    const auto current = cuda::current_stream(options_.device());
    at::Tensor out = values_;
    if (out.defined()) {
      TORCH_CHECK(!counter_.enabled() || counter_.current_version() == version_,
                  "one of the variables needed for gradient computation has been modified by an "
                  "inplace operation after the forward: fourfold had yet to offload a tensor of ",
                  numel_, " values; it is at version ", counter_.current_version(),
                  "; expected version ", version_,
                  " instead. Write to it before backward inside the pipeline's scope only");
      cuda::read_on_current_stream(out.storage(), made_on_);
    } else if (ahead_.defined()) {
      wait(loaded_, current);
      cuda::read_on_current_stream(ahead_.storage(), allocated_on_);
      out = std::exchange(ahead_, at::Tensor());
      state_->ahead_bytes -= bytes_;
      ++state_->counts.read_ahead;
    } else {
      wait(copied_, current);
      out = load();
    }
    bring_back(touched, current);
    return out;
  }

  void before_write() override {
    at::Tensor gone;
    const std::lock_guard lock(state_->mutex);
    if (!values_.defined() || !counter_.enabled()) return;
    const c10::DeviceGuard device(options_.device());
    if (where_ == Where::kCopying) {
      wait(copied_, cuda::current_stream(options_.device()));  // who writes waits for the copy
      gone = release();
      return;
    }
    const door::OperatorsPause pause;  // the program's tape is not told of it
    const c10::NoGradGuard no_grad;
    const PlaceGuard place(Place::kActivations);
    values_ = values_.clone();
    made_on_ = cuda::current_stream(options_.device());
    counter_ = c10::VariableVersion();
  }

 private:
  friend class HostOffloader;
  enum class Where { kWaiting, kCopying, kHost, kDevice };

  static void wait(const std::optional<c10::Event>& event,
                   const std::optional<c10::Stream>& stream) {
    if (event && stream) event->block(*stream);
  }

  // All under the lock.

  /// To the host, where there is memory for it.
  void copy() {
    const c10::DeviceGuard device(options_.device());
    const door::OperatorsPause pause;
    const c10::NoGradGuard no_grad;
    state_->waiting_bytes -= bytes_;
    try {
      host_ =
          at::empty({numel_}, options_.device(at::kCPU).pinned_memory(options_.device().is_cuda()));
    } catch (const c10::Error&) {
      where_ = Where::kDevice;
      state_->failed = true, ++state_->counts.failed;
      return;
    }
    copied_ = state_->side(options_.device()).run(made_on_, [&] {
      host_.copy_(values_, /*non_blocking=*/true);
    });
    where_ = Where::kCopying;
    state_->copying_bytes += bytes_;
    ++state_->counts.written, state_->counts.written_bytes += bytes_;
  }
  /// Its memory, which the stream that made it uses anew after the copy alone.
  at::Tensor release() {
    wait(copied_, made_on_);
    where_ = Where::kHost;
    state_->copying_bytes -= bytes_;
    return std::exchange(values_, at::Tensor());
  }
  at::Tensor load() {
    const door::OperatorsPause pause;
    const c10::NoGradGuard no_grad;
    const PlaceGuard place(Place::kActivations);
    at::Tensor out = at::empty({numel_}, options_);
    out.copy_(host_, /*non_blocking=*/true);
    ++state_->counts.read, state_->counts.read_bytes += bytes_;
    return out;
  }
  /// Those before this one, as far as there is room.
  void bring_back(std::vector<std::shared_ptr<HostPiece>>& touched,
                  const std::optional<c10::Stream>& current) {
    HostState& s = *state_;
    for (auto it = s.pieces.lower_bound(number_); it != s.pieces.begin();) {
      std::shared_ptr<HostPiece> piece = (--it)->second.lock();
      if (piece == nullptr) continue;
      touched.push_back(piece);
      if (piece->where_ != Where::kHost || piece->ahead_.defined()) continue;
      if (piece->options_.device() != options_.device()) continue;
      if (s.waiting_bytes + s.copying_bytes + s.ahead_bytes + piece->bytes_ > s.most) break;
      const door::OperatorsPause pause;
      const c10::NoGradGuard no_grad;
      const PlaceGuard place(Place::kActivations);
      piece->ahead_ = at::empty({piece->numel_}, options_.dtype(piece->options_.dtype()));
      piece->allocated_on_ = current;
      piece->loaded_ = s.side(options_.device()).run(current, [&] {
        piece->ahead_.copy_(piece->host_, /*non_blocking=*/true);
      });
      s.ahead_bytes += piece->bytes_;
      ++s.counts.read, s.counts.read_bytes += piece->bytes_;
    }
  }

  const std::shared_ptr<HostState> state_;
  at::Tensor values_, host_, ahead_;  // as put; as copied; as brought back
  const std::int64_t numel_, bytes_;
  const at::TensorOptions options_;
  std::optional<c10::Stream> made_on_, allocated_on_;  // of values_; of ahead_
  std::optional<c10::Event> copied_, loaded_;
  c10::VariableVersion counter_{c10::VariableVersion::DISABLED};
  std::uint32_t version_ = 0;
  std::uint64_t number_ = 0;
  Where where_ = Where::kWaiting;
};

class HostOffloader {
 public:
  explicit HostOffloader(std::int64_t bytes_in_flight)
      : state_(std::make_shared<HostState>(bytes_in_flight)) {}

  /// `values`: contiguous, not empty. Nobody may write to them, unless they are `source`'s own and the
  /// piece is told before.
  [[nodiscard]] std::shared_ptr<HostPiece> put(const at::Tensor& values,
                                               const at::Tensor& source = {}) {
    auto piece = std::make_shared<HostPiece>(state_, values.view({-1}), source);
    std::vector<at::Tensor> gone;                   // given back after the lock
    std::vector<std::shared_ptr<HostPiece>> alive;  // likewise
    bool warn = false;
    {
      const std::lock_guard lock(state_->mutex);
      HostState& s = *state_;
      piece->number_ = s.next++;
      s.pieces.emplace(piece->number_, piece);
      s.waiting.push_back(piece);
      s.waiting_bytes += piece->bytes_;
      while (2 * s.waiting_bytes > s.most && !s.waiting.empty())
        if (auto oldest = take(s.waiting, alive); oldest && oldest->where_ == Where::kWaiting) {
          oldest->copy();
          if (oldest->where_ == Where::kCopying) s.copying.push_back(alive.back());
        }
      while (s.waiting_bytes + s.copying_bytes > s.most && !s.copying.empty())
        release_one(gone, alive);
      warn = std::exchange(s.failed, false) && !std::exchange(warned_, true);
    }
    if (warn)
      TORCH_WARN(
          "fourfold::Offload: the host has no pinned memory left; saved tensors stay on the "
          "GPU until it has");
    return piece;
  }

  /// Nothing that was put is read from now on by a copy that the program's streams do not wait for.
  void settle() {
    std::vector<at::Tensor> gone;
    std::vector<std::shared_ptr<HostPiece>> alive;
    const std::lock_guard lock(state_->mutex);
    while (!state_->copying.empty()) release_one(gone, alive);
  }
  [[nodiscard]] OffloadCounts counts() const {
    const std::lock_guard lock(state_->mutex);
    OffloadCounts out = state_->counts;
    out.waiting_bytes = state_->waiting_bytes + state_->copying_bytes;
    return out;
  }

 private:
  using Where = HostPiece::Where;
  using Queue = std::deque<std::weak_ptr<HostPiece>>;

  /// The oldest, which lives until `alive` goes: its destructor takes the lock.
  static HostPiece* take(Queue& queue, std::vector<std::shared_ptr<HostPiece>>& alive) {
    std::shared_ptr<HostPiece> piece = queue.front().lock();
    queue.pop_front();
    if (piece == nullptr) return nullptr;
    alive.push_back(std::move(piece));
    return alive.back().get();
  }
  void release_one(std::vector<at::Tensor>& gone, std::vector<std::shared_ptr<HostPiece>>& alive) {
    HostPiece* const oldest = take(state_->copying, alive);
    if (oldest != nullptr && oldest->where_ == Where::kCopying) gone.push_back(oldest->release());
  }

  const std::shared_ptr<HostState> state_;
  bool warned_ = false;  // under the lock
};

}  // namespace fourfold::inline v0::detail

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
#include <c10/util/Exception.h>
#include <fourfold/activations/detail/held_elsewhere.hpp>
#include <fourfold/activations/detail/offload_piece.hpp>  // OffloadCounts
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
  HostPiece(std::shared_ptr<HostState> state, const at::Tensor& values, const at::Tensor& source)
      : state_(std::move(state)),
        values_(values, source),
        numel_(values.numel()),
        bytes_(static_cast<std::int64_t>(values.nbytes())),
        options_(values.options()),
        made_on_(cuda::current_stream(values.device())) {}
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
    at::Tensor out;
    if (values_.here()) {
      out = values_.get();
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
    if (!values_.borrowed()) return;
    const c10::DeviceGuard device(options_.device());
    if (where_ == Where::kCopying) {
      wait(copied_, cuda::current_stream(options_.device()));  // who writes waits for the copy
      gone = release();
      return;
    }
    values_.copy();
    made_on_ = cuda::current_stream(options_.device());
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
      host_.copy_(values_.unchecked(), /*non_blocking=*/true);
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
    return values_.take();
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
  PutValues values_;
  at::Tensor host_, ahead_;  // as copied; as brought back
  const std::int64_t numel_, bytes_;
  const at::TensorOptions options_;
  std::optional<c10::Stream> made_on_, allocated_on_;  // of values_; of ahead_
  std::optional<c10::Event> copied_, loaded_;
  std::uint64_t number_ = 0;
  Where where_ = Where::kWaiting;
};

}  // namespace fourfold::inline v0::detail

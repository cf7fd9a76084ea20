// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A piece of memory that goes to a file and comes back (offloader.hpp).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/detail/held_elsewhere.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/unnamed_file.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

class Offloader;

struct OffloadOptions {
  std::string directory{};                                ///< empty: $TMPDIR, else /tmp
  std::int64_t bytes_in_flight = std::int64_t{64} << 20;  ///< that wait in memory at most
  std::int64_t min_bytes = std::int64_t{1} << 20;         ///< smaller tensors stay where they are
};

struct OffloadCounts {
  std::int64_t written = 0, read = 0;  ///< pieces
  std::int64_t written_bytes = 0, read_bytes = 0;
  std::int64_t read_ahead = 0;  ///< of the pieces read
  std::int64_t failed = 0;      ///< that could not be written, and stayed in memory
  std::int64_t waiting_bytes = 0;
  std::int64_t file_bytes = 0;  ///< the file's length now
  double write_ms = 0, read_ms = 0;
};

namespace detail {

class OffloadPiece;

/// Shared by an Offloader and its pieces, which may outlive it.
struct OffloadState {
  explicit OffloadState(const OffloadOptions& options)
      : most(options.bytes_in_flight),
        file(options.directory, "fourfold::Offload", "OffloadOptions::directory") {}

  const std::int64_t most;
  UnnamedFile file;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::uint64_t, std::weak_ptr<OffloadPiece>> pieces;  // that live, by number
  std::deque<std::weak_ptr<OffloadPiece>> to_write, to_read;
  std::uint64_t next = 0;
  std::int64_t pending = 0;  // bytes that wait, or are being written
  std::int64_t ahead = 0;    // bytes read ahead, or to be
  bool writing = false, stopped = false;
  int error = 0;  // the last write's that failed
  OffloadCounts counts;

  [[nodiscard]] bool must_write() const { return !to_write.empty() && 2 * pending > most; }
};

class OffloadPiece final : public HeldElsewhere, public std::enable_shared_from_this<OffloadPiece> {
 public:
  OffloadPiece(std::shared_ptr<OffloadState> state, const at::Tensor& values,
               const at::Tensor& source)
      : state_(std::move(state)),
        values_(values, source),
        numel_(values.numel()),
        bytes_(static_cast<std::int64_t>(values.nbytes())),
        options_(values.options()) {}
  ~OffloadPiece() override {
    const std::lock_guard lock(state_->mutex);
    state_->pieces.erase(number_);
    if (where_ == Where::kWaiting) state_->pending -= bytes_;
    if (where_ == Where::kReading || ahead_.defined()) state_->ahead -= bytes_;
    if (where_ == Where::kFile || where_ == Where::kReading) state_->file.free(offset_, bytes_);
    state_->changed.notify_all();
  }
  OffloadPiece(const OffloadPiece&) = delete;
  OffloadPiece& operator=(const OffloadPiece&) = delete;

  /// The values, flat. Where they still wait in memory, those that were put.
  [[nodiscard]] at::Tensor get() override {
    std::vector<std::shared_ptr<OffloadPiece>> touched;  // let go after the lock
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] { return where_ != Where::kReading || state_->stopped; });
    if (values_.here()) {
      at::Tensor out = values_.get();
      read_ahead(touched);
      return out;
    }
    if (where_ == Where::kReading)  // whoever was to read it has stopped
      where_ = Where::kFile, state_->ahead -= bytes_;
    at::Tensor out;
    if (ahead_.defined()) {
      out = std::move(ahead_);
      ahead_ = at::Tensor();
      state_->ahead -= bytes_;
    } else {
      lock.unlock();
      int error = 0;
      out = read(error);
      TORCH_CHECK(error == 0, "fourfold::Offload: cannot read ", bytes_,
                  " bytes of a saved tensor back: ", std::strerror(error),
                  "; the step cannot go on, the model is as it was");
      lock.lock();
    }
    read_ahead(touched);
    return out;
  }

  void before_write() override {
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] { return where_ != Where::kWriting; });
    if (values_.borrowed()) values_.copy();
  }

 private:
  friend class fourfold::Offloader;
  enum class Where { kWaiting, kWriting, kFile, kReading, kMemory };

  [[nodiscard]] at::Tensor read(int& error) {
    const PlaceGuard place(Place::kActivations);
    const auto begin = std::chrono::steady_clock::now();
    at::Tensor out = at::empty({numel_}, options_);
    error = state_->file.read(out.mutable_data_ptr(), bytes_, offset_);
    const double ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    const std::lock_guard lock(state_->mutex);
    state_->counts.read_ms += ms;
    if (error == 0) ++state_->counts.read, state_->counts.read_bytes += bytes_;
    return out;
  }
  /// Those before this one, as far as there is room. Under the lock.
  void read_ahead(std::vector<std::shared_ptr<OffloadPiece>>& touched) {
    OffloadState& s = *state_;
    if (s.stopped) return;
    for (auto it = s.pieces.lower_bound(number_); it != s.pieces.begin();) {
      std::shared_ptr<OffloadPiece> piece = (--it)->second.lock();
      if (piece == nullptr) continue;
      touched.push_back(piece);
      if (piece->where_ != Where::kFile || piece->ahead_.defined()) continue;
      if (s.pending + s.ahead + piece->bytes_ > s.most) break;
      piece->where_ = Where::kReading;
      s.ahead += piece->bytes_;
      s.to_read.push_back(piece);
    }
    s.changed.notify_all();
  }

  const std::shared_ptr<OffloadState> state_;
  PutValues values_;
  at::Tensor ahead_;  // as read ahead
  const std::int64_t numel_, bytes_;
  const at::TensorOptions options_;
  std::uint64_t number_ = 0;
  std::int64_t offset_ = 0;
  Where where_ = Where::kWaiting;
};

}  // namespace detail
}  // namespace fourfold::inline v0

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Tensors that go to a file and come back: written by one thread, and read ahead by it in the
/// reverse order.
///
///   Offloader offloader({.directory = "/scratch", .bytes_in_flight = 64 << 20});
///   auto piece = offloader.put(values);   // returns at once while there is room in flight
///   values.reset();
///   ...
///   at::Tensor again = piece->get();      // flat; any thread, any number of times
///
/// The newest pieces wait in memory, `bytes_in_flight` at most, and the oldest of them are written
/// while they are more than half of that. So what is put last, which backward wants first, is never
/// written. A piece that is taken has those before it read ahead, within the same bytes.
///
/// A piece that cannot be written (the disk is full) stays in memory: nothing is lost but the room.
/// Pieces outlive the Offloader; what waits then stays in memory.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/detail/offload_piece.hpp>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace fourfold::inline v0 {

class Offloader {
 public:
  explicit Offloader(OffloadOptions options = {})
      : options_(checked(std::move(options))),
        state_(std::make_shared<detail::OffloadState>(options_)),
        worker_([state = state_.get()] { work(*state); }) {}
  ~Offloader() {
    {
      const std::lock_guard lock(state_->mutex);
      state_->stopped = true;
    }
    state_->changed.notify_all();
    worker_.join();
  }
  Offloader(const Offloader&) = delete;
  Offloader& operator=(const Offloader&) = delete;

  /// `values`: CPU, contiguous, not empty. They are read until the piece is written: nobody may
  /// write to them, unless they are `source`'s own and the piece is told before. Waits where more
  /// than `bytes_in_flight` would be waiting.
  [[nodiscard]] std::shared_ptr<detail::OffloadPiece> put(const at::Tensor& values,
                                                          const at::Tensor& source = {}) {
    TORCH_CHECK(values.defined() && values.is_cpu() && values.is_contiguous() && values.numel() > 0,
                "Offloader::put: wanted is a contiguous CPU tensor of at least one value; give "
                "tensor.cpu().contiguous()");
    auto piece = std::make_shared<detail::OffloadPiece>(state_, values.view({-1}), source);
    std::unique_lock lock(state_->mutex);
    piece->number_ = state_->next++;
    state_->pieces.emplace(piece->number_, piece);
    while (!state_->to_write.empty() && state_->to_write.front().expired())
      state_->to_write.pop_front();  // of steps that never filled the window
    state_->to_write.push_back(piece);
    state_->pending += piece->bytes_;
    state_->changed.notify_all();
    state_->changed.wait(lock, [&] { return state_->pending <= state_->most || idle(); });
    warn(lock);
    return piece;
  }

  /// Returns when nothing is being written, and nothing will be until another piece is put.
  void settle() {
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] { return idle(); });
    warn(lock);
  }

  [[nodiscard]] const OffloadOptions& options() const { return options_; }
  /// Whether the directory is memory itself.
  [[nodiscard]] bool in_memory() const { return state_->file.in_memory(); }
  [[nodiscard]] OffloadCounts counts() const {
    const std::lock_guard lock(state_->mutex);
    OffloadCounts out = state_->counts;
    out.waiting_bytes = state_->pending, out.file_bytes = state_->file.size();
    return out;
  }

 private:
  using Piece = detail::OffloadPiece;
  using Where = Piece::Where;

  static OffloadOptions checked(OffloadOptions options) {
    TORCH_CHECK(options.bytes_in_flight >= 0 && options.min_bytes >= 0,
                "fourfold::Offload: got bytes_in_flight = ", options.bytes_in_flight,
                " and min_bytes = ", options.min_bytes, "; give 0 or more");
    return options;
  }
  [[nodiscard]] bool idle() const { return !state_->writing && !state_->must_write(); }

  /// Once, in the caller's thread: the worker's warnings would reach nobody's handler.
  void warn(std::unique_lock<std::mutex>& lock) {
    const int error = std::exchange(state_->error, 0);
    if (error == 0 || warned_) return;
    warned_ = true;
    lock.unlock();
    TORCH_WARN("fourfold::Offload: cannot write to a file in '", state_->file.directory(),
               "': ", std::strerror(error),
               "; saved tensors stay in memory until it takes them again");
  }

  static void work(detail::OffloadState& state) {
    std::unique_lock lock(state.mutex);
    for (;;) {
      state.changed.wait(
          lock, [&] { return state.stopped || !state.to_read.empty() || state.must_write(); });
      if (state.stopped) return;
      auto& queue = state.to_read.empty() ? state.to_write : state.to_read;
      std::shared_ptr<Piece> piece = queue.front().lock();
      const bool write = &queue == &state.to_write;
      queue.pop_front();
      if (piece != nullptr && write && piece->where_ == Where::kWaiting)
        write_one(state, *piece, lock);
      else if (piece != nullptr && !write && piece->where_ == Where::kReading)
        read_one(state, *piece, lock);
      state.changed.notify_all();
      lock.unlock();
      piece.reset();
      lock.lock();
    }
  }
  static void write_one(detail::OffloadState& state, Piece& piece,
                        std::unique_lock<std::mutex>& lock) {
    piece.where_ = Where::kWriting, piece.offset_ = state.file.allocate(piece.bytes_);
    state.writing = true;
    at::Tensor values = piece.values_.unchecked();
    lock.unlock();
    const auto begin = std::chrono::steady_clock::now();
    const int error = state.file.write(values.const_data_ptr(), piece.bytes_, piece.offset_);
    const double ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    lock.lock();
    state.pending -= piece.bytes_;
    if (error != 0) {
      state.writing = false;
      state.file.free(piece.offset_, piece.bytes_);
      piece.where_ = Where::kMemory;
      state.error = error, ++state.counts.failed;
      return;
    }
    piece.where_ = Where::kFile, piece.values_.take();
    ++state.counts.written, state.counts.written_bytes += piece.bytes_;
    state.counts.write_ms += ms;
    state.changed.notify_all();
    lock.unlock();
    values = at::Tensor();  // the storage may go here: its deleter is not ours
    lock.lock();
    state.writing = false;
  }
  static void read_one(detail::OffloadState& state, Piece& piece,
                       std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    int error = 0;
    at::Tensor values;
    try {
      values = piece.read(error);
    } catch (const std::exception&) {  // no memory: who wants it will say so
      error = ENOMEM;
    }
    lock.lock();
    if (piece.where_ != Where::kReading) return;  // somebody did not wait
    piece.where_ = Where::kFile;
    if (error != 0) {
      state.ahead -= piece.bytes_;
    } else {
      piece.ahead_ = std::move(values);
      ++state.counts.read_ahead;
    }
  }

  const OffloadOptions options_;
  const std::shared_ptr<detail::OffloadState> state_;
  std::thread worker_;
  bool warned_ = false;  // under the lock
};

}  // namespace fourfold::inline v0

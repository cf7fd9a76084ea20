// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Which of a GPU's values wait on the host, and when they are copied there (host_piece.hpp).
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/activations/detail/host_piece.hpp>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

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

// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Tensors in a memory-mapped file: the system reads and writes their pages, and LibTorch's
/// allocator, which counts memory, never sees them.
///
///   #include <fourfold/core/mapped_file.hpp>
///   optim::AdamWOf<Int8> optimizer(model->parameters(), 1e-3,
///                                  {.offload = on_file({.directory = "/scratch"})});
///
/// The file has no name, so nothing is left of it whatever ends the process. Room on the disk is
/// reserved before a tensor is held: one that does not fit stays in memory (one warning), and no
/// write can fail for want of room. Parameters on a GPU are stepped as host_memory.hpp says. Tensors
/// may outlive the MappedFile. A process that forks shares them with its child: let one of both write.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <fourfold/core/host_memory.hpp>
#include <fourfold/core/unnamed_file.hpp>

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

namespace fourfold::inline v0 {

struct MappedFileOptions {
  std::string directory{};  ///< on a disk; empty: $TMPDIR, else /tmp, which may be memory
  std::int64_t min_bytes = std::int64_t{1} << 16;  ///< smaller tensors stay where they are
};

template <class = void>
class BasicMappedFile final : public HostMemory {
 public:
  /// Errors: a directory that cannot be written to, min_bytes below 0.
  explicit BasicMappedFile(const MappedFileOptions& options = {})
      : min_bytes_(options.min_bytes), state_(std::make_shared<State>(options.directory)) {
    TORCH_CHECK(options.min_bytes >= 0, "fourfold::MappedFile: got min_bytes = ", options.min_bytes,
                "; give 0 or more");
  }

  at::Tensor hold(const at::Tensor& values) override {
    if (!values.defined() || !values.is_cpu() || !values.is_contiguous() || values.numel() == 0 ||
        static_cast<std::int64_t>(values.nbytes()) < min_bytes_ || state_->find(values).bytes > 0)
      return values;
    const Range range = state_->take(static_cast<std::int64_t>(values.nbytes()));
    if (range.bytes == 0) return values;
    const c10::NoGradGuard no_grad;
    at::Tensor held = at::from_blob(
        range.at, values.sizes(), [state = state_, range](void*) { state->give_back(range); },
        values.options().requires_grad(false));
    std::memcpy(range.at, values.const_data_ptr(), values.nbytes());
    return held;
  }
  void will_need(const at::Tensor& held) noexcept override { advise(held, MADV_WILLNEED); }
  void need(const at::Tensor& held) noexcept override { advise(held, kPopulateWrite); }
  /// The pages stay in the system's cache as long as it has room, and are written when it likes.
  void done_with(const at::Tensor& held) noexcept override { advise(held, MADV_DONTNEED); }

  /// Bytes of the tensors that are held now, in whole pages.
  [[nodiscard]] std::int64_t held_bytes() const {
    const std::lock_guard lock(state_->mutex);
    return state_->held;
  }
  /// Writes everything out and lets the system's cache of it go: what is wanted next is read from
  /// the disk.
  void drop_cache() { state_->file.drop_cache(); }

 private:
  static constexpr int kPopulateWrite =
      23;  // of Linux 5.14; an error before, and pages come singly

  void advise(const at::Tensor& held, int advice) noexcept {
    const Range range = state_->find(held);
    if (range.bytes > 0) ::madvise(range.at, static_cast<std::size_t>(range.bytes), advice);
  }

  struct Range {
    void* at = nullptr;
    std::int64_t bytes = 0, offset = 0;
  };
  /// Shared with the tensors, which may outlive this.
  struct State {
    explicit State(const std::string& directory)
        : file(directory, "fourfold::MappedFile", "MappedFileOptions::directory") {}

    /// Room for so many bytes; none where the disk or the address space is full.
    Range take(std::int64_t bytes) {
      static const std::int64_t page = ::sysconf(_SC_PAGESIZE);
      Range range{nullptr, (bytes + page - 1) / page * page, 0};
      std::unique_lock lock(mutex);
      range.offset = file.allocate(range.bytes);
      int error = file.reserve(range.bytes, range.offset);
      if (error == 0 && (range.at = file.map(range.bytes, range.offset)) == nullptr) error = errno;
      if (error == 0) {
        held += range.bytes, ranges.emplace(range.at, range);
        return range;
      }
      file.free(range.offset, range.bytes);
      const bool first = !std::exchange(warned, true);
      lock.unlock();
      if (first)
        TORCH_WARN("fourfold::MappedFile: cannot hold ", bytes, " bytes in a file in '",
                   file.directory(), "': ", std::strerror(error),
                   "; what does not fit stays in memory");
      return {};
    }
    void give_back(const Range& range) {
      const std::lock_guard lock(mutex);
      ranges.erase(range.at), held -= range.bytes;
      ::munmap(range.at, static_cast<std::size_t>(range.bytes));
      file.free(range.offset, range.bytes);
    }
    Range find(const at::Tensor& tensor) {
      const std::lock_guard lock(mutex);
      const auto found = ranges.find(tensor.const_data_ptr());
      return found == ranges.end() ? Range{} : found->second;
    }

    std::mutex mutex;
    detail::UnnamedFile file;
    std::unordered_map<const void*, Range> ranges;  // by address
    std::int64_t held = 0;
    bool warned = false;
  };

  const std::int64_t min_bytes_;
  const std::shared_ptr<State> state_;
};
using MappedFile = BasicMappedFile<>;

/// A MappedFile, for an `offload` option. Several optimizers may share one.
template <class = void>
[[nodiscard]] std::shared_ptr<BufferHolder> on_file(const MappedFileOptions& options = {}) {
  return std::make_shared<MappedFile>(options);
}

}  // namespace fourfold::inline v0

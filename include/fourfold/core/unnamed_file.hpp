// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A file without a name: pieces of memory, written, read back, and their room used again.
///
/// Its name is removed as soon as it is open, so that whatever ends the process, nothing is left. A
/// full disk is an error of one call: of write(), or of reserve(), without which a write through a
/// mapping would end the process (SIGBUS).
///
/// Disk space is kept for the next step, which is mostly like the last. Whenever the file has become
/// empty it is cut to what was needed since it was before, so that one large step's room goes with
/// the next one.
#include <c10/util/Exception.h>

#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>

namespace fourfold::inline v0::detail {

/// Any thread, but for allocate() and free(): one at a time.
class UnnamedFile {
 public:
  /// In `directory`; where that is empty in $TMPDIR, else in /tmp. `who` speaks in messages, and
  /// `option` is where it takes the directory from.
  UnnamedFile(std::string directory, const std::string& who, const std::string& option)
      : directory_(std::move(directory)) {
    if (directory_.empty()) {
      const char* const temporary = std::getenv("TMPDIR");
      directory_ = temporary != nullptr && *temporary != 0 ? temporary : "/tmp";
    }
    std::string name = directory_ + "/fourfold-XXXXXX";
    file_ = ::mkostemp(name.data(), O_CLOEXEC);
    TORCH_CHECK(file_ >= 0, who, ": cannot make a file in '", directory_,
                "': ", std::strerror(errno),
                "; name a directory that this process may write to, on a disk, in ", option);
    ::unlink(name.c_str());
  }
  ~UnnamedFile() { ::close(file_); }
  UnnamedFile(const UnnamedFile&) = delete;
  UnnamedFile& operator=(const UnnamedFile&) = delete;

  /// Where so many bytes may stand: the first gap that is wide enough, or the end.
  [[nodiscard]] std::int64_t allocate(std::int64_t bytes) {
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
      const auto [offset, width] = *gap;
      if (width < bytes) continue;
      gaps_.erase(gap);
      if (width > bytes) gaps_.emplace(offset + bytes, width - bytes);
      return offset;
    }
    end_ += bytes;
    needed_ = std::max(needed_, end_), length_ = std::max(length_, end_);
    return end_ - bytes;
  }
  void free(std::int64_t offset, std::int64_t bytes) {
    auto gap = gaps_.emplace(offset, bytes).first;
    if (const auto next = std::next(gap);
        next != gaps_.end() && gap->first + gap->second == next->first)
      gap->second += next->second, gaps_.erase(next);
    if (gap != gaps_.begin())
      if (const auto before = std::prev(gap); before->first + before->second == gap->first)
        before->second += gap->second, gaps_.erase(gap), gap = before;
    if (gap->first + gap->second == end_) end_ = gap->first, gaps_.erase(gap);
    if (end_ > 0) return;
    if (needed_ < length_ && ::ftruncate(file_, needed_) == 0) length_ = needed_;
    needed_ = 0;
  }
  /// Whether what is written stays in memory (tmpfs), so that nothing is gained.
  [[nodiscard]] bool in_memory() const {
    struct ::statfs system;
    return ::fstatfs(file_, &system) == 0 &&
           (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
  }
  [[nodiscard]] const std::string& directory() const { return directory_; }
  /// Bytes from its beginning to the last piece.
  [[nodiscard]] std::int64_t size() const { return end_; }

  /// 0, or the system's number of what went wrong.
  [[nodiscard]] int write(const void* from, std::int64_t bytes, std::int64_t offset) noexcept {
    const IgnoreFileLimit guard;
    const char* next = static_cast<const char*>(from);
    while (bytes > 0) {
      const ::ssize_t done = ::pwrite(file_, next, piece(bytes), offset);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) return done < 0 ? errno : ENOSPC;
      next += done, offset += done, bytes -= done;
    }
    return 0;
  }
  [[nodiscard]] int read(void* to, std::int64_t bytes, std::int64_t offset) noexcept {
    char* next = static_cast<char*>(to);
    while (bytes > 0) {
      const ::ssize_t done = ::pread(file_, next, piece(bytes), offset);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) return done < 0 ? errno : EIO;  // shorter than what was written
      next += done, offset += done, bytes -= done;
    }
    return 0;
  }
  /// Room on the disk for bytes that are not written yet, so that they may be through map().
  [[nodiscard]] int reserve(std::int64_t bytes, std::int64_t offset) noexcept {
    const IgnoreFileLimit guard;
    int error = EINTR;
    while (error == EINTR) error = ::posix_fallocate(file_, offset, bytes);
    return error;
  }
  /// The file's own pages from `offset`, a multiple of a page; null where there is no room for them.
  [[nodiscard]] void* map(std::int64_t bytes, std::int64_t offset) noexcept {
    void* const at = ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                            MAP_SHARED, file_, offset);
    return at == MAP_FAILED ? nullptr : at;
  }
  /// Writes everything out and has the system forget what it has of the file, as far as it can.
  void drop_cache() noexcept {
    ::fdatasync(file_);
    ::posix_fadvise(file_, 0, 0, POSIX_FADV_DONTNEED);
  }

 private:
  /// Beyond RLIMIT_FSIZE a write is an error here, and does not end the process.
  struct IgnoreFileLimit {
    IgnoreFileLimit() noexcept {
      ::sigset_t one;
      ::sigemptyset(&one), ::sigaddset(&one, SIGXFSZ);
      ::pthread_sigmask(SIG_BLOCK, &one, &before);
    }
    ~IgnoreFileLimit() {
      if (::sigismember(&before, SIGXFSZ) == 1) return;
      ::sigset_t one;  // what is pending would be delivered as soon as it is let through
      ::sigemptyset(&one), ::sigaddset(&one, SIGXFSZ);
      const ::timespec now{};
      while (::sigtimedwait(&one, nullptr, &now) == SIGXFSZ) {
      }
      ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    ::sigset_t before{};
  };
  static std::size_t piece(std::int64_t bytes) {
    return static_cast<std::size_t>(std::min<std::int64_t>(bytes, std::int64_t{1} << 30));
  }

  std::string directory_;
  int file_ = -1;
  std::int64_t end_ = 0;
  std::int64_t length_ = 0;                    // at most: of the file
  std::int64_t needed_ = 0;                    // the largest end_ since it was 0
  std::map<std::int64_t, std::int64_t> gaps_;  // offset, bytes; never two that touch
};

}  // namespace fourfold::inline v0::detail

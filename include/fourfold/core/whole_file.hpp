// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A file that is whole or as it was before: written beside its place, then renamed.
///   write_whole_file(path, "fourfold::save", [&](std::ostream& out) { ... });
#include <c10/util/Exception.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace fourfold::inline v0 {
namespace detail {

/// Bytes that a crash after the rename must not lose.
template <class = void>
void flush_to_disk(const std::string& path) {
#if defined(__unix__) || defined(__APPLE__)
  if (const int file = ::open(path.c_str(), O_RDONLY); file >= 0) {
    ::fsync(file);
    ::close(file);
  }
#else
  static_cast<void>(path);
#endif
}

/// Where the bytes go: beside the file, under a name that nobody else has, until they are complete.
/// A link stays a link; a device or a pipe is written to as it is.
template <class = void>
struct WholeFileTarget {
  explicit WholeFileTarget(const std::string& path) : file(path) {
    static std::atomic<unsigned> saves{0};
    beside = ".partial." + std::to_string(saves.fetch_add(1));
#if defined(__unix__) || defined(__APPLE__)
    if (char* const resolved = ::realpath(path.c_str(), nullptr)) {
      file = resolved;
      std::free(resolved);
    }
    struct stat status {};
    const bool special = ::stat(file.c_str(), &status) == 0 && !S_ISREG(status.st_mode);
    beside = special ? file : file + "." + std::to_string(::getpid()) + beside;
#else
    beside = file + beside;
#endif
  }
  std::string file, beside;
};

}  // namespace detail

/// `who` speaks in messages. What `write` throws goes on to the caller; the file is as it was then.
template <class Write>
void write_whole_file(const std::string& path, const std::string& who, const Write& write) {
  const detail::WholeFileTarget<> target(path);
  const std::string& beside = target.beside;
  try {
    std::ofstream out(beside, std::ios::binary | std::ios::trunc);
    TORCH_CHECK(out.is_open(), who, " cannot write ", beside,
                "; does its folder exist, and may it be written?");
    write(static_cast<std::ostream&>(out));
    out.close();
    TORCH_CHECK(!out.fail(), who, " could not write all of ", beside, "; is the disk full?");
    detail::flush_to_disk(beside);
    TORCH_CHECK(beside == target.file || std::rename(beside.c_str(), target.file.c_str()) == 0, who,
                " could not put the file in place, from ", beside, " to ", target.file, ": ",
                std::strerror(errno), "; is the folder still there, and may it be written?");
  } catch (...) {
    if (beside != target.file) std::remove(beside.c_str());
    throw;
  }
}

}  // namespace fourfold::inline v0

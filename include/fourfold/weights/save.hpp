// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A model on disk as it is in memory: packed parameters as codes, the others and the buffers
/// plain.
///
///   fourfold::save(*model, "model.4f");     // written beside it first, then renamed: never half
///   auto again = std::make_shared<MyNet>();
///   fourfold::load(*again, "model.4f");     // packed where the file is, and bit-equal
///
/// The model that loads has the same names, sizes and dtypes; a parameter of it is plain, or packed
/// by the same codec. Any difference, a damaged or truncated file and a file of a newer version are
/// errors that leave it as it was. Codecs known from the start: Int8, Int4, Nf4; any other is known
/// once compress_weights<C> has run, or by load<C>(model, path).
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/weights/load_model.hpp>
#include <fourfold/weights/saved_model.hpp>

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

template <ModuleLike M>
void save(M&& model, std::ostream& out) {
  detail::write_model(out, detail::gather(parameters_of(model, "fourfold::save"),
                                          buffers_of(model, "fourfold::save")));
  TORCH_CHECK(out.good(),
              "fourfold::save: the stream refused to take the model; is its disk full?");
}

namespace detail {

/// Bytes that a crash after the rename must not lose.
inline void flush_to_disk(const std::string& path) {
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
struct BasicSaveTarget {
  explicit BasicSaveTarget(const std::string& path) : file(path) {
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
using SaveTarget = BasicSaveTarget<>;

}  // namespace detail

template <ModuleLike M>
void save(M&& model, const std::string& path) {
  const detail::SaveTarget target(path);
  const std::string& beside = target.beside;
  try {
    std::ofstream out(beside, std::ios::binary | std::ios::trunc);
    TORCH_CHECK(out.is_open(), "fourfold::save cannot write ", beside,
                "; does its folder exist, and may it be written?");
    save(model, out);
    out.close();
    TORCH_CHECK(!out.fail(), "fourfold::save could not write all of ", beside,
                "; is the disk full?");
    detail::flush_to_disk(beside);
    TORCH_CHECK(beside == target.file || std::rename(beside.c_str(), target.file.c_str()) == 0,
                "fourfold::save could not put the file in place, from ", beside, " to ",
                target.file, ": ", std::strerror(errno),
                "; is the folder still there, and may it be written?");
  } catch (...) {
    if (beside != target.file) std::remove(beside.c_str());
    throw;
  }
}

namespace detail {

template <Codec... More, ModuleLike M>
void load_saved(M&& model, const SavedModel& saved, const std::string& what) {
  register_codecs<Int8, Int4, Nf4, More...>();
  load_model(parameters_of(model, "fourfold::load"), buffers_of(model, "fourfold::load"), saved,
             what);
}

}  // namespace detail

/// `More`: codecs that the file may hold beside Int8, Int4 and Nf4, such as LowRank<64>.
template <Codec... More, ModuleLike M>
void load(M&& model, std::istream& in, const std::string& what = "fourfold::load: the stream") {
  detail::load_saved<More...>(model, detail::read_model(in, what), what);
}

template <Codec... More, ModuleLike M>
void load(M&& model, const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  TORCH_CHECK(in.is_open(), "fourfold::load cannot open ", path,
              "; does it exist, and may it be read?");
  const std::string what = "fourfold::load: " + path;
  const detail::SavedModel saved = detail::read_model(in, what);
  TORCH_CHECK(in.peek() == std::ifstream::traits_type::eof(), what,
              " goes on after its last byte: the file is damaged; save the model again");
  detail::load_saved<More...>(model, saved, what);
}

}  // namespace fourfold::inline v0

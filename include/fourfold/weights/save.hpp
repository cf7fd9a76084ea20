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
#include <fourfold/core/whole_file.hpp>
#include <fourfold/weights/load_model.hpp>
#include <fourfold/weights/saved_model.hpp>

#include <fstream>
#include <string>

namespace fourfold::inline v0 {

template <ModuleLike M>
void save(M&& model, std::ostream& out) {
  detail::write_model(out, detail::gather(parameters_of(model, "fourfold::save"),
                                          buffers_of(model, "fourfold::save")));
  TORCH_CHECK(out.good(),
              "fourfold::save: the stream refused to take the model; is its disk full?");
}

template <ModuleLike M>
void save(M&& model, const std::string& path) {
  write_whole_file(path, "fourfold::save", [&](std::ostream& out) { save(model, out); });
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

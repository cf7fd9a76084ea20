// SPDX-License-Identifier: Apache-2.0
#pragma once
/// An optimizer's states in a file that is never half: written beside it, then renamed.
///   optim::save(*optimizer, "optimizer.4f");
///   optim::load(*optimizer, "optimizer.4f");   // built with the same parameters; training goes on
/// Any torch::optim::Optimizer; the format is its own (torch::save's, torch::load reads it too).
#include <fourfold/core/whole_file.hpp>

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <fstream>
#include <string>

namespace fourfold::inline v0 {
namespace optim {

template <class = void>
void save(const ::torch::optim::Optimizer& optimizer, const std::string& path) {
  ::torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  write_whole_file(path, "optim::save", [&](std::ostream& out) { archive.save_to(out); });
}

/// Errors of the file leave the optimizer as it was.
template <class = void>
void load(::torch::optim::Optimizer& optimizer, const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  TORCH_CHECK(in.is_open(), "optim::load cannot open ", path,
              "; does it exist, and may it be read?");
  ::torch::serialize::InputArchive archive;
  try {
    archive.load_from(in);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "optim::load: ", path, " is no file of an optimizer, or is damaged (",
                error.what_without_backtrace(), "); save it again");
  }
  optimizer.load(archive);
}

}  // namespace optim
}  // namespace fourfold::inline v0

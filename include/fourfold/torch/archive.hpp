// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Reading LibTorch's archives so that what is missing or of another type is named: the file comes
/// from outside, and nothing in it is trusted.
///   const door::ArchiveReader file(archive, "the file of a scheduler");
///   const std::int64_t epoch = file.read_int("last_epoch");
#include <c10/util/Exception.h>

#include <torch/serialize/archive.h>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::door {

/// A template so that what nobody reads is not compiled.
template <class = void>
class BasicArchiveReader {
 public:
  /// `file` is what messages call it. The archive outlives the reader.
  BasicArchiveReader(torch::serialize::InputArchive& archive, std::string file)
      : archive_(archive), file_(std::move(file)) {}

  [[nodiscard]] std::int64_t read_int(const std::string& key) const {
    return read(key, &c10::IValue::isInt, "a whole number").toInt();
  }
  [[nodiscard]] double read_double(const std::string& key) const {
    return read(key, &c10::IValue::isDouble, "a number").toDouble();
  }
  [[nodiscard]] bool read_bool(const std::string& key) const {
    return read(key, &c10::IValue::isBool, "a truth value").toBool();
  }
  [[nodiscard]] std::string read_string(const std::string& key) const {
    return read(key, &c10::IValue::isString, "a text").toStringRef();
  }
  [[nodiscard]] std::vector<std::int64_t> read_ints(const std::string& key) const {
    return read(key, &c10::IValue::isIntList, "a list of whole numbers").toIntVector();
  }
  /// Finite ones.
  [[nodiscard]] std::vector<double> read_doubles(const std::string& key) const {
    auto values = read(key, &c10::IValue::isDoubleList, "a list of numbers").toDoubleVector();
    for (const double value : values)
      TORCH_CHECK(std::isfinite(value), "'", key, "' in ", file_, " holds ", value,
                  ": the file is damaged; save it again");
    return values;
  }
  void read_part(const std::string& key, torch::serialize::InputArchive& part) const {
    TORCH_CHECK(archive_.try_read(key, part), file_, " has no '", key,
                "': it is damaged or cut off; save it again");
  }
  /// The format version that `key` holds, from 1 to `newest`. `holds`: what the file is to hold.
  std::int64_t read_version(const std::string& key, std::int64_t newest,
                            const std::string& holds) const {
    c10::IValue version;
    TORCH_CHECK(archive_.try_read(key, version) && version.isInt(), "the archive does not hold ",
                holds, "; give it the archive that its save wrote to");
    TORCH_CHECK(version.toInt() >= 1 && version.toInt() <= newest, file_, " has format version ",
                version.toInt(), ", and this fourfold reads versions 1 to ", newest,
                "; update fourfold, or save it again");
    return version.toInt();
  }

 private:
  c10::IValue read(const std::string& key, bool (c10::IValue::*is)() const,
                   const char* wanted) const {
    c10::IValue value;
    TORCH_CHECK(archive_.try_read(key, value), file_, " has no '", key,
                "': it is damaged, or was written by another program; save it again");
    TORCH_CHECK((value.*is)(), "'", key, "' in ", file_, " is ", value.tagKind(), " and not ",
                wanted, ": the file is damaged; save it again");
    return value;
  }

  torch::serialize::InputArchive& archive_;
  std::string file_;
};
using ArchiveReader = BasicArchiveReader<>;

}  // namespace fourfold::door

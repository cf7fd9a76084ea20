// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Reading what a scheduler has saved: each value is there and of its type, or the message says not.
#include <c10/util/Exception.h>

#include <torch/serialize/archive.h>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

inline constexpr std::int64_t kSchedulerVersion = 1;

inline c10::IValue scheduler_value(InputArchive& archive, const std::string& key,
                                   bool (c10::IValue::*is)() const, const char* wanted) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(key, value), "the file of a scheduler has no '", key,
              "': it is damaged, or was written by another program; save it again");
  TORCH_CHECK((value.*is)(), "'", key, "' in the file of a scheduler is ", value.tagKind(),
              " and not ", wanted, ": the file is damaged; save it again");
  return value;
}
inline std::int64_t scheduler_int(InputArchive& archive, const std::string& key) {
  return scheduler_value(archive, key, &c10::IValue::isInt, "a whole number").toInt();
}
inline double scheduler_double(InputArchive& archive, const std::string& key) {
  return scheduler_value(archive, key, &c10::IValue::isDouble, "a number").toDouble();
}
inline bool scheduler_bool(InputArchive& archive, const std::string& key) {
  return scheduler_value(archive, key, &c10::IValue::isBool, "a truth value").toBool();
}
inline std::vector<std::int64_t> scheduler_ints(InputArchive& archive, const std::string& key) {
  return scheduler_value(archive, key, &c10::IValue::isIntList, "a list of whole numbers")
      .toIntVector();
}
/// One finite value for each of `groups` parameter groups.
inline std::vector<double> scheduler_doubles(InputArchive& archive, const std::string& key,
                                             std::size_t groups) {
  auto values = scheduler_value(archive, key, &c10::IValue::isDoubleList, "a list of numbers")
                    .toDoubleVector();
  TORCH_CHECK(values.size() == groups, "'", key, "' in the file of a scheduler is for ",
              values.size(), " parameter groups, and this optimizer has ", groups,
              "; load it for an optimizer with the groups that it was saved with");
  for (const double value : values)
    TORCH_CHECK(std::isfinite(value), "'", key, "' in the file of a scheduler holds ", value,
                ": the file is damaged; save it again");
  return values;
}

}  // namespace optim::detail
}  // namespace fourfold::inline v0

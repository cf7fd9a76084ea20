// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The memory that a CPU's tensors share with all others: the machine's, or what the process's
/// control group may have of it, whichever leaves less.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

namespace fourfold::inline v0::plan {

struct DeviceMemory {
  std::int64_t total = 0;  ///< 0: not known
  std::int64_t used = 0;   ///< by all; without what the system would give up (clean pages of files)
};

namespace detail {

/// The number after `name` in lines of names and numbers; -1: there is none.
template <class = void>
[[nodiscard]] std::int64_t number_after(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(name)) return std::strtoll(line.c_str() + name.size(), nullptr, 10);
  return -1;
}

/// How a version of control groups names things. A group without a limit says "max", or a number
/// beyond every machine's.
struct GroupFiles {
  const char *line, *folder, *limit, *used, *files[2];
};
inline constexpr GroupFiles kGroupVersions[] = {
    {"0::", "/sys/fs/cgroup", "/memory.max", "/memory.current", {"inactive_file ", "active_file "}},
    {":memory:",
     "/sys/fs/cgroup/memory",
     "/memory.limit_in_bytes",
     "/memory.usage_in_bytes",
     {"total_inactive_file ", "total_active_file "}}};

template <class = void>
[[nodiscard]] DeviceMemory group_memory(const std::string& folder, const GroupFiles& names) {
  DeviceMemory out;
  if (!(std::ifstream(folder + names.limit) >> out.total) ||
      !(std::ifstream(folder + names.used) >> out.used))
    return {};
  for (const char* const files : names.files)
    out.used -= std::clamp<std::int64_t>(number_after(folder + "/memory.stat", files), 0, out.used);
  return out;
}

}  // namespace detail

/// `root`: where the system's own files stand, for tests.
template <class = void>
[[nodiscard]] DeviceMemory machine_memory(const std::string& root = "") {
  const std::string info = root + "/proc/meminfo";
  const std::int64_t total = detail::number_after(info, "MemTotal:");
  const std::int64_t available = detail::number_after(info, "MemAvailable:");
  DeviceMemory out;
  if (total > 0) out = {total << 10, available >= 0 ? (total - available) << 10 : 0};
  const auto left = [](const DeviceMemory& one) { return one.total - one.used; };
  for (const detail::GroupFiles& names : detail::kGroupVersions) {
    std::string group;  // "0::/a/b", "4:memory:/a/b": limits stand in it and in all that it is in
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);)
      if (const std::size_t at = line.find(names.line); at != line.npos && at < 4)
        group = line.substr(at + std::string(names.line).size());
    while (true) {
      const DeviceMemory one = detail::group_memory(root + names.folder + group, names);
      if (one.total > 0 && (out.total == 0 || left(one) < left(out))) out = one;
      const std::size_t slash = group.rfind('/');
      if (slash == group.npos) break;
      group.resize(slash);
    }
  }
  return out;
}

}  // namespace fourfold::inline v0::plan

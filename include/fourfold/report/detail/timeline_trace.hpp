// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A recording as Chrome's trace events ("Trace Event Format", Google, docs.google.com/document/d/
/// 1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): one event a line, `ts` and `dur` in microseconds.
///   M  names of the process and of threads
///   C  "memory": bytes, one series a place, after each change; stacked where they are shown
///   X  operators, nodes of backward and the user's ranges, by thread
///   i  "peak", with its owners
#include <unistd.h>
#include <fourfold/report/detail/recording.hpp>
#include <fourfold/report/ledger.hpp>

#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>

namespace fourfold::inline v0::detail {

/// Nanoseconds as microseconds, exactly: "12.345".
inline std::string microseconds(std::int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof text, "%lld.%03lld", static_cast<long long>(ns / 1000),
                static_cast<long long>(ns % 1000));
  return text;
}
inline std::string milliseconds(std::int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f", static_cast<double>(ns) / 1e6);
  return text;
}

inline void trace_counters(std::ostream& out, const std::string& process, std::int64_t at,
                           const PlaceSums& now) {
  out << ",\n{\"ph\": \"C\", \"name\": \"memory\", " << process << ", \"ts\": " << microseconds(at)
      << ", \"args\": {";
  for (std::size_t i = 0; i < kPlaces; ++i)
    out << (i > 0 ? ", " : "") << '"' << name(static_cast<Place>(i)) << "\": " << now[i];
  out << "}}";
}

inline void trace_peak(std::ostream& out, const std::string& process, const Recording& recording) {
  const RecordedPeak peak = recording.peak();
  out << ",\n{\"ph\": \"i\", \"s\": \"p\", \"name\": \"peak\", \"cat\": \"memory\", " << process
      << ", \"tid\": 0, \"ts\": " << microseconds(peak.at)
      << ", \"args\": {\"bytes\": " << peak.bytes << ", \"owners\": [";
  const char* separator = "";
  for (const BlockOwner& owner : recording.owners(peak, 30)) {
    out << separator << "\n  {\"bytes\": " << owner.bytes << ", \"place\": \"" << name(owner.place)
        << "\", \"operator\": " << json_string(owner.name)
        << ", \"within\": " << json_string(owner.within) << ", \"blocks\": " << owner.blocks;
    if (owner.since_us >= 0)
      out << ", \"since_us\": "
          << microseconds(static_cast<std::int64_t>(owner.since_us * 1e3 + 0.5));
    out << '}';
    separator = ",";
  }
  out << "]}}";
}

inline void write_trace(std::ostream& out, const Recording& recording) {
  const std::string process = "\"pid\": " + std::to_string(::getpid());
  out << "{\"displayTimeUnit\": \"ms\", \"otherData\": {\"recorded_by\": \"fourfold\", "
         "\"missed_changes\": "
      << recording.missed_changes << ", \"missed_slices\": " << recording.missed_slices
      << "}, \"traceEvents\": [\n{\"ph\": \"M\", \"name\": \"process_name\", " << process
      << ", \"tid\": 0, \"args\": {\"name\": \"fourfold timeline\"}}";
  for (const RecordedThread& thread : recording.threads)
    out << ",\n{\"ph\": \"M\", \"name\": \"thread_name\", " << process << ", \"tid\": " << thread.id
        << ", \"args\": {\"name\": " << json_string(thread.name) << "}}";
  trace_counters(out, process, 0, recording.start);
  PlaceSums last = recording.start;
  recording.replay([&](const MemoryChange& change, const PlaceSums& now) {
    trace_counters(out, process, change.at, now);
    last = now;
  });
  trace_counters(out, process, recording.length, last);
  constexpr const char* kCategories[] = {"operator", "backward", "user"};
  for (const RangeSlice& slice : recording.slices)
    out << ",\n{\"ph\": \"X\", \"name\": " << json_string(recording.names[slice.name])
        << ", \"cat\": \"" << kCategories[static_cast<std::size_t>(slice.kind)] << "\", " << process
        << ", \"tid\": " << recording.threads[slice.thread].id
        << ", \"ts\": " << microseconds(slice.begin)
        << ", \"dur\": " << microseconds(slice.end - slice.begin) << '}';
  trace_peak(out, process, recording);
  out << "\n]}\n";
}

}  // namespace fourfold::inline v0::detail

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

/// Nanoseconds as microseconds, down to the last eighth: "12.375". A double holds eighths exactly, so
/// slices nest for a reader that multiplies and truncates (Perfetto's importer does).
inline std::string microseconds(std::int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof text, "%lld.%03lld", static_cast<long long>(ns / 1000),
                static_cast<long long>(ns % 1000 / 125 * 125));
  return text;
}
inline std::string milliseconds(std::int64_t ns) {
  const std::int64_t thousandths = (ns + 500) / 1000;  // no locale's point
  char text[32];
  std::snprintf(text, sizeof text, "%lld.%03lld", static_cast<long long>(thousandths / 1000),
                static_cast<long long>(thousandths % 1000));
  return text;
}

/// Up to its names: `ts` comes first, since an older Perfetto looks for it from the left and stumbles
/// over what may stand before it.
inline void trace_event(std::ostream& out, const char* phase, std::int64_t at,
                        std::int64_t thread) {
  out << "{\"ph\": \"" << phase << "\", \"ts\": " << microseconds(at) << ", \"pid\": " << ::getpid()
      << ", \"tid\": " << thread << ", ";
}

inline void trace_counters(std::ostream& out, std::int64_t at, const PlaceSums& now) {
  out << ",\n";
  trace_event(out, "C", at, ::getpid());
  out << "\"name\": \"memory\", \"args\": {";
  for (std::size_t i = 0; i < kPlaces; ++i)
    out << (i > 0 ? ", " : "") << '"' << name(static_cast<Place>(i)) << "\": " << now[i];
  out << "}}";
}

inline void trace_slice(std::ostream& out, const Recording& recording, const RangeSlice& slice) {
  constexpr const char* kCategories[] = {"operator", "backward", "user"};
  constexpr std::int64_t kEighth = 125;  // both ends rounded down: what lay within still does
  const std::int64_t begin = slice.begin / kEighth * kEighth, end = slice.end / kEighth * kEighth;
  out << ",\n";
  trace_event(out, "X", begin, recording.threads[slice.thread].id);
  out << "\"dur\": " << microseconds(end - begin) << ", \"cat\": \""
      << kCategories[static_cast<std::size_t>(slice.kind)]
      << "\", \"name\": " << json_string(recording.names[slice.name]) << '}';
}

inline void trace_peak(std::ostream& out, const Recording& recording) {
  const RecordedPeak peak = recording.peak();
  out << ",\n";
  trace_event(out, "i", peak.at, ::getpid());
  out << "\"s\": \"p\", \"name\": \"peak\", \"cat\": \"memory\", \"args\": {\"bytes\": "
      << peak.bytes << ", \"owners\": [";
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
  out << "{\"traceEvents\": [\n";
  trace_event(out, "M", 0, ::getpid());
  out << "\"name\": \"process_name\", \"args\": {\"name\": \"fourfold timeline\"}}";
  for (const RecordedThread& thread : recording.threads) {
    out << ",\n";
    trace_event(out, "M", 0, thread.id);
    out << "\"name\": \"thread_name\", \"args\": {\"name\": " << json_string(thread.name) << "}}";
  }
  trace_counters(out, 0, recording.start);
  PlaceSums last = recording.start;
  recording.replay([&](const MemoryChange& change, const PlaceSums& now) {
    trace_counters(out, change.at, now);
    last = now;
  });
  trace_counters(out, recording.length, last);
  for (const RangeSlice& slice : recording.slices) trace_slice(out, recording, slice);
  trace_peak(out, recording);
  out << "\n], \"otherData\": {\"recorded_by\": \"fourfold\", \"missed_changes\": "
      << recording.missed_changes << ", \"missed_slices\": " << recording.missed_slices << "}}\n";
}

}  // namespace fourfold::inline v0::detail

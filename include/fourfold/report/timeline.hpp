// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The timeline: a recorded step, byte by byte and operator by operator.
///
///   fourfold::Timeline timeline;         // records from here on: this process, all threads
///   train_step();
///   timeline.stop();
///   timeline.write_trace("step.json");   // opens in ui.perfetto.dev and chrome://tracing
///   timeline.write_html("step.html");    // one page, no network: the curve, the peak, its owners
///   timeline.write_snapshot("step.pickle");  // opens in pytorch.org/memory_viz
///
/// Recorded are the bytes of CPU tensors as the meter counts them (report/meter.hpp: storages older
/// than the counting are seen if they are adopted), not a GPU's, and the ranges of torch/ranges.hpp.
/// The peak is the recording's own: the meter's, if that was restarted as the recording began.
///
/// One timeline records at a time. The recorder takes at most 64 bytes for each of max_events and 2
/// MiB for names, from malloc: it does not count itself, and what it does not fill it does not
/// touch. Where a buffer is full, what follows is not recorded but its number is: missed(), and the
/// trace and the page say so. Without a timeline nothing is registered with LibTorch, and the
/// counters compare one pointer under a lock that they hold.
#include <c10/util/Exception.h>
#include <fourfold/core/peak_bytes.hpp>
#include <fourfold/report/detail/recorder.hpp>
#include <fourfold/report/detail/recording.hpp>
#include <fourfold/report/detail/timeline_html.hpp>
#include <fourfold/report/detail/timeline_snapshot.hpp>
#include <fourfold/report/detail/timeline_trace.hpp>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <locale>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace fourfold::inline v0 {

struct TimelineOptions {
  /// Allocations, frees and moves between places that are kept, and as many ranges.
  std::int64_t max_events = std::int64_t{1} << 20;
  /// Whether operators are recorded; without them blocks have no names, and recording costs less.
  bool operators = true;
};

class Timeline {
 public:
  /// Records from here on. Throws where another timeline records, and where another CPU allocator
  /// cannot be replaced.
  explicit Timeline(const TimelineOptions& options = {}) {
    TORCH_CHECK(options.max_events > 0 && options.max_events <= kMostEvents,
                "fourfold::Timeline: max_events is ", options.max_events, ", wanted is 1 to ",
                kMostEvents, ", at 64 bytes each; leave it out for ", TimelineOptions{}.max_events);
    door::ByteCounters& counters = door::install_allocator().counters();
    recorder_ = std::make_unique<detail::Recorder>(static_cast<std::size_t>(options.max_events));
    door::ByteCount start;
    TORCH_CHECK(counters.observe(*recorder_, start),
                "fourfold::Timeline: another timeline records this process already, and its "
                "allocator tells one at a time; stop() that one, or let it go, before the next");
    recorder_->recording.start = start.now;
    recording_ = true;
    if (!options.operators) return;
    try {
      ranges_.emplace(*recorder_);
    } catch (...) {
      end();
      throw;
    }
  }
  ~Timeline() {
    if (recording_) end();
  }
  Timeline(const Timeline&) = delete;
  Timeline& operator=(const Timeline&) = delete;

  /// Ends the recording; ranges that still run end with it. Throws if it has ended.
  void stop() {
    TORCH_CHECK(recording_, "fourfold::Timeline: stop() on a timeline that was stopped ",
                detail::milliseconds(recorder_->recording.length),
                " ms after it began; a timeline records once: make another for the next step");
    end();
  }
  [[nodiscard]] bool recording() const { return recording_; }

  /// Bytes of CPU tensors: at the end, the most at once, and all that was allocated meanwhile.
  [[nodiscard]] PeakBytes bytes() const {
    const detail::Recording& done = finished("bytes()");
    PeakBytes out{.current = detail::sum(done.start), .peak = done.peak().bytes};
    done.replay([&](const detail::MemoryChange& change, const detail::PlaceSums& now) {
      out.current = detail::sum(now);
      if (change.kind == detail::MemoryChange::Kind::kAdded) out.total += change.bytes;
    });
    return out;
  }
  /// The places at the peak: they add up to bytes().peak.
  [[nodiscard]] std::array<std::int64_t, kPlaces> at_peak() const {
    return finished("at_peak()").peak().places;
  }
  /// Whose bytes stood at the peak, the largest first: the `most` largest blocks, then the others
  /// and what is older than the recording, as one for each place. They add up to bytes().peak.
  [[nodiscard]] std::vector<BlockOwner> owners(std::size_t most = 30) const {
    const detail::Recording& done = finished("owners()");
    return done.owners(done.peak(), most);
  }
  /// Allocations, frees, moves and ranges that found a buffer full. 0: all is there.
  [[nodiscard]] std::int64_t missed() const {
    const detail::Recording& done = finished("missed()");
    return done.missed_changes + done.missed_slices;
  }

  /// Trace Event Format, JSON object form ("Trace Event Format", Google, the reference of
  /// chrome://tracing; Perfetto reads it). Bytes, microseconds since the recording began.
  void write_trace(const std::string& path) const {
    const detail::Recording& done = finished("write_trace()");
    write(path, [&](std::ostream& out) { detail::write_trace(out, done); });
  }
  /// One page that asks for nothing outside of itself.
  void write_html(const std::string& path) const {
    const detail::Recording& done = finished("write_html()");
    write(path, [&](std::ostream& out) { detail::write_html(out, done); });
  }
  /// The dictionary of torch.cuda.memory._snapshot(), pickled (protocol 2), as device 0: the CPU's
  /// blocks in a segment each.
  void write_snapshot(const std::string& path) const {
    const detail::Recording& done = finished("write_snapshot()");
    write(path, [&](std::ostream& out) { detail::write_snapshot(out, done); });
  }

 private:
  static constexpr std::int64_t kMostEvents = std::int64_t{1} << 26;

  void end() {
    ranges_.reset();
    door::counters().end_observation();
    recorder_->finish();
    recording_ = false;
  }

  const detail::Recording& finished(const char* call) const {
    TORCH_CHECK(!recording_, "fourfold::Timeline: ", call,
                " on a timeline that still records; call stop() first");
    return recorder_->recording;
  }

  template <class Write>
  static void write(const std::string& path, const Write& write) {
    errno = 0;
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    TORCH_CHECK(out.is_open(), "fourfold::Timeline: cannot open '", path, "' for writing (",
                std::strerror(errno),
                "); wanted is a file in a folder that exists and may be written to: make the "
                "folder, or give another path");
    out.imbue(std::locale::classic());
    write(out);
    out.close();
    TORCH_CHECK(!out.fail(), "fourfold::Timeline: writing '", path, "' failed (",
                std::strerror(errno),
                "), so the file is not whole; make room, or give a path on another disk");
  }

  std::unique_ptr<detail::Recorder> recorder_;
  std::optional<door::RangesScope> ranges_;
  bool recording_ = false;
};

}  // namespace fourfold::inline v0

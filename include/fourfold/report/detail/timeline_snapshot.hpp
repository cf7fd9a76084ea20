// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A recording as the dictionary that torch.cuda.memory._snapshot() returns and
/// pytorch.org/memory_viz draws ("Snapshot API Reference", pytorch.org/docs/stable/
/// torch_cuda_memory.html; torch/cuda/_memory_viz.py reads it), pickled by protocol 2:
///   segments        one with one block in it for each block that lives at the end
///   device_traces   [segment_alloc, alloc; free_requested, free_completed, segment_free]
/// A block's frames are its operator, what that ran within, and its place, which stands for the
/// file. A move between places has no entry of its own. What is older than the recording and is
/// not freed in it is one block, so that the plot's height is that of the timeline.
#include <fourfold/report/detail/recording.hpp>

#include <cstdint>
#include <ostream>
#include <string_view>
#include <unordered_map>

namespace fourfold::inline v0::detail {

/// The opcodes of protocol 2 that the dictionary needs (Lib/pickletools.py), without a memo.
class PickleWriter {
 public:
  explicit PickleWriter(std::ostream& out) : out_(out) { out_ << "\x80\x02"; }
  void list() { out_ << ']'; }       // EMPTY_LIST
  void items() { out_ << '('; }      // MARK
  void end_items() { out_ << 'e'; }  // APPENDS
  void dict() { out_ << "}("; }      // EMPTY_DICT MARK
  void end_dict() { out_ << 'u'; }
  void text(std::string_view utf8) {  // BINUNICODE
    out_ << 'X';
    little_endian(utf8.size(), 4);
    out_ << utf8;
  }
  void integer(std::int64_t value) {  // LONG1, two's complement
    out_ << "\x8a" << '\x08';
    little_endian(static_cast<std::uint64_t>(value), 8);
  }
  void entry(std::string_view key, std::string_view value) { text(key), text(value); }
  void entry(std::string_view key, std::int64_t value) { text(key), integer(value); }
  void pair() { out_ << '\x86'; }  // TUPLE2: of the two before
  void boolean(bool value) { out_ << (value ? '\x88' : '\x89'); }
  void end() { out_ << '.'; }

 private:
  void little_endian(std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out_ << static_cast<char>(value >> (8 * i) & 0xFF);
  }
  std::ostream& out_;
};

/// Appended to a thousand at a time, as Python's pickler has it: readers put them on their stack.
class PickledList {
 public:
  explicit PickledList(PickleWriter& pickle) : pickle_(pickle) { pickle_.list(); }
  void next() {  // an item follows
    if (count_ % 1000 == 0) {
      end();
      pickle_.items();
    }
    ++count_;
  }
  void end() const {
    if (count_ > 0) pickle_.end_items();
  }

 private:
  PickleWriter& pickle_;
  std::int64_t count_ = 0;
};

inline void pickle_frames(PickleWriter& pickle, const Recording& recording,
                          const MemoryChange& change) {
  pickle.text("frames");
  PickledList frames(pickle);
  for (const std::uint32_t name : {change.name, change.within}) {
    if (name == 0) continue;
    frames.next();
    pickle.dict();
    pickle.entry("filename", fourfold::name(change.place)), pickle.entry("line", 0);
    pickle.entry("name", recording.names[name]);
    pickle.end_dict();
  }
  frames.end();
}

inline void pickle_trace(PickleWriter& pickle, const Recording& recording) {
  PickledList entries(pickle);
  const auto entry = [&](const char* action, const MemoryChange& change) {
    entries.next();
    pickle.dict();
    pickle.entry("action", action);
    pickle.entry("addr", static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(change.block)));
    pickle.entry("size", change.bytes), pickle.entry("stream", 0);
    pickle.entry("time_us", change.at / 1000);
    pickle_frames(pickle, recording, change);
    pickle.end_dict();
  };
  for (const MemoryChange& change : recording.changes) {
    if (change.kind == MemoryChange::Kind::kAdded)
      entry("segment_alloc", change), entry("alloc", change);
    if (change.kind == MemoryChange::Kind::kRemoved)
      entry("free_requested", change), entry("free_completed", change),
          entry("segment_free", change);
  }
  entries.end();
}

inline void pickle_segment(PickleWriter& pickle, const Recording& recording,
                           const MemoryChange& change) {
  const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(change.block));
  pickle.dict();
  pickle.entry("device", 0), pickle.entry("address", address);
  pickle.entry("total_size", change.bytes), pickle.entry("allocated_size", change.bytes);
  pickle.entry("active_size", change.bytes), pickle.entry("requested_size", change.bytes);
  pickle.entry("stream", 0), pickle.entry("segment_type", "large");
  pickle.text("segment_pool_id"), pickle.integer(0), pickle.integer(0), pickle.pair();
  pickle.text("is_expandable"), pickle.boolean(false);
  pickle_frames(pickle, recording, change);
  pickle.text("blocks"), pickle.list(), pickle.items(), pickle.dict();
  pickle.entry("address", address), pickle.entry("size", change.bytes);
  pickle.entry("requested_size", change.bytes), pickle.entry("state", "active_allocated");
  pickle_frames(pickle, recording, change);
  pickle.end_dict(), pickle.end_items(), pickle.end_dict();
}

inline void write_snapshot(std::ostream& out, const Recording& recording) {
  std::unordered_map<const void*, MemoryChange> live;
  std::int64_t older = sum(recording.start);
  for (const MemoryChange& change : recording.changes) {
    if (change.kind == MemoryChange::Kind::kAdded) live.insert_or_assign(change.block, change);
    if (change.kind == MemoryChange::Kind::kRemoved && live.erase(change.block) == 0)
      older -= change.bytes;
  }
  if (older > 0)  // at an address that no block of a process has, and that a double holds
    live[nullptr] = {.at = 0,
                     .block = reinterpret_cast<const void*>(std::uintptr_t{1} << 50),
                     .bytes = older,
                     .name = 0,
                     .within = 0,
                     .place = Place::kOther,
                     .from = Place::kOther,
                     .kind = MemoryChange::Kind::kAdded};
  PickleWriter pickle(out);
  pickle.dict();
  pickle.text("segments");
  PickledList segments(pickle);
  for (const auto& [block, change] : live) {
    segments.next();
    pickle_segment(pickle, recording, change);
  }
  segments.end();
  pickle.text("device_traces"), pickle.list(), pickle.items();
  pickle_trace(pickle, recording);
  pickle.end_items();
  pickle.text("allocator_settings"), pickle.dict(), pickle.end_dict();
  pickle.text("external_annotations"), pickle.list();
  pickle.end_dict(), pickle.end();
}

}  // namespace fourfold::inline v0::detail

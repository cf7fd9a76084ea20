// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Writes down what the byte counters and LibTorch's ranges tell, into buffers of a fixed capacity.
/// These come from malloc, so they are not counted; their pages are touched only as they fill.
///
/// The operator to which a block is put down is the innermost one on its thread that is more than a
/// request for memory: `aten::empty` under `aten::mm` is mm's.
#include <c10/util/thread_name.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <fourfold/report/detail/recording.hpp>
#include <fourfold/torch/allocator.hpp>
#include <fourfold/torch/ranges.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>

namespace fourfold::inline v0::detail {

/// A copy that is UTF-8: each byte that is not becomes U+FFFD. JSON and HTML can hold nothing else.
inline std::string as_utf8(std::string_view text) {
  std::string out;
  const auto follows = [&](std::size_t i, unsigned low, unsigned high) {
    return i < text.size() && static_cast<unsigned char>(text[i]) >= low &&
           static_cast<unsigned char>(text[i]) <= high;
  };
  for (std::size_t i = 0; i < text.size();) {  // table 3-7 of the Unicode standard
    const unsigned first = static_cast<unsigned char>(text[i]);
    std::size_t size = 0;
    if (first < 0x80)
      size = 1;
    else if (first >= 0xC2 && first <= 0xDF)
      size = follows(i + 1, 0x80, 0xBF) ? 2 : 0;
    else if (first >= 0xE0 && first <= 0xEF)
      size = follows(i + 1, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF) &&
                     follows(i + 2, 0x80, 0xBF)
                 ? 3
                 : 0;
    else if (first >= 0xF0 && first <= 0xF4)
      size = follows(i + 1, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF) &&
                     follows(i + 2, 0x80, 0xBF) && follows(i + 3, 0x80, 0xBF)
                 ? 4
                 : 0;
    out += size == 0 ? std::string_view("\xEF\xBF\xBD") : text.substr(i, size);
    i += size == 0 ? 1 : size;
  }
  return out;
}

/// Asks for memory on behalf of the operator around it.
inline bool only_allocates(std::string_view name) {
  constexpr std::array<std::string_view, 8> names{
      "aten::empty",     "aten::empty_strided",     "aten::empty_like", "aten::empty_permuted",
      "aten::new_empty", "aten::new_empty_strided", "aten::resize_",    "aten::resize_as_"};
  return std::find(names.begin(), names.end(), name) != names.end();
}

class Recorder final : public door::BytesObserver, public door::RangeObserver {
 public:
  static constexpr std::size_t kNameBytes = std::size_t{2} << 20;  ///< of all different names
  static constexpr std::size_t kMaxThreads = 4096;

  explicit Recorder(std::size_t most) : most_(most), id_(next_id()) {
    recording.changes.reserve(most);
    recording.slices.reserve(most);
    recording.names.emplace_back("(name not kept)");
  }

  [[nodiscard]] std::int64_t now() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() -
                                                                began_)
        .count();
  }

  /// After the last call from a door: ranges that still run end here.
  void finish() {
    recording.length = now();
    for (RangeSlice& slice : recording.slices)
      if (slice.end < 0) slice.end = recording.length;
  }

  void added(const void* block, std::int64_t bytes, Place place) noexcept override {
    write(MemoryChange::Kind::kAdded, block, bytes, place, place);
  }
  void removed(const void* block, std::int64_t bytes, Place place) noexcept override {
    write(MemoryChange::Kind::kRemoved, block, bytes, place, place);
  }
  void moved(const void* block, std::int64_t bytes, Place from, Place to) noexcept override {
    write(MemoryChange::Kind::kMoved, block, bytes, to, from);
  }

  void began(const void* range, const char* text, at::RecordScope scope) noexcept override {
    Stack& stack = stack_of_this_thread();
    if (stack.depth == stack.open.size() || !knows_thread(stack)) {
      ++recording.missed_slices;
      return;
    }
    const Name name = name_of(text);
    const auto kind = scope == at::RecordScope::FUNCTION     ? RangeSlice::Kind::kOperator
                      : scope == at::RecordScope::USER_SCOPE ? RangeSlice::Kind::kUser
                                                             : RangeSlice::Kind::kBackward;
    const bool operates = kind != RangeSlice::Kind::kUser;
    Open open{.range = range,
              .slice = kNone,
              .owner = operates ? name.index : 0,
              .within = 0,
              .around = 0};
    if (stack.depth > 0) {
      const Open& outer = stack.open[stack.depth - 1];
      if (outer.owner != 0 && (name.only_allocates || !operates)) open.owner = outer.owner;
      open.around = outer.around;
    }
    // A node or the user's words say more than the operators below them.
    if (kind != RangeSlice::Kind::kOperator || open.around == 0) open.around = name.index;
    open.within = open.around == open.owner ? 0 : open.around;
    if (recording.slices.size() < most_) {
      open.slice = recording.slices.size();
      recording.slices.push_back({.begin = now(),
                                  .end = -1,
                                  .name = name.index,
                                  .thread = static_cast<std::uint16_t>(stack.thread),
                                  .kind = kind});
    } else {
      ++recording.missed_slices;
    }
    stack.open[stack.depth++] = open;
  }

  void ended(const void* range) noexcept override {
    Stack& stack = stack_of_this_thread();
    std::size_t at = stack.depth;
    while (at > 0 && stack.open[at - 1].range != range) --at;
    if (at == 0) return;  // began before the recording, too deep, or on another thread
    const std::int64_t time = now();
    for (; stack.depth >= at; --stack.depth)
      if (const std::size_t slice = stack.open[stack.depth - 1].slice; slice != kNone)
        recording.slices[slice].end = time;
  }

  static_assert(sizeof(MemoryChange) + sizeof(RangeSlice) <= 64, "as Timeline states");
  Recording recording;

 private:
  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t kDepth = 64;  // operators nest less than 20 deep

  struct Name {
    std::uint32_t index;
    bool only_allocates;
  };
  struct Open {
    const void* range;
    std::size_t slice;
    std::uint32_t owner, within, around;
  };
  /// Of one thread; trivial, since tensors are freed while a thread's variables are destroyed.
  struct Stack {
    std::uint64_t recorder;  // whose; 0: nobody's
    std::size_t depth, thread;
    std::array<Open, kDepth> open;
  };
  static Stack& this_thread() {
    static thread_local constinit Stack stack{};
    return stack;
  }
  Stack& stack_of_this_thread() const {
    Stack& stack = this_thread();
    if (stack.recorder != id_) stack.recorder = id_, stack.depth = 0, stack.thread = kNone;
    return stack;
  }
  static std::uint64_t next_id() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
  }

  void write(MemoryChange::Kind kind, const void* block, std::int64_t bytes, Place place,
             Place from) noexcept {
    // What follows a gap would not add up: the recording ends there.
    if (recording.changes.size() == most_) {
      ++recording.missed_changes;
      return;
    }
    std::uint32_t name = 0, within = 0;
    const Stack& stack = this_thread();
    if (stack.recorder == id_ && stack.depth > 0)
      name = stack.open[stack.depth - 1].owner, within = stack.open[stack.depth - 1].within;
    recording.changes.push_back({.at = now(),
                                 .block = block,
                                 .bytes = bytes,
                                 .name = name,
                                 .within = within,
                                 .place = place,
                                 .from = from,
                                 .kind = kind});
  }

  bool knows_thread(Stack& stack) noexcept {
    if (stack.thread != kNone) return true;
    try {
      if (recording.threads.size() == kMaxThreads) return false;
      recording.threads.push_back(
          {.id = ::syscall(SYS_gettid), .name = as_utf8(c10::getThreadName())});
    } catch (const std::bad_alloc&) {
      return false;
    }
    stack.thread = recording.threads.size() - 1;
    return true;
  }

  Name name_of(std::string_view text) noexcept {
    constexpr Name kNotKept{1, false};
    const auto known = names_.find(text);
    if (known != names_.end()) return known->second;
    try {
      const std::size_t bytes = 2 * text.size() + 160;  // in the list, in the map, and its node
      if (bytes > kNameBytes - name_bytes_) return kNotKept;
      name_bytes_ += bytes;
      const Name name{static_cast<std::uint32_t>(recording.names.size()), only_allocates(text)};
      recording.names.push_back(as_utf8(text));
      return names_.emplace(text, name).first->second;
    } catch (const std::bad_alloc&) {
      return kNotKept;
    }
  }

  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::size_t most_;
  std::uint64_t id_;
  std::size_t name_bytes_ = 0;
  std::unordered_map<std::string, Name, Hash, std::equal_to<>> names_;
  std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

}  // namespace fourfold::inline v0::detail

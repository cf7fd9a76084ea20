// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The Problem of a recorded step: an item for each storage with an option for each of its ways,
/// then an item for each block, whose first option leaves its storages to themselves.
#include <fourfold/plan/problem.hpp>
#include <fourfold/plan/record.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

namespace detail {

/// A block's ways and what they need, the block recomputed.
///
/// Its second run begins where the first of what it saved is read. There, what lived in its forward
/// above what lived before lives once more; from there on what it saves is held until it is read:
/// by the pipeline's own codecs, or as it is (`reference`). Until there only its inputs are.
template <class = void>
class BasicBlockOptions {
 public:
  BasicBlockOptions(const StepRecord& record, std::size_t block)
      : record_(record), block_(record.blocks[block]), number_(static_cast<int>(block)) {
    end_ = block_.again;
    for (std::size_t i = 0; i < record.storages.size(); ++i) {
      const StorageRecord& one = record.storages[i];
      const bool input =
          std::find(block_.inputs.begin(), block_.inputs.end(), i) != block_.inputs.end();
      if (input && (one.block == number_ || one.input_alone)) inputs_.push_back(&one);
      if (one.block != number_ || one.input_alone) continue;
      end_ = std::max(end_, one.kept.last);
      if (!input) members_.push_back(&one);
    }
  }

  /// The first way leaves the block's storages to themselves.
  [[nodiscard]] std::vector<BlockWay> ways() const {
    std::vector<BlockWay> out{{}};
    if (block_.again < 0) return out;
    for (const bool reference : {true, false}) {
      out.push_back({true, Way::Kind::kKeep, reference});
      if (inputs_.empty()) continue;
      if (all_inputs([](const StorageRecord& one) { return one.finest.bytes_per_value > 0; }))
        out.push_back({true, Way::Kind::kPack, reference});
      if (all_inputs([](const StorageRecord& one) { return offload_ms(one) >= 0; }))
        out.push_back({true, Way::Kind::kOffload, reference});
    }
    return out;
  }

  [[nodiscard]] Option option(const BlockWay& way) const {
    if (!way.recompute) return {};
    Option out{.ms = block_.ms};
    for (const StorageRecord* one : members_) {
      if (one->kind == StoredAs::kKept) {  // gone from its forward's end until it runs again
        out.spans.push_back({block_.last + 1, run(), -one->bytes});
      } else if (stays_whole(*one, way)) {
        out.spans.push_back({block_.again, one->kept.last, one->bytes});
        StorageRecord::append(out.spans, one->results);
      } else {
        for (const Span& span : one->held)
          out.spans.push_back({std::max(span.first, block_.again), span.last, span.bytes});
        const bool whole =
            one->kind == StoredAs::kRebuilt && one->read_in_pieces() && exact(*one, way);
        const auto reading = whole ? StorageRecord::joined({one->whole(), one->results})
                                   : StorageRecord::joined({one->dense, one->pieces});
        StorageRecord::append(out.spans, reading);
        out.ms += one->pack_ms + one->unpack_ms;
        out.variance += share(*one) * one->noise(own_way(*one));
      }
    }
    out.spans.push_back({run(), run(), working(way) + kRandomState});
    out.spans.push_back({block_.first, end_, kRandomState});
    for (const StorageRecord* one : inputs_) add_input(*one, way, out);
    return out;
  }

 private:
  static constexpr std::int64_t kRandomState = 5056;  // a frame's (torch/random_state.hpp)

  /// The instant before the first read: what lives then, and what the second run needs besides.
  [[nodiscard]] int run() const { return block_.again - 1; }
  /// In the second run. There nothing is offloaded.
  [[nodiscard]] static bool stays_whole(const StorageRecord& one, const BlockWay& way) {
    return way.reference || one.kind == StoredAs::kOffloaded;
  }
  /// What the second run saves, to the bit.
  [[nodiscard]] bool exact(const StorageRecord& one, const BlockWay& way) const {
    const auto number = static_cast<std::size_t>(&one - record_.storages.data());
    return record_.exact(number, [&](std::size_t i) {
      const StorageRecord& of = record_.storages[i];
      if (std::find(inputs_.begin(), inputs_.end(), &of) != inputs_.end()) return way.input;
      return of.kind == StoredAs::kRebuilt ? Way::Kind::kRebuild : own_way(of).kind;
    });
  }
  /// The most that lives in a run of the block, above what lived before.
  [[nodiscard]] std::int64_t working(const BlockWay& way) const {
    const auto first = static_cast<std::size_t>(block_.first);
    const auto last = static_cast<std::size_t>(block_.last);
    std::vector<std::int64_t> lives(record_.bytes.begin() + block_.first,
                                    record_.bytes.begin() + block_.last + 1);
    const auto add = [&](const Span& span, std::int64_t bytes) {
      for (std::size_t p = first; p <= last; ++p)
        if (span.first <= static_cast<int>(p) && static_cast<int>(p) <= span.last)
          lives[p - first] += bytes;
    };
    for (const StorageRecord* one : members_) {
      if (one->kind == StoredAs::kKept || !stays_whole(*one, way)) continue;
      add(one->kept, one->bytes);
      for (const Span& span : one->held) add(span, -span.bytes);
    }
    for (const StorageRecord* one : inputs_)  // it is held anyway
      if (!one->input_alone)
        for (const Span& span : one->held) add(span, -span.bytes);
    return std::max<std::int64_t>(0, *std::max_element(lives.begin(), lives.end()) - lives[0]);
  }
  void add_input(const StorageRecord& input, const BlockWay& way, Option& out) const {
    const bool plain = way.input != Way::Kind::kPack || way.reference;  // to whoever reads it
    if (plain && !input.input_alone) StorageRecord::append(out.spans, input.results);
    if (way.input == Way::Kind::kKeep) {
      if (input.kind != StoredAs::kKept || input.input_alone)
        out.spans.push_back({input.kept.first, end_, input.bytes});
      return;
    }
    if (input.kind == StoredAs::kKept && !input.input_alone)
      out.spans.push_back({block_.last + 1, run() - 1, -input.bytes});
    else  // its dense copy, while the second run and what it saved by reference read it
      out.spans.push_back({run(), way.reference ? end_ : run(), input.bytes});
    if (!way.reference && !input.input_alone)
      for (const auto* spans : {&input.dense, &input.pieces})
        for (const Span& span : *spans)
          if (span.first >= block_.again) out.spans.push_back(span);
    if (way.input == Way::Kind::kOffload) {
      out.ms += offload_ms(input);
      return;
    }
    out.spans.push_back({block_.first, end_, input.coded_bytes(input.finest)});
    out.ms += input.coding_ms;
    out.variance += share(input) * input.finest.noise;
  }

  template <class Is>
  [[nodiscard]] bool all_inputs(const Is& is) const {
    return std::all_of(inputs_.begin(), inputs_.end(),
                       [&](const StorageRecord* one) { return is(*one); });
  }
  [[nodiscard]] static double offload_ms(const StorageRecord& one) {
    return one.kind == StoredAs::kOffloaded ? one.pack_ms + one.unpack_ms : one.offload_ms;
  }
  /// As the pipeline's policies hold it where no plan is asked.
  [[nodiscard]] static Way own_way(const StorageRecord& one) {
    if (one.kind != StoredAs::kPacked) return {Way::Kind::kExact};
    return {Way::Kind::kPack, one.rungs.empty() ? 0 : one.rungs.size() - 1};
  }
  [[nodiscard]] double share(const StorageRecord& one) const {
    const double all = record_.packable_bytes();
    return all > 0 ? static_cast<double>(one.bytes) / all : 0;
  }

  const StepRecord& record_;
  const BlockRecord& block_;
  const int number_;
  int end_ = 0;  // the last position at which anything of it is read
  std::vector<const StorageRecord*> members_, inputs_;
};
using BlockOptions = BasicBlockOptions<>;

}  // namespace detail

/// The variance that stochastic rounding adds to a gradient, as a share of the gradient's own: for
/// y = x W, dW = sum over rows n of x_n^T dy_n, whose variance over rows is about sum |x_n|^2
/// |dy_n|^2, and rounding adds sum |e_n|^2 |dy_n|^2 (its error e is independent of all else). The
/// share is the noise's power over the values', which a sample of the values tells; a plan's is
/// the mean over what could be packed, by bytes. A share v costs v more steps' time.
///
/// `present`: gradients that are there when the step begins. Backward adds to them, and allocates
/// no others.
template <class = void>
[[nodiscard]] Problem problem_of(const StepRecord& record, std::int64_t present) {
  Problem out;
  out.fixed = record.bytes;
  out.ms_of_variance = record.ms;
  const double all = record.packable_bytes();
  std::vector<std::int64_t> change(record.bytes.size() + 1, 0);
  for (const StorageRecord& storage : record.storages) {
    Item item;
    if (storage.block >= 0 && !storage.input_alone)
      item.within = static_cast<int>(record.storages.size()) + storage.block;
    for (const Way& way : storage.ways()) {
      const double share = all > 0 ? static_cast<double>(storage.bytes) / all : 0;
      item.options.push_back({.ms = storage.ms(way),
                              .variance = share * storage.noise(way),
                              .spans = storage.spans(way)});
    }
    const bool fixed = storage.kind == StoredAs::kKept;
    if (fixed && item.options.size() == 1) item.options[0].spans = {};
    out.items.push_back(std::move(item));
    if (fixed) continue;
    for (const auto* spans : {&storage.held, &storage.dense, &storage.pieces})
      for (const Span& span : *spans) {
        if (span.last < span.first) continue;
        change[static_cast<std::size_t>(span.first)] -= span.bytes;
        change[static_cast<std::size_t>(span.last) + 1] += span.bytes;
      }
  }
  for (std::size_t b = 0; b < record.blocks.size(); ++b) {
    const detail::BlockOptions options(record, b);
    Item item;
    for (const BlockWay& way : options.ways()) item.options.push_back(options.option(way));
    out.items.push_back(std::move(item));
  }
  std::int64_t running = 0;
  const std::int64_t more = present - record.base_gradients;
  for (std::size_t p = 0; p < record.bytes.size(); ++p)
    out.fixed[p] +=
        (running += change[p]) - std::min(more, std::max<std::int64_t>(record.gradients[p], 0));
  return out;
}

}  // namespace fourfold::inline v0::plan

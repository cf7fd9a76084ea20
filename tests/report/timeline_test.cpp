// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/torch.h>
#include <unistd.h>
#include <fourfold/report/meter.hpp>
#include <fourfold/report/timeline.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <locale>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using fourfold::BlockOwner;
using fourfold::Ledger;
using fourfold::Meter;
using fourfold::Place;
using fourfold::PlaceGuard;
using fourfold::Timeline;
using Json = nlohmann::json;
using Sums = std::array<std::int64_t, fourfold::kPlaces>;
using testing::HasSubstr;
using testing::Not;

at::Tensor bytes(std::int64_t n) { return torch::empty({n}, torch::kByte); }
std::size_t index(Place place) { return static_cast<std::size_t>(place); }
std::int64_t sum(const Sums& places) {
  return std::accumulate(places.begin(), places.end(), std::int64_t{0});
}
std::int64_t sum(const std::vector<BlockOwner>& owners) {
  std::int64_t all = 0;
  for (const BlockOwner& owner : owners) all += owner.bytes;
  return all;
}

/// A file of this test alone, gone with it.
class Timelines : public testing::Test {
 protected:
  void SetUp() override {
    const auto* const info = testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::temp_directory_path() /
            ("fourfold_" + std::to_string(::getpid()) + "_" + info->name());
  }
  void TearDown() override { std::filesystem::remove(path_); }
  [[nodiscard]] std::string path() const { return path_.string(); }
  [[nodiscard]] std::string text() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  [[nodiscard]] Json trace(const Timeline& timeline) const {
    timeline.write_trace(path());
    return Json::parse(text());
  }
  [[nodiscard]] std::string html(const Timeline& timeline) const {
    timeline.write_html(path());
    return text();
  }
  std::filesystem::path path_;
};

std::vector<Json> events(const Json& trace, const std::string& phase) {
  std::vector<Json> out;
  for (const Json& event : trace.at("traceEvents"))
    if (event.at("ph") == phase) out.push_back(event);
  return out;
}
/// The counters of each C event.
std::vector<Sums> counters(const Json& trace) {
  std::vector<Sums> out;
  for (const Json& event : events(trace, "C")) {
    EXPECT_EQ(event.at("name"), "memory");
    EXPECT_EQ(event.at("args").size(), fourfold::kPlaces);
    Sums places{};
    for (std::size_t i = 0; i < fourfold::kPlaces; ++i)
      places[i] = event.at("args").at(std::string(name(static_cast<Place>(i)))).get<std::int64_t>();
    out.push_back(places);
  }
  return out;
}
Sums reading() { return fourfold::door::counters().read().now; }
std::int64_t nanoseconds(const Json& microseconds) {
  return std::llround(microseconds.get<double>() * 1e3);
}

struct Slice {
  std::int64_t begin, end;
  std::string name;
};
/// By thread, each outer slice before its inner ones.
std::map<std::int64_t, std::vector<Slice>> slices(const Json& trace) {
  std::map<std::int64_t, std::vector<Slice>> out;
  for (const Json& event : events(trace, "X"))
    out[event.at("tid").get<std::int64_t>()].push_back(
        {nanoseconds(event.at("ts")), nanoseconds(event.at("ts")) + nanoseconds(event.at("dur")),
         event.at("name").get<std::string>()});
  for (auto& [thread, of] : out)
    std::stable_sort(of.begin(), of.end(),
                     [](const Slice& a, const Slice& b) { return a.begin < b.begin; });
  return out;
}
/// Whether each slice lies within the one that was open as it began; "a > b > c" of the deepest.
void expect_nested(const Json& trace) {
  for (const auto& [thread, of] : slices(trace)) {
    std::vector<Slice> open;
    for (const Slice& slice : of) {
      EXPECT_GE(slice.end, slice.begin);
      while (!open.empty() && open.back().end <= slice.begin) open.pop_back();
      if (!open.empty()) {
        EXPECT_LE(slice.end, open.back().end) << slice.name << " in " << open.back().name;
      }
      open.push_back(slice);
    }
  }
}
bool has_inside(const Json& trace, const std::string& outer, const std::string& inner) {
  for (const auto& [thread, of] : slices(trace))
    for (const Slice& a : of)
      for (const Slice& b : of)
        if (a.name == outer && b.name == inner && a.begin <= b.begin && b.end <= a.end) return true;
  return false;
}

struct Net {
  torch::nn::Sequential model{torch::nn::Linear(64, 256), torch::nn::GELU(),
                              torch::nn::Dropout(0.1), torch::nn::Linear(256, 64)};
  torch::optim::AdamW optimizer{model->parameters(), torch::optim::AdamWOptions(1e-3)};
  Meter meter;
  at::Tensor x = torch::ones({128, 64});
  Net() { meter.adopt(model->parameters(), Place::kWeights); }
  void step() {
    optimizer.zero_grad();
    at::Tensor loss;
    {
      const PlaceGuard guard(Place::kActivations);
      loss = model->forward(x).square().mean();
    }
    {
      const PlaceGuard guard(Place::kGradients);
      loss.backward();
    }
    const PlaceGuard guard(Place::kOptimizer);
    optimizer.step();
  }
};

TEST_F(Timelines, CountersAreTheReadingsOfEachInstant) {
  Net net;
  const auto older = bytes(5000);
  std::vector<Sums> read{reading()};
  Timeline timeline;
  std::vector<at::Tensor> held;
  for (int i = 0; i < 20; ++i) {
    const PlaceGuard guard(static_cast<Place>(i % 5));
    if (i % 3 == 2) held.erase(held.begin());
    held.push_back(bytes(1000 + 100'000 * (i % 4)));
    read.push_back(reading());
    if (i % 4 == 0) fourfold::door::retag(held.front(), Place::kGradients);
    read.push_back(reading());
    if (i == 10) net.step();
    read.push_back(reading());
  }
  fourfold::door::retag(older, Place::kOptimizer);
  read.push_back(reading());
  timeline.stop();
  const std::vector<Sums> told = counters(trace(timeline));
  EXPECT_EQ(told.front(), read.front());
  EXPECT_EQ(told.back(), read.back());
  auto at = told.begin();
  for (const Sums& one : read) {
    at = std::find(at, told.end(), one);
    ASSERT_NE(at, told.end());
  }
}

TEST_F(Timelines, PeakAndItsPlacesAreTheMeters) {
  Net net;
  net.step();
  net.meter.restart_peak();
  Timeline timeline;
  net.step();
  timeline.stop();
  const Ledger ledger = net.meter.ledger();
  const auto before = ledger.bytes.total;
  EXPECT_EQ(timeline.bytes().peak, ledger.bytes.peak);
  EXPECT_EQ(timeline.bytes().current, ledger.bytes.current);
  EXPECT_LE(timeline.bytes().total, before);
  for (std::size_t i = 0; i < fourfold::kPlaces; ++i)
    EXPECT_EQ(timeline.at_peak()[i], ledger.places[i].at_peak) << i;
  std::int64_t highest = 0;
  for (const Sums& places : counters(trace(timeline))) highest = std::max(highest, sum(places));
  EXPECT_EQ(highest, ledger.bytes.peak);
}

TEST_F(Timelines, OwnersAddUpToThePeak) {
  Net net;
  Timeline timeline;
  net.step();
  timeline.stop();
  for (const std::size_t most :
       {std::size_t{0}, std::size_t{1}, std::size_t{5}, std::size_t{1000}}) {
    const std::vector<BlockOwner> owners = timeline.owners(most);
    EXPECT_EQ(sum(owners), timeline.bytes().peak) << most;
    Sums places{};
    for (const BlockOwner& owner : owners) places[index(owner.place)] += owner.bytes;
    EXPECT_EQ(places, timeline.at_peak()) << most;
    EXPECT_TRUE(std::is_sorted(owners.begin(), owners.end(),
                               [](const auto& a, const auto& b) { return a.bytes > b.bytes; }));
  }
  const Json peak = events(trace(timeline), "i").at(0);
  EXPECT_EQ(peak.at("args").at("bytes"), timeline.bytes().peak);
  std::int64_t all = 0;
  for (const Json& owner : peak.at("args").at("owners"))
    all += owner.at("bytes").get<std::int64_t>();
  EXPECT_EQ(all, timeline.bytes().peak);
}

/// The rule of ByteCounters: a block moved while the count stands at the peak is the peak's.
TEST_F(Timelines, OwnersKnowWhereABlockWasMoved) {
  Meter().restart_peak();
  const auto older = bytes(3000);
  Timeline timeline;
  const auto moved = bytes(10 << 20);
  fourfold::door::retag(moved, Place::kActivations);
  fourfold::door::retag(older, Place::kWeights);
  timeline.stop();
  EXPECT_EQ(timeline.owners(1).front().bytes, 10 << 20);
  EXPECT_EQ(timeline.owners(1).front().place, Place::kActivations);
  EXPECT_EQ(sum(timeline.owners(1)), timeline.bytes().peak);
  const Ledger ledger = Meter().ledger();
  for (std::size_t i = 0; i < fourfold::kPlaces; ++i)
    EXPECT_EQ(timeline.at_peak()[i], ledger.places[i].at_peak) << i;
}

TEST_F(Timelines, OwnersAreNamedByTheOperatorThatAllocated) {
  const auto a = torch::ones({512, 512}).requires_grad_(true), b = torch::ones({512, 512});
  Timeline timeline;
  at::Tensor product;
  {
    RECORD_USER_SCOPE("the product");
    product = torch::mm(a, b);
  }
  timeline.stop();
  const BlockOwner forward = timeline.owners(1).front().blocks == 1 ? timeline.owners(1).front()
                                                                    : timeline.owners(1).at(1);
  EXPECT_EQ(forward.bytes, 1 << 20);
  EXPECT_EQ(forward.name, "aten::mm");
  EXPECT_EQ(forward.within, "the product");
  EXPECT_GT(forward.since_us, 0);

  Timeline backward;
  product.backward(torch::ones({512, 512}));
  backward.stop();
  std::vector<std::string> names;
  for (const BlockOwner& owner : backward.owners())
    names.push_back(owner.name + " in " + owner.within);
  EXPECT_THAT(names, testing::Contains("aten::mm in MmBackward0"));
  EXPECT_THAT(names, testing::Contains("aten::ones in "));  // not the aten::empty that it calls
}

TEST_F(Timelines, APeakAtTheStartIsOwnedByWhatWasThere) {
  at::Tensor older;
  {
    const PlaceGuard guard(Place::kWeights);
    older = bytes(4 << 20);
  }
  const Sums start = reading();
  Timeline timeline;
  older.reset();
  timeline.stop();
  EXPECT_EQ(timeline.bytes().peak, sum(start));
  EXPECT_EQ(timeline.bytes().total, 0);
  EXPECT_EQ(timeline.at_peak(), start);
  for (const BlockOwner& owner : timeline.owners()) {
    EXPECT_EQ(owner.name, "(before the recording)");
    EXPECT_LT(owner.since_us, 0);
    EXPECT_EQ(owner.blocks, 0);
    EXPECT_EQ(owner.bytes, start[index(owner.place)]);
  }
  EXPECT_EQ(events(trace(timeline), "i").at(0).at("ts"), 0);
}

TEST_F(Timelines, SlicesNest) {
  Net net;
  const Json out = [&] {
    Timeline timeline;
    {
      RECORD_USER_SCOPE("step");
      net.step();
    }
    timeline.stop();
    return trace(timeline);
  }();
  expect_nested(out);
  EXPECT_TRUE(has_inside(out, "step", "aten::addmm"));
  EXPECT_TRUE(has_inside(out, "step", "aten::gelu_backward"));
  EXPECT_TRUE(has_inside(out, "GeluBackward0", "aten::gelu_backward"));
  EXPECT_TRUE(has_inside(out, "aten::dropout", "aten::bernoulli_"));
  EXPECT_FALSE(has_inside(out, "aten::gelu_backward", "GeluBackward0"));
}

/// What Perfetto and chrome://tracing ask of each event ("Trace Event Format", and its importer).
TEST_F(Timelines, TraceHasTheFieldsOfTheFormat) {
  Net net;
  Timeline timeline;
  net.step();
  timeline.stop();
  const Json out = trace(timeline);
  double last = 0;
  std::vector<std::int64_t> named;
  for (const Json& event : out.at("traceEvents")) {
    ASSERT_TRUE(event.at("ph").is_string());
    ASSERT_TRUE(event.at("name").is_string());
    ASSERT_EQ(event.at("pid"), ::getpid());
    const std::string phase = event.at("ph");
    if (phase != "M") {
      ASSERT_GE(event.at("ts").get<double>(), 0);
    }
    if (phase == "M" && event.at("name") == "thread_name") {
      named.push_back(event.at("tid").get<std::int64_t>());
      EXPECT_FALSE(event.at("args").at("name").get<std::string>().empty());
    } else if (phase == "C") {
      for (const auto& [key, value] : event.at("args").items())
        EXPECT_TRUE(value.is_number()) << key;
      EXPECT_GE(event.at("ts").get<double>(), last);
      last = event.at("ts").get<double>();
    } else if (phase == "X") {
      EXPECT_GE(event.at("dur").get<double>(), 0);
      for (const char* key : {"ts", "dur"}) {  // whatever a reader's arithmetic, nesting holds
        EXPECT_EQ(std::fmod(event.at(key).get<double>() * 8, 1), 0);
      }
      EXPECT_THAT(named, testing::Contains(event.at("tid").get<std::int64_t>()));
      EXPECT_LE(event.at("ts").get<double>() + event.at("dur").get<double>(), 1e9);
    } else if (phase == "i") {
      EXPECT_EQ(event.at("s"), "p");
    } else {
      EXPECT_EQ(phase, "M");
    }
  }
  EXPECT_EQ(out.at("otherData").at("missed_changes"), 0);
  EXPECT_EQ(timeline.missed(), 0);
}

TEST_F(Timelines, NamesAreEscaped) {
  const char* const evil =
      "</script>\"\\ \n\x01 & '<b>' \xFF \xED\xA0\x80 "
      "gr\xC3\xBC\xC3\x9F\xE2\x82\xAC\xF0\x9F\x8E\x88";
  Timeline timeline;
  at::Tensor held;
  {
    RECORD_USER_SCOPE(evil);
    held = bytes(50 << 20);
  }
  timeline.stop();
  const std::string bad = "\xEF\xBF\xBD";
  const std::string wanted = "</script>\"\\ \n\x01 & '<b>' " + bad + " " + bad + bad + bad +
                             " gr\xC3\xBC\xC3\x9F\xE2\x82\xAC\xF0\x9F\x8E\x88";
  const Json out = trace(timeline);
  EXPECT_EQ(events(out, "X").at(0).at("name"), wanted);
  EXPECT_EQ(events(out, "i").at(0).at("args").at("owners").at(0).at("within"), wanted);
  const std::string page = html(timeline);
  EXPECT_THAT(page, HasSubstr("&lt;/script&gt;&quot;\\    &amp; &#39;&lt;b&gt;&#39;"));
  EXPECT_THAT(page, Not(HasSubstr("<b>")));
}

struct Grouping : std::numpunct<char> {
  char do_thousands_sep() const override { return '.'; }
  char do_decimal_point() const override { return ','; }
  std::string do_grouping() const override { return "\3"; }
};

TEST_F(Timelines, ALocaleOfTheProgramsDoesNotShow) {
  Timeline timeline;
  const at::Tensor held = bytes(50 << 20);
  timeline.stop();
  const Json expected = trace(timeline);
  const std::string page = html(timeline);
  const std::locale before = std::locale::global(std::locale(std::locale(), new Grouping));
  const Json got = trace(timeline);
  const std::string again = html(timeline);
  std::locale::global(before);
  EXPECT_EQ(got, expected);
  EXPECT_EQ(again, page);
}

TEST_F(Timelines, SeesAllThreadsAndFreesOnAnother) {
  Timeline timeline;
  at::Tensor made;
  std::thread([&] {
    RECORD_USER_SCOPE("maker");
    const PlaceGuard place(Place::kOptimizer);
    made = bytes(7 << 20);
  }).join();
  const Sums between = reading();
  std::thread([&] { made.reset(); }).join();
  const Sums after = reading();
  timeline.stop();
  EXPECT_EQ(timeline.owners(1).front().within, "maker");
  const Json out = trace(timeline);
  const std::vector<Sums> told = counters(out);
  EXPECT_THAT(told, testing::Contains(between));
  EXPECT_EQ(told.back(), after);
  EXPECT_EQ(between[index(Place::kOptimizer)] - after[index(Place::kOptimizer)], 7 << 20);
  expect_nested(out);
}

TEST_F(Timelines, OperatorsOnOtherThreadsWhileItStartsAndStops) {
  (void)Meter();
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&done, t] {
      const PlaceGuard guard(static_cast<Place>(t + 1));
      auto x = torch::ones({64, 64});
      while (!done) x = torch::mm(x, x).relu().sqrt();
    });
  std::size_t most = 0;
  for (int i = 0; i < 20; ++i) {
    Timeline timeline({.max_events = 200'000});
    const auto held = bytes(100'000 + i);
    for (int turn = 0; turn < 20; ++turn)
      (void)torch::mm(held.view({-1, 1}).narrow(0, 0, 64).to(torch::kFloat), torch::ones({1, 512}));
    timeline.stop();
    EXPECT_EQ(sum(timeline.owners()), timeline.bytes().peak);
    EXPECT_EQ(sum(timeline.at_peak()), timeline.bytes().peak);
    const Json out = trace(timeline);
    if (i % 5 == 0) expect_nested(out);
    most = std::max(most, slices(out).size());
  }
  done = true;
  for (auto& thread : threads) thread.join();
  EXPECT_GE(most, 2u);  // they did run meanwhile
}

TEST_F(Timelines, RangesThatBeganBeforeOrEndAfterAreCutOff) {
  Json out;
  {
    RECORD_USER_SCOPE("before");
    Timeline timeline;
    {
      RECORD_USER_SCOPE("across");
      (void)bytes(100);
      timeline.stop();
      out = trace(timeline);
    }
    EXPECT_EQ(trace(timeline), out);
  }
  expect_nested(out);
  std::vector<std::string> names;
  for (const Json& event : events(out, "X")) names.push_back(event.at("name"));
  EXPECT_THAT(names, testing::ElementsAre("across", "aten::empty"));
}

void nested(int depth) {
  RECORD_USER_SCOPE("deep");
  if (depth > 1) nested(depth - 1);
}
TEST_F(Timelines, TooDeepRangesAreCounted) {
  Timeline timeline;
  nested(100);
  nested(3);
  timeline.stop();
  EXPECT_EQ(timeline.missed(), 36);
  const Json out = trace(timeline);
  EXPECT_EQ(events(out, "X").size(), 67u);
  expect_nested(out);
}

TEST_F(Timelines, AFullBufferEndsTheRecordingAndIsSaid) {
  Timeline timeline({.max_events = 10});
  std::vector<at::Tensor> held;
  for (int i = 0; i < 25; ++i) held.push_back(bytes(1 << 20));
  timeline.stop();
  EXPECT_EQ(timeline.missed(), 15 + 15);
  EXPECT_EQ(timeline.bytes().peak, timeline.bytes().current);
  EXPECT_EQ(sum(timeline.owners()), timeline.bytes().peak);
  const Json out = trace(timeline);
  EXPECT_EQ(events(out, "C").size(), 12u);
  EXPECT_EQ(events(out, "X").size(), 10u);
  EXPECT_EQ(out.at("otherData").at("missed_changes"), 15);
  EXPECT_EQ(out.at("otherData").at("missed_slices"), 15);
  EXPECT_THAT(html(timeline),
              HasSubstr("15 changes and 15 ranges came when the buffers were full"));
}

TEST_F(Timelines, NamesAreBounded) {
  Timeline timeline;
  for (int i = 0; i < 40; ++i) {
    const std::string name(100'000, static_cast<char>('A' + i % 26));
    RECORD_USER_SCOPE(name + std::to_string(i));
  }
  timeline.stop();
  std::size_t kept = 0;
  const Json out = trace(timeline);
  for (const Json& event : events(out, "X"))
    kept += event.at("name") != "(name not kept)" ? 1u : 0u;
  EXPECT_EQ(kept, 10u);  // 2 MiB / (2 * 100 kB)
  EXPECT_EQ(events(out, "X").size(), 40u);
}

TEST_F(Timelines, DoesNotCountItselfAndLeavesNothingBehind) {
  (void)Meter();
  const auto before = fourfold::door::counters().read();
  const bool callbacks = at::hasGlobalCallbacks();
  {
    Timeline timeline;
    EXPECT_TRUE(at::hasGlobalCallbacks());
    timeline.stop();
    EXPECT_EQ(at::hasGlobalCallbacks(), callbacks);
    (void)trace(timeline), (void)html(timeline);
    EXPECT_EQ(timeline.bytes().total, 0);
  }
  { Timeline left; }
  EXPECT_EQ(at::hasGlobalCallbacks(), callbacks);
  const auto after = fourfold::door::counters().read();
  EXPECT_EQ(after.all.total, before.all.total);
  EXPECT_EQ(after.blocks, before.blocks);
}

TEST_F(Timelines, WithoutOperatorsThereAreBytesAlone) {
  const bool callbacks = at::hasGlobalCallbacks();
  Timeline timeline({.operators = false});
  EXPECT_EQ(at::hasGlobalCallbacks(), callbacks);
  const auto held = bytes(60 << 20);
  timeline.stop();
  EXPECT_EQ(timeline.owners(1).front().name, "");
  EXPECT_EQ(timeline.owners(1).front().bytes, 60 << 20);
  EXPECT_TRUE(events(trace(timeline), "X").empty());
  EXPECT_THAT(html(timeline), HasSubstr("(no operator)"));
}

/// Nobody tells of an adopted storage's death: it is found before a peak is believed.
TEST_F(Timelines, AdoptedStoragesThatDiedAreInNoPeak) {
  const auto high = bytes(80 << 20);  // the meter's peak lies above all that follows
  c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
  auto old = bytes(20 << 20);
  fourfold::door::install_allocator();
  fourfold::door::adopt(old, Place::kWeights);
  { const auto more = bytes(100 << 20); }
  Timeline timeline;
  const std::int64_t start = sum(reading());
  old.reset();
  const auto fresh = bytes(5 << 20);
  timeline.stop();
  EXPECT_EQ(timeline.bytes().peak, start);
  EXPECT_EQ(timeline.bytes().current, start - (15 << 20));
  EXPECT_EQ(timeline.bytes().current, sum(reading()));
}

TEST_F(Timelines, PageIsWholeSmallAndHoldsThePeak) {
  Timeline timeline;
  for (int i = 0; i < 20'000; ++i) (void)bytes(1000 + i % 700);
  {
    const PlaceGuard guard(Place::kActivations);
    (void)bytes(33 << 20);
  }
  for (int i = 0; i < 20'000; ++i) (void)bytes(1000 + i % 700);
  timeline.stop();
  const std::string page = html(timeline);
  EXPECT_LT(page.size(), 300'000u);
  EXPECT_EQ(page.find("http"), page.find("http://www.w3.org/2000/svg"));  // a name, not fetched
  EXPECT_EQ(page.find("http", page.find("http") + 4), std::string::npos);
  for (const char* wanted : {"src=", "href=", "@import", "url(", "fetch("})
    EXPECT_THAT(page, Not(HasSubstr(wanted)));
  const std::size_t begin = page.find("const rows=") + 11;
  const Json rows = Json::parse(page.substr(begin, page.find("];", begin) + 1 - begin));
  std::int64_t highest = 0;
  double last = 0;
  for (const Json& row : rows) {
    std::int64_t all = 0;
    for (std::size_t i = 1; i <= fourfold::kPlaces; ++i) all += row.at(i).get<std::int64_t>();
    highest = std::max(highest, all);
    EXPECT_GE(row.at(0).get<double>(), last);
    last = row.at(0).get<double>();
  }
  EXPECT_EQ(highest, timeline.bytes().peak);
  EXPECT_THAT(page, HasSubstr("<td>33.0</td><td>34603008</td>"));
  EXPECT_THAT(page,
              HasSubstr("<td class='place activations'>activations</td><td>aten::empty</td>"));
}

c10::IValue at_key(const c10::IValue& dict, const char* key) {
  return dict.toGenericDict().at(c10::IValue(std::string(key)));
}
TEST_F(Timelines, SnapshotIsTheDictionaryOfMemoryViz) {
  Net net;
  const std::int64_t start = sum(reading());
  Timeline timeline;
  net.step();
  const auto kept = bytes(9 << 20);
  timeline.stop();
  timeline.write_snapshot(path());
  const std::string pickled = text();
  const c10::IValue out = torch::jit::unpickle(pickled.data(), pickled.size());
  std::int64_t live = 0, change = 0;
  for (const c10::IValue& segment : at_key(out, "segments").toList().vec()) {
    live += at_key(segment, "total_size").toInt();
    const auto blocks = at_key(segment, "blocks").toList().vec();
    ASSERT_EQ(blocks.size(), 1u);
    EXPECT_EQ(at_key(blocks[0], "state").toStringRef(), "active_allocated");
    EXPECT_EQ(at_key(blocks[0], "address"), at_key(segment, "address"));
  }
  const auto traces = at_key(out, "device_traces").toList().vec();
  ASSERT_EQ(traces.size(), 1u);
  bool found = false;
  for (const c10::IValue& entry : traces[0].toList().vec()) {
    const std::string action = at_key(entry, "action").toStringRef();
    const std::int64_t size = at_key(entry, "size").toInt();
    if (action == "alloc") change += size;
    if (action == "free_completed") change -= size;
    for (const c10::IValue& frame : at_key(entry, "frames").toList().vec())
      found |= at_key(frame, "name").toStringRef() == "aten::addmm";
  }
  EXPECT_EQ(start + change, timeline.bytes().current);
  EXPECT_EQ(live, timeline.bytes().current);
  EXPECT_GE(live, 9 << 20);
  EXPECT_TRUE(found);
}

std::string message(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST_F(Timelines, MessagesSayWhatCameAndWhatToDo) {
  Timeline timeline;
  EXPECT_TRUE(timeline.recording());
  EXPECT_EQ(message([] { Timeline second; }),
            "fourfold::Timeline: another timeline records this process already, and its allocator "
            "tells one at a time; stop() that one, or let it go, before the next");
  EXPECT_TRUE(at::hasGlobalCallbacks());  // the first goes on
  EXPECT_EQ(
      message([&] { timeline.write_trace("/tmp/x"); }),
      "fourfold::Timeline: write_trace() on a timeline that still records; call stop() first");
  EXPECT_EQ(message([&] { (void)timeline.owners(); }),
            "fourfold::Timeline: owners() on a timeline that still records; call stop() first");
  timeline.stop();
  EXPECT_FALSE(timeline.recording());
  EXPECT_THAT(message([&] { timeline.stop(); }),
              testing::MatchesRegex("fourfold::Timeline: stop\\(\\) on a timeline that was stopped "
                                    "[0-9]+\\.[0-9]+ ms after it began; a timeline records once: "
                                    "make another for the next step"));
  EXPECT_EQ(message([] { Timeline none({.max_events = 0}); }),
            "fourfold::Timeline: max_events is 0, wanted is 1 to 67108864, at 64 bytes each; leave "
            "it out for 1048576");
  EXPECT_EQ(message([&] { timeline.write_html("/no/such/folder/step.html"); }),
            "fourfold::Timeline: cannot open '/no/such/folder/step.html' for writing (No such file "
            "or directory); wanted is a file in a folder that exists and may be written to: make "
            "the folder, or give another path");
  EXPECT_THAT(message([&] { timeline.write_trace("/"); }), HasSubstr("(Is a directory)"));
  if (std::filesystem::exists("/dev/full")) {
    EXPECT_EQ(message([&] { timeline.write_html("/dev/full"); }),
              "fourfold::Timeline: writing '/dev/full' failed (No space left on device), so the "
              "file is not whole; make room, or give a path on another disk");
  }
  Timeline next;  // one after the other is fine
  next.stop();
}

}  // namespace

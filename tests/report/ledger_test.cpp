// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <fourfold/report/ledger.hpp>

#include <sstream>
#include <string>

namespace {

using fourfold::Ledger;
using fourfold::Place;
using testing::HasSubstr;

Ledger example() {
  constexpr std::int64_t kMiB = 1 << 20;
  Ledger ledger;
  ledger.bytes = {.current = 24 * kMiB, .peak = 100 * kMiB, .total = 900 * kMiB};
  ledger[Place::kWeights] = {.now = 16 * kMiB, .at_peak = 16 * kMiB, .own_peak = 16 * kMiB};
  ledger[Place::kActivations] = {
      .now = 8 * kMiB, .at_peak = 84 * kMiB, .own_peak = 85 * kMiB + kMiB / 2};
  ledger.saved_bytes = 80 * kMiB;
  ledger.saved_plain_bytes = 320 * kMiB;
  ledger.resident_bytes = 150 * kMiB;
  ledger.resident_peak_bytes = 230 * kMiB;
  return ledger;
}

std::string text(const Ledger& ledger) {
  std::ostringstream out;
  out << ledger;
  return out.str();
}

TEST(Ledger, PrintsATableWhoseColumnsAlign) {
  EXPECT_EQ(text(example()),
            "MiB                              now     at peak    own peak\n"
            "other                            0.0         0.0         0.0\n"
            "weights                         16.0        16.0        16.0\n"
            "gradients                        0.0         0.0         0.0\n"
            "optimizer                        0.0         0.0         0.0\n"
            "activations                      8.0        84.0        85.5\n"
            "all CPU tensors                 24.0       100.0\n"
            "process, resident              150.0       230.0\n"
            "saved for backward: 80.0 MiB where plain autograd holds 320.0 MiB\n");
}

TEST(Ledger, PrintsWhatIsThereAndNothingElse) {
  Ledger ledger = example();
  ledger.predicted_peak_bytes = 101 << 20;
  ledger.cuda.push_back({.current = 1 << 20, .peak = 2 << 20, .total = 3 << 20});
  ledger.notes.push_back("no tensor passed");
  EXPECT_THAT(text(ledger), HasSubstr("predicted                                  101.0\n"));
  EXPECT_THAT(text(ledger), HasSubstr("cuda:0                           1.0         2.0\n"));
  EXPECT_THAT(text(ledger), HasSubstr("note: no tensor passed\n"));
}

TEST(Ledger, JsonGivesBytes) {
  Ledger ledger = example();
  ledger.predicted_peak_bytes = 7;
  ledger.cuda.push_back({.current = 1, .peak = 2, .total = 3});
  EXPECT_EQ(
      ledger.to_json(),
      "{\"bytes\": {\"current\": 25165824, \"peak\": 104857600, \"total\": 943718400}, \"places\": "
      "{"
      "\"other\": {\"now\": 0, \"at_peak\": 0, \"own_peak\": 0}, "
      "\"weights\": {\"now\": 16777216, \"at_peak\": 16777216, \"own_peak\": 16777216}, "
      "\"gradients\": {\"now\": 0, \"at_peak\": 0, \"own_peak\": 0}, "
      "\"optimizer\": {\"now\": 0, \"at_peak\": 0, \"own_peak\": 0}, "
      "\"activations\": {\"now\": 8388608, \"at_peak\": 88080384, \"own_peak\": 89653248}}, "
      "\"saved_bytes\": 83886080, \"saved_plain_bytes\": 335544320, \"resident_bytes\": 157286400, "
      "\"resident_peak_bytes\": 241172480, \"predicted_peak_bytes\": 7, "
      "\"cuda\": [{\"current\": 1, \"peak\": 2, \"total\": 3}], \"notes\": []}");
  EXPECT_THAT(example().to_json(), HasSubstr("\"predicted_peak_bytes\": null, \"cuda\": []"));
}

TEST(Ledger, JsonEscapesWhatANoteMayHold) {
  Ledger ledger;
  ledger.notes = {"a \"quoted\" C:\\path", "two\nlines\tand \x01",
                  "gr\xC3\xB6\xC3\x9F"
                  "er"};
  EXPECT_THAT(ledger.to_json(),
              HasSubstr("\"notes\": [\"a \\\"quoted\\\" C:\\\\path\", "
                        "\"two\\u000alines\\u0009and \\u0001\", \"gr\xC3\xB6\xC3\x9F"
                        "er\"]"));
}

}  // namespace

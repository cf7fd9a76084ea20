// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The ledger: whose bytes stood where, now and at the peak, with what was saved for backward, what
/// the process held, and what had been predicted. A value: whoever measures fills it in
/// (report/meter.hpp), `std::cout << ledger` prints a table in MiB, to_json() gives bytes.
#include <fourfold/core/peak_bytes.hpp>
#include <fourfold/core/place.hpp>

#include <array>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace fourfold::inline v0 {

/// One place's bytes.
struct PlaceBytes {
  std::int64_t now = 0;
  std::int64_t at_peak = 0;   ///< at the instant of the overall peak: these add up to bytes.peak
  std::int64_t own_peak = 0;  ///< the place's own maximum, at another instant perhaps
  friend constexpr bool operator==(const PlaceBytes&, const PlaceBytes&) = default;
};

struct Ledger {
  PeakBytes bytes;  ///< all CPU tensors
  std::array<PlaceBytes, kPlaces> places{};
  std::int64_t saved_bytes = 0;          ///< what was held for backward, at most at once
  std::int64_t saved_plain_bytes = 0;    ///< what plain autograd would have held; 0: not known
  std::int64_t resident_bytes = 0;       ///< of the process, VmRSS; 0 where the system does not say
  std::int64_t resident_peak_bytes = 0;  ///< VmHWM: what libraries take past the allocator included
  std::vector<PeakBytes> cuda;           ///< the caching allocator's own count, by device
  std::optional<std::int64_t> predicted_peak_bytes;
  std::vector<std::string> notes;  ///< sentences for the reader: why nothing was saved, and so on

  PlaceBytes& operator[](Place place) { return places[static_cast<std::size_t>(place)]; }
  const PlaceBytes& operator[](Place place) const {
    return places[static_cast<std::size_t>(place)];
  }

  template <class = void>
  [[nodiscard]] std::string to_json() const;
};

namespace detail {

template <class = void>
std::string mib(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", static_cast<double>(bytes) / (1 << 20));
  return text;
}

/// "name        1.0        2.0        3.0": 24 characters, then 12 for each number.
template <class = void>
void ledger_row(std::ostream& out, std::string_view name, const std::vector<std::string>& cells) {
  out << name << std::string(name.size() < 24 ? 24 - name.size() : 1, ' ');
  for (const std::string& cell : cells)
    out << std::string(cell.size() < 12 ? 12 - cell.size() : 1, ' ') << cell;
  out << '\n';
}

/// A JSON string, quoted; control characters escaped, UTF-8 passed through (RFC 8259, section 7).
template <class = void>
std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\', out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

template <class = void>
std::string json_bytes(const PeakBytes& bytes) {
  return "{\"current\": " + std::to_string(bytes.current) +
         ", \"peak\": " + std::to_string(bytes.peak) +
         ", \"total\": " + std::to_string(bytes.total) + "}";
}

}  // namespace detail

template <class = void>
std::ostream& operator<<(std::ostream& out, const Ledger& ledger) {
  using detail::ledger_row, detail::mib;
  ledger_row(out, "MiB", {"now", "at peak", "own peak"});
  for (std::size_t i = 0; i < kPlaces; ++i) {
    const PlaceBytes& place = ledger.places[i];
    ledger_row(out, name(static_cast<Place>(i)),
               {mib(place.now), mib(place.at_peak), mib(place.own_peak)});
  }
  ledger_row(out, "all CPU tensors", {mib(ledger.bytes.current), mib(ledger.bytes.peak)});
  if (ledger.predicted_peak_bytes)
    ledger_row(out, "predicted", {"", mib(*ledger.predicted_peak_bytes)});
  for (std::size_t i = 0; i < ledger.cuda.size(); ++i)
    ledger_row(out, "cuda:" + std::to_string(i),
               {mib(ledger.cuda[i].current), mib(ledger.cuda[i].peak)});
  ledger_row(out, "process, resident",
             {mib(ledger.resident_bytes), mib(ledger.resident_peak_bytes)});
  out << "saved for backward: " << mib(ledger.saved_bytes) << " MiB";
  if (ledger.saved_plain_bytes > 0)
    out << " where plain autograd holds " << mib(ledger.saved_plain_bytes) << " MiB";
  out << '\n';
  for (const std::string& note : ledger.notes) out << "note: " << note << '\n';
  return out;
}

template <class>
std::string Ledger::to_json() const {
  std::string out = "{\"bytes\": " + detail::json_bytes(bytes) + ", \"places\": {";
  for (std::size_t i = 0; i < kPlaces; ++i) {
    const PlaceBytes& place = places[i];
    out += (i > 0 ? ", " : "") + detail::json_string(name(static_cast<Place>(i))) +
           ": {\"now\": " + std::to_string(place.now) +
           ", \"at_peak\": " + std::to_string(place.at_peak) +
           ", \"own_peak\": " + std::to_string(place.own_peak) + "}";
  }
  out += "}, \"saved_bytes\": " + std::to_string(saved_bytes) +
         ", \"saved_plain_bytes\": " + std::to_string(saved_plain_bytes) +
         ", \"resident_bytes\": " + std::to_string(resident_bytes) +
         ", \"resident_peak_bytes\": " + std::to_string(resident_peak_bytes) +
         ", \"predicted_peak_bytes\": " +
         (predicted_peak_bytes ? std::to_string(*predicted_peak_bytes) : "null") + ", \"cuda\": [";
  for (std::size_t i = 0; i < cuda.size(); ++i)
    out += (i > 0 ? ", " : "") + detail::json_bytes(cuda[i]);
  out += "], \"notes\": [";
  for (std::size_t i = 0; i < notes.size(); ++i)
    out += (i > 0 ? ", " : "") + detail::json_string(notes[i]);
  return out + "]}";
}

}  // namespace fourfold::inline v0

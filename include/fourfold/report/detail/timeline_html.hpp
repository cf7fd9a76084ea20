// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A recording as one HTML page: the bytes over time stacked by place, the peak marked, its owners
/// in a table. Drawn as SVG here, so that it shows without scripts; the script reads the curve under
/// the pointer. Nothing is fetched. Under 300 kB however long the recording: of each of kColumns
/// stretches of time the highest instant and the last are drawn, so the peak is always there.
#include <fourfold/report/detail/recording.hpp>
#include <fourfold/report/detail/timeline_trace.hpp>
#include <fourfold/report/ledger.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iomanip>
#include <locale>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

inline std::string html_text(std::string_view text) {
  std::string out;
  for (const char c : text) switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  return out;
}

struct CurvePoint {
  std::int64_t at;
  PlaceSums places;
};
inline constexpr std::int64_t kColumns = 800;

inline std::vector<CurvePoint> curve(const Recording& recording) {
  std::vector<CurvePoint> out{{0, recording.start}};
  const std::int64_t width = recording.length / kColumns + 1;
  CurvePoint highest{}, last{0, recording.start};
  std::int64_t column = -1;
  const auto close = [&] {
    if (column < 0) return;
    if (highest.at < last.at) out.push_back(highest);
    out.push_back(last);
  };
  recording.replay([&](const MemoryChange& change, const PlaceSums& now) {
    const std::int64_t here = change.at / width;
    if (here != column) {
      close();
      column = here, highest = {change.at, now};
    } else if (sum(now) > sum(highest.places)) {
      highest = {change.at, now};
    }
    last = {change.at, now};
  });
  close();
  out.push_back({recording.length, last.places});
  return out;
}

/// Where things stand on the drawing, in its own units.
struct Chart {
  static constexpr double kLeft = 70, kTop = 30, kWidth = 960, kHeight = 320;
  double length, most;  // ns, bytes
  [[nodiscard]] double x(std::int64_t at) const {
    return kLeft + kWidth * static_cast<double>(at) / length;
  }
  [[nodiscard]] double y(std::int64_t bytes) const {
    return kTop + kHeight * (1 - static_cast<double>(bytes) / most);
  }
};
inline std::string tenths(double value) {
  std::ostringstream text;
  text.imbue(std::locale::classic());  // whatever the program's own writes for a point
  text << std::fixed << std::setprecision(1) << value;
  return std::move(text).str();
}

/// 1, 2 or 5 times a power of ten, at most eight of them in `range`.
inline double tick_step(double range) {
  const double power = std::pow(10.0, std::floor(std::log10(range / 8)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (range / (factor * power) <= 8) return factor * power;
  return 10 * power;
}

struct PlaceStyle {
  Place place;
  const char* colour;  // Okabe and Ito's, told apart by colour-blind eyes
};
/// From the bottom of the stack to its top: what stays first.
inline constexpr std::array<PlaceStyle, kPlaces> kStack{{{Place::kWeights, "#0072B2"},
                                                         {Place::kOptimizer, "#009E73"},
                                                         {Place::kGradients, "#E69F00"},
                                                         {Place::kActivations, "#CC79A7"},
                                                         {Place::kOther, "#999999"}}};

inline void html_axes(std::ostream& out, const Chart& chart) {
  const double mib = chart.most / (1 << 20), milliseconds = chart.length / 1e6;
  for (double at = 0, step = tick_step(mib); at <= mib; at += step) {
    const std::string y = tenths(Chart::kTop + Chart::kHeight * (1 - at / mib));
    out << "<line class='grid' x1='" << Chart::kLeft << "' x2='" << Chart::kLeft + Chart::kWidth
        << "' y1='" << y << "' y2='" << y << "'/><text class='y' x='" << Chart::kLeft - 8 << "' y='"
        << y << "'>" << at << "</text>\n";
  }
  for (double at = 0, step = tick_step(milliseconds); at <= milliseconds; at += step) {
    out << "<text class='x' x='" << tenths(Chart::kLeft + Chart::kWidth * at / milliseconds)
        << "' y='" << Chart::kTop + Chart::kHeight + 20 << "'>" << at << "</text>\n";
  }
  out << "<text class='y' x='" << Chart::kLeft - 8 << "' y='" << Chart::kTop - 16
      << "'>MiB</text><text class='x' x='" << Chart::kLeft + Chart::kWidth << "' y='"
      << Chart::kTop + Chart::kHeight + 40 << "'>ms</text>\n";
}

/// Each area reaches down to the axis and the next lower one covers it.
inline void html_areas(std::ostream& out, const Chart& chart,
                       const std::vector<CurvePoint>& points) {
  for (std::size_t top = kPlaces; top-- > 0;) {
    const auto height = [&](const CurvePoint& point) {
      std::int64_t bytes = 0;
      for (std::size_t i = 0; i <= top; ++i)
        bytes += point.places[static_cast<std::size_t>(kStack[i].place)];
      return tenths(chart.y(bytes));
    };
    const std::string floor = tenths(chart.y(0));
    out << "<path fill='" << kStack[top].colour << "' d='M" << Chart::kLeft << ' ' << floor;
    std::string before = floor;
    for (const CurvePoint& point : points) {
      const std::string here = height(point);
      if (here == before) continue;
      out << 'H' << tenths(chart.x(point.at)) << 'V' << here;
      before = here;
    }
    out << 'H' << tenths(Chart::kLeft + Chart::kWidth) << 'V' << floor << "Z'><title>"
        << name(kStack[top].place) << "</title></path>\n";
  }
}

inline void html_owners(std::ostream& out, const Recording& recording, const RecordedPeak& peak) {
  out << "<table><thead><tr><th>MiB</th><th>bytes</th><th>share</th><th>place</th><th>operator</th>"
         "<th>within</th><th>since, ms</th><th>blocks</th></tr></thead><tbody>\n";
  for (const BlockOwner& owner : recording.owners(peak, 30)) {
    const double share = 100.0 * static_cast<double>(owner.bytes) /
                         static_cast<double>(std::max<std::int64_t>(peak.bytes, 1));
    out << "<tr><td>" << mib(owner.bytes) << "</td><td>" << owner.bytes << "</td><td>"
        << tenths(share) << " %</td><td class='place " << name(owner.place) << "'>"
        << name(owner.place) << "</td><td>"
        << (owner.name.empty() ? "(no operator)" : html_text(owner.name)) << "</td><td>"
        << html_text(owner.within) << "</td><td>"
        << (owner.since_us < 0 ? "" : milliseconds(static_cast<std::int64_t>(owner.since_us * 1e3)))
        << "</td><td>" << (owner.blocks > 0 ? std::to_string(owner.blocks) : "") << "</td></tr>\n";
  }
  out << "</tbody></table>\n";
}

inline constexpr std::string_view kHtmlStyle = R"(
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1080px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.3em;margin:0}svg{width:100%;height:auto}text{font-size:12px;fill:#555}
.grid{stroke:#ddd}.y{text-anchor:end;dominant-baseline:middle}.x{text-anchor:middle}
.peak{stroke:#c00;stroke-dasharray:4 3}.mark{fill:#c00}text.peak{fill:#c00;stroke:none;font-weight:600}
#at{stroke:#222;visibility:hidden}#read{min-height:1.5em;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}
th:nth-child(n+4):nth-child(-n+6),td:nth-child(n+4):nth-child(-n+6){text-align:left;overflow-wrap:anywhere}
.place::before{content:"";display:inline-block;width:.8em;height:.8em;margin-right:.5em}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}text{fill:#aaa}.grid,th,td{stroke:#444;border-color:#444}#at{stroke:#ddd}.peak{stroke:#f66}.mark,text.peak{fill:#f66}}
)";
inline constexpr std::string_view kHtmlScript = R"(
const svg=document.querySelector('svg'),at=document.getElementById('at'),read=document.getElementById('read');
svg.addEventListener('pointermove',e=>{
  const p=new DOMPoint(e.clientX,e.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const t=(p.x-chart.left)/chart.width*chart.length;
  if(t<0||t>chart.length)return;
  let low=0,high=rows.length-1;
  while(low<high){const middle=(low+high+1)>>1;if(rows[middle][0]<=t)low=middle;else high=middle-1}
  const bytes=rows[low].slice(1),mib=b=>(b/1048576).toFixed(1);
  at.setAttribute('x1',p.x);at.setAttribute('x2',p.x);at.style.visibility='visible';
  read.textContent=(t/1000).toFixed(3)+' ms: '+mib(bytes.reduce((a,b)=>a+b,0))+' MiB; '+
    bytes.map((b,i)=>[places[i],b]).filter(x=>x[1]).map(x=>x[0]+' '+mib(x[1])).join(', ');
});
)";

inline void write_html(std::ostream& out, const Recording& recording) {
  const RecordedPeak peak = recording.peak();
  const std::vector<CurvePoint> points = curve(recording);
  const Chart chart{.length = static_cast<double>(std::max<std::int64_t>(recording.length, 1)),
                    .most = 1.08 * static_cast<double>(std::max<std::int64_t>(peak.bytes, 1))};
  out << "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>fourfold timeline"
         "</title><style>"
      << kHtmlStyle;
  for (const PlaceStyle& style : kStack)
    out << ".place." << name(style.place) << "::before{background:" << style.colour << "}\n";
  out << "</style></head><body>\n<h1>Peak " << mib(peak.bytes) << " MiB at "
      << milliseconds(peak.at) << " ms</h1>\n<p>CPU tensors, " << recording.changes.size()
      << " allocations, frees and moves in " << milliseconds(recording.length) << " ms; "
      << mib(sum(recording.start)) << " MiB lived before, " << mib(sum(points.back().places))
      << " MiB at the end.</p>\n";
  if (recording.missed_changes + recording.missed_slices > 0)
    out << "<p><strong>Not whole:</strong> " << recording.missed_changes << " changes and "
        << recording.missed_slices
        << " ranges came when the buffers were full; raise max_events, or record less.</p>\n";
  out << "<p>";
  for (const PlaceStyle& style : kStack)
    out << "<span class='place " << name(style.place) << "'></span>" << name(style.place) << " "
        << mib(peak.places[static_cast<std::size_t>(style.place)]) << " &nbsp; ";
  out << "(MiB at the peak)</p>\n<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1060 400' "
         "role='img' aria-label='bytes by place over time'>\n";
  html_axes(out, chart);
  html_areas(out, chart, points);
  const std::string x = tenths(chart.x(peak.at)), y = tenths(chart.y(peak.bytes));
  const bool right = chart.x(peak.at) > Chart::kLeft + Chart::kWidth / 2;
  out << "<line class='peak' x1='" << x << "' x2='" << x << "' y1='" << Chart::kTop << "' y2='"
      << Chart::kTop + Chart::kHeight << "'/><circle class='mark' cx='" << x << "' cy='" << y
      << "' r='4'/><text class='peak' x='" << tenths(chart.x(peak.at) + (right ? -8 : 8)) << "' y='"
      << Chart::kTop - 6 << "' text-anchor='" << (right ? "end" : "start") << "'>peak "
      << mib(peak.bytes) << " MiB</text>\n<line id='at' y1='" << Chart::kTop << "' y2='"
      << Chart::kTop + Chart::kHeight
      << "'/></svg>\n<p id='read'></p>\n<h1>Owners of the peak</h1>\n";
  html_owners(out, recording, peak);
  out << "<script>\nconst places=[";
  for (std::size_t i = 0; i < kPlaces; ++i)
    out << (i > 0 ? "," : "") << '"' << name(static_cast<Place>(i)) << '"';
  out << "];\nconst chart={left:" << Chart::kLeft << ",width:" << Chart::kWidth
      << ",length:" << microseconds(recording.length) << "};\nconst rows=[";
  for (std::size_t i = 0; i < points.size(); ++i) {
    out << (i > 0 ? ",\n[" : "\n[") << microseconds(points[i].at);
    for (const std::int64_t bytes : points[i].places) out << ',' << bytes;
    out << ']';
  }
  out << "];" << kHtmlScript << "</script></body></html>\n";
}

}  // namespace fourfold::inline v0::detail

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes one Markdown table of Google Benchmark's JSON files: bench_table.py FOLDER writes
FOLDER/table.md and prints it. Counters named *_bytes are shown in MiB, bytes_per_second in GB/s."""
import json
import pathlib
import sys

OWN_FIELDS = {  # what Google Benchmark writes of itself; all else are the bench's counters
    "name", "run_name", "run_type", "family_index", "per_family_instance_index", "repetitions",
    "repetition_index", "threads", "iterations", "real_time", "cpu_time", "time_unit", "label",
    "aggregate_name", "aggregate_unit", "error_occurred", "error_message", "skipped", "skip_message",
    "items_per_second"}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def time_of(run):
    seconds = run["real_time"] * SECONDS[run["time_unit"]]
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def heading(counter):
    if counter == "bytes_per_second":
        return "GB/s"
    return counter[:-len("_bytes")].replace("_", " ") + " MiB" if counter.endswith("_bytes") else counter


def value(counter, number):
    if counter == "bytes_per_second":
        return f"{number / 1e9:.2f}"
    return f"{number / 2**20:.1f}" if counter.endswith("_bytes") else f"{number:.3g}"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def main(folder):
    runs, machine = [], ""
    for path in sorted(folder.glob("*_bench.json")):
        document = json.loads(path.read_text())
        context = document["context"]
        machine = f"{context['num_cpus']} CPUs at {context['mhz_per_cpu']} MHz, {context['date']}"
        runs += document["benchmarks"]
    if not runs:
        sys.exit(f"bench_table: no results of a bench in {folder}")
    counters = []
    for run in runs:
        counters += [key for key in run if key not in OWN_FIELDS and key not in counters]
    lines = [machine, "", row(["benchmark", "time"] + [heading(counter) for counter in counters]),
             row(["---"] + ["---:"] * (1 + len(counters)))]
    for run in runs:
        if run.get("error_occurred") or run.get("skipped"):
            said = run.get("error_message") or run.get("skip_message") or "skipped"
            lines.append(row([run["name"], said] + [""] * len(counters)))
            continue
        cells = [value(counter, run[counter]) if counter in run else "" for counter in counters]
        lines.append(row([run["name"], time_of(run)] + cells))
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

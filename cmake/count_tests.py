#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Adds up single test cases: count_tests.py RESULTS prints "N passed, N failed, N skipped".

RESULTS holds ctest.junit, and an XML of GoogleTest for each test of ctest that is a GoogleTest
binary. A binary that left no XML (a crash) or that ctest calls failed counts at least one failure.
"""
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def cases_of(path):
    """Passed, failed and skipped cases of one GoogleTest binary; None without a readable file."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    counts = [0, 0, 0]
    for case in root.iter("testcase"):
        if case.find("failure") is not None:
            counts[1] += 1
        elif case.find("skipped") is not None or case.get("result") == "skipped":
            counts[2] += 1
        elif case.get("status") == "run":
            counts[0] += 1
    return counts


def main(results):
    total = [0, 0, 0]
    for test in ElementTree.parse(results / "ctest.junit").getroot().iter("testcase"):
        status = test.get("status")
        counts = cases_of(results / f"{test.get('name')}.xml")
        if status in ("disabled", "notrun"):
            counts = [0, 0, 1]
        elif counts is None:
            counts = [1, 0, 0] if status == "run" else [0, 1, 0]
        elif status == "fail" and counts[1] == 0:
            counts[1] = 1  # broken outside of its cases: a leak, say
        total = [a + b for a, b in zip(total, counts)]
    line = f"{total[0]} passed, {total[1]} failed"
    print(line + (f", {total[2]} skipped" if total[2] else ""))
    return 0 if total[0] and not total[1] else 1


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sh cmake/test.sh [ctest options]: sets up, builds and tests fourfold. Ends with a line
# "N passed, N failed" that counts single cases, and fails if one did or if there was none.
cd "$(dirname "$0")/.." || exit 1
. cmake/setup.sh

build all
rm -rf "$build_dir/results"
mkdir -p "$build_dir/results"
status=0
ctest --test-dir "$build_dir" -j "$(nproc)" --output-on-failure \
  --output-junit results/ctest.junit "$@" || status=$?
python3 cmake/count_tests.py "$build_dir/results" || status=1
exit "$status"

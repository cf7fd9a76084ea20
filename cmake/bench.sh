#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sh cmake/bench.sh [Google Benchmark options]: builds and runs every bench, leaves build/bench/*.json
# and one Markdown table of them all, build/bench/table.md.
cd "$(dirname "$0")/.." || exit 1
. cmake/setup.sh

build benches
mkdir -p build/bench
for source in bench/*_bench.cpp; do
  name=$(basename "$source" .cpp)
  if [ "$name" = gpu_bench ] && [ "$torch_cuda" != 1 ]; then continue; fi  # gpu.sh runs it
  "$build_dir/bench/$name" --benchmark_out="build/bench/$name.json" --benchmark_out_format=json "$@"
done
python3 cmake/bench_table.py build/bench

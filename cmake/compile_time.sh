#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sh cmake/compile_time.sh [runs]: what fourfold.hpp adds to the time of compiling torch/torch.h. Prints
# both medians and their ratio; fails above 1.2. Compilations alternate, so a busy machine slows both.
cd "$(dirname "$0")/.." || exit 1
. cmake/setup.sh

runs=${1:-5}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '#include <torch/torch.h>\n' >"$work/alone.cpp"
printf '#include <fourfold/fourfold.hpp>\n#include <torch/torch.h>\n' >"$work/with.cpp"
i=0
while [ "$i" -lt "$runs" ]; do
  for unit in alone with; do
    before=$(date +%s.%N)
    "${CXX:-c++}" -std=c++20 -O2 -c "$work/$unit.cpp" -o "$work/$unit.o" -I include \
      -isystem "$torch_root/include" -isystem "$torch_root/include/torch/csrc/api/include"
    date +%s.%N | awk -v before="$before" '{ print $1 - before }' >>"$work/$unit.times"
  done
  i=$((i + 1))
done
median() { sort -n "$1" | awk '{ t[NR] = $1 } END { print (t[int((NR + 1) / 2)] + t[int(NR / 2) + 1]) / 2 }'; }
awk -v alone="$(median "$work/alone.times")" -v with="$(median "$work/with.times")" 'BEGIN {
  printf "torch/torch.h alone %.2f s, with fourfold/fourfold.hpp %.2f s, ratio %.3f (at most 1.2)\n",
    alone, with, with / alone
  exit with / alone > 1.2 }'

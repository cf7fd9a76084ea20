#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sh cmake/gpu.sh: all that needs a GPU, in one go. Builds for this machine's GPU alone, runs the tests
# labelled gpu, the same under compute-sanitizer (memcheck; the kernels' own also under racecheck), and
# the benches on the GPU. Writes bench/results/DATE-NAME.md, also where something failed, and then fails.
# Under 10 minutes on 16 cores, or give FOURFOLD_GPU_STEPS some of: tests memcheck racecheck bench train.
# What else it takes from the environment stands in cmake/setup.sh; what is missing is installed, so
# where there is no network, CMAKE_PREFIX_PATH names GoogleTest, Google Benchmark, json and CLI11.
cd "$(dirname "$0")/.." || exit 1

if ! gpu=$(nvidia-smi --id=0 --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader); then
  echo "fourfold: gpu.sh needs a GPU, and nvidia-smi finds none; sh cmake/test.sh does what can be done without" >&2
  exit 1
fi
name=$(printf '%s' "$gpu" | cut -d, -f1)
capability=$(printf '%s' "$gpu" | cut -d, -f2 | tr -d ' .')
FOURFOLD_TORCH_CUDA=1
preset=cuda
cmake_options="-DCMAKE_CUDA_ARCHITECTURES=$capability-real -DFOURFOLD_EXAMPLES=OFF"
. cmake/setup.sh

steps=${FOURFOLD_GPU_STEPS:-tests memcheck racecheck bench train}
wants() { case " $steps " in *" $1 "*) return 0 ;; esac; return 1; }
targets=
if wants tests || wants memcheck || wants racecheck; then targets="$targets pipeline_tests"; fi
if wants bench; then targets="$targets gpu_bench"; fi
if wants train; then targets="$targets train_step_bench"; fi
# shellcheck disable=SC2086
build $targets

out=$build_dir/gpu
rm -rf "$out"
mkdir -p "$out" bench/results
result=bench/results/$(date +%Y-%m-%d)-$(printf '%s' "$name" | tr ' /' '--').md
failed=
# run NAME SECONDS COMMAND...: its words go to $out/NAME.log, and how it ended into the result.
run() {
  step=$1
  limit=$2
  shift 2
  say "$step"
  began=$(date +%s)
  status=0
  timeout "$limit" "$@" >"$out/$step.log" 2>&1 || status=$?
  took=$(($(date +%s) - began))
  if [ "$status" = 0 ]; then word=passed; else word="FAILED ($status)" failed="$failed $step"; tail -n 30 "$out/$step.log" >&2; fi
  said=$(grep -E '^\[  (PASSED|FAILED|SKIPPED) |ERROR SUMMARY|RACECHECK SUMMARY' "$out/$step.log" | tr '\n' ' ' | cut -c 1-400)
  echo "| $step | $word | $took s | $said |" >>"$out/steps.md"
}
tests=$build_dir/tests/pipeline_tests
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
sanitize() {
  tool=$1
  filter=$2
  if [ ! -x "$sanitizer" ]; then
    echo "| $tool | not run: no compute-sanitizer | | |" >>"$out/steps.md"
    return 0
  fi
  # PyTorch's allocator would hide what is read beyond the end of a block.
  run "$tool" 240 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
    "$tests" "--gtest_filter=$filter"
}

if wants tests; then run tests 300 "$tests" '--gtest_filter=Gpu*'; fi
if wants memcheck; then sanitize memcheck 'GpuCodec*:GpuBitMask*:GpuOptimizer*:GpuFactors*'; fi
if wants racecheck; then sanitize racecheck 'GpuCodec*TakesAnyStrides*:GpuBitMask.NamesTheThird*:GpuOptimizerStates*:GpuFactors*'; fi
if wants bench; then
  run gpu_bench 180 "$build_dir/bench/gpu_bench" \
    --benchmark_out="$out/gpu_bench.json" --benchmark_out_format=json
fi
if wants train; then
  run train_step_bench 240 env FOURFOLD_DEVICE=cuda "$build_dir/bench/train_step_bench" \
    --benchmark_min_time=0.5 --benchmark_out="$out/train_step_bench.json" --benchmark_out_format=json
fi

{
  echo "# $name"
  echo
  echo "By \`sh cmake/gpu.sh\` at $(git rev-parse --short HEAD 2>/dev/null || echo 'an unknown commit')."
  echo "GPU, compute capability, driver, memory: $gpu. $(nproc) CPU cores. LibTorch: $torch_root."
  echo
  echo '| step | result | time | in its words |'
  echo '|---|---|---:|---|'
  cat "$out/steps.md"
  echo
  if wants bench || wants train; then python3 cmake/bench_table.py "$out" || echo 'no bench ended.'; fi
} >"$result"
cat "$result"
say "written to $result"
if [ -n "$failed" ]; then die "failed:$failed (their words are in $out)"; fi

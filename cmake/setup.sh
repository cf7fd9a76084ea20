#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The set-up that test.sh, demo.sh and bench.sh share: installs what is missing, puts a LibTorch into
# build/ unless there is one, configures. Sourced from the repository's root; `sh cmake/setup.sh` does
# it alone. Nothing is asked of any network while nothing is missing. From the environment:
#   FOURFOLD_TORCH_VERSION   take the pinned wheel of this version, whatever else is there
#   FOURFOLD_WHEELS          folders with the wheels, separated by colons
#   FOURFOLD_JOBS            how many compilers run at once
#   FOURFOLD_TORCH_CUDA      1 links LibTorch's CUDA operators, 0 does not; else where nvcc and a GPU are
#   CMAKE_PREFIX_PATH, Torch_DIR, CXX   as CMake knows them
# A script may set `preset` (release) and `cmake_options` (one word each) before it sources this.
set -eu
[ -f cmake/setup.sh ] || cd "$(dirname "$0")/.."

say() { printf '%s\n' "fourfold: $*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
have_header() {
  for prefix in $(printf '%s' "${CMAKE_PREFIX_PATH:-}" | tr ':' ' ') /usr /usr/local; do
    if [ -e "$prefix/include/$1" ]; then return 0; fi
  done
  return 1
}

install_packages() {
  say "installing $*"
  have apt-get || die "these packages of Debian or Ubuntu are missing, and there is no apt-get here: $*.
Install what your system has in their place and run this again."
  as_root=
  if [ "$(id -u)" != 0 ]; then
    have sudo || die "these packages are missing: $*. Install them as root (apt-get install $*), or install sudo."
    as_root=sudo
  fi
  apt_log=$(mktemp)
  if ! { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive \
           apt-get install -y --no-install-recommends "$@"; } >"$apt_log" 2>&1; then
    tail -n 20 "$apt_log" >&2
    rm -f "$apt_log"
    die "apt-get could not install $* (its last words are above)."
  fi
  rm -f "$apt_log"
}

missing=
if [ -z "${CXX:-}" ] && ! have c++ && ! have g++; then missing="$missing g++"; fi
have cmake || missing="$missing cmake"
have ninja || missing="$missing ninja-build"
[ "${preset:-}" = cuda ] || have ccache || missing="$missing ccache"  # gpu.sh builds once
have python3 || missing="$missing python3"
have_header gtest/gtest.h || missing="$missing libgtest-dev"
have_header gmock/gmock.h || missing="$missing libgmock-dev"
have_header benchmark/benchmark.h || missing="$missing libbenchmark-dev"
have_header nlohmann/json.hpp || missing="$missing nlohmann-json3-dev"
have_header CLI/CLI.hpp || missing="$missing libcli11-dev"
# shellcheck disable=SC2086  # one word a package
if [ -n "$missing" ]; then install_packages $missing; fi

torch_cuda=${FOURFOLD_TORCH_CUDA:-}
if [ -z "$torch_cuda" ] && [ -e /dev/nvidiactl ] && { have nvcc || [ -x /usr/local/cuda/bin/nvcc ]; }; then
  torch_cuda=1
fi

# The version asked for, or what the user already has, or the reference version.
torch_version=${FOURFOLD_TORCH_VERSION:-2.11.0}
torch_root=
if [ -z "${FOURFOLD_TORCH_VERSION:-}" ]; then
  torch_root=$(cmake -P cmake/find_torch.cmake) || exit 1
fi
if [ -z "$torch_root" ] || [ "$torch_root" = "$PWD/build/torch-$torch_version/torch" ]; then
  torch_root=$PWD/build/torch-$torch_version/torch
  fetch="cmake/fetch_torch.py --version $torch_version --to build/torch-$torch_version --wheels build/wheels"
  if [ "$torch_cuda" = 1 ]; then fetch="$fetch --cuda"; fi
  # shellcheck disable=SC2086
  wheels=$(python3 $fetch --list-missing) || exit 1
  if [ -n "$wheels" ] && ! python3 -c 'import pip' 2>/dev/null; then
    install_packages python3-pip ca-certificates
  fi
  # shellcheck disable=SC2086
  python3 $fetch || exit 1
fi

build_dir=build/${preset:=release}
if [ "$torch_version" != 2.11.0 ]; then build_dir=$build_dir-torch-$torch_version; fi
wanted="$torch_root $torch_cuda${cmake_options:+ $cmake_options}"
if [ ! -f "$build_dir/build.ninja" ] || [ "$(cat "$build_dir/configured_for" 2>/dev/null)" != "$wanted" ]; then
  cuda=OFF
  if [ "$torch_cuda" = 1 ]; then cuda=ON; fi
  # shellcheck disable=SC2086  # options are words
  cmake --preset "$preset" -B "$build_dir" -DFOURFOLD_TORCH_ROOT="$torch_root" \
    -DFOURFOLD_TORCH_CUDA="$cuda" ${cmake_options:-} || exit 1
  echo "$wanted" >"$build_dir/configured_for"
fi

# A compiler of LibTorch code takes up to 3 GB.
jobs=${FOURFOLD_JOBS:-$(awk -v cores="$(nproc)" '/^MemAvailable/ { fit = int($2 / 3e6) }
  END { if (fit < 1) fit = 1; print fit < cores ? fit : cores }' /proc/meminfo)}

# build TARGET...: what is up to date costs a second.
build() { cmake --build "$build_dir" -j "$jobs" --target "$@"; }

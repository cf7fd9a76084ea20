#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sh cmake/demo.sh [train_lm options]: trains a language model under each pipeline, in fresh processes
# from one seed, and prints one table. The figures are left in build/demo/train_lm.json.
cd "$(dirname "$0")/.." || exit 1
. cmake/setup.sh

build train_lm
mkdir -p build/demo
exec "$build_dir/examples/train_lm" --compare --json build/demo/train_lm.json "$@"

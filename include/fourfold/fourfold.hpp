// SPDX-License-Identifier: Apache-2.0
#pragma once
/// All of fourfold. Each part may be included alone.
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/activations/checkpoint_sequential.hpp>
#include <fourfold/activations/chunked.hpp>
#include <fourfold/activations/linear_cross_entropy.hpp>
#include <fourfold/codec/bit_mask.hpp>
#include <fourfold/codec/companded.hpp>
#include <fourfold/codec/group_int.hpp>
#include <fourfold/codec/low_rank.hpp>
#include <fourfold/codec/nf4.hpp>
#include <fourfold/optim/adamw.hpp>
#include <fourfold/pipeline.hpp>
#include <fourfold/presets.hpp>
#include <fourfold/report/meter.hpp>
#include <fourfold/weights/compress_weights.hpp>
#include <fourfold/weights/save.hpp>

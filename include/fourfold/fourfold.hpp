// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What a training program needs. Each part may be included alone; beside these, for those who want
/// them, stand report/timeline.hpp, optim/schedulers.hpp and gradients/grad_scaler.hpp.
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

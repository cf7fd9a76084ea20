// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Python's learning-rate schedules that LibTorch lacks, for any torch::optim::Optimizer, each to
/// the last bit. How they are stepped, saved and combined: schedulers/scheduler.hpp.
#include <fourfold/optim/schedulers/cosine_annealing_lr.hpp>
#include <fourfold/optim/schedulers/lambda_lr.hpp>
#include <fourfold/optim/schedulers/linear_lr.hpp>
#include <fourfold/optim/schedulers/one_cycle_lr.hpp>
#include <fourfold/optim/schedulers/polynomial_lr.hpp>
#include <fourfold/optim/schedulers/sequential_lr.hpp>
#include <fourfold/optim/schedulers/warmup_stable_decay_lr.hpp>

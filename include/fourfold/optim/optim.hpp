// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Every optimizer; fourfold.hpp has AdamW's header alone. Rules that keep, for a parameter of n values
/// in (rows, columns), in the codecs that are given:
///   AdamW, Adam        adamw.hpp, adam.hpp   two moments: 2 n
///   AdamW<C, Factored> factored.hpp          n + rows + columns
///   SGD                sgd.hpp               n with momentum, else nothing
///   Lion               lion.hpp              n
///   AdamMini           adam_mini.hpp         n + rows
///   Adafactor          adafactor.hpp         rows + columns
///   Scale              scale.hpp             n for the last layer, else nothing
///   Apollo, ApolloMini apollo.hpp            2 rank * the longer dimension; 2 * the longer dimension
///   GaLore             galore.hpp            rank * (twice the longer dimension + the shorter)
///   Muon               muon.hpp              n
/// What all of them promise stands in optimizer.hpp, codecs of moments in state_codec.hpp, what is
/// kept of bf16 weights in master_codec.hpp, and what a rule of your own needs in rule.hpp.
#include <fourfold/optim/adafactor.hpp>
#include <fourfold/optim/adam.hpp>
#include <fourfold/optim/adam_mini.hpp>
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/apollo.hpp>
#include <fourfold/optim/factored.hpp>
#include <fourfold/optim/galore.hpp>
#include <fourfold/optim/lion.hpp>
#include <fourfold/optim/muon.hpp>
#include <fourfold/optim/scale.hpp>
#include <fourfold/optim/sgd.hpp>

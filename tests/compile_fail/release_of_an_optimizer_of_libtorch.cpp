// SPDX-License-Identifier: Apache-2.0
// EXPECT: GradientRelease steps one parameter at a time, which LibTorch's own optimizers cannot
#include <fourfold/gradients/release.hpp>
#include <fourfold/optim/adamw.hpp>

#if defined(MISUSE)
using Optimizer = torch::optim::AdamW;
#else
using Optimizer = fourfold::optim::AdamWOf<fourfold::Int8>;
#endif
void release(Optimizer& optimizer) { const fourfold::GradientRelease released(optimizer); }

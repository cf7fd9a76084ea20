// SPDX-License-Identifier: Apache-2.0
#include "unit.hpp"

double unit_a() { return loss_after_a_step<fourfold::Balanced>(); }

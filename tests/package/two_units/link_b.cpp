// SPDX-License-Identifier: Apache-2.0
#include "unit.hpp"

double unit_b() { return loss_after_a_step<fourfold::Exact>(); }

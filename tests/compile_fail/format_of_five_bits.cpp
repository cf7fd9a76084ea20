// SPDX-License-Identifier: Apache-2.0
#include <fourfold/codec/group_int.hpp>

#ifdef MISUSE
template class fourfold::GroupQuantizer<fourfold::IntFormat{.bits = 5, .group = 64}>;
// EXPECT: GroupQuantizer stores
#else
template class fourfold::GroupQuantizer<fourfold::IntFormat{.bits = 4, .group = 32}>;
#endif

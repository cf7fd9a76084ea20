// SPDX-License-Identifier: Apache-2.0
#include <fourfold/fourfold.hpp>

#ifdef MISUSE
template class fourfold::CompressionPipeline<fourfold::Int4>;
// EXPECT: a codec is not a policy: say what it packs, as in Activations<Int4> or Weights<Int4>
#else
template class fourfold::CompressionPipeline<fourfold::Weights<fourfold::Int4> >;
#endif

// SPDX-License-Identifier: Apache-2.0
#include <fourfold/fourfold.hpp>

using fourfold::Activations, fourfold::CompressionPipeline, fourfold::Int4, fourfold::Int8;
#ifdef MISUSE
template class fourfold::CompressionPipeline<Activations<Int4>, Activations<Int8>>;
// EXPECT: two policies for one role: keep one Activations<>, one Weights<>, and so on
#else
template class fourfold::CompressionPipeline<Activations<Int4>>;
#endif

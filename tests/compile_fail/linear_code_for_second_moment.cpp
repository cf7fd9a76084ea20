// SPDX-License-Identifier: Apache-2.0
#include <fourfold/fourfold.hpp>

using fourfold::Companded, fourfold::Softsign, fourfold::Sqrt;
#ifdef MISUSE
template class fourfold::optim::Optimizer<fourfold::optim::AdamWRule, Companded<8, Softsign>,
                                          fourfold::Int8>;
// EXPECT: use Companded<8, Sqrt>
#else
template class fourfold::optim::Optimizer<fourfold::optim::AdamWRule, Companded<8, Softsign>,
                                          Companded<8, Sqrt> >;
#endif

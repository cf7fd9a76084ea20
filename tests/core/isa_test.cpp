// SPDX-License-Identifier: Apache-2.0
#include <fourfold/core/isa.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdlib>

namespace {

using fourfold::Isa;

TEST(Isa, NamesAreThoseOfTheEnvironmentVariable) {
  EXPECT_EQ(name(Isa::kScalar), "scalar");
  EXPECT_EQ(name(Isa::kAvx2), "avx2");
  EXPECT_EQ(name(Isa::kAvx512), "avx512");
}

TEST(Isa, AvailableOnesAscendFromScalarToTheChosen) {
  const auto all = fourfold::available_isas();
  ASSERT_FALSE(all.empty());
  EXPECT_EQ(all.front(), Isa::kScalar);
  EXPECT_EQ(all.back(), fourfold::isa());
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end()));
}

TEST(Isa, TheEnvironmentOnlyLowers) {
  if (const char* asked = std::getenv("FOURFOLD_ISA"))
    for (Isa one : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512})
      if (name(one) == asked) {
        EXPECT_LE(fourfold::isa(), one);
      }
#if defined(__x86_64__)
  if (fourfold::isa() == Isa::kAvx512) {
    EXPECT_TRUE(__builtin_cpu_supports("avx512bw"));
  }
  if (fourfold::isa() >= Isa::kAvx2) {
    EXPECT_TRUE(__builtin_cpu_supports("avx2"));
  }
#endif
}

}  // namespace

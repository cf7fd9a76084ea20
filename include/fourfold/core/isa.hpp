// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Which vector instructions a loop may use. Chosen at run time: our users build without
/// -march=native. Each vectorised function takes an Isa, so that tests can hold every path of this
/// machine against the scalar truth.
#include <array>
#include <cstdlib>
#include <span>
#include <string_view>

namespace fourfold::inline v0 {

enum class Isa { kScalar, kAvx2, kAvx512 };  // kAvx2: with FMA and F16C; kAvx512: F, BW, DQ, VL

constexpr std::string_view name(Isa isa) {
  constexpr std::array<std::string_view, 3> names{"scalar", "avx2", "avx512"};
  return names[static_cast<std::size_t>(isa)];
}

/// The best that this processor has; FOURFOLD_ISA=scalar|avx2|avx512 in the environment lowers it.
inline Isa isa() {
  static const Isa best = [] {
    Isa found = Isa::kScalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      found = Isa::kAvx2;
    if (found == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found = Isa::kAvx512;
#endif
    if (const char* asked = std::getenv("FOURFOLD_ISA"))
      for (Isa one : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512})
        if (name(one) == asked && one < found) found = one;
    return found;
  }();
  return best;
}

/// Every path that this machine can run, the scalar one first.
template <class T = Isa>  // Isa; so that std::span is compiled where it is asked
std::span<const T> available_isas() {
  static constexpr std::array<T, 3> all{Isa::kScalar, Isa::kAvx2, Isa::kAvx512};
  return std::span(all).first(static_cast<std::size_t>(isa()) + 1);
}

}  // namespace fourfold::inline v0

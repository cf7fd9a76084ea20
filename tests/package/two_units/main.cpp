// SPDX-License-Identifier: Apache-2.0
/// main [libunit_a.so libunit_b.so]: runs both units, alternating, from two libraries or as linked here.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>

using Unit = double (*)();

#ifdef UNITS_LINKED
extern "C" double unit_a();
extern "C" double unit_b();
#endif

static Unit load(const char* path, const char* name) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* unit = library != nullptr ? dlsym(library, name) : nullptr;
  if (unit == nullptr) std::printf("%s\n", dlerror());
  return reinterpret_cast<Unit>(unit);
}

int main(int argc, char** argv) {
#ifdef UNITS_LINKED
  static_cast<void>(load), static_cast<void>(argc), static_cast<void>(argv);
  const Unit a = unit_a, b = unit_b;
#else
  if (argc != 3) return 2;
  const Unit a = load(argv[1], "unit_a"), b = load(argv[2], "unit_b");
  if (a == nullptr || b == nullptr) return 1;
#endif
  const double first_a = a(), first_b = b(), second_a = a(), second_b = b();
  std::printf("unit a: %.9g and %.9g, unit b: %.9g and %.9g\n", first_a, second_a, first_b, second_b);
  // b is exact, so it repeats bit for bit whatever a left behind; a rounds anew in each forward.
  return std::isfinite(first_a) && std::isfinite(first_b) && second_b == first_b &&
                 std::abs(first_a - first_b) < 0.05 * first_b &&
                 std::abs(second_a - first_b) < 0.05 * first_b
             ? 0
             : 1;
}

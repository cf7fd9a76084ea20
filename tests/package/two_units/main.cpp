// SPDX-License-Identifier: Apache-2.0
/// main [libunit_a.so libunit_b.so]: runs both units, alternating, from two libraries or as linked here;
/// then b reads what a packed.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>

namespace at {
class Tensor;
}
using Unit = double (*)();
using Packed = at::Tensor* (*)();
using Reader = bool (*)(at::Tensor*);

#ifdef UNITS_LINKED
extern "C" double unit_a();
extern "C" double unit_b();
extern "C" at::Tensor* packed_by_a();
extern "C" bool read_by_b(at::Tensor*);
#endif

template <class Function>
static Function load(const char* path, const char* name) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* unit = library != nullptr ? dlsym(library, name) : nullptr;
  if (unit == nullptr) std::printf("%s\n", dlerror());
  return reinterpret_cast<Function>(unit);
}

int main(int argc, char** argv) {
#ifdef UNITS_LINKED
  static_cast<void>(load<Unit>), static_cast<void>(argc), static_cast<void>(argv);
  const Unit a = unit_a, b = unit_b;
  const Packed pack = packed_by_a;
  const Reader read = read_by_b;
#else
  if (argc != 3) return 2;
  const auto a = load<Unit>(argv[1], "unit_a"), b = load<Unit>(argv[2], "unit_b");
  const auto pack = load<Packed>(argv[1], "packed_by_a");
  const auto read = load<Reader>(argv[2], "read_by_b");
  if (a == nullptr || b == nullptr || pack == nullptr || read == nullptr) return 1;
#endif
  const double first_a = a(), first_b = b(), second_a = a(), second_b = b();
  std::printf("unit a: %.9g and %.9g, unit b: %.9g and %.9g\n", first_a, second_a, first_b, second_b);
  if (!std::isfinite(first_a) || second_a != first_a || second_b != first_b) return 1;
  if (!read(pack())) {
    std::printf("b does not read what a packed\n");
    return 1;
  }
  return 0;
}

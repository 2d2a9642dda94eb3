// The inner loops, compiled once per instruction set from one source, and the choice between them.
#include "kernels.h"

#include <immintrin.h>

#include <cstdlib>
#include <string_view>

// A loop's body is one piece of code: its values stay in registers.
#define INLINE inline __attribute__((always_inline))

// All headers come before the first #pragma: what they define must be compiled for every machine.
namespace batchnorm {

template <class A>
struct Integer;
template <>
struct Integer<float> {
  using type = int32_t;
};
template <>
struct Integer<double> {
  using type = int64_t;
};

namespace baseline {
#define VECTOR_BYTES 16
#include "lanes.inl"
#include "activations.inl"
#include "kernels.inl"
#undef VECTOR_BYTES
}  // namespace baseline

#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#define VECTOR_BYTES 32
#include "lanes.inl"
#include "activations.inl"
#include "kernels.inl"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

namespace {

bool use_avx2() {
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  return __builtin_cpu_supports("avx2") && !(wish && std::string_view(wish) == "default");
}

}  // namespace

template <class A>
const Kernels<A>& kernels(Type type) {
  static const bool wide = use_avx2();
  return wide ? avx2::table(type, A{}) : baseline::table(type, A{});
}

template const Kernels<float>& kernels<float>(Type);
template const Kernels<double>& kernels<double>(Type);

}  // namespace batchnorm

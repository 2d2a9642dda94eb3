// The choice between the inner loops that are compiled for each instruction set.
#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace batchnorm {

#define DECLARE_TIER(name)                       \
  namespace name {                               \
  const Kernels<float>& loops(Type, float);      \
  const Kernels<double>& loops(Type, double);    \
  }
DECLARE_TIER(baseline)
#ifdef __x86_64__
DECLARE_TIER(avx2)
DECLARE_TIER(avx512)
#endif

namespace {

int chosen_vector_bytes() {
#ifdef __x86_64__
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = wish ? wish : "";
  if (most == "default" || !__builtin_cpu_supports("avx2")) return 16;
  const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return most == "avx2" || !wide ? 32 : 64;
#else
  return 16;
#endif
}

}  // namespace

int vector_bytes() {
  static const int bytes = chosen_vector_bytes();
  return bytes;
}

template <class A>
const Kernels<A>& kernels(Type type) {
#ifdef __x86_64__
  if (vector_bytes() == 64) return avx512::loops(type, A{});
  if (vector_bytes() == 32) return avx2::loops(type, A{});
#endif
  return baseline::loops(type, A{});
}

template const Kernels<float>& kernels<float>(Type);
template const Kernels<double>& kernels<double>(Type);

}  // namespace batchnorm

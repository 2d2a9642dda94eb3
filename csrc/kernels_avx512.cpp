// The inner loops for AVX-512.
#ifdef __x86_64__
#include "tier.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers leave registers undefined, on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define TIER avx512
#define VECTOR_BYTES 64
#include "tier.inl"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

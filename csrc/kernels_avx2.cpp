// The inner loops for AVX2.
#ifdef __x86_64__
#include "tier.h"

// To the same effect: Clang does not know the second.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define TIER avx2
#define VECTOR_BYTES 32
#include "tier.inl"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

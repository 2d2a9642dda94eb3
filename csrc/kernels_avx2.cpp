// The inner loops for AVX2.
#include "tier.h"

#pragma GCC target("avx2")
#define TIER avx2
#define VECTOR_BYTES 32
#include "tier.inl"

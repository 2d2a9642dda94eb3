// The inner loops for AVX-512.
#include "tier.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers leave registers undefined, on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define TIER avx512
#define VECTOR_BYTES 64
#include "tier.inl"

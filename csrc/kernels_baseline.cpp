// The inner loops for any x86-64 machine (SSE2).
#include "tier.h"

#define TIER baseline
#define VECTOR_BYTES 16
#include "tier.inl"

// The inner loops for any 64-bit CPU: SSE2 on x86, NEON on ARM.
#include "tier.h"

#define TIER baseline
#define VECTOR_BYTES 16
#include "tier.inl"

// What every instruction set's loops are compiled with.
#pragma once

#include <immintrin.h>

#include "kernels.h"

// A loop's body is one piece of code: its values stay in registers.
#define INLINE inline __attribute__((always_inline))

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

}  // namespace batchnorm

// What every instruction set's loops are compiled with.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "kernels.h"

// A loop's body is one piece of code: its values stay in registers.
#define INLINE inline __attribute__((always_inline))

// A statement for every register i of a line. Written out: loops instead, unrolled late, take GCC three times as long to compile.
#define EACH_PART(...)                                                 \
  do {                                                                 \
    constexpr int all_parts = line_bytes / VECTOR_BYTES;               \
    PART_OF_LINE(0, __VA_ARGS__)                                       \
    if constexpr (all_parts > 1) PART_OF_LINE(1, __VA_ARGS__)          \
    if constexpr (all_parts > 2) PART_OF_LINE(2, __VA_ARGS__)          \
    if constexpr (all_parts > 2) PART_OF_LINE(3, __VA_ARGS__)          \
  } while (false)
#define PART_OF_LINE(number, ...) \
  {                               \
    constexpr int i = number;     \
    __VA_ARGS__;                  \
  }

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

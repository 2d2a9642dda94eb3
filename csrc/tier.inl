// One instruction set's inner loops. Included by kernels_*.cpp with TIER its name and VECTOR_BYTES the width of its registers;
// all headers come before, for what they define must be compiled for every machine.
#pragma once

namespace batchnorm::TIER {

#include "lanes.inl"
#include "registers.inl"
#include "formats.inl"
#include "activations.inl"
#include "kernels.inl"

const Kernels<float>& loops(Type type, float) {
  static constexpr Kernels<float> float32 = table<Plain<float>, true>(), bfloat16 = table<BFloat16, true>(),
                                  float16 = table<Float16, false>();
  return type == Type::float32 ? float32 : type == Type::bfloat16 ? bfloat16 : float16;
}
const Kernels<double>& loops(Type, double) {
  static constexpr Kernels<double> float64 = table<Plain<double>, false>();
  return float64;
}

}  // namespace batchnorm::TIER

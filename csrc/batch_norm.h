// Batch normalization over strided arrays: measure, normalize, reduce, apply, and the two passes together.
#pragma once

#include <cstdint>
#include <vector>

#include "cut.h"
#include "kernels.h"

namespace batchnorm {

// Element (row, channel, column) of a tensor is data[row * row_stride + channel * channel_stride + column], where a row is a
// batch item (channels first) or a position (channels last). No data: absent.
struct Operand {
  char* data = nullptr;
  int64_t row_stride = 0, channel_stride = 0;  // in values
};

// The operands of a call. Arrays of doubles have one entry per channel; an empty weight is 1, an empty bias 0.
struct Problem {
  Shape shape;
  Type type = Type::float32;
  Operand x, residual, y, dy, dx, dresidual;
  const bool* mask = nullptr;  // (batch, space), contiguous
  std::vector<double> weight, bias;
  Activation activation = Activation::none;
  double slope = 0;
  bool through_mean = false;  // backward: the statistics depended on x
};

// What is measured: the mean of `count` values per channel, and the sum of squared deviations from it.
void measure(const Problem& problem, int64_t& count, double* mean, double* m2);
void normalize(const Problem& problem, const double* mean, const double* rstd);
void forward(const Problem& problem, double eps, double* mean, double* m2, double* rstd);

// Sums over a channel for the gradient: of dz, and of dz * xhat. Divided by the count they are means (null: no mean).
void reduce(const Problem& problem, const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat);
void apply(const Problem& problem, const double* mean, const double* rstd, const double* mean_dz,
           const double* mean_dz_xhat);
void backward(const Problem& problem, const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat);

}  // namespace batchnorm

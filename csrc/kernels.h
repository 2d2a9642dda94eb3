// The inner loops' interface: what a strip of values is, and the five things done to one.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class Activation : int64_t {
  none, relu, relu6, leaky_relu, elu, silu, gelu, gelu_tanh, hardswish, sigmoid, tanh,
};
constexpr int64_t activation_count = 11;

enum class Type { float32, float64, bfloat16, float16 };

// Values are reduced in lanes of one cache line: 16 floats or 8 doubles, whatever the instruction set. The order of
// additions is therefore part of the source, not of the machine.
constexpr int64_t line_bytes = 64;
// A strip whose constants change along the row is at most this wide, so that they stay in a near cache.
constexpr int64_t max_width = 2048;

// Rows of one tensor: element (r, i) is data[r * stride + i]. No data: the operand is absent.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// mask[r * row_stride + i * step]; the step is 0 where a whole row is one sample.
struct MaskRows {
  const bool* data = nullptr;
  int64_t row_stride = 0;
  int64_t step = 0;
};

// y = activation((x - high) * scale + beta), dx = (dz - mean_dz - (x - high) * slope_dz) * scale, where high is the mean
// rounded, so x - high is exact at any mean. The remainder of the rounding is in beta and mean_dz. A NaN's lower half is 0.
template <class A>
struct Constants {
  const A *high, *scale, *beta;
  const A *mean_dz, *slope_dz;
  int64_t step = 0;  // from one row's to the next one's, where a row has one
};

// There is one constant per row (which lies in one channel), or one per position.
template <class A>
struct Strip {
  int64_t rows = 0;
  int64_t width = 0;
  Rows x, residual, y, dy, dx, dresidual;
  MaskRows mask;
  Constants<A> constants = {};
  Activation activation = Activation::none;
  A slope = 0;
  bool through_mean = false;  // dx: the statistics depended on x
  bool stream = false;        // write with streaming stores, bypassing the caches
  bool adjacent = false;      // rows of at least one line follow each other without a gap, in all operands
};

// What a strip's loop has to do. The first three have no residual, the first four no mask, and all four write dx.
enum Kind {
  plain,
  rectified,  // relu, its derivative from x
  clipped,    // relu6, in the same way
  joined,     // a residual, and relu or nothing: relu's derivative is from y; dresidual is written if present
  general,    // any activation and any operands
};
constexpr int kind_count = 5;

// Each loop in two forms, [0] one constant per row and [1] one per position; the last three also by kind.
template <class A>
struct Kernels {
  using Sum = void (*)(const Strip<A>&, A* sum);
  using Moments = void (*)(const Strip<A>&, const A* shift, A* sum, A* squares);
  using Normalize = void (*)(const Strip<A>&);
  using Reduce = void (*)(const Strip<A>&, A* sum_dz, A* sum_dz_centred);
  using Apply = void (*)(const Strip<A>&);

  Sum sum[2];
  Moments moments[2][2];  // [1] with a mask
  Normalize normalize[2][kind_count];
  Reduce reduce[2][kind_count];
  Apply apply[2][kind_count];
};

// The width of the registers in use: the machine's, or less if ATEN_CPU_CAPABILITY (default, avx2, avx512) says so. Chosen
// once.
int vector_bytes();

// The loops for one type of tensor at that width.
template <class A>
const Kernels<A>& kernels(Type type);

}  // namespace batchnorm

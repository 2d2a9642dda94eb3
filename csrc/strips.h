// Regions of a problem's tensors as strips for the inner loops.
#pragma once

#include <algorithm>

#include "batch_norm.h"

namespace batchnorm {

constexpr int64_t streamed_row = 4 << 10;    // bytes of a row that outweigh its two ends, which share lines

inline int64_t value_bytes(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// Whether all that is read and written is cache-resident (in the cache that cores share, usually along with other data). If
// not, ordinary stores of the outputs would evict what is read a second time.
inline bool cached(const Problem& p) {
  int64_t tensors = 0;
  for (const Operand* operand : {&p.x, &p.residual, &p.y, &p.dy, &p.dx, &p.dresidual}) tensors += operand->data != nullptr;
  return tensors * p.shape.values() * value_bytes(p.type) < 16 << 20;
}

template <class A>
class Strips {
 public:
  Strips(const Problem& problem, const Cut& cut)
      : p_(problem), cut_(cut), adjacent_(cut.planes && problem.shape.adjacent && !problem.mask), stream_(streams()) {}

  // A region's rows, or the planes of its channels as rows.
  Strip<A> of(const Region& region, bool across_channels = false) const {
    Strip<A> s;
    s.rows = across_channels ? region.channels : region.rows;
    s.width = region.width;
    s.x = rows(p_.x, region, across_channels);
    s.residual = rows(p_.residual, region, across_channels);
    s.y = rows(p_.y, region, across_channels);
    s.dy = rows(p_.dy, region, across_channels);
    s.dx = rows(p_.dx, region, across_channels);
    s.dresidual = rows(p_.dresidual, region, across_channels);
    if (p_.mask) {
      const int64_t row_values = cut_.planes ? p_.shape.space : 1;
      s.mask = {p_.mask + region.row * row_values + region.column, across_channels ? 0 : row_values, cut_.planes};
    }
    s.activation = p_.activation;
    s.slope = static_cast<A>(p_.slope);
    s.through_mean = p_.through_mean;
    s.stream = stream_;
    s.adjacent = across_channels && adjacent_;
    return s;
  }

  Strip<A> of(const Region& region, const Constants<A>& constants) const {
    Strip<A> s = of(region);
    s.constants = constants;
    return s;
  }

  // A sample of eight rows of a strip, or of four rows or lines of planes, spread over it; its rows and width give the number
  // of values. A masked strip is taken whole.
  Strip<A> sample(Strip<A> s) const {
    constexpr int64_t width = line_bytes / sizeof(float);
    const int64_t parts = cut_.space > 1 ? 4 : 8;
    if (p_.mask) return s;
    if (cut_.planes && s.width >= parts * width) {
      s.x.stride = s.rows / parts * s.x.stride + s.width / parts;
      s.rows = parts;
      s.width = width;
    } else if (s.rows > parts) {
      s.x.stride *= s.rows / parts;
      s.rows = parts;
    }
    return s;
  }

  // Values per channel in a region's strip, or in a sample of it.
  double count(const Region& region, const Strip<A>& strip) const {
    const int64_t row_values = cut_.planes ? strip.width : region.repeats * cut_.space;
    if (!p_.mask) return static_cast<double>(strip.rows * row_values);
    int64_t present = 0;
    for (int64_t r = 0; r < strip.rows; ++r) {
      const bool* row = strip.mask.data + r * strip.mask.row_stride;
      present += count_set(row, cut_.planes ? strip.width : 1);
    }
    return static_cast<double>(present);
  }

 private:
  bool streams() const {
    const int64_t bytes = value_bytes(p_.type), row = cut_.block(0, 0).width * bytes;
    return !cached(p_) && (adjacent_ || row % line_bytes == 0 || row >= streamed_row);
  }

  Rows rows(const Operand& operand, const Region& region, bool across_channels) const {
    if (!operand.data) return {};
    // If rows are joined, one row of the cut is several rows of the operand.
    const int64_t row_stride = operand.row_stride * cut_.row_samples();
    const int64_t offset = region.row * row_stride + region.channel * operand.channel_stride + region.column;
    // After a part of a row, the next part of that row is read.
    const int64_t next = cut_.in_chunks() ? region.width : row_stride;
    return {operand.data + offset * value_bytes(p_.type), across_channels ? operand.channel_stride : next};
  }

  const Problem& p_;
  const Cut& cut_;
  const bool adjacent_;  // planes of a batch item follow each other
  const bool stream_;
};

}  // namespace batchnorm

// The inner loops' constants: of every channel, and spread over the positions of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "batch_norm.h"
#include "positions.h"

namespace batchnorm {

// Every NaN is replaced by one with zeros in its lower half: see Constants.
template <class A>
A tidy(double value) {
  return value != value ? std::numeric_limits<A>::quiet_NaN() : static_cast<A>(value);
}

template <class A>
class ChannelConstants {
 public:
  static constexpr int64_t lanes = line_bytes / sizeof(A);
  enum Kind { high, scale, beta, mean_dz, slope_dz, kinds };

  explicit ChannelConstants(const Problem& problem)
      : p_(problem), stride_(problem.shape.channels / lanes + 5), lines_(kinds * stride_) {}

  // Space for one region's constants, if they have to be spread. The kinds begin at different offsets in a page, so that they
  // do not compete for the same cache sets.
  static constexpr int64_t scratch_stride = max_width + 5 * lanes;
  struct Scratch {
    alignas(line_bytes) A values[kinds * scratch_stride];
  };

  void set_affine(int64_t first, int64_t channels, const double* mean, const double* rstd) {
    for (int64_t c = first; c < first + channels; ++c) {
      const double factor = (p_.weight.empty() ? 1 : p_.weight[c]) * rstd[c];
      row(high)[c] = tidy<A>(mean[c]);
      row(scale)[c] = tidy<A>(factor);
      row(beta)[c] = tidy<A>((p_.bias.empty() ? 0 : p_.bias[c]) - times(factor, low(c, mean)));
    }
  }

  // After the above: its mean is needed.
  void set_through_mean(int64_t c, const double* mean, double mean_of_dz, double slope) {
    row(mean_dz)[c] = tidy<A>(mean_of_dz - times(slope, low(c, mean)));
    row(slope_dz)[c] = tidy<A>(slope);
  }

  // The remainder of the rounded mean.
  double low(int64_t c, const double* mean) const { return mean[c] - static_cast<double>(row(high)[c]); }

  // The first `needed` kinds: the channels' own, one of them at a time or each at its position; else spread.
  Constants<A> of(const Cut& cut, const Region& region, Scratch& scratch, int needed) const {
    const bool own = cut.planes || (cut.space == 1 && region.repeats == 1);
    const A* at[kinds];
    for (int kind = 0; kind < needed; ++kind) {
      const A* channels = row(kind) + region.channel;
      A* positions = scratch.values + kind * scratch_stride;
      if (!own) spread(cut, region, channels, positions);
      at[kind] = own ? channels : positions;
    }
    std::fill(at + needed, at + kinds, at[high]);  // a loop may read constants that it does not use
    return {at[high], at[scale], at[beta], at[mean_dz], at[slope_dz]};
  }

 private:
  // If the factor is infinite, the remainder of the rounded mean is dropped.
  static double times(double factor, double low) { return std::isinf(factor) ? 0 : factor * low; }

  A* row(int kind) { return reinterpret_cast<A*>(lines_.data() + kind * stride_); }
  const A* row(int kind) const { return reinterpret_cast<const A*>(lines_.data() + kind * stride_); }

  const Problem& p_;
  // Aligned to cache lines, because a load that straddles two takes twice as long. Each kind can be read one line past its
  // end, and begins at its own offset in a page.
  struct alignas(line_bytes) Line {
    A values[lanes];
  };
  int64_t stride_;
  std::vector<Line> lines_;
};

}  // namespace batchnorm

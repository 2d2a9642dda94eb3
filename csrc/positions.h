// Between channels and the positions of a row: a channel's number spread over its positions, positions' sums collapsed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cut.h"
#include "kernels.h"

namespace batchnorm {

// f(channel of the tile, first position) for each run of `space` positions that belong to one channel.
template <class F>
void each_run(const Region& region, int64_t space, F f) {
  int64_t position = 0;
  for (int64_t k = 0; k < region.repeats; ++k)
    for (int64_t c = 0; c < region.channels; ++c, position += space) f(c, position);
}

// A line past the width is filled too: the loops read whole lines of constants. Planes have one position. A run is written in
// whole lines; the next run overwrites what its last line has too much.
template <class V, class A>
void spread(const Cut& cut, const Region& region, const V* channels, A* positions) {
  if (cut.planes) {
    positions[0] = static_cast<A>(channels[0]);
    return;
  }
  if (cut.space == 1)
    for (int64_t k = 0; k < region.repeats; ++k)
      std::transform(channels, channels + region.channels, positions + k * region.channels,
                     [](V v) { return static_cast<A>(v); });
  else
    each_run(region, cut.space, [&](int64_t c, int64_t position) {
      constexpr int64_t lanes = line_bytes / sizeof(A);
      const A value = static_cast<A>(channels[c]);
      for (int64_t i = 0; i < cut.space; i += lanes) std::fill_n(positions + position + i, lanes, value);
    });
  std::fill(positions + region.width, positions + std::min(max_width, region.width + line_bytes), A{0});
}

// In eight partial sums, so that an addition waits less for the one before.
template <class V>
double total(const V* values, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int64_t j = 0; j < 8; ++j) sums[j] += static_cast<double>(values[i + j]);
  for (; i < count; ++i) sums[i % 8] += static_cast<double>(values[i]);
  for (int64_t half = 4; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

template <class V>
void collapse(const Cut& cut, const Region& region, const V* positions, double* channels) {
  std::fill_n(channels, region.channels, 0.0);
  if (cut.planes) channels[0] = static_cast<double>(positions[0]);
  else if (cut.space == 1)
    for (int64_t k = 0; k < region.repeats; ++k)
      for (int64_t c = 0; c < region.channels; ++c)
        channels[c] += static_cast<double>(positions[k * region.channels + c]);
  else
    each_run(region, cut.space, [&](int64_t c, int64_t position) { channels[c] += total(positions + position, cut.space); });
}

// The sum over the blocks of a piece, at each position.
template <class A>
class PositionSums {
 public:
  PositionSums(const Cut& cut, const Region& widest) : cut_(cut), widest_(widest) {}

  void add(const Region& region, const A* block) {
    const int64_t width = cut_.planes ? 1 : region.width;
    if (std::min(cut_.blocks, cut_.piece_blocks) == 1) {
      only_ = block;
    } else {
      if (empty_) std::fill_n(sums_, cut_.planes ? 1 : widest_.width, 0.0);
      for (int64_t i = 0; i < width; ++i) sums_[i] += static_cast<double>(block[i]);
    }
    empty_ = false;
  }

  // Before the one block's sums are overwritten.
  void collapse(double* channels) const {
    if (empty_) std::fill_n(channels, widest_.channels, 0.0);
    else if (only_) batchnorm::collapse(cut_, widest_, only_, channels);
    else batchnorm::collapse(cut_, widest_, sums_, channels);
  }

 private:
  const Cut& cut_;
  const Region& widest_;  // the first block's
  bool empty_ = true;
  const A* only_ = nullptr;
  double sums_[max_width];
};

}  // namespace batchnorm

// Results of pieces and tiles, and how they are merged.
#pragma once

#include <cstdint>
#include <vector>

#include "cut.h"

namespace batchnorm {

// One piece's, or one tile's, results: two numbers per channel, each over `count` values.
struct Partial {
  double& count;
  double* first;
  double* second;
};

// Partials of every piece of every tile, 0 before they are computed.
class Partials {
 public:
  Partials(const Cut& cut, int64_t channels)
      : cut_(cut), channels_(channels), values_(cut.tiles * cut.pieces + 2 * cut.pieces * channels) {}

  Partial at(int64_t tile, int64_t piece) {
    double* first = values_.data() + cut_.tiles * cut_.pieces + 2 * piece * channels_ + tile * cut_.tile_channels;
    return {values_[tile * cut_.pieces + piece], first, first + channels_};
  }

 private:
  const Cut& cut_;
  int64_t channels_;
  std::vector<double> values_;
};

// (mean, m2) of the union of two disjoint sets (Chan et al. 1979). The counts are the same in every channel.
inline void merge_moments(Partial into, Partial other, int64_t channels) {
  if (other.count == 0) return;
  const double count = into.count + other.count;
  const double share = other.count / count, spread = into.count * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = other.first[c] - into.first[c];
    into.first[c] = into.count == 0 ? other.first[c] : into.first[c] + delta * share;
    into.second[c] = into.count == 0 ? other.second[c] : into.second[c] + (other.second[c] + delta * delta * spread);
  }
  into.count = count;
}

inline void merge_sums(Partial into, Partial other, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    into.first[c] += other.first[c];
    into.second[c] += other.second[c];
  }
}

}  // namespace batchnorm

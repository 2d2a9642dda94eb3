// Cutting by shape: the sizes here are chosen by measurement, and fixed for good bits.
#include "cut.h"

#include <algorithm>
#include <numeric>

namespace batchnorm {
namespace {

constexpr int64_t plane_block = 4096;      // values: sums of 128 in a lane
constexpr int64_t position_block = 65536;  // values, but enough rows that merging costs little beside reading them, before
constexpr int64_t fewest_rows = 128, most_rows = 1024;  // they are evened out; too many, and a float32 sum would suffer
constexpr int64_t map_block = 16384;       // values, where there are no sums: a share for every thread even of small tensors
constexpr int64_t plane_piece = 65536, position_piece = 131072;  // values
constexpr int64_t even_pieces = 4;         // pieces of positions come in multiples of this
constexpr int64_t shortest_plane = 256;    // values; shorter ones are handled as positions where there are sums,
constexpr int64_t shortest_map = 32;       // and where there are none
constexpr int64_t joined_row = 256;        // values, roughly, in a joined row of few channels
constexpr int64_t short_planes_row = 1024;  // positions of a tile of short planes, whose constants stay in cache
constexpr int64_t lanes = line_bytes / sizeof(float);

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many rows of `channels` values make one wide row, a whole number of lines if possible.
int64_t rows_joined(int64_t channels) {
  const int64_t unit = lanes / std::gcd(channels, lanes);
  if (unit * channels > 2 * joined_row) return std::max<int64_t>(1, joined_row / channels);
  return unit * std::max<int64_t>(1, joined_row / (unit * channels));
}

// About `wanted` of `channels`, in equal shares that are a whole number of lines if possible.
int64_t share(int64_t channels, int64_t wanted) {
  const int64_t shares = ceil_divide(channels, std::max<int64_t>(wanted, 1));
  const int64_t each = ceil_divide(channels, shares);
  const int64_t aligned = ceil_divide(each, lanes) * lanes;
  return std::min(aligned <= wanted ? aligned : each, channels);
}

}  // namespace

Cut::Cut(const Shape& shape, int64_t value_bytes, bool sums) : channels_(shape.channels) {
  const bool rows = shape.channels_last || shape.space == 1;
  const bool short_planes = shape.space < (sums ? shortest_plane : shortest_map) && shape.adjacent && !shape.masked;
  planes = !rows && !short_planes;
  if (planes) cut_planes(shape);
  else cut_positions(shape, sums);

  piece_blocks = std::max<int64_t>(1, (planes ? plane_piece : position_piece) / (block_rows_ * chunk_));
  if (!planes && sums) even_out();
  const int64_t whole = ceil_divide(rows_, block_rows_) * chunks_;
  blocks = whole + (rest_ > 0);
  pieces = std::max<int64_t>(1, ceil_divide(whole, piece_blocks));
  piece_values = piece_blocks * block_rows_ * chunk_;
  tile_bytes = shape.batch * shape.space * tile_channels * value_bytes;
}

void Cut::cut_planes(const Shape& shape) {
  tile_channels = 1;
  tiles = shape.channels;
  space = shape.space;
  rows_ = shape.batch;
  row_samples_ = 1;
  rest_ = 0;
  chunk_ = std::min(std::max<int64_t>(shape.space, 1), plane_block);
  chunks_ = ceil_divide(shape.space, chunk_);
  block_rows_ = chunks_ > 1 ? 1 : plane_block / chunk_;
}

void Cut::cut_positions(const Shape& shape, bool sums) {
  const bool rows = shape.channels_last || shape.space == 1;
  const int64_t samples = rows ? shape.batch * shape.space : shape.batch;
  space = rows ? 1 : shape.space;
  const int64_t channels = std::max<int64_t>(shape.channels, 1);

  row_samples_ = 1;
  if (rows && shape.adjacent && !shape.masked && samples > 0)
    row_samples_ = std::clamp<int64_t>(rows_joined(channels), 1, samples);
  rows_ = samples / row_samples_;
  rest_ = samples % row_samples_;

  // Channels last: whole rows, read from end to end.
  const int64_t width = rows ? max_width : short_planes_row;
  tile_channels = row_samples_ > 1 ? channels : share(channels, std::max<int64_t>(1, width / space));
  tiles = ceil_divide(shape.channels, tile_channels);
  chunk_ = row_samples_ * tile_channels * space;
  chunks_ = 1;
  block_rows_ = sums ? std::clamp(position_block / chunk_, fewest_rows, most_rows)
                     : std::max<int64_t>(1, map_block / chunk_);
}

// Pieces come in fours, with equally many rows except the last. With seven pieces, the seventh a quarter of the others, two
// threads took 2 and 1.1 times as long.
void Cut::even_out() {
  if (rows_ <= block_rows_ * piece_blocks) return;
  const int64_t unit = piece_blocks * even_pieces, wanted = ceil_divide(rows_, block_rows_);
  block_rows_ = ceil_divide(rows_, ceil_divide(wanted, unit) * unit);
}

Region Cut::block(int64_t tile, int64_t index) const {
  Region region;
  region.channel = tile * tile_channels;
  region.channels = std::min(tile_channels, channels_ - region.channel);
  region.repeats = row_samples_;
  region.row = index / chunks_ * block_rows_;
  region.rows = std::min(block_rows_, rows_ - region.row);
  region.column = index % chunks_ * chunk_;
  region.width = planes ? std::min(chunk_, space - region.column) : row_samples_ * region.channels * space;
  if (region.rows <= 0) {  // the samples left over where rows are joined
    region.row = rows_;
    region.rows = 1;
    region.repeats = rest_;
    region.width = rest_ * region.channels;
  }
  return region;
}

}  // namespace batchnorm

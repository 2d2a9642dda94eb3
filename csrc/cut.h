// How a tensor is cut into tiles, pieces and blocks: by its shape alone, never by the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace batchnorm {

// How many of the flags are set: counted eight at a time, in bytes that hold up to 255 each.
inline int64_t count_set(const bool* flags, int64_t count) {
  int64_t total = 0, i = 0;
  while (i + 8 <= count) {
    const int64_t end = std::min(count - 7, i + 8 * 255);
    uint64_t bytes = 0;
    for (; i < end; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, flags + i, 8);
      bytes += eight;
    }
    const uint64_t even = 0x00ff00ff00ff00ff, pairs = (bytes & even) + (bytes >> 8 & even);
    total += static_cast<int64_t>(pairs * 0x0001000100010001 >> 48);
  }
  for (; i < count; ++i) total += flags[i];
  return total;
}

// x seen as (batch, channels, space), channels first or last in memory.
struct Shape {
  int64_t batch = 0, channels = 0, space = 1;
  bool channels_last = false;  // the values of a position lie together; so they do where space is 1
  bool adjacent = true;        // channels (rows, where channels are last) follow without a gap
  bool masked = false;

  int64_t values() const { return batch * channels * space; }
};

// A block of one tile: `rows` rows from `row` on, each of `width` values from `column` on.
struct Region {
  int64_t row, rows, column, width;
  int64_t channel, channels;  // the tile's
  int64_t repeats;            // how often the channels repeat along the row
};

// A tile is some channels, measured and normalized together; its samples are cut into pieces, the unit of work a thread
// takes, and pieces into blocks, small enough to be read twice from the nearest cache.
//
//   planes      channels first: a tile is one channel, a row one plane of `space` values.
//   positions   channels last, or planes too short to be worth a loop: a row holds many channels, position p of it
//               belongs to channel (p / space) % channels. Where channels are few, one row of the cut is several of the
//               tensor's.
struct Cut {
  // Without sums, short planes also have their own loop, so that memory is read in order.
  Cut(const Shape& shape, int64_t value_bytes, bool sums);

  bool planes;
  int64_t tiles, tile_channels;
  int64_t pieces, blocks, piece_blocks;  // a tile's
  int64_t space;                         // consecutive positions of one channel
  int64_t piece_values;                  // roughly, in a piece; used to share out the work
  int64_t tile_bytes;                    // of one operand

  Region block(int64_t tile, int64_t index) const;
  // One past a piece's last block. If rows are joined, the remainder goes to the last piece, which has room: joined rows are
  // short, and their pieces have several blocks.
  int64_t end(int64_t piece) const { return piece + 1 < pieces ? (piece + 1) * piece_blocks : blocks; }
  int64_t row_samples() const { return row_samples_; }  // rows of the tensor in one of the cut
  bool in_chunks() const { return chunks_ > 1; }        // a block is a part of one row

 private:
  void cut_planes(const Shape& shape);
  void cut_positions(const Shape& shape, bool sums);
  void even_out();

  int64_t channels_, rows_, row_samples_, rest_;
  int64_t block_rows_, chunks_, chunk_;
};

}  // namespace batchnorm

// The passes over a tensor: blocks to the inner loops, partial results merged in an order that the shape alone fixes.
#include "batch_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

namespace batchnorm {
namespace {

constexpr int64_t least_parallel = 32768;     // values: less is not worth waking a thread
constexpr int64_t cached_bytes = 4 << 20;     // a tile of all operands that stays in some cache between two passes
constexpr int64_t streamed_bytes = 4 << 20;   // an output this large would only push others out of the caches
constexpr int64_t streamed_row = 4 << 10;     // bytes of a row that make up for its two ends, which share lines
constexpr int64_t fewest_tiles = 8;           // with fewer, threads share pieces rather than tiles

// One piece's, or one tile's, results: two numbers a channel, over `count` values each.
struct Partial {
  double& count;
  double* first;
  double* second;
};

// Partials of every piece of every tile.
class Partials {
 public:
  Partials(const Cut& cut, int64_t channels)
      : cut_(cut), channels_(channels), counts_(cut.tiles * cut.pieces), values_(2 * cut.pieces * channels) {}  // zero: nothing was counted

  Partial at(int64_t tile, int64_t piece) {
    double* first = values_.data() + 2 * piece * channels_ + tile * cut_.tile_channels;
    return {counts_[tile * cut_.pieces + piece], first, first + channels_};
  }

 private:
  const Cut& cut_;
  int64_t channels_;
  std::vector<double> counts_, values_;
};

// (mean, m2) of the union of two disjoint sets (Chan et al. 1979). The counts are the same in every channel.
void merge_moments(Partial into, Partial other, int64_t channels) {
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

// The constants of every channel, each kind readable for a line past its end.
template <class A>
class ChannelConstants {
 public:
  enum Kind { high, low, scale, beta, mean_dz, slope_dz, kinds };

  explicit ChannelConstants(int64_t channels) : stride_(channels + line_bytes), values_(kinds * stride_) {}
  A* of(Kind kind) { return values_.data() + kind * stride_; }
  const A* of(Kind kind) const { return values_.data() + kind * stride_; }

 private:
  int64_t stride_;
  std::vector<A> values_;
};

void merge_sums(Partial into, Partial other, int64_t channels) {
  into.count += other.count;
  for (int64_t c = 0; c < channels; ++c) {
    into.first[c] += other.first[c];
    into.second[c] += other.second[c];
  }
}

template <class A>
class Runner {
 public:
  Runner(const Problem& problem, bool sums)
      : p_(problem),
        cut_(problem.shape, value_bytes(problem.type), sums),
        kernels_(kernels<A>(problem.type)),
        kind_(kind(problem)),
        stream_(streams()) {}

  int64_t count() const {
    const int64_t samples = p_.shape.batch * p_.shape.space;
    return p_.mask ? std::count(p_.mask, p_.mask + samples, true) : samples;
  }

  void measure(double* mean, double* m2) { forward(mean, m2, /*eps=*/0, nullptr); }

  // Then normalizes, unless there is no rstd to fill.
  void forward(double* mean, double* m2, double eps, double* rstd) {
    const double n = static_cast<double>(std::max<int64_t>(count_, 1));
    passes(
        merge_moments, [this](int64_t tile, int64_t piece, Partial out) { measure_piece(tile, piece, out); },
        [=, this](int64_t channel, int64_t channels, Partial total) {
          std::copy_n(total.first, channels, mean + channel);
          std::copy_n(total.second, channels, m2 + channel);
          if (!rstd) return;
          for (int64_t c = channel; c < channel + channels; ++c) rstd[c] = 1 / std::sqrt(m2[c] / n + eps);
          set_affine(channel, channels, mean, rstd);
        },
        /*then_map=*/rstd != nullptr, /*operands=*/p_.residual.data ? 2 : 1,
        [=, this](int64_t tile, int64_t piece) { each_strip_of(tile, piece, kernels_.normalize[!cut_.planes][kind_]); });
  }

  void normalize(const double* mean, const double* rstd) {
    set_affine(0, p_.shape.channels, mean, rstd);
    each_strip([this](const Strip<A>& s) { kernels_.normalize[!cut_.planes][kind_](s); });
  }

  void backward(const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat, bool then_apply) {
    const double n = static_cast<double>(std::max<int64_t>(count_, 1));
    set_affine(0, p_.shape.channels, mean, rstd);
    passes(
        merge_sums, [this](int64_t tile, int64_t piece, Partial out) { reduce_piece(tile, piece, out); },
        [=, this](int64_t channel, int64_t channels, Partial total) {
          for (int64_t i = 0, c = channel; i < channels; ++i, ++c) {
            sum_dz[c] = total.first[i];
            sum_dz_xhat[c] = total.second[i] * rstd[c];
            set_through_mean(c, sum_dz[c] / n, sum_dz_xhat[c] / n * rstd[c]);
          }
        },
        then_apply, /*operands=*/2 + (p_.residual.data || p_.y.data),
        [this](int64_t tile, int64_t piece) { each_strip_of(tile, piece, kernels_.apply[!cut_.planes][kind_]); });
  }

  void apply(const double* mean, const double* rstd, const double* mean_dz, const double* mean_dz_xhat) {
    set_affine(0, p_.shape.channels, mean, rstd);
    for (int64_t c = 0; c < p_.shape.channels; ++c)
      set_through_mean(c, mean_dz ? mean_dz[c] : 0, mean_dz_xhat ? mean_dz_xhat[c] * rstd[c] : 0);
    each_strip([this](const Strip<A>& s) { kernels_.apply[!cut_.planes][kind_](s); });
  }

 private:
  using Channels = ChannelConstants<A>;
  static int64_t value_bytes(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

  // Which loops serve: see Kernels. A saved y is not the y that normalize writes, and counts only beside dy.
  static int kind(const Problem& p) {
    const bool more = p.mask || p.residual.data || p.dresidual.data || (p.dy.data && p.y.data);
    if (more) return 2;
    return p.activation == Activation::none ? 0 : p.activation == Activation::relu ? 1 : 2;
  }

  bool streams() const {
    const int64_t bytes = value_bytes(p_.type), row = cut_.block(0, 0).width * bytes;
    return p_.shape.values() * bytes >= streamed_bytes && (row % line_bytes == 0 || row >= streamed_row);
  }

  // ---- sharing out -------------------------------------------------------------------------------------------------

  template <class F>
  void share(int64_t tasks, int64_t values_a_task, const F& f) const {
    const int64_t grain = std::max<int64_t>(1, least_parallel / std::max<int64_t>(values_a_task, 1));
    if (tasks > 0) torch::stable::parallel_for(0, tasks, grain, f);
  }

  // Every strip with its constants, in the order of memory: for what needs no sums first.
  template <class F>
  void each_strip(const F& f) const {
    if (!cut_.planes) {
      share(cut_.tiles * cut_.blocks, cut_.piece_values / cut_.piece_blocks, [&](int64_t begin, int64_t end) {
        alignas(line_bytes) A scratch[Channels::kinds * max_width];
        for (int64_t i = begin; i < end;) {
          const int64_t tile = i / cut_.blocks, first = i % cut_.blocks, last = std::min(first + end - i, cut_.blocks);
          const Constants<A> constants = constants_of(cut_.block(tile, 0), scratch);
          for (int64_t b = first; b < last; ++b) f(strip_of(cut_.block(tile, b), constants));
          i += last - first;
        }
      });
      return;
    }
    const int64_t space = p_.shape.space, channels = p_.shape.channels;
    const int64_t together = std::clamp<int64_t>(least_parallel / space, 1, channels);  // planes of one batch item
    const int64_t groups = (channels + together - 1) / together;
    share(p_.shape.batch * groups, together * space, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = i % groups * together;
        const Region region{.row = i / groups, .rows = 1, .column = 0, .width = space, .channel = channel,
                            .channels = std::min(together, channels - channel), .repeats = 1};
        Strip<A> s = strip(region, /*across_channels=*/true);
        s.constants = constants_of(region, nullptr);
        s.constants.step = 1;
        f(s);
      }
    });
  }

  // The last pieces first: they are what a pass before has left in the caches.
  template <class F>
  void each_piece(const F& f) const {
    share(cut_.tiles * cut_.pieces, cut_.piece_values, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) f(i / cut_.pieces, i % cut_.pieces);
    });
  }

  // Reduces every tile, piece by piece, and then maps it, at once where a tile stays in cache between the two. Either way
  // a tile's pieces are merged in the same order.
  template <class Merge, class Reduce, class Finish, class Map>
  void passes(Merge merge, const Reduce& reduce, const Finish& finish, bool then_map, int64_t operands, const Map& map) {
    Partials partials(cut_, p_.shape.channels);
    const auto merge_tile = [&](int64_t tile) {
      const int64_t channel = tile * cut_.tile_channels;
      const int64_t channels = std::min(cut_.tile_channels, p_.shape.channels - channel);
      for (int64_t piece = 1; piece < cut_.pieces; ++piece)
        merge(partials.at(tile, 0), partials.at(tile, piece), channels);
      if (cut_.pieces > 0) finish(channel, channels, partials.at(tile, 0));
    };

    const bool resident = cut_.tiles >= fewest_tiles && cut_.tile_bytes * operands <= cached_bytes;
    if (resident || p_.shape.values() < 2 * least_parallel) {
      share(cut_.tiles, cut_.piece_values * cut_.pieces, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          for (int64_t piece = 0; piece < cut_.pieces; ++piece) reduce(tile, piece, partials.at(tile, piece));
          merge_tile(tile);
          for (int64_t piece = cut_.pieces - 1; then_map && piece >= 0; --piece) map(tile, piece);
        }
      });
      return;
    }
    share(cut_.tiles * cut_.pieces, cut_.piece_values, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i / cut_.pieces, piece = i % cut_.pieces;
        reduce(tile, piece, partials.at(tile, piece));
      }
    });
    share(cut_.tiles, cut_.pieces * cut_.tile_channels, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) merge_tile(tile);
    });
    if (then_map) each_piece(map);
  }

  // ---- between channels and positions ------------------------------------------------------------------------------

  // f(channel of the tile, first position, positions) for each run of positions that belong to one channel.
  template <class F>
  void runs(const Region& region, F f) const {
    const int64_t space = cut_.space;
    int64_t position = 0;
    for (int64_t k = 0; k < region.repeats; ++k)
      for (int64_t c = 0; c < region.channels; ++c, position += space) f(c, position, position + space);
  }

  void collapse(const Region& region, const A* positions, double* channels) const {
    if (cut_.planes) {
      channels[0] = static_cast<double>(positions[0]);
      return;
    }
    std::fill_n(channels, region.channels, 0.0);
    if (cut_.space == 1) {
      for (int64_t k = 0; k < region.repeats; ++k, positions += region.channels)
        for (int64_t c = 0; c < region.channels; ++c) channels[c] += static_cast<double>(positions[c]);
      return;
    }
    runs(region, [&](int64_t c, int64_t begin, int64_t end) {
      double sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += static_cast<double>(positions[i]);
      channels[c] += sum;
    });
  }

  // A line past the width is filled too: the loops read whole lines of constants.
  template <class V>
  void spread(const Region& region, const V* channels, A* positions) const {
    if (cut_.planes) {
      positions[0] = static_cast<A>(channels[0]);
      return;
    }
    if (cut_.space == 1)
      for (int64_t k = 0; k < region.repeats; ++k)
        std::transform(channels, channels + region.channels, positions + k * region.channels,
                       [](V v) { return static_cast<A>(v); });
    else
      runs(region, [&](int64_t c, int64_t begin, int64_t end) {
        std::fill(positions + begin, positions + end, static_cast<A>(channels[c]));
      });
    std::fill(positions + region.width, positions + std::min(max_width, region.width + line_bytes), A{0});
  }

  // Where a position is a channel, and in planes, the channels' own; else spread into `scratch`, max_width for each kind.
  Constants<A> constants_of(const Region& region, A* scratch) const {
    const bool own = cut_.planes || (cut_.space == 1 && region.repeats == 1);
    const int needed = p_.dy.data ? Channels::kinds : Channels::mean_dz;  // the last two are backward's
    const A* of[Channels::kinds] = {};
    for (int kind = 0; kind < needed; ++kind) {
      const A* channels = constants_.of(static_cast<typename Channels::Kind>(kind)) + region.channel;
      if (!own) spread(region, channels, scratch + kind * max_width);
      of[kind] = own ? channels : scratch + kind * max_width;
    }
    return {of[Channels::high], of[Channels::low], of[Channels::scale], of[Channels::beta], of[Channels::mean_dz],
            of[Channels::slope_dz]};
  }

  void set_affine(int64_t first, int64_t channels, const double* mean, const double* rstd) {
    for (int64_t c = first; c < first + channels; ++c) {
      const A high = static_cast<A>(mean[c]);
      constants_.of(Channels::high)[c] = high;
      constants_.of(Channels::low)[c] = static_cast<A>(mean[c] - static_cast<double>(high));
      constants_.of(Channels::scale)[c] = static_cast<A>((p_.weight.empty() ? 1 : p_.weight[c]) * rstd[c]);
      constants_.of(Channels::beta)[c] = static_cast<A>(p_.bias.empty() ? 0 : p_.bias[c]);
    }
  }

  void set_through_mean(int64_t channel, double mean_dz, double slope_dz) {
    constants_.of(Channels::mean_dz)[channel] = static_cast<A>(mean_dz);
    constants_.of(Channels::slope_dz)[channel] = static_cast<A>(slope_dz);
  }

  // ---- blocks ------------------------------------------------------------------------------------------------------

  Rows rows(const Operand& operand, const Region& region, bool across_channels) const {
    if (!operand.data) return {};
    // Where rows are joined, one row of the cut is several of the operand's.
    const int64_t row_stride = operand.row_stride * cut_.row_samples();
    const int64_t offset = region.row * row_stride + region.channel * operand.channel_stride + region.column;
    return {operand.data + offset * value_bytes(p_.type), across_channels ? operand.channel_stride : row_stride};
  }

  // A region's rows, or the planes of its channels as rows.
  Strip<A> strip(const Region& region, bool across_channels = false) const {
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
    return s;
  }

  Strip<A> strip_of(const Region& region, const Constants<A>& constants) const {
    Strip<A> s = strip(region);
    s.constants = constants;
    return s;
  }

  double count(const Region& region, const Strip<A>& strip) const {
    if (!p_.mask) return static_cast<double>(region.rows * (cut_.planes ? region.width : region.repeats * cut_.space));
    int64_t present = 0;
    for (int64_t r = 0; r < strip.rows; ++r) {
      const bool* row = strip.mask.data + r * strip.mask.row_stride;
      present += std::count(row, row + (cut_.planes ? region.width : 1), true);
    }
    return static_cast<double>(present);
  }

  void measure_piece(int64_t tile, int64_t piece, Partial out) const {
    each_block(tile, piece, [&](const Region& region) { measure_block(region, out); });
  }

  // Deviations from an estimate of the mean: their own mean then corrects it. A good estimate loses nothing to that
  // correction, and a sample mostly gives one; where it did not, the block is still in cache to be measured again.
  void measure_block(const Region& region, Partial out) const {
    alignas(line_bytes) A shift[max_width], sums[max_width], squares[max_width];
    double mean[max_width], correction[max_width], m2[max_width];
    const Strip<A> s = strip(region);
    const double n = count(region, s);
    if (n == 0) return;

    const Strip<A> sample = sample_of(s);
    const double sampled = p_.mask ? n : n * static_cast<double>(sample.rows * sample.width) /
                                             static_cast<double>(s.rows * s.width);
    kernels_.sum[!cut_.planes](sample, sums);
    collapse(region, sums, mean);
    for (int64_t c = 0; c < region.channels; ++c) mean[c] /= sampled;

    for (bool again = false;; again = true) {
      for (int64_t c = 0; c < region.channels; ++c)
        mean[c] = std::isfinite(mean[c]) ? static_cast<double>(static_cast<A>(mean[c])) : 0;
      spread(region, mean, shift);
      kernels_.moments[!cut_.planes](s, shift, sums, squares);
      collapse(region, sums, correction);
      collapse(region, squares, m2);
      bool good = true;
      for (int64_t c = 0; c < region.channels; ++c) {
        const double lost = correction[c] * correction[c] / n;
        good &= !(lost > m2[c] / 2);
        m2[c] = m2[c] - lost < 0 ? 0 : m2[c] - lost;  // NaN stays
        mean[c] += correction[c] / n;
      }
      if (good || again) break;
    }
    double counted = n;
    merge_moments(out, Partial{counted, mean, m2}, region.channels);
  }

  // An eighth of a strip, from all over it; its own rows and width say how many values. All of a masked one.
  Strip<A> sample_of(Strip<A> s) const {
    constexpr int64_t part = 8, width = line_bytes / sizeof(float);
    if (p_.mask) return s;
    if (s.rows >= part) {
      s.rows /= part;
      s.x.stride *= part;
    } else if (cut_.planes && s.width >= part * width) {  // lines of its first row
      s.rows = s.width / (part * width);
      s.width = width;
      s.x.stride = part * width;
    }
    return s;
  }

  void reduce_piece(int64_t tile, int64_t piece, Partial out) const {
    alignas(line_bytes) A scratch[Channels::kinds * max_width];
    const Constants<A> constants = constants_of(cut_.block(tile, 0), scratch);
    each_block(tile, piece, [&](const Region& region) {
      alignas(line_bytes) A sums[max_width], products[max_width];
      double sum_dz[max_width], sum_centred[max_width], no_count = 0;
      Strip<A> s = strip(region);
      s.constants = constants;
      kernels_.reduce[!cut_.planes][kind_](s, sums, products);
      collapse(region, sums, sum_dz);
      collapse(region, products, sum_centred);
      merge_sums(out, Partial{no_count, sum_dz, sum_centred}, region.channels);
    });
  }

  // The last blocks first, as the last pieces. The constants serve all blocks, also the shorter one that joined rows leave
  // at the end: its positions are the first of theirs.
  template <class F>
  void each_strip_of(int64_t tile, int64_t piece, const F& f) const {
    alignas(line_bytes) A scratch[Channels::kinds * max_width];
    const Constants<A> constants = constants_of(cut_.block(tile, 0), scratch);
    const int64_t first = piece * cut_.piece_blocks, last = std::min(first + cut_.piece_blocks, cut_.blocks);
    for (int64_t b = last - 1; b >= first; --b) f(strip_of(cut_.block(tile, b), constants));
  }

  template <class F>
  void each_block(int64_t tile, int64_t piece, F f) const {
    const int64_t first = piece * cut_.piece_blocks, last = std::min(first + cut_.piece_blocks, cut_.blocks);
    for (int64_t b = first; b < last; ++b) f(cut_.block(tile, b));
  }
  const Problem& p_;
  const Cut cut_;
  const Kernels<A>& kernels_;
  const int kind_;
  const bool stream_;
  const int64_t count_ = count();
  Channels constants_{p_.shape.channels};
};

template <class F>
void run(const Problem& problem, bool sums, F f) {
  if (problem.type == Type::float64) f(Runner<double>(problem, sums));
  else f(Runner<float>(problem, sums));
}

}  // namespace

void measure(const Problem& problem, int64_t& count, double* mean, double* m2) {
  run(problem, /*sums=*/true, [&](auto runner) {
    count = runner.count();
    runner.measure(mean, m2);
  });
}

void normalize(const Problem& problem, const double* mean, const double* rstd) {
  run(problem, /*sums=*/false, [&](auto runner) { runner.normalize(mean, rstd); });
}

void forward(const Problem& problem, double eps, double* mean, double* m2, double* rstd) {
  run(problem, /*sums=*/true, [&](auto runner) { runner.forward(mean, m2, eps, rstd); });
}

void reduce(const Problem& problem, const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat) {
  run(problem, /*sums=*/true, [&](auto runner) { runner.backward(mean, rstd, sum_dz, sum_dz_xhat, /*then_apply=*/false); });
}

void apply(const Problem& problem, const double* mean, const double* rstd, const double* mean_dz,
           const double* mean_dz_xhat) {
  run(problem, /*sums=*/false, [&](auto runner) { runner.apply(mean, rstd, mean_dz, mean_dz_xhat); });
}

void backward(const Problem& problem, const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat) {
  const bool wanted = problem.dx.data || problem.dresidual.data;
  run(problem, /*sums=*/true, [&](auto runner) { runner.backward(mean, rstd, sum_dz, sum_dz_xhat, wanted); });
}

}  // namespace batchnorm

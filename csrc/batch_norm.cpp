// The passes over a tensor: blocks to the inner loops, partial results merged in an order that the shape alone fixes.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>

#include "constants.h"
#include "parallel.h"
#include "partials.h"
#include "positions.h"
#include "strips.h"

namespace batchnorm {
namespace {

constexpr int64_t least_parallel = 32768;   // values: fewer are not worth waking a thread
constexpr int64_t far_bytes = 4 << 20;      // a tile of all operands up to this size is cache-resident between two passes
constexpr int64_t near_bytes = 1 << 20;     // tiles up to this size stay in a core's own cache
constexpr int64_t fewest_tiles = 8;         // with fewer, threads share pieces rather than tiles
constexpr int64_t sampled_blocks = 4;       // of a piece, for a first estimate of its mean

// f(begin, end) over the tasks, on as many threads as are worth it.
template <class F>
void share(int64_t tasks, int64_t values_a_task, const F& f) {
  const int64_t grain = std::max<int64_t>(1, least_parallel / std::max<int64_t>(values_a_task, 1));
  if (tasks > grain) parallel_for(tasks, grain, f);
  else if (tasks > 0) f(0, tasks);
}

// Which loops serve. A saved y is not the y that normalize writes, and counts only beside dy.
Kind kind_of(const Problem& p) {
  const Activation act = p.activation;
  const bool none = act == Activation::none, relu = act == Activation::relu, backward = p.dy.data;
  if (p.mask || (backward && !p.dx.data && p.dresidual.data)) return general;
  const bool alone = !p.residual.data && !(backward && (p.y.data || p.dresidual.data));
  if (alone) return none ? plain : relu ? rectified : act == Activation::relu6 ? clipped : general;
  return (backward ? relu && p.y.data : none || relu) ? joined : general;
}

// An estimate of the mean with only a few more bits than the values have. With many more bits, a subtraction would round all
// values alike, and these errors would add up. With no more bits, the squares would round alike.
int estimate_bits(Type type) {
  return type == Type::float64 ? 53 : type == Type::float32 ? 24 : type == Type::float16 ? 17 : 14;
}

// Rounds to this number of bits (Veltkamp).
double rounded(double value, int bits) {
  const double large = value * (static_cast<double>(int64_t{1} << (53 - bits)) + 1);
  return bits == 53 ? value : large - (large - value);
}

template <class A>
class Runner {
 public:
  explicit Runner(const Problem& problem)
      : p_(problem),
        cut_(problem.shape, value_bytes(problem.type), /*sums=*/true),
        map_cut_(problem.shape, value_bytes(problem.type), /*sums=*/false),
        kernels_(kernels<A>(problem.type)),
        kind_(kind_of(problem)) {}

  int64_t count() const {
    const int64_t samples = p_.shape.batch * p_.shape.space;
    return p_.mask ? count_set(p_.mask, samples) : samples;
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
          constants_.set_affine(channel, channels, mean, rstd);
        },
        /*then_map=*/rstd != nullptr, /*operands=*/p_.residual.data ? 2 : 1,
        kernels_.normalize[!map_cut_.planes][kind_]);
  }

  void normalize(const double* mean, const double* rstd) {
    constants_.set_affine(0, p_.shape.channels, mean, rstd);
    each_strip(kernels_.normalize[!map_cut_.planes][kind_]);
  }

  void backward(const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat, bool then_apply) {
    const double n = static_cast<double>(std::max<int64_t>(count_, 1));
    constants_.set_affine(0, p_.shape.channels, mean, rstd);
    passes(
        merge_sums, [this](int64_t tile, int64_t piece, Partial out) { reduce_piece(tile, piece, out); },
        [=, this](int64_t channel, int64_t channels, Partial total) {
          for (int64_t i = 0, c = channel; i < channels; ++i, ++c) {
            sum_dz[c] = total.first[i];
            sum_dz_xhat[c] = (total.second[i] - constants_.low(c, mean) * total.first[i]) * rstd[c];
            constants_.set_through_mean(c, mean, sum_dz[c] / n, sum_dz_xhat[c] / n * rstd[c]);
          }
        },
        then_apply, /*operands=*/2 + (p_.residual.data || p_.y.data),
        kernels_.apply[!map_cut_.planes][kind_]);
  }

  void apply(const double* mean, const double* rstd, const double* mean_dz, const double* mean_dz_xhat) {
    constants_.set_affine(0, p_.shape.channels, mean, rstd);
    for (int64_t c = 0; c < p_.shape.channels; ++c)
      constants_.set_through_mean(c, mean, mean_dz ? mean_dz[c] : 0, mean_dz_xhat ? mean_dz_xhat[c] * rstd[c] : 0);
    each_strip(kernels_.apply[!map_cut_.planes][kind_]);
  }

 private:
  using Channels = ChannelConstants<A>;

  // ---- sharing out -------------------------------------------------------------------------------------------------

  // The kinds of constants that normalize needs, and apply.
  int map_needs() const { return p_.dy.data ? Channels::kinds : Channels::mean_dz; }

  // Every strip with its constants, in reverse memory order: the end is what an earlier pass has left in the caches.
  template <class F>
  void each_strip(const F& f) const {
    if (!map_cut_.planes) {
      const int64_t blocks = map_cut_.blocks;
      share(map_cut_.tiles * blocks, map_cut_.piece_values / map_cut_.piece_blocks, [&](int64_t begin, int64_t end) {
        while (end > begin) {
          const int64_t tile = (end - 1) / blocks, first = std::max(begin, tile * blocks);
          each_strip_of(tile, first - tile * blocks, end - tile * blocks, f);
          end = first;
        }
      });
      return;
    }
    const int64_t space = p_.shape.space, channels = p_.shape.channels;
    const int64_t together = std::clamp<int64_t>(least_parallel / space, 1, channels);  // planes of one batch item
    const int64_t groups = (channels + together - 1) / together;
    share(p_.shape.batch * groups, together * space, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t channel = i % groups * together;
        f(planes_of(i / groups, channel, std::min(together, channels - channel)));
      }
    });
  }

  // Blocks of one tile. The same constants serve all blocks, including the shorter last block of joined rows, whose positions
  // are the first positions of the others.
  template <class F>
  void each_strip_of(int64_t tile, int64_t first, int64_t last, const F& f) const {
    typename Channels::Scratch scratch;
    const Constants<A> constants = constants_.of(map_cut_, map_cut_.block(tile, 0), scratch, map_needs());
    for (int64_t b = last - 1; b >= first; --b) f(map_strips_.of(map_cut_.block(tile, b), constants));
  }

  // Planes of one batch item, which lie together.
  Strip<A> planes_of(int64_t item, int64_t channel, int64_t channels) const {
    typename Channels::Scratch unused;
    const Region region{.row = item, .rows = 1, .column = 0, .width = p_.shape.space, .channel = channel,
                        .channels = channels, .repeats = 1};
    Strip<A> s = map_strips_.of(region, /*across_channels=*/true);
    s.constants = constants_.of(map_cut_, region, unused, map_needs());
    s.constants.step = 1;
    return s;
  }

  // Reduces every tile, piece by piece, and then maps it. If everything is cache-resident, all tiles are reduced before any is
  // mapped, because reading memory in order is fastest; else a few tiles at a time, if those are. Either way a tile's pieces
  // are merged in the same order.
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

    if (!cached(p_) && cut_.tiles >= fewest_tiles && cut_.tile_bytes * operands <= far_bytes) {
      const int64_t together = std::max<int64_t>(1, near_bytes / (cut_.tile_bytes * operands));
      share(cut_.tiles, cut_.piece_values * cut_.pieces, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += together) {
          const int64_t last = std::min(first + together, end);
          for (int64_t tile = first; tile < last; ++tile) {
            for (int64_t piece = 0; piece < cut_.pieces; ++piece) reduce(tile, piece, partials.at(tile, piece));
            merge_tile(tile);
          }
          if (then_map) map_tiles(first, last, map);
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
    if (then_map) each_strip(map);
  }

  // The same for some of the tiles.
  template <class F>
  void map_tiles(int64_t first, int64_t last, const F& f) const {
    if (map_cut_.planes) {
      const int64_t channel = first * cut_.tile_channels;
      const int64_t channels = std::min((last - first) * cut_.tile_channels, p_.shape.channels - channel);
      for (int64_t item = p_.shape.batch - 1; item >= 0; --item) f(planes_of(item, channel, channels));
      return;
    }
    for (int64_t tile = last - 1; tile >= first; --tile) each_strip_of(tile, 0, map_cut_.blocks, f);
  }

  // ---- a piece -----------------------------------------------------------------------------------------------------

  // Deviations from an estimate of the mean: their own mean then corrects it. A good estimate loses nothing to that
  // correction, and a sample mostly gives one; where it did not, the piece is measured again from the better one.
  void measure_piece(int64_t tile, int64_t piece, Partial out) const {
    // At different offsets in a page, so that they do not compete for the same cache sets.
    constexpr int64_t width = Channels::scratch_stride;
    alignas(line_bytes) A shift[width], first[width], second[width];
    const Region widest = cut_.block(tile, 0);
    double *mean = out.first, *m2 = out.second, n = 0;

    PositionSums<A> sampled(cut_, widest);
    const int64_t every = std::max<int64_t>(1, cut_.piece_blocks / sampled_blocks);
    int64_t block = 0;
    each_block(tile, piece, [&](const Region& region) {
      if (block++ % every != 0) return;
      const Strip<A> sample = strips_.sample(strips_.of(region));
      kernels_.sum[!cut_.planes](sample, first);
      sampled.add(region, first);
      n += strips_.count(region, sample);
    });
    sampled.collapse(mean);
    for (int64_t c = 0; c < widest.channels; ++c) mean[c] *= 1 / n;

    for (bool again = false;; again = true) {
      for (int64_t c = 0; c < widest.channels; ++c)
        mean[c] = std::isfinite(mean[c]) ? rounded(mean[c], estimate_bits(p_.type)) : 0;
      spread(cut_, widest, mean, shift);
      PositionSums<A> sums(cut_, widest), squares(cut_, widest);
      out.count = 0;
      each_block(tile, piece, [&](const Region& region) {
        const Strip<A> s = strips_.of(region);
        kernels_.moments[!cut_.planes][p_.mask != nullptr](s, shift, first, second);
        sums.add(region, first);
        squares.add(region, second);
        out.count += strips_.count(region, s);
      });
      if (out.count == 0) return;
      double correction[max_width];
      sums.collapse(correction);
      squares.collapse(m2);
      const double share = 1 / out.count;
      bool good = true;
      for (int64_t c = 0; c < widest.channels; ++c) {
        const double lost = correction[c] * correction[c] * share;
        good &= !(lost > m2[c] * 0.75);
        m2[c] = m2[c] - lost < 0 ? 0 : m2[c] - lost;  // NaN stays
        mean[c] += correction[c] * share;
      }
      if (good || again) return;
    }
  }

  void reduce_piece(int64_t tile, int64_t piece, Partial out) const {
    constexpr int64_t width = Channels::scratch_stride;
    alignas(line_bytes) A first[width], second[width];
    typename Channels::Scratch scratch;
    const Region widest = cut_.block(tile, 0);
    const Constants<A> constants = constants_.of(cut_, widest, scratch, kind_ == plain ? Channels::scale : Channels::mean_dz);
    PositionSums<A> sums(cut_, widest), products(cut_, widest);
    each_block(tile, piece, [&](const Region& region) {
      kernels_.reduce[!cut_.planes][kind_](strips_.of(region, constants), first, second);
      sums.add(region, first);
      products.add(region, second);
    });
    sums.collapse(out.first);
    products.collapse(out.second);
  }

  template <class F>
  void each_block(int64_t tile, int64_t piece, F f) const {
    for (int64_t b = piece * cut_.piece_blocks; b < cut_.end(piece); ++b) f(cut_.block(tile, b));
  }

  const Problem& p_;
  const Cut cut_, map_cut_;
  const Kernels<A>& kernels_;
  const Kind kind_;
  const Strips<A> strips_{p_, cut_}, map_strips_{p_, map_cut_};
  const int64_t count_ = count();
  Channels constants_{p_};
};

template <class F>
void run(const Problem& problem, F f) {
  if (problem.type == Type::float64) {
    Runner<double> runner(problem);
    f(runner);
  } else {
    Runner<float> runner(problem);
    f(runner);
  }
}

}  // namespace

void measure(const Problem& problem, int64_t& count, double* mean, double* m2) {
  run(problem, [&](auto& runner) {
    count = runner.count();
    runner.measure(mean, m2);
  });
}

void normalize(const Problem& problem, const double* mean, const double* rstd) {
  run(problem, [&](auto& runner) { runner.normalize(mean, rstd); });
}

void forward(const Problem& problem, double eps, double* mean, double* m2, double* rstd) {
  run(problem, [&](auto& runner) { runner.forward(mean, m2, eps, rstd); });
}

void reduce(const Problem& problem, const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat) {
  run(problem, [&](auto& runner) { runner.backward(mean, rstd, sum_dz, sum_dz_xhat, /*then_apply=*/false); });
}

void apply(const Problem& problem, const double* mean, const double* rstd, const double* mean_dz,
           const double* mean_dz_xhat) {
  run(problem, [&](auto& runner) { runner.apply(mean, rstd, mean_dz, mean_dz_xhat); });
}

void backward(const Problem& problem, const double* mean, const double* rstd, double* sum_dz, double* sum_dz_xhat) {
  const bool wanted = problem.dx.data || problem.dresidual.data;
  run(problem, [&](auto& runner) { runner.backward(mean, rstd, sum_dz, sum_dz_xhat, wanted); });
}

}  // namespace batchnorm

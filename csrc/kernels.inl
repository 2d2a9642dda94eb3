// The five loops over a strip. Included once per instruction set, after formats.inl and activations.inl.

template <class F>
INLINE const typename F::Stored* row_in(const Rows& rows, int64_t r) {
  return static_cast<const typename F::Stored*>(rows.data) + r * rows.stride;
}
template <class F>
INLINE typename F::Stored* row_out(const Rows& rows, int64_t r) {
  return static_cast<typename F::Stored*>(rows.data) + r * rows.stride;
}

// Calls each(i, amount) for the lines of a row, the first whole one at `head`; of two whole ones, one is the second. Where rows
// are adjacent, what is before the head was in the last line of the row before it, if it `follows` one; and if it is `followed`
// by one, they share a line.
template <class A, bool in_twos, class Each>
INLINE void lines(int64_t width, int64_t head, bool follows, bool followed, Each each) {
  constexpr int64_t lanes = Pack<A>::lanes;
  if (width < lanes) {
    each(0, Part{width});
    return;
  }
  for (int64_t i = follows ? head : 0;;) {
    if (i == head) {
      if constexpr (in_twos)
        for (; i + 2 * lanes <= width; i += 2 * lanes) each(i, First{}), each(i + lanes, Second{});
      for (; i + lanes <= width; i += lanes) each(i, Whole{});
    }
    if (i == width) break;
    if (followed && i >= head) {
      each(i, Joint{{}, width - i});
      break;
    }
    const int64_t begin = i < head ? 0 : width - lanes;
    each(begin, Edge{i - begin});
    i = i < head ? head : width;
  }
}

// Sums per position take this many rows at a time, so that a position's constants and sums are loaded once for them.
constexpr int64_t row_group = 4;

// Calls each(i, amount, row) so, for one value at a time where the constants are shared.
template <class A, bool shared, class Each>
INLINE void rows_of_lines(const Strip<A>& strip, Each each) {
  constexpr int64_t group = shared ? 1 : row_group;
  for (int64_t r = 0; r < strip.rows; r += group) {
    const int64_t end = shared || strip.rows - r >= group ? r + group : strip.rows;
    lines<A, shared>(strip.width, /*head=*/0, /*follows=*/false, /*followed=*/false,
                     [&](int64_t i, auto amount) __attribute__((always_inline)) { each(r, end, i, amount); });
  }
}

// Prefetches into the second-level cache what will be read soon: 3 KiB ahead in this row and the next, or, if several rows are
// taken together, the next rows. The hardware prefetcher stops at the end of every page and row, and in the first-level cache
// rows that are a page apart would evict each other.
template <class F, bool shared, class Amount>
INLINE void prefetch(const Rows& rows, int64_t r, int64_t i, int64_t width, Amount) {
  constexpr int64_t bytes = sizeof(typename F::Stored), two = 2 * Pack<typename F::Compute>::lanes;
  const auto* row = row_in<F>(rows, r);
  if constexpr (!shared) {
    const int64_t groups = width * bytes < 2048 ? 2 : 1;
    __builtin_prefetch(row + groups * row_group * rows.stride + i, 0, 2);
  } else if constexpr (__is_same(Amount, First)) {
    const int64_t j = i + (width * bytes < 3072 ? width : 3072 / bytes);
    const auto* ahead = row + (j < width ? j : j - width + rows.stride);
    __builtin_prefetch(ahead, 0, 2);
    if constexpr (two * bytes > line_bytes) __builtin_prefetch(ahead + two / 2, 0, 2);
  }
}

// A constant of the channel: one for the row, and one for what a line holds of the next; or one a position (then readable for
// a line at least).
template <class A, bool shared>
struct Constant {
  const A* values;
  Pack<A> fixed;
  INLINE explicit Constant(const A* values) : values(values), fixed(splat(values[0])) {}
  template <class Amount>
  INLINE Pack<A> operator()(int64_t i, Amount amount) const {
    if constexpr (!shared) return Plain<A>::load(values + i);
    else if constexpr (__is_same(Amount, Joint)) return select(lanes_from<A>(amount.count), splat(values[1]), fixed);
    else return fixed;
  }
};

// Number of lines after which a new partial sum begins; partial sums are then added. In one long sum, values of few bits
// (x - shift for large x, and its square) would be rounded alike again and again, and these errors add up.
constexpr int64_t folded_lines = 16;

// A sum over the strip: in the lanes of two lines, so that an addition waits less for the one before, added up at the end; or
// one sum per position.
template <class A, bool shared>
struct Accumulator {
  A* out;
  Pack<A> first = splat<A>(0), second = first, folded = first;
  INLINE Pack<A>& lanes(Second) { return second; }
  template <class Amount>
  INLINE Pack<A>& lanes(Amount) {
    return first;
  }
  INLINE Accumulator(A* out, int64_t width) : out(out) {
    if constexpr (!shared)
      for (int64_t i = 0; i < width; i += Pack<A>::lanes) store<Plain<A>>(out + i, first);
  }
  // To be continued and put back; one a position, a few rows' sum begins at 0 and is added.
  template <class Amount>
  INLINE Pack<A> at(int64_t i, Amount amount) {
    if constexpr (shared) {
      constexpr int64_t two = 2 * Pack<A>::lanes;
      if (i % (folded_lines / 2 * two) < two) {
        folded = folded + lanes(amount);
        return splat<A>(0);
      }
      return lanes(amount);
    }
    return splat<A>(0);
  }
  template <class Amount>
  INLINE void put(int64_t i, Pack<A> value, Amount amount) {
    if constexpr (shared) lanes(amount) = value;
    else store<Plain<A>>(out + i, Plain<A>::load(out + i) + value);
  }
  INLINE void finish() {
    if constexpr (shared) out[0] = total(folded + (first + second));
  }
};

// Which of a line's values count by the mask; used only if there is a mask.
INLINE Mask<double> nonzero(const bool* flags, double) {
  double absent[Pack<double>::lanes];
  for (int64_t j = 0; j < Pack<double>::lanes; ++j) absent[j] = flags[j] ? 0 : 1;
  return Plain<double>::load(absent) <= splat<double>(0);
}
template <class A>
[[gnu::noinline]] Mask<A> present_in_part(MaskRows mask, int64_t r, int64_t i, int64_t count) {
  const bool* flag = mask.data + r * mask.row_stride + i * mask.step;
  bool flags[Pack<A>::lanes];
  for (int64_t j = 0; j < Pack<A>::lanes; ++j) flags[j] = j < count && flag[j * mask.step];
  return nonzero(flags, A{});
}
template <class A>
INLINE Mask<A> present(MaskRows mask, int64_t r, int64_t i, int64_t count) {
  if (count < Pack<A>::lanes) return present_in_part<A>(mask, r, i, count);
  const bool* flag = mask.data + r * mask.row_stride + i * mask.step;
  if (mask.step == 0) return splat<A>(*flag ? 0 : 1) <= splat<A>(0);
  return nonzero(flag, A{});
}
INLINE int64_t count_of(Part part, int64_t) { return part.count; }
template <class Amount>
INLINE int64_t count_of(Amount, int64_t lanes) {
  return lanes;
}
template <class A, class Amount>
INLINE Pack<A> masked(const Strip<A>& strip, int64_t r, int64_t i, Amount amount, Pack<A> value) {
  if (!strip.mask.data) return value;
  return select(present<A>(strip.mask, r, i, count_of(amount, Pack<A>::lanes)), value, splat<A>(0));
}

// Each loop works on its own copy of the strip: no store can change the copy, so its members stay in registers.

template <class F, bool shared>
void sum(const Strip<typename F::Compute>& given, typename F::Compute* out) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  Accumulator<A, shared> sums(out, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    Pack<A> sum = sums.at(i, amount);
    for (; r < end; ++r)
      sum = sum + fresh(masked(strip, r, i, amount, load<F>(row_in<F>(strip.x, r) + i, amount)), amount);
    sums.put(i, sum, amount);
  });
  sums.finish();
}

// sum of d and of d * d, where d = x - shift.
template <class F, bool shared, bool with_mask>
void moments(const Strip<typename F::Compute>& given, const typename F::Compute* shifts, typename F::Compute* out,
             typename F::Compute* out_squares) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Constant<A, shared> shift(shifts);
  Accumulator<A, shared> sums(out, strip.width), squares(out_squares, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    const Pack<A> from = shift(i, amount);
    Pack<A> sum = sums.at(i, amount), square = squares.at(i, amount);
    for (; r < end; ++r) {
      prefetch<F, shared>(strip.x, r, i, strip.width, amount);
      Pack<A> d = fresh(load<F>(row_in<F>(strip.x, r) + i, amount) - from, amount);
      if (with_mask) d = masked(strip, r, i, amount, d);
      sum = sum + d;
      square = square + d * d;
    }
    sums.put(i, sum, amount);
    squares.put(i, square, amount);
  });
  sums.finish();
  squares.finish();
}

// Where in a row the first whole cache line of `out` begins. Only whole lines can be streamed, and a store that straddles two
// takes as long as two stores.
template <class F>
INLINE int64_t head(const typename F::Stored* out) {
  constexpr int64_t bytes = Pack<typename F::Compute>::lanes * sizeof(*out);
  return (bytes - reinterpret_cast<uintptr_t>(out) % bytes) % bytes / static_cast<int64_t>(sizeof(*out));
}

// z = (x - high) * scale + beta, at a line.
template <class A>
struct AffineLine {
  Pack<A> high, scale, beta;
  INLINE Pack<A> operator()(Pack<A> centred) const { return centred * scale + beta; }
};

template <class A, bool shared>
struct Affine {
  Constant<A, shared> high, scale, beta;
  INLINE Affine(const Constants<A>& c, int64_t row)
      : high(c.high + row * c.step), scale(c.scale + row * c.step), beta(c.beta + row * c.step) {}
  template <class Amount>
  INLINE AffineLine<A> operator()(int64_t i, Amount amount) const {
    return {high(i, amount), scale(i, amount), beta(i, amount)};
  }
};

template <class F, bool shared, Kind kind>
void normalize(const Strip<typename F::Compute>& given) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Pack<A> least = splat(strip.activation == Activation::relu ? A{0} : static_cast<A>(-__builtin_inf()));
  for (int64_t r = 0; r < strip.rows; ++r) {
    const Affine<A, shared> affine(strip.constants, r);
    const auto* x = row_in<F>(strip.x, r);
    const auto* residual = row_in<F>(strip.residual, r);
    auto* y = row_out<F>(strip.y, r);
    // Constants per position are stored in lines that start at the row's beginning.
    const int64_t start = shared || strip.stream ? head<F>(y) : 0;
    const bool follows = strip.adjacent && r > 0, followed = strip.adjacent && r + 1 < strip.rows;
    lines<A, false>(strip.width, start, follows, followed, [&](int64_t i, auto amount) __attribute__((always_inline)) {
      const AffineLine<A> line = affine(i, amount);
      Pack<A> z = line(load<F>(x + i, amount) - line.high);
      if (kind == joined || (kind == general && strip.residual.data)) z = z + load<F>(residual + i, amount);
      if constexpr (kind == rectified || kind == clipped) z = larger(splat<A>(0), z);
      if constexpr (kind == clipped) z = smaller(splat<A>(6), z);
      if constexpr (kind == joined) z = larger(least, z);
      if constexpr (kind == general) z = masked(strip, r, i, amount, activate(strip.activation, z, strip.slope));
      store<F>(y + i, z, amount, strip.stream);
    });
  }
}

// dz at a line of row r, from dy and what determines the activation's derivative there: y, or z recomputed.
template <class F, Kind kind, class Amount, class A = typename F::Compute>
INLINE Pack<A> gradient(const Strip<A>& strip, const AffineLine<A>& line, Pack<A> centred, int64_t r, int64_t i,
                        Amount amount) {
  const Pack<A> dy = load<F>(row_in<F>(strip.dy, r) + i, amount);
  if constexpr (kind == plain) return dy;
  if constexpr (kind == rectified) return chain(Activation::relu, line(centred), A{0}, dy);
  if constexpr (kind == clipped) return chain(Activation::relu6, line(centred), A{0}, dy);
  if constexpr (kind == joined) return chain(Activation::relu, load<F>(row_in<F>(strip.y, r) + i, amount), A{0}, dy);
  if (strip.y.data)
    return chain_from_y(strip.activation, load<F>(row_in<F>(strip.y, r) + i, amount), strip.slope, dy);
  Pack<A> z = line(centred);
  if (strip.residual.data) z = z + load<F>(row_in<F>(strip.residual, r) + i, amount);
  return chain(strip.activation, z, strip.slope, dy);
}

// sum of dz and of dz * (x - high).
template <class F, bool shared, Kind kind>
void reduce(const Strip<typename F::Compute>& given, typename F::Compute* out, typename F::Compute* out_centred) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Affine<A, shared> affine(strip.constants, 0);
  Accumulator<A, shared> sums(out, strip.width), products(out_centred, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    const AffineLine<A> line = affine(i, amount);
    Pack<A> sum = sums.at(i, amount), product = products.at(i, amount);
    for (; r < end; ++r) {
      prefetch<F, shared>(strip.x, r, i, strip.width, amount);
      prefetch<F, shared>(strip.dy, r, i, strip.width, amount);
      if constexpr (kind == joined) prefetch<F, shared>(strip.y, r, i, strip.width, amount);
      const Pack<A> centred = load<F>(row_in<F>(strip.x, r) + i, amount) - line.high;
      const Pack<A> dz = gradient<F, kind>(strip, line, centred, r, i, amount), both = dz * centred;
      sum = sum + fresh(kind == general ? masked(strip, r, i, amount, dz) : dz, amount);
      product = product + fresh(kind == general ? masked(strip, r, i, amount, both) : both, amount);
    }
    sums.put(i, sum, amount);
    products.put(i, product, amount);
  });
  sums.finish();
  products.finish();
}

// Two outputs are both streamed if their lines begin at the same values.
template <class F, bool shared, Kind kind>
void apply(const Strip<typename F::Compute>& given) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Constants<A>& constants = strip.constants;
  for (int64_t r = 0; r < strip.rows; ++r) {
    const int64_t at = r * constants.step;
    const Affine<A, shared> affine(constants, r);
    const Constant<A, shared> mean_dz(constants.mean_dz + at), slope_dz(constants.slope_dz + at);
    const auto* x = row_in<F>(strip.x, r);
    auto *dx = row_out<F>(strip.dx, r), *dresidual = row_out<F>(strip.dresidual, r);
    const int64_t start = shared || strip.stream ? head<F>(strip.dx.data ? dx : dresidual) : 0;
    const bool stream_both = strip.stream && head<F>(dresidual) == start;
    const bool follows = strip.adjacent && r > 0, followed = strip.adjacent && r + 1 < strip.rows;
    lines<A, false>(strip.width, start, follows, followed, [&](int64_t i, auto amount) __attribute__((always_inline)) {
      const AffineLine<A> line = affine(i, amount);
      const Pack<A> centred = load<F>(x + i, amount) - line.high;
      const Pack<A> dz = gradient<F, kind>(strip, line, centred, r, i, amount);
      if ((kind == joined || kind == general) && strip.dresidual.data)
        store<F>(dresidual + i, kind == general ? masked(strip, r, i, amount, dz) : dz, amount, stream_both);
      if (kind == general && !strip.dx.data) return;
      Pack<A> change = dz;
      if (strip.through_mean) change = dz - mean_dz(i, amount) - centred * slope_dz(i, amount);
      change = change * line.scale;
      if (kind == general) change = masked(strip, r, i, amount, change);
      store<F>(dx + i, change, amount, strip.stream);
    });
  }
}

// Types that training seldom uses have the general loops alone, which are nearly as fast.
template <class F, bool common>
constexpr Kernels<typename F::Compute> table() {
  constexpr Kind none = common ? plain : general, relu = common ? rectified : general, relu6 = common ? clipped : general,
                 add = common ? joined : general;
#define KINDS(loop, shared) \
  {loop<F, shared, none>, loop<F, shared, relu>, loop<F, shared, relu6>, loop<F, shared, add>, loop<F, shared, general>}
  return {
      {sum<F, true>, sum<F, false>},
      {{moments<F, true, false>, moments<F, true, true>}, {moments<F, false, false>, moments<F, false, true>}},
      {KINDS(normalize, true), KINDS(normalize, false)},
      {KINDS(reduce, true), KINDS(reduce, false)},
      {KINDS(apply, true), KINDS(apply, false)},
  };
#undef KINDS
}

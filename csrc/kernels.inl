// The five loops over a strip. Included once per instruction set, after lanes.inl and activations.inl.

// Loops without and with relu that have neither mask nor residual nor y to ask for, and the one that has everything.
enum Kind { plain, rectified, any };

template <class F>
INLINE const typename F::Stored* row_in(const Rows& rows, int64_t r) {
  return static_cast<const typename F::Stored*>(rows.data) + r * rows.stride;
}
template <class F>
INLINE typename F::Stored* row_out(const Rows& rows, int64_t r) {
  return static_cast<typename F::Stored*>(rows.data) + r * rows.stride;
}

// Calls each(i, amount) for the lines of a row, the first whole one at `head`.
template <class A, class Each>
INLINE void lines(int64_t width, int64_t head, Each each) {
  constexpr int64_t lanes = Pack<A>::lanes;
  if (width < lanes) {
    each(0, Part{width});
    return;
  }
  for (int64_t i = 0;;) {
    if (i == head)
      for (; i + lanes <= width; i += lanes) each(i, Whole{});
    if (i == width) break;
    const int64_t begin = i < head ? 0 : width - lanes;
    each(begin, Edge{i - begin});
    i = i < head ? head : width;
  }
}

// Sums one a position take this many rows at a time, so that a position's constants and sums are loaded once for them.
constexpr int64_t row_group = 4;

// Calls each(i, amount, row) so, for one value at a time where the constants are shared.
template <class A, bool shared, class Each>
INLINE void rows_of_lines(const Strip<A>& strip, Each each) {
  constexpr int64_t group = shared ? 1 : row_group;
  for (int64_t r = 0; r < strip.rows; r += group) {
    const int64_t end = shared || strip.rows - r >= group ? r + group : strip.rows;
    lines<A>(strip.width, 0, [&](int64_t i, auto amount) __attribute__((always_inline)) { each(r, end, i, amount); });
  }
}

// A constant of the channel: one for the row, or one a position (then readable for a line at least).
template <class A, bool shared>
struct Constant {
  const A* values;
  Pack<A> fixed;
  INLINE explicit Constant(const A* values) : values(values), fixed(splat(values[0])) {}
  INLINE Pack<A> operator()(int64_t i) const {
    if constexpr (shared) return fixed;
    return Plain<A>::load(values + i);
  }
};

// A sum over the strip: in lanes that are added up at its end, or one a position.
template <class A, bool shared>
struct Accumulator {
  A* out;
  Pack<A> lanes = splat<A>(0);
  INLINE Accumulator(A* out, int64_t width) : out(out) {
    if constexpr (!shared)
      for (int64_t i = 0; i < width; i += Pack<A>::lanes) store<Plain<A>>(out + i, lanes);
  }
  INLINE void add(int64_t i, Pack<A> value) {
    if constexpr (shared) lanes = lanes + value;
    else store<Plain<A>>(out + i, Plain<A>::load(out + i) + value);
  }
  INLINE void finish() {
    if constexpr (shared) out[0] = total(lanes);
  }
};

// Which of a line's values count by the mask; asked only where there is one.
template <class A>
[[gnu::noinline]] Mask<A> present(MaskRows mask, int64_t r, int64_t i, int64_t count) {
  const bool* flag = mask.data + r * mask.row_stride + i * mask.step;
  A absent[Pack<A>::lanes];
  for (int64_t j = 0; j < Pack<A>::lanes; ++j) absent[j] = j < count && flag[j * mask.step] ? 0 : 1;
  return Plain<A>::load(absent) <= splat<A>(0);
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

// Each loop works on a copy of the strip it is given: no store can change that, and so its members stay in registers.

template <class F, bool shared>
void sum(const Strip<typename F::Compute>& given, typename F::Compute* out) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  Accumulator<A, shared> sums(out, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    Pack<A> sum = splat<A>(0);
    for (; r < end; ++r) sum = sum + masked(strip, r, i, amount, load<F>(row_in<F>(strip.x, r) + i, amount));
    sums.add(i, fresh(sum, amount));
  });
  sums.finish();
}

// sum of d and of d * d, where d = x - shift.
template <class F, bool shared>
void moments(const Strip<typename F::Compute>& given, const typename F::Compute* shifts, typename F::Compute* out,
             typename F::Compute* out_squares) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Constant<A, shared> shift(shifts);
  Accumulator<A, shared> sums(out, strip.width), squares(out_squares, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    const Pack<A> from = shift(i);
    Pack<A> sum = splat<A>(0), square = sum;
    for (; r < end; ++r) {
      const Pack<A> d = masked(strip, r, i, amount, load<F>(row_in<F>(strip.x, r) + i, amount) - from);
      sum = sum + d;
      square = square + d * d;
    }
    sums.add(i, fresh(sum, amount));
    squares.add(i, fresh(square, amount));
  });
  sums.finish();
  squares.finish();
}

// Where in a row the first line begins that can be streamed to `out`.
template <class F>
INLINE int64_t head(const typename F::Stored* out, const Strip<typename F::Compute>& strip) {
  if (!strip.stream) return 0;
  constexpr int64_t bytes = Pack<typename F::Compute>::lanes * sizeof(*out);
  return (bytes - reinterpret_cast<uintptr_t>(out) % bytes) % bytes / static_cast<int64_t>(sizeof(*out));
}
// z = ((x - high) - low) * scale + beta, at a line.
template <class A>
struct AffineLine {
  Pack<A> high, low, scale, beta;
  INLINE Pack<A> centred(Pack<A> x) const { return (x - high) - low; }
  INLINE Pack<A> operator()(Pack<A> centred) const { return centred * scale + beta; }
};

template <class A, bool shared>
struct Affine {
  Constant<A, shared> high, low, scale, beta;
  INLINE Affine(const Constants<A>& c, int64_t row)
      : high(c.high + row * c.step), low(c.low + row * c.step), scale(c.scale + row * c.step), beta(c.beta + row * c.step) {}
  INLINE AffineLine<A> operator()(int64_t i) const { return {high(i), low(i), scale(i), beta(i)}; }
};

template <Kind kind, class A>
INLINE constexpr Activation activation_of(const Strip<A>& strip) {
  if constexpr (kind == plain) return Activation::none;
  if constexpr (kind == rectified) return Activation::relu;
  return strip.activation;
}

// How many rows of `out` to write together: they must begin at the same place in a line of memory to be streamed.
template <class F, bool shared>
INLINE int64_t rows_together(const Rows& out, bool streaming) {
  constexpr int64_t line_values = line_bytes / sizeof(typename F::Stored);
  return shared || (streaming && out.stride % line_values != 0) ? 1 : row_group;
}

template <class F, bool shared, Kind kind>
void normalize(const Strip<typename F::Compute>& given) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const int64_t group = rows_together<F, shared>(strip.y, strip.stream);
  for (int64_t first = 0; first < strip.rows; first += group) {
    const int64_t end = shared || strip.rows - first >= group ? first + group : strip.rows;
    const Affine<A, shared> affine(strip.constants, first);
    const int64_t start = head<F>(row_out<F>(strip.y, first), strip);
    lines<A>(strip.width, start, [&](int64_t i, auto amount) __attribute__((always_inline)) {
      const AffineLine<A> line = affine(i);
      int64_t r = first;
      do {
        Pack<A> z = line(line.centred(load<F>(row_in<F>(strip.x, r) + i, amount)));
        if (kind == any && strip.residual.data) z = z + load<F>(row_in<F>(strip.residual, r) + i, amount);
        Pack<A> value = activate(activation_of<kind>(strip), z, strip.slope);
        if (kind == any) value = masked(strip, r, i, amount, value);
        store<F>(row_out<F>(strip.y, r) + i, value, amount, strip.stream);
      } while (!shared && ++r < end);
    });
  }
}

// dz at a line of row r, from dy and what determines the activation's derivative there: y, or z recomputed.
template <class F, Kind kind, class Amount, class A = typename F::Compute>
INLINE Pack<A> gradient(const Strip<A>& strip, const AffineLine<A>& line, Pack<A> centred, int64_t r, int64_t i,
                        Amount amount) {
  const Pack<A> dy = load<F>(row_in<F>(strip.dy, r) + i, amount);
  if constexpr (kind == plain) return dy;
  const Activation activation = activation_of<kind>(strip);
  if (kind == any && strip.y.data)
    return chain_from_y(activation, load<F>(row_in<F>(strip.y, r) + i, amount), strip.slope, dy);
  Pack<A> z = line(centred);
  if (kind == any && strip.residual.data) z = z + load<F>(row_in<F>(strip.residual, r) + i, amount);
  return chain(activation, z, strip.slope, dy);
}

// sum of dz and of dz * (x - mean).
template <class F, bool shared, Kind kind>
void reduce(const Strip<typename F::Compute>& given, typename F::Compute* out, typename F::Compute* out_centred) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Affine<A, shared> affine(strip.constants, 0);
  Accumulator<A, shared> sums(out, strip.width), products(out_centred, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    const AffineLine<A> line = affine(i);
    Pack<A> sum = splat<A>(0), product = sum;
    for (; r < end; ++r) {
      const Pack<A> centred = line.centred(load<F>(row_in<F>(strip.x, r) + i, amount));
      const Pack<A> dz = gradient<F, kind>(strip, line, centred, r, i, amount);
      sum = sum + (kind == any ? masked(strip, r, i, amount, dz) : dz);
      product = product + (kind == any ? masked(strip, r, i, amount, dz * centred) : dz * centred);
    }
    sums.add(i, fresh(sum, amount));
    products.add(i, fresh(product, amount));
  });
  sums.finish();
  products.finish();
}

template <class F, bool shared, Kind kind>
void apply(const Strip<typename F::Compute>& given) {
  using A = typename F::Compute;
  const Strip<A> strip = given;
  const Constants<A>& constants = strip.constants;
  const Rows& out = strip.dx.data ? strip.dx : strip.dresidual;
  const int64_t group = rows_together<F, shared>(out, strip.stream);
  for (int64_t first = 0; first < strip.rows; first += group) {
    const int64_t end = shared || strip.rows - first >= group ? first + group : strip.rows;
    const int64_t at = first * constants.step;
    const Affine<A, shared> affine(constants, first);
    const Constant<A, shared> mean_dz(constants.mean_dz + at), slope_dz(constants.slope_dz + at);
    const int64_t start = head<F>(row_out<F>(out, first), strip);
    lines<A>(strip.width, start, [&](int64_t i, auto amount) __attribute__((always_inline)) {
      const AffineLine<A> line = affine(i);
      const Pack<A> mean = mean_dz(i), slope = slope_dz(i);
      int64_t r = first;
      do {
        const Pack<A> centred = line.centred(load<F>(row_in<F>(strip.x, r) + i, amount));
        const Pack<A> dz = gradient<F, kind>(strip, line, centred, r, i, amount);
        if (kind == any && strip.dresidual.data)
          store<F>(row_out<F>(strip.dresidual, r) + i, masked(strip, r, i, amount, dz), amount, /*streaming=*/false);
        if (kind == any && !strip.dx.data) continue;
        Pack<A> change = dz;
        if (strip.through_mean) change = dz - mean - centred * slope;
        change = change * line.scale;
        if (kind == any) change = masked(strip, r, i, amount, change);
        store<F>(row_out<F>(strip.dx, r) + i, change, amount, strip.stream);
      } while (!shared && ++r < end);
    });
  }
}

// Types that training seldom uses have the general loops alone, which are nearly as fast.
template <class F, bool common>
constexpr Kernels<typename F::Compute> table() {
  constexpr Kind none = common ? plain : any, relu = common ? rectified : any;
  return {
      {sum<F, true>, sum<F, false>},
      {moments<F, true>, moments<F, false>},
      {{normalize<F, true, none>, normalize<F, true, relu>, normalize<F, true, any>},
       {normalize<F, false, none>, normalize<F, false, relu>, normalize<F, false, any>}},
      {{reduce<F, true, none>, reduce<F, true, relu>, reduce<F, true, any>},
       {reduce<F, false, none>, reduce<F, false, relu>, reduce<F, false, any>}},
      {{apply<F, true, none>, apply<F, true, relu>, apply<F, true, any>},
       {apply<F, false, none>, apply<F, false, relu>, apply<F, false, any>}},
  };
}

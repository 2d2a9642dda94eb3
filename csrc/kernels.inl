// The five loops over a strip. Included once per instruction set, after lanes.inl and activations.inl.

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

// A constant of the channel: one for the strip, or one a position (then readable for a line at least).
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
[[gnu::noinline]] Mask<A> present(const MaskRows& mask, int64_t r, int64_t i, int64_t count) {
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

template <class F, bool shared>
void sum(const Strip<typename F::Compute>& strip, typename F::Compute* out) {
  using A = typename F::Compute;
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
void moments(const Strip<typename F::Compute>& strip, const typename F::Compute* shifts, typename F::Compute* out,
             typename F::Compute* out_squares) {
  using A = typename F::Compute;
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
template <class F, bool shared>
struct Affine {
  using A = typename F::Compute;
  Constant<A, shared> high, low, scale, beta;
  INLINE explicit Affine(const Constants<A>& c) : high(c.high), low(c.low), scale(c.scale), beta(c.beta) {}
  INLINE Pack<A> centred(Pack<A> x, int64_t i) const { return (x - high(i)) - low(i); }
  INLINE Pack<A> operator()(Pack<A> centred, int64_t i) const { return centred * scale(i) + beta(i); }
};

template <Kind kind, class A>
INLINE constexpr Activation activation_of(const Strip<A>& strip) {
  if constexpr (kind == plain) return Activation::none;
  if constexpr (kind == rectified) return Activation::relu;
  return strip.activation;
}

template <class F, bool shared, Kind kind>
void normalize(const Strip<typename F::Compute>& strip) {
  using A = typename F::Compute;
  const Affine<F, shared> affine(*strip.constants);
  for (int64_t r = 0; r < strip.rows; ++r) {
    const auto* x = row_in<F>(strip.x, r);
    const auto* residual = strip.residual.data ? row_in<F>(strip.residual, r) : nullptr;
    auto* y = row_out<F>(strip.y, r);
    lines<A>(strip.width, head<F>(y, strip), [&](int64_t i, auto amount) __attribute__((always_inline)) {
      Pack<A> z = affine(affine.centred(load<F>(x + i, amount), i), i);
      if (residual) z = z + load<F>(residual + i, amount);
      const Pack<A> value = activate(activation_of<kind>(strip), z, strip.slope);
      store<F>(y + i, masked(strip, r, i, amount, value), amount, strip.stream);
    });
  }
}

// dz at a line of row r, from dy and what determines the activation's derivative there: y, or z recomputed.
template <class F, bool shared, Kind kind, class Amount, class A = typename F::Compute>
INLINE Pack<A> gradient(const Strip<A>& strip, const Affine<F, shared>& affine, Pack<A> centred, int64_t r, int64_t i,
                        Amount amount) {
  const Pack<A> dy = load<F>(row_in<F>(strip.dy, r) + i, amount);
  if constexpr (kind == plain) return dy;
  const Activation activation = activation_of<kind>(strip);
  if (strip.y.data) return chain_from_y(activation, load<F>(row_in<F>(strip.y, r) + i, amount), strip.slope, dy);
  Pack<A> z = affine(centred, i);
  if (strip.residual.data) z = z + load<F>(row_in<F>(strip.residual, r) + i, amount);
  return chain(activation, z, strip.slope, dy);
}

// sum of dz and of dz * (x - mean).
template <class F, bool shared, Kind kind>
void reduce(const Strip<typename F::Compute>& strip, typename F::Compute* out, typename F::Compute* out_centred) {
  using A = typename F::Compute;
  const Affine<F, shared> affine(*strip.constants);
  Accumulator<A, shared> sums(out, strip.width), products(out_centred, strip.width);
  rows_of_lines<A, shared>(strip, [&](int64_t r, int64_t end, int64_t i, auto amount) __attribute__((always_inline)) {
    Pack<A> sum = splat<A>(0), product = sum;
    for (; r < end; ++r) {
      const Pack<A> centred = affine.centred(load<F>(row_in<F>(strip.x, r) + i, amount), i);
      const Pack<A> dz = gradient<F, shared, kind>(strip, affine, centred, r, i, amount);
      sum = sum + masked(strip, r, i, amount, dz);
      product = product + masked(strip, r, i, amount, dz * centred);
    }
    sums.add(i, fresh(sum, amount));
    products.add(i, fresh(product, amount));
  });
  sums.finish();
  products.finish();
}

template <class F, bool shared, Kind kind>
void apply(const Strip<typename F::Compute>& strip) {
  using A = typename F::Compute;
  const Affine<F, shared> affine(*strip.constants);
  const Constant<A, shared> mean_dz(strip.constants->mean_dz), slope_dz(strip.constants->slope_dz);
  for (int64_t r = 0; r < strip.rows; ++r) {
    const auto* x = row_in<F>(strip.x, r);
    auto* dx = strip.dx.data ? row_out<F>(strip.dx, r) : nullptr;
    auto* dresidual = strip.dresidual.data ? row_out<F>(strip.dresidual, r) : nullptr;
    lines<A>(strip.width, head<F>(dx ? dx : dresidual, strip), [&](int64_t i, auto amount) __attribute__((always_inline)) {
      const Pack<A> centred = affine.centred(load<F>(x + i, amount), i);
      const Pack<A> dz = gradient<F, shared, kind>(strip, affine, centred, r, i, amount);
      if (dresidual) store<F>(dresidual + i, masked(strip, r, i, amount, dz), amount, /*streaming=*/false);
      if (!dx) return;
      Pack<A> change = dz;
      if (strip.through_mean) change = dz - mean_dz(i) - centred * slope_dz(i);
      store<F>(dx + i, masked(strip, r, i, amount, change * affine.scale(i)), amount, strip.stream);
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

// The five loops over a strip. Included once per instruction set, after lanes.inl and activations.inl.

enum Kind { plain, rectified, any };

template <class F>
inline const typename F::Stored* row_in(const Rows& rows, int64_t r) {
  return static_cast<const typename F::Stored*>(rows.data) + r * rows.stride;
}
template <class F>
inline typename F::Stored* row_out(const Rows& rows, int64_t r) {
  return static_cast<typename F::Stored*>(rows.data) + r * rows.stride;
}

// Calls each(i, Whole) for every full line of a row and each(i, Some) for what is left.
template <class A, class Each>
inline void lines(int64_t width, int64_t start, Each each) {
  int64_t i = start;
  for (; i + Pack<A>::lanes <= width; i += Pack<A>::lanes) each(i, Whole{});
  if (i < width) each(i, Some{width - i});
}

// A constant of the channel: one for the strip, or one a position (then readable up to the end of the last line).
template <class A, bool shared>
struct Constant {
  const A* values;
  Pack<A> fixed;
  explicit Constant(const A* values) : values(values), fixed(splat(values[0])) {}
  Pack<A> operator()(int64_t i) const {
    if constexpr (shared) return fixed;
    return load<Plain<A>>(values + i, Whole{});
  }
};

// A sum over the strip: in lanes that are added up at its end, or one a position.
template <class A, bool shared>
struct Accumulator {
  A* out;
  Pack<A> lanes = splat<A>(0);
  Accumulator(A* out, int64_t width) : out(out) {
    if constexpr (!shared)
      for (int64_t i = 0; i < width; i += Pack<A>::lanes) store<Plain<A>>(out + i, lanes, Whole{});
  }
  void add(int64_t i, Pack<A> value) {
    if constexpr (shared) lanes = lanes + value;
    else store<Plain<A>>(out + i, load<Plain<A>>(out + i, Whole{}) + value, Whole{});
  }
  void finish() {
    if constexpr (shared) out[0] = total(lanes);
  }
};

// Which of a row's values count. Asked only where there is a mask.
template <class A>
inline Mask<A> present(const MaskRows& mask, int64_t r, int64_t i, int64_t count) {
  const bool* flag = mask.data + r * mask.row_stride + i * mask.step;
  A absent[Pack<A>::lanes];
  for (int64_t j = 0; j < Pack<A>::lanes; ++j) absent[j] = j < count && flag[j * mask.step] ? 0 : 1;
  return load<Plain<A>>(absent, Whole{}) <= splat<A>(0);
}
template <class A>
inline Mask<A> present(const MaskRows& mask, int64_t r, int64_t i, Whole) {
  return present<A>(mask, r, i, Pack<A>::lanes);
}
template <class A>
inline Mask<A> present(const MaskRows& mask, int64_t r, int64_t i, Some some) {
  return present<A>(mask, r, i, some.count);
}

template <class F, bool shared>
void sum(const Strip<typename F::Compute>& strip, typename F::Compute* out) {
  using A = typename F::Compute;
  Accumulator<A, shared> sums(out, strip.width);
  for (int64_t r = 0; r < strip.rows; ++r) {
    const auto* x = row_in<F>(strip.x, r);
    lines<A>(strip.width, 0, [&](int64_t i, auto amount) {
      Pack<A> value = load<F>(x + i, amount);
      if (strip.mask.data) value = select(present<A>(strip.mask, r, i, amount), value, splat<A>(0));
      sums.add(i, value);
    });
  }
  sums.finish();
}

// sum of d and of d * d, where d = x - shift.
template <class F, bool shared>
void moments(const Strip<typename F::Compute>& strip, const typename F::Compute* shifts, typename F::Compute* out,
             typename F::Compute* out_squares) {
  using A = typename F::Compute;
  const Constant<A, shared> shift(shifts);
  Accumulator<A, shared> sums(out, strip.width), squares(out_squares, strip.width);
  for (int64_t r = 0; r < strip.rows; ++r) {
    const auto* x = row_in<F>(strip.x, r);
    lines<A>(strip.width, 0, [&](int64_t i, auto amount) {
      Pack<A> d = load<F>(x + i, amount, shifts[0]) - shift(i);
      if (strip.mask.data) d = select(present<A>(strip.mask, r, i, amount), d, splat<A>(0));
      sums.add(i, d);
      squares.add(i, d * d);
    });
  }
  sums.finish();
  squares.finish();
}

// Writes y, aligned for streaming where that is asked: the head of the row up to the first full line of memory goes alone.
template <class F>
inline int64_t head(const typename F::Stored* out, int64_t width) {
  const int64_t past = reinterpret_cast<uintptr_t>(out) % line_bytes;
  const int64_t count = past == 0 ? 0 : (line_bytes - past) / static_cast<int64_t>(sizeof(*out));
  return count < width ? count : width;
}
template <class F>
inline void put(typename F::Stored* p, Pack<typename F::Compute> value, Whole whole, bool streaming) {
  if (streaming) stream<F>(p, value);
  else store<F>(p, value, whole);
}
template <class F>
inline void put(typename F::Stored* p, Pack<typename F::Compute> value, Some some, bool) {
  store<F>(p, value, some);
}

// lines(), but starting so that whole lines can be streamed to `out`.
template <class F, class Each>
inline void lines_to(const typename F::Stored* out, int64_t width, bool streaming, Each each) {
  using A = typename F::Compute;
  int64_t start = streaming ? head<F>(out, width) : 0;
  for (int64_t i = 0; i < start; i += Pack<A>::lanes)
    each(i, Some{start - i < Pack<A>::lanes ? start - i : Pack<A>::lanes});
  lines<A>(width, start, each);
}

template <class F, bool shared>
struct Affine {
  using A = typename F::Compute;
  Constant<A, shared> high, low, scale, beta;
  explicit Affine(const Constants<A>& c) : high(c.high), low(c.low), scale(c.scale), beta(c.beta) {}
  Pack<A> centred(Pack<A> x, int64_t i) const { return (x - high(i)) - low(i); }
  Pack<A> operator()(Pack<A> centred, int64_t i) const { return centred * scale(i) + beta(i); }
};

template <Kind kind, class A>
inline constexpr Activation activation_of(const Strip<A>& strip) {
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
    lines_to<F>(y, strip.width, strip.stream, [&](int64_t i, auto amount) {
      Pack<A> z = affine(affine.centred(load<F>(x + i, amount), i), i);
      if (residual) z = z + load<F>(residual + i, amount);
      Pack<A> value = activate(activation_of<kind>(strip), z, strip.slope);
      if (strip.mask.data) value = select(present<A>(strip.mask, r, i, amount), value, splat<A>(0));
      put<F>(y + i, value, amount, strip.stream);
    });
  }
}

// dz at a line of row r, from dy and what determines the activation's derivative there: y, or z recomputed.
template <class F, bool shared, Kind kind>
struct Gradient {
  using A = typename F::Compute;
  const Strip<A>& strip;
  const Affine<F, shared>& affine;
  int64_t r;
  const typename F::Stored* dy = row_in<F>(strip.dy, r);
  const typename F::Stored* residual = strip.residual.data ? row_in<F>(strip.residual, r) : nullptr;
  const typename F::Stored* y = strip.y.data ? row_in<F>(strip.y, r) : nullptr;

  template <class Amount>
  Pack<A> operator()(Pack<A> centred, int64_t i, Amount amount) const {
    const Pack<A> gradient = load<F>(dy + i, amount);
    if constexpr (kind == plain) return gradient;
    const Activation activation = activation_of<kind>(strip);
    if (y) return chain_from_y(activation, load<F>(y + i, amount), strip.slope, gradient);
    Pack<A> z = affine(centred, i);
    if (residual) z = z + load<F>(residual + i, amount);
    return chain(activation, z, strip.slope, gradient);
  }
};

// sum of dz and of dz * (x - mean).
template <class F, bool shared, Kind kind>
void reduce(const Strip<typename F::Compute>& strip, typename F::Compute* out, typename F::Compute* out_centred) {
  using A = typename F::Compute;
  const Affine<F, shared> affine(*strip.constants);
  Accumulator<A, shared> sums(out, strip.width), products(out_centred, strip.width);
  for (int64_t r = 0; r < strip.rows; ++r) {
    const auto* x = row_in<F>(strip.x, r);
    const Gradient<F, shared, kind> gradient{strip, affine, r};
    lines<A>(strip.width, 0, [&](int64_t i, auto amount) {
      const Pack<A> centred = affine.centred(load<F>(x + i, amount, strip.constants->high[0]), i);
      Pack<A> dz = gradient(centred, i, amount);
      Pack<A> product = dz * centred;
      if (strip.mask.data) {
        const Mask<A> counts = present<A>(strip.mask, r, i, amount);
        dz = select(counts, dz, splat<A>(0));
        product = select(counts, product, splat<A>(0));
      }
      sums.add(i, dz);
      products.add(i, product);
    });
  }
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
    const Gradient<F, shared, kind> gradient{strip, affine, r};
    lines_to<F>(dx ? dx : dresidual, strip.width, strip.stream, [&](int64_t i, auto amount) {
      const Pack<A> centred = affine.centred(load<F>(x + i, amount), i);
      Pack<A> dz = gradient(centred, i, amount);
      Pack<A> change = dz;
      if (strip.through_mean) change = dz - mean_dz(i) - centred * slope_dz(i);
      change = change * affine.scale(i);
      if (strip.mask.data) {
        const Mask<A> counts = present<A>(strip.mask, r, i, amount);
        dz = select(counts, dz, splat<A>(0));
        change = select(counts, change, splat<A>(0));
      }
      if (dresidual) put<F>(dresidual + i, dz, amount, false);
      if (dx) put<F>(dx + i, change, amount, strip.stream);
    });
  }
}

template <class F>
constexpr Kernels<typename F::Compute> table() {
  return {
      {sum<F, true>, sum<F, false>},
      {moments<F, true>, moments<F, false>},
      {{normalize<F, true, plain>, normalize<F, true, rectified>, normalize<F, true, any>},
       {normalize<F, false, plain>, normalize<F, false, rectified>, normalize<F, false, any>}},
      {{reduce<F, true, plain>, reduce<F, true, rectified>, reduce<F, true, any>},
       {reduce<F, false, plain>, reduce<F, false, rectified>, reduce<F, false, any>}},
      {{apply<F, true, plain>, apply<F, true, rectified>, apply<F, true, any>},
       {apply<F, false, plain>, apply<F, false, rectified>, apply<F, false, any>}},
  };
}

inline const Kernels<float>& table(Type type, float) {
  static constexpr Kernels<float> float32 = table<Plain<float>>(), bfloat16 = table<BFloat16>(),
                                  float16 = table<Float16>();
  return type == Type::float32 ? float32 : type == Type::bfloat16 ? bfloat16 : float16;
}
inline const Kernels<double>& table(Type, double) {
  static constexpr Kernels<double> float64 = table<Plain<double>>();
  return float64;
}

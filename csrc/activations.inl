// The activations and what they do to a gradient, in plain lanes: no call to libm, whose results differ between machines.
// Included once per instruction set, after lanes.inl.

template <class A>
struct Exponential;  // how 2^n is made from n in the format of A, and ln 2 as a short and a remaining part
template <>
struct Exponential<float> {
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, rounder = 0x1.8p23f;
  static constexpr float lowest = -104, highest = 89;  // exp is 0 below, infinite above
  static constexpr int bias = 127, mantissa_bits = 23, terms = 7;
};
template <>
struct Exponential<double> {
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double rounder = 0x1.8p52, lowest = -746, highest = 710;
  static constexpr int bias = 1023, mantissa_bits = 52, terms = 13;
};

struct InverseFactorials {
  double of[14] = {1};
  constexpr InverseFactorials() {
    double factorial = 1;
    for (int k = 1; k < 14; ++k) of[k] = 1 / (factorial *= k);
  }
};
constexpr InverseFactorials inverse_factorial;

// z = n ln 2 + r with |r| <= ln 2 / 2: exp(z) = 2^n (1 + expm1(r)), and expm1(r) is its Taylor series to full precision.
template <class A>
struct Reduced {
  Pack<A> expm1_r;
  Mask<A> n;  // integers
};

template <class A>
INLINE Pack<A> clamp(Pack<A> z, A low, A high) {  // NaN stays NaN
  return select(z < splat(low), splat(low), select(splat(high) < z, splat(high), z));
}

template <class A>
INLINE Reduced<A> reduced(Pack<A> z) {
  using E = Exponential<A>;
  const Pack<A> rounded = z * splat<A>(1.44269504088896340736) + splat<A>(E::rounder);
  const Pack<A> n = rounded - splat<A>(E::rounder);
  const Pack<A> r = (z - n * splat<A>(E::ln2_high)) - n * splat<A>(E::ln2_low);
  Pack<A> series = splat<A>(inverse_factorial.of[E::terms]);
  for (int k = E::terms - 1; k >= 2; --k) series = series * r + splat<A>(inverse_factorial.of[k]);
  Reduced<A> result{r + r * r * series, {}};
  using Integers = typename Mask<A>::Vector;
  const Pack<A> origin = splat<A>(E::rounder);
  EACH_PART(result.n.part[i] = (Integers)rounded.part[i] - (Integers)origin.part[i]);
  return result;
}

template <class A>
INLINE Pack<A> power_of_two(Mask<A> n) {
  using E = Exponential<A>;
  Pack<A> r;
  EACH_PART(r.part[i] = (typename Pack<A>::Vector)((n.part[i] + E::bias) << E::mantissa_bits));
  return r;
}

template <class A>
INLINE Pack<A> exp(Pack<A> z) {
  using E = Exponential<A>;
  const Reduced<A> e = reduced(clamp<A>(z, E::lowest, E::highest));
  Mask<A> half, rest;  // 2^n in two factors, each a normal number where 2^n itself is not
  EACH_PART(
    half.part[i] = e.n.part[i] >> 1;
    rest.part[i] = e.n.part[i] - half.part[i];
  );
  return (splat<A>(1) + e.expm1_r) * power_of_two<A>(half) * power_of_two<A>(rest);
}

template <class A>
INLINE Pack<A> expm1(Pack<A> z) {
  const Reduced<A> e = reduced(clamp<A>(z, -80, 80));  // exp(z) - 1 is -1 to the last bit below, and large enough above
  const Pack<A> power = power_of_two<A>(e.n);
  return power * e.expm1_r + (power - splat<A>(1));
}

template <class A>
INLINE Pack<A> tanh(Pack<A> z) {
  const Pack<A> zero = splat<A>(0);
  const Pack<A> magnitude = select(z < zero, zero - z, z);
  const Pack<A> e = expm1(clamp<A>(magnitude + magnitude, 0, 40));
  const Pack<A> r = e / (e + splat<A>(2));
  return select(z < zero, zero - r, select(zero < z, r, z));  // z itself: a zero's sign, or NaN
}

template <class A>
INLINE Pack<A> sigmoid(Pack<A> z) {
  return splat<A>(1) / (splat<A>(1) + exp(splat<A>(0) - z));
}

// With t = 1 / (1 + |z| / 4): cdf(-|z|) = exp(-z^2 / 2) t q(2 t - 1), where q's Chebyshev coefficients are these (computed to
// 50 digits). The first 11 leave an error under 1e-8, all of them under 2e-17.
constexpr double cdf_series[] = {
    0.485225602283038272, 0.187927204209892633, 0.0555483889188127585,
    0.0121294383151115215, 0.0017314801240606201, 0.0000801496185995374884,
    -0.000025136847908026696, -4.7258422549267409e-6, 2.52589221368657764e-7,
    1.53633368734945598e-7, -8.45255030017293909e-10, -5.17162701543570851e-9,
    -2.82065090811737786e-11, 1.94350380709717373e-10, -2.48535604785119298e-12,
    -7.93620737464574426e-12, 4.60620171117616913e-13, 3.28215411667773228e-13,
    -4.35384066316288338e-14, -1.22681850792747961e-14, 3.23284608155773314e-15,
    3.04516588027697647e-16, -2.01303684304228963e-16, 7.15123535592147585e-18,
};

// The standard normal distribution function and exp(-z^2 / 2), which its derivative needs too.
template <class A>
struct Normal {
  Pack<A> cdf, bell;
};
template <class A>
INLINE Normal<A> normal(Pack<A> z) {
  const Pack<A> zero = splat<A>(0), one = splat<A>(1);
  const Pack<A> magnitude = select(z < zero, zero - z, z);
  const Pack<A> t = one / (one + magnitude * splat<A>(0.25));
  const Pack<A> u = t + t - one;
  constexpr int terms = sizeof(A) == sizeof(float) ? 11 : sizeof(cdf_series) / sizeof(double);
  Pack<A> next = zero, current = zero;  // Clenshaw's recurrence
  for (int k = terms - 1; k >= 1; --k) {
    const Pack<A> previous = (u + u) * current - next + splat<A>(cdf_series[k]);
    next = current;
    current = previous;
  }
  const Pack<A> q = u * current - next + splat<A>(cdf_series[0] / 2);
  const Pack<A> bell = exp(zero - z * z * splat<A>(0.5));
  const Pack<A> tail = bell * t * q;
  return {select(z < zero, tail, one - tail), bell};
}

constexpr double gelu_k = 0.79788456080286535588, gelu_c = 0.044715;  // sqrt(2 / pi), and the paper's cubic term

template <class A>
INLINE Pack<A> gelu_tanh_part(Pack<A> z) {
  return tanh(splat<A>(gelu_k) * (z + splat<A>(gelu_c) * z * z * z));
}

// y = activation(z) and activation'(z) for activations with an exponential: function calls, not inlined into every loop.
template <class A>
[[gnu::noinline]] Pack<A> smooth(Activation activation, Pack<A> z) {
  switch (activation) {
    case Activation::silu: return z / (splat<A>(1) + exp(splat<A>(0) - z));
    case Activation::gelu: return z * normal(z).cdf;
    case Activation::gelu_tanh: return z * splat<A>(0.5) * (splat<A>(1) + gelu_tanh_part(z));
    case Activation::sigmoid: return sigmoid(z);
    default: return tanh(z);
  }
}
template <class A>
[[gnu::noinline]] Pack<A> smooth_derivative(Activation activation, Pack<A> z) {
  const Pack<A> one = splat<A>(1), half = splat<A>(0.5);
  switch (activation) {
    case Activation::silu: {
      const Pack<A> s = sigmoid(z);
      return s * (one + z * (one - s));
    }
    case Activation::gelu: {
      const Normal<A> n = normal(z);
      return n.cdf + z * n.bell * splat<A>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    }
    case Activation::gelu_tanh: {
      const Pack<A> t = gelu_tanh_part(z);
      const Pack<A> inner = splat<A>(gelu_k) * (one + splat<A>(3 * gelu_c) * z * z);
      return half * (one + t) + half * z * (one - t * t) * inner;
    }
    case Activation::sigmoid: return sigmoid(z) * sigmoid(splat<A>(0) - z);
    default: {
      const Pack<A> t = tanh(z);
      return one - t * t;
    }
  }
}
template <class A>
[[gnu::noinline]] Pack<A> elu_negative(Pack<A> z, A alpha) {
  return expm1(z) * splat(alpha);
}
template <class A>
[[gnu::noinline]] Pack<A> elu_negative_derivative(Pack<A> z, A alpha) {
  return exp(select(splat<A>(0) < z, splat<A>(0), z)) * splat(alpha);
}

// y = activation(z). Comparisons are written so that NaN passes through, as in torch.
template <class A>
INLINE Pack<A> activate(Activation activation, Pack<A> z, A slope) {
  const Pack<A> zero = splat<A>(0), six = splat<A>(6);
  switch (activation) {
    case Activation::none: return z;
    case Activation::relu: return larger(zero, z);
    case Activation::relu6: return select(z < zero, zero, select(six < z, six, z));
    case Activation::leaky_relu: return select(z <= zero, z * splat(slope), z);
    case Activation::elu: return select(z <= zero, elu_negative(z, slope), z);
    case Activation::hardswish: return z * clamp<A>(z + splat<A>(3), 0, 6) / six;
    default: return smooth(activation, z);
  }
}

// dz = dy * activation'(z).
template <class A>
INLINE Pack<A> chain(Activation activation, Pack<A> z, A slope, Pack<A> dy) {
  const Pack<A> zero = splat<A>(0), three = splat<A>(3), six = splat<A>(6);
  switch (activation) {
    case Activation::none: return dy;
    case Activation::relu: return select(z <= zero, zero, dy);
    case Activation::relu6: return select(z <= zero, zero, select(six <= z, zero, dy));
    case Activation::leaky_relu: return select(zero < z, dy, dy * splat(slope));
    case Activation::elu: return select(z <= zero, dy * elu_negative_derivative(z, slope), dy);
    case Activation::hardswish: {
      const Pack<A> within = dy * (z / three + splat<A>(0.5));
      return select(z <= zero - three, zero, select(z < three, within, dy));
    }
    default: return dy * smooth_derivative(activation, z);
  }
}

// The same from y = activation(z), where y determines the derivative.
template <class A>
INLINE Pack<A> chain_from_y(Activation activation, Pack<A> y, A slope, Pack<A> dy) {
  const Pack<A> one = splat<A>(1);
  switch (activation) {
    case Activation::elu: return select(y <= splat<A>(0), dy * (y + splat(slope)), dy);
    case Activation::sigmoid: return dy * (y * (one - y));
    case Activation::tanh: return dy * (one - y * y);
    default: return chain(activation, y, slope, dy);  // depends on the sign and bounds of y, which are those of z
  }
}

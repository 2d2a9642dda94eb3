// The activations and what they do to a gradient, in plain lanes. Included once per instruction set.

// y = activation(z). Comparisons are written so that NaN passes through, as in torch.
template <class A>
inline Pack<A> activate(Activation activation, Pack<A> z, A slope) {
  const Pack<A> zero = splat<A>(0), three = splat<A>(3), six = splat<A>(6);
  switch (activation) {
    case Activation::relu: return select(z < zero, zero, z);
    case Activation::relu6: return select(z < zero, zero, select(six < z, six, z));
    case Activation::leaky_relu: return select(z <= zero, z * splat(slope), z);
    case Activation::hardswish: {
      const Pack<A> gate = z + three;
      return z * select(gate < zero, zero, select(six < gate, six, gate)) / six;
    }
    default: return z;
  }
}

// dz = dy * activation'(z).
template <class A>
inline Pack<A> chain(Activation activation, Pack<A> z, A slope, Pack<A> dy) {
  const Pack<A> zero = splat<A>(0), three = splat<A>(3), six = splat<A>(6);
  switch (activation) {
    case Activation::relu: return select(z <= zero, zero, dy);
    case Activation::relu6: return select(z <= zero, zero, select(six <= z, zero, dy));
    case Activation::leaky_relu: return select(z <= zero, dy * splat(slope), dy);
    case Activation::hardswish: {
      const Pack<A> within = dy * (z / three + splat<A>(0.5));
      return select(z <= zero - three, zero, select(three <= z, dy, within));
    }
    default: return dy;
  }
}

// The same from y = activation(z), where y determines the derivative.
template <class A>
inline Pack<A> chain_from_y(Activation activation, Pack<A> y, A slope, Pack<A> dy) {
  switch (activation) {
    default: return chain(activation, y, slope, dy);
  }
}

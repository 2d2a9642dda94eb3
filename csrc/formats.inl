// Formats: how values of a type lie in memory and what they are computed in; and the lines of a row. Included once per
// instruction set, after registers.inl.

template <class A>
struct Plain {
  using Compute = A;
  using Stored = A;
  INLINE static Pack<A> load(const A* p) {
    Pack<A> r;
    EACH_PART(r.part[i] = read<typename Pack<A>::Vector>(p + i * r.part_lanes));
    return r;
  }
  template <class Write>
  INLINE static void store(A* p, Pack<A> value, Write write) {
    EACH_PART(write(p + i * value.part_lanes, value.part[i]));
  }
};

struct BFloat16 {
  using Compute = float;
  using Stored = uint16_t;
  INLINE static Pack<float> load(const uint16_t* p) {
    const WordPack words = load_high_halves(p);
    Pack<float> r;
    EACH_PART(r.part[i] = (Floats)words.part[i]);
    return r;
  }
  // Round to nearest, ties to even. NaN stays NaN because its lower half is 0: operands and constants have no other NaN, and
  // arithmetic makes no other.
  template <class Write>
  INLINE static void store(uint16_t* p, Pack<float> value, Write write) {
    WordPack words;
    EACH_PART(words.part[i] = nearest_high_half((Words)value.part[i]));
    store_high_halves(p, words, write);
  }
};

struct Float16 {
  using Compute = float;
  using Stored = uint16_t;
  // Exponents are moved by a multiplication, which also turns subnormal halves into normal floats.
  INLINE static Pack<float> load(const uint16_t* p) {
    const WordPack words = load_high_halves(p);
    Pack<float> r;
    EACH_PART(
      const Words magnitude = (words.part[i] & 0x7fff0000u) >> 3;
      const Words special = magnitude | 0x7f800000u;  // infinity and NaN keep an exponent of ones
      const Words moved = (Words)((Floats)magnitude * 0x1p112f);
      r.part[i] = (Floats)((magnitude >= 0x0f800000u ? special : moved) | (words.part[i] & 0x80000000u));
    );
    return r;
  }
  // Round to nearest, ties to even; the bits of a subnormal half appear below those of 0.5, rounded as addition rounds.
  template <class Write>
  INLINE static void store(uint16_t* p, Pack<float> value, Write write) {
    WordPack words;
    EACH_PART(
      const Words bits = (Words)value.part[i];
      const Words magnitude = bits & 0x7fffffffu;
      const Words rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
      const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
      Words half = magnitude < 0x38800000u ? subnormal : (rounded - 0x38000000u) >> 13;
      half = rounded >= 0x47800000u ? Words{} + 0x7c00u : half;
      half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
      words.part[i] = half << 16 | (bits & 0x80000000u);
    );
    store_high_halves(p, words, write);
  }
};

// The lines of a row. A row ends, and may begin, in a line that overlaps its neighbor: its first lanes, or the last, are handled
// twice, and `done` of them must not be counted again; or in one that it shares with the next row. Only a row shorter than a
// line is handled in part.
struct Whole {};
struct First : Whole {};  // of two lines whose sums are kept apart
struct Second : Whole {};
struct Joint : Whole {  // the last `count` values of a row and the first of the next
  int64_t count;
};
struct Edge {
  int64_t done;
};
struct Part {
  int64_t count;
};

template <class F>
INLINE auto load(const typename F::Stored* p, Whole) {
  return F::load(p);
}
template <class F>
INLINE auto load(const typename F::Stored* p, Edge) {
  return F::load(p);
}
template <class F>
auto load(const typename F::Stored* p, Part part) {
  typename F::Stored line[Pack<typename F::Compute>::lanes] = {};
  for (int64_t i = 0; i < part.count; ++i) line[i] = p[i];
  return F::load(line);
}

template <class F>
INLINE void store(typename F::Stored* p, Pack<typename F::Compute> value) {
  F::store(p, value, [](void* to, auto bits) __attribute__((always_inline)) { write(to, bits); });
}
// Streams if asked to; p then begins a line of memory.
template <class F>
INLINE void store(typename F::Stored* p, Pack<typename F::Compute> value, Whole, bool streaming) {
  if (streaming)
    F::store(p, value, [](void* to, auto bits) __attribute__((always_inline)) { stream_bits(to, bits); });
  else
    store<F>(p, value);
}
template <class F>
INLINE void store(typename F::Stored* p, Pack<typename F::Compute> value, Edge, bool) {
  store<F>(p, value);
}
template <class F>
void store(typename F::Stored* p, Pack<typename F::Compute> value, Part part, bool) {
  typename F::Stored line[Pack<typename F::Compute>::lanes];
  store<F>(line, value);
  for (int64_t i = 0; i < part.count; ++i) p[i] = line[i];
}

// The new lanes of a sum: without those done before, and those past the end of a short row.
template <class A>
struct Flags {
  typename Integer<A>::type of[2 * Pack<A>::lanes] = {};
  constexpr Flags() {
    for (int i = Pack<A>::lanes; i < 2 * Pack<A>::lanes; ++i) of[i] = -1;
  }
};
template <class A>
constexpr Flags<A> flags;

template <class A>
INLINE Mask<A> lanes_from(int64_t first) {
  Mask<A> r;
  EACH_PART(r.part[i] = read<typename Mask<A>::Vector>(flags<A>.of + Pack<A>::lanes - first + i * r.part_lanes));
  return r;
}
template <class A>
INLINE Pack<A> fresh(Pack<A> value, Whole) {
  return value;
}
template <class A>
INLINE Pack<A> fresh(Pack<A> value, Edge edge) {
  return select(lanes_from<A>(edge.done), value, splat<A>(0));
}
template <class A>
INLINE Pack<A> fresh(Pack<A> value, Part part) {
  return select(lanes_from<A>(part.count), splat<A>(0), value);
}

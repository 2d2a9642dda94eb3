// One cache line of values in registers: arithmetic, loads and stores. Included once per instruction set, with VECTOR_BYTES the
// width of its registers. No operation here depends on that width, nor on the machine: these are GCC's vectors, which Clang
// has too. (A NaN's sign and payload are the machine's, and promised to nobody.)

template <class A>
struct Pack {
  static constexpr int lanes = line_bytes / sizeof(A);
  static constexpr int parts = line_bytes / VECTOR_BYTES;
  static constexpr int part_lanes = lanes / parts;
  typedef A Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector part[parts];

  // Copied part by part: GCC copies whole structures through memory, which it then waits for.
  Pack() = default;
  INLINE Pack(const Pack& other) { *this = other; }
  INLINE Pack& operator=(const Pack& other) {
    EACH_PART(part[i] = other.part[i]);
    return *this;
  }
};

// Comparisons give all ones or all zeros in each lane.
template <class A>
struct Mask {
  static constexpr int parts = Pack<A>::parts, part_lanes = Pack<A>::part_lanes;
  typedef typename Integer<A>::type Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector part[parts];
};

template <class A>
INLINE Pack<A> splat(A value) {
  Pack<A> r;
  EACH_PART(r.part[i] = value - typename Pack<A>::Vector{});
  return r;
}

template <class A>
INLINE Pack<A> operator+(Pack<A> a, Pack<A> b) {
  EACH_PART(a.part[i] += b.part[i]);
  return a;
}
template <class A>
INLINE Pack<A> operator-(Pack<A> a, Pack<A> b) {
  EACH_PART(a.part[i] -= b.part[i]);
  return a;
}
template <class A>
INLINE Pack<A> operator*(Pack<A> a, Pack<A> b) {
  EACH_PART(a.part[i] *= b.part[i]);
  return a;
}
template <class A>
INLINE Pack<A> operator/(Pack<A> a, Pack<A> b) {
  EACH_PART(a.part[i] /= b.part[i]);
  return a;
}
template <class A>
INLINE Mask<A> operator<(Pack<A> a, Pack<A> b) {
  Mask<A> r;
  EACH_PART(r.part[i] = (typename Mask<A>::Vector)(a.part[i] < b.part[i]));
  return r;
}
template <class A>
INLINE Mask<A> operator<=(Pack<A> a, Pack<A> b) {
  Mask<A> r;
  EACH_PART(r.part[i] = (typename Mask<A>::Vector)(a.part[i] <= b.part[i]));
  return r;
}
template <class A>
INLINE Pack<A> select(Mask<A> mask, Pack<A> yes, Pack<A> no) {
  EACH_PART(yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i]);
  return yes;
}

// The sum of all lanes, halves added to halves.
template <class A>
INLINE A total(Pack<A> a) {
  A lane[Pack<A>::lanes];
  for (int i = 0; i < a.parts; ++i)
    for (int j = 0; j < a.part_lanes; ++j) lane[i * a.part_lanes + j] = a.part[i][j];
  for (int half = Pack<A>::lanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// Memory, at any address.
template <class V>
INLINE V read(const void* p) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  return *static_cast<const Unaligned*>(p);
}
template <class V>
INLINE void write(void* p, V value) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  *static_cast<Unaligned*>(p) = value;
}

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
struct WordPack {
  Words part[line_bytes / VECTOR_BYTES];
};

// One cache line of values in registers: arithmetic, loads, stores and conversions. Included once per instruction set, with
// VECTOR_BYTES the width of its registers. No operation here depends on that width.

template <class A>
struct Pack {
  static constexpr int lanes = line_bytes / sizeof(A);
  static constexpr int parts = line_bytes / VECTOR_BYTES;
  static constexpr int part_lanes = lanes / parts;
  typedef A Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector part[parts];
};

// Comparisons give all ones or all zeros in each lane.
template <class A>
struct Mask {
  typedef typename Integer<A>::type Vector __attribute__((vector_size(VECTOR_BYTES)));
  Vector part[Pack<A>::parts];
};

template <class A>
inline Pack<A> splat(A value) {
  Pack<A> r;
  for (int i = 0; i < r.parts; ++i) r.part[i] = value - typename Pack<A>::Vector{};
  return r;
}

template <class A>
inline Pack<A> operator+(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] += b.part[i];
  return a;
}
template <class A>
inline Pack<A> operator-(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] -= b.part[i];
  return a;
}
template <class A>
inline Pack<A> operator*(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] *= b.part[i];
  return a;
}
template <class A>
inline Pack<A> operator/(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] /= b.part[i];
  return a;
}
template <class A>
inline Mask<A> operator<(Pack<A> a, Pack<A> b) {
  Mask<A> r;
  for (int i = 0; i < a.parts; ++i) r.part[i] = a.part[i] < b.part[i];
  return r;
}
template <class A>
inline Mask<A> operator<=(Pack<A> a, Pack<A> b) {
  Mask<A> r;
  for (int i = 0; i < a.parts; ++i) r.part[i] = a.part[i] <= b.part[i];
  return r;
}
template <class A>
inline Pack<A> select(Mask<A> mask, Pack<A> yes, Pack<A> no) {
  for (int i = 0; i < yes.parts; ++i) yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}

// Lane 0 + lane 1 + ..., in that order.
template <class A>
inline A total(Pack<A> a) {
  A sum = 0;
  for (int i = 0; i < a.parts; ++i)
    for (int j = 0; j < a.part_lanes; ++j) sum += a.part[i][j];
  return sum;
}

// Memory. A Format says how values of a type lie in memory and what they are computed in.
template <class V>
inline V read(const void* p) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  return *static_cast<const Unaligned*>(p);
}
template <class V>
inline void write(void* p, V value) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  *static_cast<Unaligned*>(p) = value;
}

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));

template <class A>
struct Plain {
  using Compute = A;
  using Stored = A;
  using Vector = typename Pack<A>::Vector;
  using Bits = Vector;
  static Vector widen(Bits bits) { return bits; }
  static Bits narrow(Vector value) { return value; }
};

struct BFloat16 {
  using Compute = float;
  using Stored = uint16_t;
  using Bits = HalfWords;
  static Floats widen(Bits bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }
  // Round to nearest, ties to even; every NaN becomes the quiet one torch writes.
  static Bits narrow(Floats value) {
    const Words bits = (Words)value;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = Words{} + 0x7fc0u;
    return __builtin_convertvector(value == value ? rounded : nan, HalfWords);
  }
};

struct Float16 {
  using Compute = float;
  using Stored = uint16_t;
  using Bits = HalfWords;
  // Exponents are moved by a multiplication, which also turns subnormal halves into normal floats.
  static Floats widen(Bits bits) {
    const Words wide = __builtin_convertvector(bits, Words);
    const Words magnitude = (wide & 0x7fffu) << 13;
    const Floats scaled = (Floats)magnitude * 0x1p112f;
    const Words special = magnitude | 0x7f800000u;  // infinity and NaN keep an exponent of ones
    const Words value = magnitude >= 0x0f800000u ? special : (Words)scaled;
    return (Floats)(value | ((wide & 0x8000u) << 16));
  }
  // Round to nearest, ties to even. Adding a power of two that is 2^13 (2^24 for subnormals: a fixed 2^-1) above the value
  // drops the bits a half lacks, rounded as IEEE addition rounds.
  static Bits narrow(Floats value) {
    const Words bits = (Words)value;
    const Words magnitude = bits & 0x7fffffffu;
    const Words rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    const Words normal = (rounded - 0x38000000u) >> 13;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    Words half = magnitude < 0x38800000u ? subnormal : normal;
    half = rounded >= 0x47800000u ? Words{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), HalfWords);
  }
};

// How many values of a row are handled at once: a whole line, or the rest of the row.
struct Whole {};
struct Some {
  int64_t count;
};

template <class F>
inline auto load(const typename F::Stored* p, Whole, typename F::Compute /*fill*/ = 0) {
  Pack<typename F::Compute> r;
  for (int i = 0; i < r.parts; ++i) r.part[i] = F::widen(read<typename F::Bits>(p + i * r.part_lanes));
  return r;
}

template <class F>
inline void store(typename F::Stored* p, Pack<typename F::Compute> value, Whole) {
  for (int i = 0; i < value.parts; ++i) write(p + i * value.part_lanes, F::narrow(value.part[i]));
}

// Lanes past the end hold `fill`.
template <class F>
inline auto load(const typename F::Stored* p, Some some, typename F::Compute fill = 0) {
  using A = typename F::Compute;
  typename F::Stored line[Pack<A>::lanes] = {};
  for (int64_t i = 0; i < some.count; ++i) line[i] = p[i];
  A lane[Pack<A>::lanes];
  const Pack<A> loaded = load<F>(line, Whole{});
  store<Plain<A>>(lane, loaded, Whole{});
  for (int64_t i = some.count; i < Pack<A>::lanes; ++i) lane[i] = fill;
  return load<Plain<A>>(lane, Whole{});
}

template <class F>
inline void store(typename F::Stored* p, Pack<typename F::Compute> value, Some some) {
  typename F::Stored line[Pack<typename F::Compute>::lanes];
  store<F>(line, value, Whole{});
  for (int64_t i = 0; i < some.count; ++i) p[i] = line[i];
}

// Past the caches. p is a multiple of the vector's size.
template <class V>
inline void stream_bits(void* p, V value) {
  if constexpr (sizeof(V) == 8) _mm_stream_si64(static_cast<long long*>(p), __builtin_bit_cast(long long, value));
  if constexpr (sizeof(V) == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)value);
  if constexpr (sizeof(V) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)value);
  if constexpr (sizeof(V) == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)value);
}

template <class F>
inline void stream(typename F::Stored* p, Pack<typename F::Compute> value) {
  for (int i = 0; i < value.parts; ++i) stream_bits(p + i * value.part_lanes, F::narrow(value.part[i]));
}

// One cache line of values in registers: arithmetic, loads, stores and conversions. Included once per instruction set, with
// VECTOR_BYTES the width of its registers. No operation here depends on that width.

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
    for (int i = 0; i < parts; ++i) part[i] = other.part[i];
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
  for (int i = 0; i < r.parts; ++i) r.part[i] = value - typename Pack<A>::Vector{};
  return r;
}

template <class A>
INLINE Pack<A> operator+(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] += b.part[i];
  return a;
}
template <class A>
INLINE Pack<A> operator-(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] -= b.part[i];
  return a;
}
template <class A>
INLINE Pack<A> operator*(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] *= b.part[i];
  return a;
}
template <class A>
INLINE Pack<A> operator/(Pack<A> a, Pack<A> b) {
  for (int i = 0; i < a.parts; ++i) a.part[i] /= b.part[i];
  return a;
}
template <class A>
INLINE Mask<A> operator<(Pack<A> a, Pack<A> b) {
  Mask<A> r;
  for (int i = 0; i < a.parts; ++i) r.part[i] = a.part[i] < b.part[i];
  return r;
}
template <class A>
INLINE Mask<A> operator<=(Pack<A> a, Pack<A> b) {
  Mask<A> r;
  for (int i = 0; i < a.parts; ++i) r.part[i] = a.part[i] <= b.part[i];
  return r;
}
template <class A>
INLINE Pack<A> select(Mask<A> mask, Pack<A> yes, Pack<A> no) {
  for (int i = 0; i < yes.parts; ++i) yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}

// a > b ? a : b, and a < b ? a : b, which is b where one of them is NaN: the machine's own instructions.
#define EXTREME(name, op)                                                                       \
  template <class V>                                                                            \
  INLINE V name##_part(V a, V b) {                                                              \
    constexpr bool floats = sizeof(a[0]) == sizeof(float);                                      \
    if constexpr (sizeof(V) == 16 && floats) return (V)_mm_##op##_ps((__m128)a, (__m128)b);     \
    if constexpr (sizeof(V) == 16 && !floats) return (V)_mm_##op##_pd((__m128d)a, (__m128d)b);  \
    if constexpr (sizeof(V) == 32 && floats) return (V)_mm256_##op##_ps((__m256)a, (__m256)b);  \
    if constexpr (sizeof(V) == 32 && !floats) return (V)_mm256_##op##_pd((__m256d)a, (__m256d)b); \
    if constexpr (sizeof(V) == 64 && floats) return (V)_mm512_##op##_ps((__m512)a, (__m512)b);  \
    if constexpr (sizeof(V) == 64 && !floats) return (V)_mm512_##op##_pd((__m512d)a, (__m512d)b); \
  }                                                                                             \
  template <class A>                                                                            \
  INLINE Pack<A> name(Pack<A> a, Pack<A> b) {                                                   \
    for (int i = 0; i < a.parts; ++i) a.part[i] = name##_part(a.part[i], b.part[i]);            \
    return a;                                                                                   \
  }
EXTREME(larger, max)
EXTREME(smaller, min)
#undef EXTREME

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

// Memory. A Format says how values of a type lie in memory and what they are computed in.
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

// 16 half words to the high halves of words, and back, in order. (GCC's own __builtin_convertvector takes twice the
// instructions.)
template <int bytes>
INLINE WordPack load_high_halves(const uint16_t* p) {
  WordPack r;
  if constexpr (bytes == 16)
    for (int i = 0; i < 2; ++i) {
      const __m128i eight = read<__m128i>(p + 8 * i), zero = _mm_setzero_si128();
      r.part[2 * i] = (Words)_mm_unpacklo_epi16(zero, eight);
      r.part[2 * i + 1] = (Words)_mm_unpackhi_epi16(zero, eight);
    }
  if constexpr (bytes == 32)
    for (int i = 0; i < 2; ++i) r.part[i] = (Words)_mm256_cvtepu16_epi32(read<__m128i>(p + 8 * i)) << 16;
  if constexpr (bytes == 64) {
    static constexpr uint16_t place[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                           0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i sixteen = _mm512_castsi256_si512(read<__m256i>(p));
    r.part[0] = (Words)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, read<__m512i>(place), sixteen);
  }
  return r;
}
template <int bytes, class Write>
INLINE void store_high_halves(uint16_t* p, WordPack words, Write write) {
  if constexpr (bytes == 64) {
    static constexpr uint16_t high[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    write(p, _mm512_castsi512_si256(_mm512_permutexvar_epi16(read<__m512i>(high), (__m512i)words.part[0])));
    return;
  }
  // As signed numbers, because the packing instruction for those is the older.
  for (auto& part : words.part) part = (Words)((Mask<float>::Vector)part >> 16);
  if constexpr (bytes == 16)
    for (int i = 0; i < 2; ++i)
      write(p + 8 * i, _mm_packs_epi32((__m128i)words.part[2 * i], (__m128i)words.part[2 * i + 1]));
  if constexpr (bytes == 32) {
    const __m256i mixed = _mm256_packs_epi32((__m256i)words.part[0], (__m256i)words.part[1]);
    write(p, _mm256_permute4x64_epi64(mixed, 0b11011000));
  }
}

// How values lie in memory and what they are computed in.
template <class A>
struct Plain {
  using Compute = A;
  using Stored = A;
  INLINE static Pack<A> load(const A* p) {
    Pack<A> r;
    for (int i = 0; i < r.parts; ++i) r.part[i] = read<typename Pack<A>::Vector>(p + i * r.part_lanes);
    return r;
  }
  template <class Write>
  INLINE static void store(A* p, Pack<A> value, Write write) {
    for (int i = 0; i < value.parts; ++i) write(p + i * value.part_lanes, value.part[i]);
  }
};

// bits + 0x7fff, or 0x8000 where the high half is odd. (GCC makes two steps of the test.)
INLINE Words nearest_high_half(Words bits) {
  const Words below_half = Words{} + 0x7fffu, half = Words{} + 0x8000u;
#if VECTOR_BYTES == 64
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  return bits + (Words)_mm512_mask_blend_epi32(odd, (__m512i)below_half, (__m512i)half);
#else
  return bits + ((bits & 0x10000u) != 0 ? half : below_half);
#endif
}

struct BFloat16 {
  using Compute = float;
  using Stored = uint16_t;
  INLINE static Pack<float> load(const uint16_t* p) {
    const WordPack words = load_high_halves<VECTOR_BYTES>(p);
    Pack<float> r;
    for (int i = 0; i < r.parts; ++i) r.part[i] = (Floats)words.part[i];
    return r;
  }
  // Round to nearest, ties to even. NaN stays NaN, for its lower half is 0: operands and constants have no other, and
  // arithmetic makes no other.
  template <class Write>
  INLINE static void store(uint16_t* p, Pack<float> value, Write write) {
    WordPack words;
    for (int i = 0; i < value.parts; ++i) words.part[i] = nearest_high_half((Words)value.part[i]);
    store_high_halves<VECTOR_BYTES>(p, words, write);
  }
};

struct Float16 {
  using Compute = float;
  using Stored = uint16_t;
  // Exponents are moved by a multiplication, which also turns subnormal halves into normal floats.
  INLINE static Pack<float> load(const uint16_t* p) {
    const WordPack words = load_high_halves<VECTOR_BYTES>(p);
    Pack<float> r;
    for (int i = 0; i < r.parts; ++i) {
      const Words magnitude = (words.part[i] & 0x7fff0000u) >> 3;
      const Words special = magnitude | 0x7f800000u;  // infinity and NaN keep an exponent of ones
      const Words moved = (Words)((Floats)magnitude * 0x1p112f);
      r.part[i] = (Floats)((magnitude >= 0x0f800000u ? special : moved) | (words.part[i] & 0x80000000u));
    }
    return r;
  }
  // Round to nearest, ties to even; the bits of a subnormal half appear below those of 0.5, rounded as addition rounds.
  template <class Write>
  INLINE static void store(uint16_t* p, Pack<float> value, Write write) {
    WordPack words;
    for (int i = 0; i < value.parts; ++i) {
      const Words bits = (Words)value.part[i];
      const Words magnitude = bits & 0x7fffffffu;
      const Words rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
      const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
      Words half = magnitude < 0x38800000u ? subnormal : (rounded - 0x38000000u) >> 13;
      half = rounded >= 0x47800000u ? Words{} + 0x7c00u : half;
      half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
      words.part[i] = half << 16 | (bits & 0x80000000u);
    }
    store_high_halves<VECTOR_BYTES>(p, words, write);
  }
};

// Past the caches. p is a multiple of the vector's size.
template <class V>
INLINE void stream_bits(void* p, V value) {
  if constexpr (sizeof(V) == 8) _mm_stream_si64(static_cast<long long*>(p), __builtin_bit_cast(long long, value));
  if constexpr (sizeof(V) == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)value);
  if constexpr (sizeof(V) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)value);
  if constexpr (sizeof(V) == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)value);
}

// The lines of a row. A row ends, and may begin, in a line that overlaps its neighbour: its first lanes, or the last, are handled
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
// Streams where that is asked and p, as it then does, begins a line of memory.
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

// The lanes of a sum that are new: not those done before, nor those past a short row's end.
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
  for (int i = 0; i < r.parts; ++i)
    r.part[i] = read<typename Mask<A>::Vector>(flags<A>.of + Pack<A>::lanes - first + i * r.part_lanes);
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

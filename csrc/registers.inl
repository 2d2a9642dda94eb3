// What has a form of its own for each width of registers: extremes, conversions between 16 and 32 bits, flags, stores past the
// caches. 16 bytes wide they serve any CPU: interleavings are one instruction on x86 and on ARM. Included once per instruction
// set, after lanes.inl.

// a > b ? a : b, and a < b ? a : b, which is b where one of them is NaN: x86's own instructions, which GCC does not find where
// one is a constant.
#ifdef __x86_64__
#define EXTREME_PART(name, op, _)                                                             \
  template <class V>                                                                          \
  INLINE V name##_part(V a, V b) {                                                            \
    constexpr bool floats = sizeof(a[0]) == sizeof(float);                                    \
    if constexpr (sizeof(V) == 16 && floats) return (V)_mm_##op##_ps((__m128)a, (__m128)b);   \
    if constexpr (sizeof(V) == 16 && !floats) return (V)_mm_##op##_pd((__m128d)a, (__m128d)b); \
    if constexpr (sizeof(V) == 32 && floats) return (V)_mm256_##op##_ps((__m256)a, (__m256)b); \
    if constexpr (sizeof(V) == 32 && !floats) return (V)_mm256_##op##_pd((__m256d)a, (__m256d)b); \
    if constexpr (sizeof(V) == 64 && floats) return (V)_mm512_##op##_ps((__m512)a, (__m512)b); \
    if constexpr (sizeof(V) == 64 && !floats) return (V)_mm512_##op##_pd((__m512d)a, (__m512d)b); \
  }
#else
#define EXTREME_PART(name, _, sign)   \
  template <class V>                  \
  INLINE V name##_part(V a, V b) {    \
    return a sign b ? a : b;          \
  }
#endif
#define EXTREME(name, op, sign)                                            \
  EXTREME_PART(name, op, sign)                                             \
  template <class A>                                                       \
  INLINE Pack<A> name(Pack<A> a, Pack<A> b) {                              \
    EACH_PART(a.part[i] = name##_part(a.part[i], b.part[i]));              \
    return a;                                                              \
  }
EXTREME(larger, max, >)
EXTREME(smaller, min, <)
#undef EXTREME
#undef EXTREME_PART

#if VECTOR_BYTES == 16

typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

// Lanes of a, and of b counted on.
template <int... lane, class V>
INLINE V lanes_of(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, V{lane...});
#endif
}
INLINE Words low_interleaved(Halves a, Halves b) { return (Words)lanes_of<0, 8, 1, 9, 2, 10, 3, 11>(a, b); }
INLINE Words high_interleaved(Halves a, Halves b) { return (Words)lanes_of<4, 12, 5, 13, 6, 14, 7, 15>(a, b); }

constexpr bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// 16 half words to the high halves of words, and back, in order.
INLINE WordPack load_high_halves(const uint16_t* p) {
  WordPack r;
  for (int i = 0; i < 2; ++i) {
    const Halves eight = read<Halves>(p + 8 * i), zero = {};
    const Halves first = little_endian ? zero : eight, second = little_endian ? eight : zero;
    r.part[2 * i] = low_interleaved(first, second);
    r.part[2 * i + 1] = high_interleaved(first, second);
  }
  return r;
}
INLINE Halves high_halves(Words a, Words b) {
#ifdef __SSE2__
  // Packed as signed numbers: three instructions, where GCC makes six of the lanes below.
  typedef int32_t Signed __attribute__((vector_size(16)));
  return (Halves)_mm_packs_epi32((__m128i)((Signed)a >> 16), (__m128i)((Signed)b >> 16));
#else
  constexpr int k = little_endian;
  return lanes_of<k, k + 2, k + 4, k + 6, k + 8, k + 10, k + 12, k + 14>((Halves)a, (Halves)b);
#endif
}
template <class Write>
INLINE void store_high_halves(uint16_t* p, WordPack words, Write write) {
  for (int i = 0; i < 2; ++i) write(p + 8 * i, high_halves(words.part[2 * i], words.part[2 * i + 1]));
}

// Which of 16 flags are set.
INLINE Mask<float> nonzero(const bool* flags, float) {
  typedef typename Mask<float>::Vector Vector;
  const Bytes sixteen = read<Bytes>(flags), none = {};
  const Halves zero = {};
  const Halves halves[2] = {
      (Halves)lanes_of<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(sixteen, none),
      (Halves)lanes_of<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(sixteen, none)};
  Mask<float> r;
  for (int i = 0; i < 2; ++i) {
    r.part[2 * i] = (Vector)(low_interleaved(halves[i], zero) != 0);
    r.part[2 * i + 1] = (Vector)(high_interleaved(halves[i], zero) != 0);
  }
  return r;
}

#elif VECTOR_BYTES == 32

INLINE WordPack load_high_halves(const uint16_t* p) {
  WordPack r;
  for (int i = 0; i < 2; ++i) r.part[i] = (Words)_mm256_cvtepu16_epi32(read<__m128i>(p + 8 * i)) << 16;
  return r;
}
template <class Write>
INLINE void store_high_halves(uint16_t* p, WordPack words, Write write) {
  const __m256i mixed = _mm256_packus_epi32((__m256i)(words.part[0] >> 16), (__m256i)(words.part[1] >> 16));
  write(p, _mm256_permute4x64_epi64(mixed, 0b11011000));
}

INLINE Mask<float> nonzero(const bool* flags, float) {
  typedef typename Mask<float>::Vector Vector;
  const __m128i sixteen = read<__m128i>(flags);
  Mask<float> r;
  for (int i = 0; i < 2; ++i) r.part[i] = (Vector)_mm256_cvtepi8_epi32(i ? _mm_srli_si128(sixteen, 8) : sixteen) != 0;
  return r;
}

#else

INLINE WordPack load_high_halves(const uint16_t* p) {
  static constexpr uint16_t place[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                         0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i sixteen = _mm512_castsi256_si512(read<__m256i>(p));
  WordPack r;
  r.part[0] = (Words)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, read<__m512i>(place), sixteen);
  return r;
}
template <class Write>
INLINE void store_high_halves(uint16_t* p, WordPack words, Write write) {
  static constexpr uint16_t high[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  write(p, _mm512_castsi512_si256(_mm512_permutexvar_epi16(read<__m512i>(high), (__m512i)words.part[0])));
}

INLINE Mask<float> nonzero(const bool* flags, float) {
  Mask<float> r;
  r.part[0] = (typename Mask<float>::Vector)_mm512_cvtepi8_epi32(read<__m128i>(flags)) != 0;
  return r;
}

#endif

// bits + 0x7fff, or 0x8000 where the high half is odd. (GCC makes two steps of the test with AVX-512.)
INLINE Words nearest_high_half(Words bits) {
  const Words below_half = Words{} + 0x7fffu, half = Words{} + 0x8000u;
#if VECTOR_BYTES == 64
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  return bits + (Words)_mm512_mask_blend_epi32(odd, (__m512i)below_half, (__m512i)half);
#else
  return bits + ((bits & 0x10000u) != 0 ? half : below_half);
#endif
}

// Past the caches, on x86. p is a multiple of the vector's size.
template <class V>
INLINE void stream_bits(void* p, V value) {
#ifdef __x86_64__
  if constexpr (sizeof(V) == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)value);
  if constexpr (sizeof(V) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)value);
  if constexpr (sizeof(V) == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)value);
#else
  write(p, value);
#endif
}

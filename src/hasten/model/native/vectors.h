// Sixteen numbers as compilers' vectors of 64 bytes, and the instructions of x86 that they have no word for. Included once
// per instruction set, by lanes.h.

namespace {
namespace NAME {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Codes __attribute__((vector_size(16)));

template <class Vector>
inline Vector loaded(const void *from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof value); }
inline Lanes every(float value) { return Lanes{} + value; }
inline Lanes floats(Whole value) { return __builtin_convertvector(value, Lanes); }
// Of whole numbers.
inline Whole whole(Lanes value) { return __builtin_convertvector(value, Whole); }
// Of numbers from -128 to 127.
inline Codes bytes_of(Whole value) { return __builtin_convertvector(value, Codes); }
// The second of two that cannot be compared.
template <class Vector>
inline Vector larger(Vector a, Vector b) {
    return a > b ? a : b;
}
template <class Vector>
inline Vector smaller(Vector a, Vector b) {
    return a < b ? a : b;
}
// bf16 is the upper half of a float.
inline Lanes wide(const uint16_t *from) { return as<Lanes>(__builtin_convertvector(loaded<Halves>(from), Words) << 16); }

// Sixteen float16.
inline Lanes halfs(const char *from) {
#if LEVEL >= 2
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif LEVEL == 1
    __m256 part[2];
    for (int i = 0; i < 2; ++i) part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from) + i));
    return loaded<Lanes>(part);
#else
    const Words word = __builtin_convertvector(loaded<Halves>(from), Words), size = word & 0x7fffu;
    // Below 2^-14 there is no leading one. As floats these are no subnormals, which would be slow.
    const Lanes small = floats(as<Whole>(size)) * 0x1p-24f, usual = as<Lanes>((size << 13) + (112u << 23));
    return as<Lanes>(as<Words>(size < 0x400u ? small : usual) | (word & 0x8000u) << 16);
#endif
}

// Sixteen numbers from -128 to 127.
inline Lanes bytes(const char *from) {
#if LEVEL >= 2
    return floats((Whole)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#else
    return floats(__builtin_convertvector(loaded<Codes>(from), Whole));
#endif
}

// In a fixed order, whatever the instruction set makes of the lanes.
inline float sum(Lanes value) {
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = value[i] + value[i + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

// Lanes that are HALF apart: their sum in the first of the two, in the second what the first is more.
template <int HALF>
inline Lanes crossed(Lanes value) {
    const Whole lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Lanes across;
#ifdef __clang__
    for (int i = 0; i < WIDTH; ++i) across[i] = value[i ^ HALF];
#else
    across = __builtin_shuffle(value, lane ^ HALF);
#endif
    return (lane & HALF) != 0 ? across - value : across + value;
}

inline Halves narrow(Lanes value) {
#if LEVEL >= 3
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    Halves bits;
    for (int64_t i = 0; i < WIDTH; ++i) bits[i] = narrow(value[i]);
    return bits;
#endif
}

// 32 floats to bf16, two to a word.
inline Words narrow_pairs(const float *from) {
#if LEVEL >= 3
    return (Words)_mm512_cvtne2ps_pbh((__m512)loaded<Lanes>(from + WIDTH), (__m512)loaded<Lanes>(from));
#else
    Words bits;
    for (int64_t i = 0; i < WIDTH; ++i) bits[i] = narrow(from[2 * i + 1]) << 16 | narrow(from[2 * i]);
    return bits;
#endif
}

// What a word of a row's inputs, and the same inputs of sixteen outputs, add to their sums. A word holds one float, two bf16
// or four int8 codes.

inline Lanes add_float(Lanes total, Words weights, uint32_t input) { return total + as<Lanes>(weights) * as<float>(input); }

inline Lanes add_bf16(Lanes total, Words weights, uint32_t input) {
#if LEVEL >= 3
    return (Lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)(Words{} + input));
#else
    total += as<Lanes>(weights << 16) * as<float>(input << 16);
    return total + as<Lanes>(weights & 0xffff0000u) * as<float>(input & 0xffff0000u);
#endif
}

#if LEVEL == 1
template <class Each>
inline Whole halves(Whole total, Words weights, Each each) {
    __m256i part[2], from[2];
    std::memcpy(part, &total, sizeof part);
    std::memcpy(from, &weights, sizeof from);
    for (int i = 0; i < 2; ++i) part[i] = _mm256_add_epi32(part[i], _mm256_madd_epi16(each(from[i]), _mm256_set1_epi16(1)));
    std::memcpy(&total, part, sizeof part);
    return total;
}
#elif LEVEL == 0
// Byte by byte, with its sign: a weight from 0 to 63 has none.
inline Whole products(Whole total, Words weights, uint32_t input) {
    for (int i = 0; i < 4; ++i, weights >>= 8, input >>= 8)
        total += ((Whole)(weights << 24) >> 24) * static_cast<int8_t>(input & 255u);
    return total;
}
#endif

// Weights from 0 to 63.
inline Whole add_unsigned(Whole total, Words weights, uint32_t input) {
#if LEVEL >= 2
    return (Whole)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weights, (__m512i)(Words{} + input));
#elif LEVEL == 1
    const __m256i x = _mm256_set1_epi32(static_cast<int>(input));
    return halves(total, weights, [&](__m256i w) { return _mm256_maddubs_epi16(w, x); });
#else
    return products(total, weights, input);
#endif
}

// Bytes from 0 to 255 for weights from -128 to 127. Where the instruction wants them so, their sum is 128 times that of the
// inputs too large.
inline Whole add_byte(Whole total, Words weights, uint32_t input) {
#if LEVEL >= 2
    return (Whole)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weights, (__m512i)(Words{} + input));
#elif LEVEL == 1
    const __m256i x = _mm256_set1_epi32(static_cast<int>(input));
    return halves(total, weights ^ 0x80808080u, [&](__m256i w) {
        // The size of -128 is 128 only as a byte without a sign; inputs have no -128.
        return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    });
#else
    return products(total, weights ^ 0x80808080u, input);
#endif
}

}  // namespace NAME
}  // namespace

// Sixteen numbers at once, in the instruction set that includes this. Included once per instruction set.

namespace {
namespace NAME {

constexpr int64_t WIDTH = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Codes __attribute__((vector_size(16)));

// Added to a float and taken away again, it rounds to a whole number: 1.5 * 2^23.
constexpr float ROUND = 12582912.0f;

template <class To, class From>
inline To as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline Lanes load(const float *from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline Whole load(const int32_t *from) {
    Whole value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof value); }
inline Lanes every(float value) { return Lanes{} + value; }
inline Lanes floats(Whole value) { return __builtin_convertvector(value, Lanes); }
// bf16 is the upper half of a float.
inline Lanes wide(const uint16_t *from) {
    Halves value;
    std::memcpy(&value, from, sizeof value);
    return as<Lanes>(__builtin_convertvector(value, Words) << 16);
}

// In a fixed order, whatever the instruction set makes of the lanes.
inline float sum(Lanes value) {
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = value[i] + value[i + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

inline float dot(const float *a, const float *b, int64_t count) {
    Lanes total = {};
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) total += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < count; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

// Memory for so many values; it only grows.
template <class T>
inline T *grown(std::vector<T> &values, int64_t count) {
    if (static_cast<int64_t>(values.size()) < count) values.resize(count);
    return values.data();
}

// e^x to about 2 units in the last place; 0 far below. NaN stays so.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? every(-87.0f) : x;
    x = x > 88.0f ? every(88.0f) : x;
    // The whole number, in its lowest bits.
    const Lanes shifted = x * 1.44269504088896341f + ROUND, whole = shifted - ROUND;
    const Lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as<Lanes>((as<Words>(shifted) + 127) << 23);
}

// bf16: rounded to the nearest, ties to even; not a number stays so.
inline uint32_t narrow(float value) {
    const uint32_t bits = as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 64 : rounded;
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
    return (Words)_mm512_cvtne2ps_pbh((__m512)load(from + WIDTH), (__m512)load(from));
#else
    Words bits;
    for (int64_t i = 0; i < WIDTH; ++i) bits[i] = narrow(from[2 * i + 1]) << 16 | narrow(from[2 * i]);
    return bits;
#endif
}

// What a word of a row's inputs, and the same inputs of sixteen outputs, add to their sums. A word holds one float, two bf16
// or four int8 codes, for int8 weights shifted by 128 where the instruction wants them unsigned (SHIFTED).

inline Lanes add_float(Lanes total, Words weights, uint32_t input) { return total + as<Lanes>(weights) * as<float>(input); }

inline Lanes add_bf16(Lanes total, Words weights, uint32_t input) {
#if LEVEL >= 3
    return (Lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)(Words{} + input));
#else
    total += as<Lanes>(weights << 16) * as<float>(input << 16);
    return total + as<Lanes>(weights & 0xffff0000u) * as<float>(input & 0xffff0000u);
#endif
}

constexpr bool SHIFTED = LEVEL == 2 || LEVEL == 3;

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

// Weights from -127 to 127.
inline Whole add_signed(Whole total, Words weights, uint32_t input) {
#if LEVEL >= 2
    return (Whole)_mm512_dpbusd_epi32((__m512i)total, (__m512i)(Words{} + input), (__m512i)weights);
#elif LEVEL == 1
    const __m256i x = _mm256_set1_epi32(static_cast<int>(input)), size = _mm256_abs_epi8(x);
    return halves(total, weights, [&](__m256i w) { return _mm256_maddubs_epi16(size, _mm256_sign_epi8(w, x)); });
#else
    return products(total, weights, input);
#endif
}

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

// Bytes. Weights that are wanted soon are fetched by hand: the processor's own guess comes too late.
constexpr int64_t AHEAD = 2048;

inline Words weights_at(const void *panels, int64_t vector) {
    const char *from = static_cast<const char *>(panels) + vector * 64;
    __builtin_prefetch(from + AHEAD);
    Words value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

}  // namespace NAME
}  // namespace

// Sixteen numbers at once, in the instruction set that includes this. Included once per instruction set.

namespace {
namespace NAME {

constexpr int64_t WIDTH = 16;
// Added to a float and taken away again, it rounds to a whole number: 1.5 * 2^23.
constexpr float ROUND = 12582912.0f;

template <class To, class From>
inline To as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// bf16: rounded to the nearest, ties to even; not a number stays so.
inline uint32_t narrow(float value) {
    const uint32_t bits = as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 64 : rounded;
}

}  // namespace NAME
}  // namespace

#ifdef NEON
#include "neon.h"
#else
#include "vectors.h"
#endif

namespace {
namespace NAME {

inline Lanes load(const float *from) { return loaded<Lanes>(from); }

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
    x = smaller(every(88.0f), larger(every(-87.0f), x));
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

// Bytes. Weights that are wanted soon are fetched by hand: the processor's own guess comes too late.
constexpr int64_t AHEAD = 2048;

inline Words weights_at(const void *panels, int64_t vector) {
    const char *from = static_cast<const char *>(panels) + vector * 64;
    __builtin_prefetch(from + AHEAD);
    return loaded<Words>(from);
}

}  // namespace NAME
}  // namespace

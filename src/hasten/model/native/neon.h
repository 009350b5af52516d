// Sixteen numbers as four registers of arm64, and its instructions. Included once per instruction set, by lanes.h.
//
// NEON: 0 what every such processor has, 1 dot products of bytes, 2 bf16 as well. All of them give the same bits.

namespace {
namespace NAME {

// Compilers keep this in registers, and larger vectors of their own in memory.
template <class Quad_, class Number_>
struct Sixteen {
    typedef Quad_ Quad;
    typedef Number_ Number;
    Quad of[4];

    Sixteen() = default;
    Sixteen(Quad a, Quad b, Quad c, Quad d) : of{a, b, c, d} {}
    Sixteen(Number value) : of{Quad{value, value, value, value}, of[0], of[0], of[0]} {}
    Number operator[](int64_t i) const { return of[i / 4][i % 4]; }
};

// What `work` makes of each four numbers.
template <class To, class Work, class... From>
inline To each(Work work, const From &...from) {
    return {work(from.of[0]...), work(from.of[1]...), work(from.of[2]...), work(from.of[3]...)};
}

typedef Sixteen<float32x4_t, float> Lanes;
typedef Sixteen<int32x4_t, int32_t> Whole;
typedef Sixteen<uint32x4_t, uint32_t> Words;
typedef uint16x8x2_t Halves;
typedef int8x16_t Codes;

#define OPERATOR(Type, op) \
    inline Type operator op(Type a, Type b) { return each<Type>([](Type::Quad x, Type::Quad y) { return x op y; }, a, b); }
OPERATOR(Lanes, +)
OPERATOR(Lanes, -)
OPERATOR(Lanes, *)
OPERATOR(Lanes, /)
OPERATOR(Whole, +)
OPERATOR(Whole, &)
OPERATOR(Words, +)
OPERATOR(Words, &)
OPERATOR(Words, |)
OPERATOR(Words, ^)
#undef OPERATOR
inline Lanes operator-(Lanes a) { return each<Lanes>([](float32x4_t x) { return -x; }, a); }
inline Words operator<<(Words a, int by) { return each<Words>([=](uint32x4_t x) { return x << by; }, a); }
inline Words operator>>(Words a, int by) { return each<Words>([=](uint32x4_t x) { return x >> by; }, a); }
inline Lanes &operator+=(Lanes &a, Lanes b) { return a = a + b; }
inline Whole &operator+=(Whole &a, Whole b) { return a = a + b; }

template <class To, class Quad, class Number>
inline To as(Sixteen<Quad, Number> value) {
    return each<To>([](Quad x) { return (typename To::Quad)x; }, value);
}
template <class Vector>
inline Vector loaded(const void *from) {
    typename Vector::Quad of[4];
    std::memcpy(of, from, sizeof of);
    return {of[0], of[1], of[2], of[3]};
}
inline void store(float *to, Lanes value) {
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, value.of[i]);
}
inline Lanes every(float value) { return value; }
inline Lanes floats(Whole value) { return each<Lanes>([](int32x4_t x) { return vcvtq_f32_s32(x); }, value); }
// Of whole numbers.
inline Whole whole(Lanes value) { return each<Whole>([](float32x4_t x) { return vcvtq_s32_f32(x); }, value); }
// Of numbers from -128 to 127.
inline Codes bytes_of(Whole value) {
    return vcombine_s8(vmovn_s16(vcombine_s16(vmovn_s32(value.of[0]), vmovn_s32(value.of[1]))),
                       vmovn_s16(vcombine_s16(vmovn_s32(value.of[2]), vmovn_s32(value.of[3]))));
}
// The second of two that cannot be compared: the instructions for it would take what is no number.
inline Lanes larger(Lanes a, Lanes b) {
    return each<Lanes>([](float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }, a, b);
}
inline Lanes smaller(Lanes a, Lanes b) {
    return each<Lanes>([](float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }, a, b);
}
inline Whole larger(Whole a, Whole b) {
    return each<Whole>([](int32x4_t x, int32x4_t y) { return vmaxq_s32(x, y); }, a, b);
}

// Sixteen of 16 bits, by quads.
template <class To, class Work>
inline To each_half(const void *from, Work work) {
    uint16x8_t part[2];
    std::memcpy(part, from, sizeof part);
    return {work(vget_low_u16(part[0])), work(vget_high_u16(part[0])), work(vget_low_u16(part[1])), work(vget_high_u16(part[1]))};
}
// bf16 is the upper half of a float.
inline Lanes wide(const uint16_t *from) {
    return each_half<Lanes>(from, [](uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); });
}
// Sixteen float16.
inline Lanes halfs(const char *from) {
    return each_half<Lanes>(from, [](uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); });
}
// Sixteen numbers from -128 to 127.
inline Lanes bytes(const char *from) {
    const int8x16_t value = vld1q_s8(reinterpret_cast<const int8_t *>(from));
    const int16x8_t low = vmovl_s8(vget_low_s8(value)), high = vmovl_s8(vget_high_s8(value));
    return floats(Whole(vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                        vmovl_s16(vget_high_s16(high))));
}

// See vectors.h.
inline float sum(Lanes value) {
    const float32x4_t quarter = (value.of[0] + value.of[2]) + (value.of[1] + value.of[3]);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// See vectors.h.
template <int HALF>
inline Lanes crossed(Lanes value) {
    const auto &x = value.of;
    if constexpr (HALF == 8) return {x[2] + x[0], x[3] + x[1], x[0] - x[2], x[1] - x[3]};
    if constexpr (HALF == 4) return {x[1] + x[0], x[0] - x[1], x[3] + x[2], x[2] - x[3]};
    constexpr uint32_t SIGN = 0x80000000u;
    const uint32x4_t signs = HALF == 2 ? uint32x4_t{0, 0, SIGN, SIGN} : uint32x4_t{0, SIGN, 0, SIGN};
    const auto cross = [=](float32x4_t y) {
        return (HALF == 2 ? vextq_f32(y, y, 2) : vrev64q_f32(y)) + (float32x4_t)((uint32x4_t)y ^ signs);
    };
    return each<Lanes>(cross, value);
}

inline Halves narrow(Lanes value) {
#if NEON >= 2
    const auto pair = [](float32x4_t a, float32x4_t b) {
        return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b));
    };
#else
    const auto one = [](float32x4_t x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x), upper = bits >> 16;
        return vmovn_u32(vbslq_u32(vceqq_f32(x, x), (bits + 0x7fffu + (upper & 1u)) >> 16, upper | 64u));
    };
    const auto pair = [&](float32x4_t a, float32x4_t b) { return vcombine_u16(one(a), one(b)); };
#endif
    return {{pair(value.of[0], value.of[1]), pair(value.of[2], value.of[3])}};
}
// 32 floats to bf16, two to a word.
inline Words narrow_pairs(const float *from) {
    const Halves low = narrow(loaded<Lanes>(from)), high = narrow(loaded<Lanes>(from + WIDTH));
    return {(uint32x4_t)low.val[0], (uint32x4_t)low.val[1], (uint32x4_t)high.val[0], (uint32x4_t)high.val[1]};
}

// See vectors.h. An input's word is read as a lane of a register: it need not be spread.

inline Lanes add_float(Lanes total, Words weights, uint32_t input) {
    return each<Lanes>([=](float32x4_t t, uint32x4_t w) { return vfmaq_n_f32(t, (float32x4_t)w, as<float>(input)); }, total, weights);
}

// Rounded as floats are, unlike the dot product of bf16.
inline Lanes add_bf16(Lanes total, Words weights, uint32_t input) {
#if NEON >= 2
    const bfloat16x4_t x = vcreate_bf16(input);
    const auto add = [=](float32x4_t t, uint32x4_t w) {
        const bfloat16x8_t weight = vreinterpretq_bf16_u32(w);
        return vbfmlaltq_lane_f32(vbfmlalbq_lane_f32(t, weight, x, 0), weight, x, 1);
    };
#else
    const float first = as<float>(input << 16), second = as<float>(input & 0xffff0000u);
    const auto add = [=](float32x4_t t, uint32x4_t w) {
        return vfmaq_n_f32(vfmaq_n_f32(t, (float32x4_t)(w << 16), first), (float32x4_t)(w & 0xffff0000u), second);
    };
#endif
    return each<Lanes>(add, total, weights);
}

// Weights from -128 to 127; inputs have no -128.
inline Whole add_signed(Whole total, Words weights, uint32_t input) {
#if NEON >= 1
    const int8x8_t x = vcreate_s8(input);
    const auto add = [=](int32x4_t t, uint32x4_t w) { return vdotq_lane_s32(t, vreinterpretq_s8_u32(w), x, 0); };
#else
    const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(input));
    // Two products have 16 bits.
    const auto add = [=](int32x4_t t, uint32x4_t w) {
        const int8x16_t weight = vreinterpretq_s8_u32(w);
        return vpadalq_s16(t, vpaddq_s16(vmull_s8(vget_low_s8(weight), vget_low_s8(x)), vmull_high_s8(weight, x)));
    };
#endif
    return each<Whole>(add, total, weights);
}
// Weights from 0 to 63.
inline Whole add_unsigned(Whole total, Words weights, uint32_t input) { return add_signed(total, weights, input); }
// Bytes from 0 to 255 for weights from -128 to 127.
inline Whole add_byte(Whole total, Words weights, uint32_t input) { return add_signed(total, weights ^ 0x80808080u, input); }

}  // namespace NAME
}  // namespace

// Weights whose inputs come in groups with a scale of their own: the block formats of GGUF files. Included once per
// instruction set.
//
// A group's products are added as integers, exactly; what a group adds to a sum is then a float. The rows' codes have a
// scale per group, too.

namespace {
namespace NAME {

constexpr bool grouped(Format format) { return format >= Q8_0; }
// Words of a group, and of those that one call of `unpack` gives.
constexpr int64_t group_words(Format format) { return format == Q6_K ? 4 : 8; }
constexpr int64_t unit_words(Format format) { return format == Q8_0 ? 1 : format == Q6_K ? 4 : 2; }
// Whether each group of an output has a number that is added to all its weights.
constexpr bool has_minima(Format format) { return format == Q4_1 || format == Q4_K; }
// What a code is more than the number that it stands for, as `add_code` takes it.
constexpr int32_t offset(Format format) {
    return format == Q4_0 ? 8 : format == Q6_K ? 32 : format == Q8_0 && LEVEL >= 2 ? 128 : 0;
}

template <Format FORMAT>
inline Whole add_code(Whole total, Words weights, uint32_t input) {
    return FORMAT == Q8_0 ? add_byte(total, weights, input) : add_unsigned(total, weights, input);
}

// The codes from a word of a panel on, of sixteen outputs.
template <Format FORMAT>
inline void unpack(const void *panels, int64_t word, Words (&codes)[unit_words(FORMAT)]) {
    constexpr uint32_t LOW = 0x0f0f0f0fu, TOP = 0x30303030u;
    if constexpr (FORMAT == Q8_0) {
        codes[0] = weights_at(panels, word);
    } else if constexpr (FORMAT == Q6_K) {
        const int64_t vector = word / 4 * 3;
        const Words one = weights_at(panels, vector), other = weights_at(panels, vector + 1);
        const Words top = weights_at(panels, vector + 2);
        codes[0] = (one & LOW) | (top << 4 & TOP);
        codes[1] = (one >> 4 & LOW) | (top << 2 & TOP);
        codes[2] = (other & LOW) | (top & TOP);
        codes[3] = (other >> 4 & LOW) | (top >> 2 & TOP);
    } else {
        const Words both = weights_at(panels, word / 2);
        codes[0] = both & LOW;
        codes[1] = both >> 4 & LOW;
    }
}

// A group's 32 inputs times Hadamard's matrix, whose rows have length 1: an outlier is shared out among all of them, so that
// the codes of the others do not suffer. Sums of two keep the same order in every instruction set.
inline void turn(Lanes (&group)[2]) {
    const Lanes one = group[0] * 0.17677669529663687f, other = group[1] * 0.17677669529663687f;
    group[0] = one + other;
    group[1] = one - other;
    for (Lanes &part : group) part = crossed<1>(crossed<2>(crossed<4>(crossed<8>(part))));
}

// Of sixteen outputs in a group: what a code of theirs is worth, and the minimum where there is one.
struct Worth {
    Lanes scale, minimum;
};

// `Linear` has the layouts.
template <Format FORMAT>
inline Worth worth(const void *scales, int64_t panel, int64_t groups, int64_t group) {
    constexpr int64_t BYTES = FORMAT == Q4_K ? 40 : FORMAT == Q6_K ? 18 : has_minima(FORMAT) ? 64 : 32;
    const char *from = static_cast<const char *>(scales);
    const int64_t place = panel * groups + group;
    __builtin_prefetch(from + place * BYTES + AHEAD / 4);
    if constexpr (FORMAT == Q8_0 || FORMAT == Q4_0) {
        return {halfs(from + place * 32), Lanes{}};
    } else if constexpr (FORMAT == Q4_1) {
        return {halfs(from + place * 64), halfs(from + place * 64 + 32)};
    } else if constexpr (FORMAT == Q4_K) {
        const char *super = from + place / 8 * 320, *own = super + 64 + place % 8 * 32;
        return {halfs(super) * bytes(own), halfs(super + 32) * bytes(own + 16)};
    } else {
        const char *super = from + place / 16 * 288;
        return {halfs(super) * bytes(super + 32 + place % 16 * 16), Lanes{}};
    }
}

}  // namespace NAME
}  // namespace

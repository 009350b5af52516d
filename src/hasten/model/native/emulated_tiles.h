// Tile registers in plain C++, for processors without them: what a test compiles LEVEL 4 with (EMULATED_TILES).

namespace {
namespace emulated {

struct Tile {
    alignas(64) unsigned char row[16][64];
};

inline Tile &tile(int number) {
    static thread_local Tile all[8];
    return all[number];
}
inline void zero(int number) { tile(number) = Tile{}; }
inline void load(int number, const void *from, int64_t step) {
    for (int64_t i = 0; i < 16; ++i) std::memcpy(tile(number).row[i], static_cast<const char *>(from) + i * step, 64);
}
inline void store(int number, void *to, int64_t step) {
    for (int64_t i = 0; i < 16; ++i) std::memcpy(static_cast<char *>(to) + i * step, tile(number).row[i], 64);
}

// sum[m][n] += product(word k of row m of `one`, word n of row k of `other`), in the order of k.
template <class Sum, class Product>
inline void add_products(int sum, int one, int other, Product product) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            Sum total;
            std::memcpy(&total, tile(sum).row[m] + 4 * n, 4);
            for (int k = 0; k < 16; ++k) total = product(total, tile(one).row[m] + 4 * k, tile(other).row[k] + 4 * n);
            std::memcpy(tile(sum).row[m] + 4 * n, &total, 4);
        }
}
// Signed bytes times bytes without a sign.
inline void add_bytes(int sum, int one, int other) {
    add_products<int32_t>(sum, one, other, [](int32_t total, const unsigned char *a, const unsigned char *b) {
        for (int i = 0; i < 4; ++i) total += static_cast<signed char>(a[i]) * b[i];
        return total;
    });
}
inline float half_at(const unsigned char *from) {
    const uint32_t bits = static_cast<uint32_t>(from[1]) << 24 | static_cast<uint32_t>(from[0]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void add_bf16(int sum, int one, int other) {
    add_products<float>(sum, one, other, [](float total, const unsigned char *a, const unsigned char *b) {
        return total + half_at(a) * half_at(b) + half_at(a + 2) * half_at(b + 2);
    });
}

}  // namespace emulated
}  // namespace

// All rows have their whole length here.
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_zero(number) emulated::zero(number)
#define _tile_loadd(number, from, step) emulated::load(number, from, step)
#define _tile_stored(number, to, step) emulated::store(number, to, step)
#define _tile_dpbf16ps(sum, one, other) emulated::add_bf16(sum, one, other)
#define _tile_dpbsud(sum, one, other) emulated::add_bytes(sum, one, other)

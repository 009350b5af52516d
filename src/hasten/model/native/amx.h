// Products in the processor's tile registers (AMX). Included once per instruction set; empty for those without.
//
// Sixteen vectors of a panel are a tile of weights, sixteen words of up to sixteen rows one of inputs: both layouts are
// the hardware's own. Tiles always have sixteen rows. What lies behind a block's rows is multiplied, too, and left alone,
// so that a row goes through the same instructions whatever stands beside it.

namespace {
namespace NAME {

#if LEVEL >= 4

// Makes the registers usable for as long as it lives: four tiles of sums, two of inputs, two of weights.
class TileRegisters {
  public:
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        static_assert(sizeof config == 64);
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters &) = delete;
};

constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t TILE_ROWS = 16;

// The compiler does not know that a tile is read from memory.
inline void written() { __asm__ volatile("" ::: "memory"); }

inline void fetch_tile(const char *from) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < TILE_BYTES; i += 64) __builtin_prefetch(from + i);
}

#define TILE_DOT(sum, input, weight)        \
    if constexpr (FORMAT == BFLOAT16)       \
        _tile_dpbf16ps(sum, input, weight); \
    else                                    \
        _tile_dpbsud(sum, input, weight);

// The sums of BLOCKS times 16 rows in PANELS panels, of bf16 or of codes without a sign, over so many tiles of inputs, which are `step` bytes apart. With
// `fetched`, the panels' next tiles are fetched meanwhile: from further ahead, they would push each other out of the
// nearest cache.
template <Format FORMAT, int BLOCKS, int PANELS>
inline void tile_products(const char *const *panels, bool fetched, const char *inputs, int64_t step, int64_t count,
                          Lanes (*sums)[MOST]) {
    static_assert(BLOCKS * PANELS <= 4 && BLOCKS * TILE_ROWS <= MOST);
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0, at = 0; i < count; ++i, inputs += step, at += TILE_BYTES) {
        if (fetched)
            for (int p = 0; p < PANELS; ++p) fetch_tile(panels[p] + at + TILE_BYTES);
        _tile_loadd(4, inputs, 64);
        _tile_loadd(6, panels[0] + at, 64);
        TILE_DOT(0, 4, 6)
        _tile_loadd(7, panels[1] + at, 64);
        TILE_DOT(1, 4, 7)
        if constexpr (BLOCKS == 2) {
            _tile_loadd(5, inputs + TILE_BYTES, 64);
            TILE_DOT(2, 5, 6)
            TILE_DOT(3, 5, 7)
        } else if constexpr (PANELS == 4) {
            _tile_loadd(6, panels[2] + at, 64);
            TILE_DOT(2, 4, 6)
            _tile_loadd(7, panels[3] + at, 64);
            TILE_DOT(3, 4, 7)
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if constexpr (BLOCKS == 2) {
        _tile_stored(2, sums[0] + TILE_ROWS, 64);
        _tile_stored(3, sums[1] + TILE_ROWS, 64);
    } else if constexpr (PANELS == 4) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    written();
}

#undef TILE_DOT

#else

struct TileRegisters {};

#endif

}  // namespace NAME
}  // namespace

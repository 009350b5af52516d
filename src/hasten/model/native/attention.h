// Attention of the rows of a pass over the cache's own memory. Included once per instruction set.
//
// Each query sums over the slots that it sees in their order, so neither other rows nor slots that it does not see
// (other branches of a tree) change a bit of its result.

namespace {
namespace NAME {

constexpr int64_t TILE = 16;  // queries that are computed together
constexpr int IN_REGISTERS = LEVEL >= 2 ? 16 : 4;  // lanes that are added to, beside what is added

#if LEVEL >= 2

// The sums of the lower and upper lanes of COUNT pairs of vectors: halves of a slot's sums come together, then quarters.
template <int COUNT>
inline void fold(const Lanes *one, const Lanes *other, Lanes *to, int half) {
    const Whole lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, upper = (lane & half) != 0;
    const Whole own = upper ? lane + (16 - half) : lane, across = upper ? lane + 16 : lane + half;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) to[i] = __builtin_shuffle(one[i], other[i], own) + __builtin_shuffle(one[i], other[i], across);
}

// Dot products of QUERIES queries with 16 keys of d channels, whole vectors; `D` is d where that is known. Keys are taken by
// 8, as they meet in `fold`: so two queries share them in registers. Unrolled, all that has no name stays in registers.
template <int QUERIES, int64_t D>
inline void dots(const float *const *query, const float *keys, int64_t d, Lanes *result) {
    if (D) d = D;
    Lanes half[QUERIES][2][4];
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
        Lanes total[QUERIES][8];
#pragma GCC unroll 2
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 8
            for (int n = 0; n < 8; ++n) total[q][n] = Lanes{};
        for (int64_t i = 0; i < d; i += WIDTH) {
            Lanes channels[QUERIES];
#pragma GCC unroll 2
            for (int q = 0; q < QUERIES; ++q) channels[q] = load(query[q] + i);
#pragma GCC unroll 8
            for (int n = 0; n < 8; ++n) {
                const Lanes key = load(keys + (n / 4 * 8 + part * 4 + n % 4) * d + i);
#pragma GCC unroll 2
                for (int q = 0; q < QUERIES; ++q) total[q][n] += channels[q] * key;
            }
        }
#pragma GCC unroll 2
        for (int q = 0; q < QUERIES; ++q) fold<4>(total[q], total[q] + 4, half[q][part], 8);
    }
#pragma GCC unroll 2
    for (int q = 0; q < QUERIES; ++q) {
        Lanes quarter[4], eighth[2];
        fold<4>(half[q][0], half[q][1], quarter, 4);
        fold<2>(quarter, quarter + 2, eighth, 2);
        fold<1>(eighth, eighth + 1, result + q, 1);
    }
}

template <int64_t D>
inline void dots(const float *const *query, int64_t queries, const float *keys, int64_t d, Lanes *result) {
    int64_t q = 0;
    for (; q + 2 <= queries; q += 2) dots<2, D>(query + q, keys, d, result + q);
    if (q < queries) dots<1, D>(query + q, keys, d, result + q);
}

#endif

// Dot products of some queries with `count` keys (at most 16) of d channels. Each adds channels 16 apart in order, then the
// sixteen sums by halves.
inline void dots(const float *const *query, int64_t queries, const float *keys, int64_t count, int64_t d, Lanes *result) {
#if LEVEL >= 2
    if (d % WIDTH == 0 && count == WIDTH) {
        if (d == 64) return dots<64>(query, queries, keys, d, result);
        if (d == 128) return dots<128>(query, queries, keys, d, result);
        return dots<0>(query, queries, keys, d, result);
    }
#endif
    for (int64_t q = 0; q < queries; ++q) {
        float sums[WIDTH] = {};
        for (int64_t slot = 0; slot < count; ++slot) sums[slot] = dot(query[q], keys + slot * d, d);
        result[q] = load(sums);
    }
}

// Adds `count` slots' values, weighted, to 16 CHUNKS channels of some queries, which all see all these slots.
template <int QUERIES, int CHUNKS>
inline void add_values(const float *values, int64_t d, int64_t count, float *const *weights, float *const *out, int64_t at) {
    // Unrolled, so that the sums stay in registers.
    Lanes total[QUERIES][CHUNKS];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int c = 0; c < CHUNKS; ++c) total[q][c] = load(out[q] + at + c * WIDTH);
    for (int64_t slot = 0; slot < count; ++slot) {
        Lanes value[CHUNKS];
#pragma GCC unroll 4
        for (int c = 0; c < CHUNKS; ++c) value[c] = load(values + slot * d + at + c * WIDTH);
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int c = 0; c < CHUNKS; ++c) total[q][c] += value[c] * weights[q][slot];
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int c = 0; c < CHUNKS; ++c) store(out[q] + at + c * WIDTH, total[q][c]);
}

template <int QUERIES>
inline void add_to(const float *values, int64_t d, int64_t count, float *const *weights, float *const *out) {
    int64_t i = 0;
    if constexpr (QUERIES * 4 <= IN_REGISTERS)
        for (; i + 4 * WIDTH <= d; i += 4 * WIDTH) add_values<QUERIES, 4>(values, d, count, weights, out, i);
    if constexpr (QUERIES * 2 <= IN_REGISTERS)
        for (; i + 2 * WIDTH <= d; i += 2 * WIDTH) add_values<QUERIES, 2>(values, d, count, weights, out, i);
    for (; i + WIDTH <= d; i += WIDTH) add_values<QUERIES, 1>(values, d, count, weights, out, i);
    for (; i < d; ++i)
        for (int q = 0; q < QUERIES; ++q)
            for (int64_t slot = 0; slot < count; ++slot) out[q][i] += weights[q][slot] * values[slot * d + i];
}

inline void add(const float *values, int64_t d, int64_t count, int64_t queries, float *const *weights, float *const *out) {
    int64_t q = 0;
    for (; q + 4 <= queries; q += 4) add_to<4>(values, d, count, weights + q, out + q);
    for (; q + 2 <= queries; q += 2) add_to<2>(values, d, count, weights + q, out + q);
    for (; q < queries; ++q) add_to<1>(values, d, count, weights + q, out + q);
}

// Some rows of a span, and of each some heads that share a key head: at most TILE queries.
struct Tile {
    int64_t span, first, rows, head, heads;
};

class Attend {
  public:
    // `qkv` is [rows of the pass][width], queries rotated; the result goes to `mixed.row(row) + head * d`.
    void operator()(const Model &model, const Batch &batch, const Tile &tile, int64_t layer, const float *qkv, int64_t width,
                    Inputs &mixed) {
        const Span &span = batch.span[tile.span];
        const int64_t d = model.head_dim, group = model.heads / model.kv_heads, kv_head = tile.head / group;
        const int64_t queries = tile.rows * tile.heads, rows = tile.rows;
        const int64_t room = (count_slots(span, layer) + WIDTH - 1) / WIDTH * WIDTH + WIDTH;
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
        span_ = &span;
        window_ = model.layer[layer].window;
        first_ = tile.first;
        axes_ = batch.axes;
        positions_ = batch.positions + span.start * axes_;
        float *scores = grown(scores_, queries * room);
        const float *query[TILE];
        float *score[TILE], *out[TILE], *next[TILE];
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t row = span.start + tile.first + q / tile.heads, head = tile.head + q % tile.heads;
            query[q] = qkv + row * width + head * d;
            score[q] = next[q] = scores + q * room;
            out[q] = mixed.row(row) + head * d;
            std::fill(out[q], out[q] + d, 0.0f);
        }
        each_block(model, layer, kv_head, rows, [&](const float *keys, const float *, int64_t count, const uint32_t *seen) {
            Lanes found[TILE];
            dots(query, queries, keys, count, d, found);
            for (int64_t q = 0; q < queries; ++q) {
                const uint32_t bits = seen[q / tile.heads];
                found[q] = found[q] * scale;
                if (bits & (bits + 1)) {
                    for (uint32_t left = bits; left; left &= left - 1) *next[q]++ = found[q][__builtin_ctz(left)];
                } else {
                    store(next[q], found[q]);
                    next[q] += __builtin_popcount(bits);
                }
            }
        });
        float inverse[TILE];
        for (int64_t q = 0; q < queries; ++q) inverse[q] = 1.0f / weigh(score[q], next[q] - score[q]);
        std::copy(score, score + queries, next);
        each_block(model, layer, kv_head, rows, [&](const float *, const float *values, int64_t count, const uint32_t *seen) {
            const uint32_t whole = (1u << count) - 1;
            bool all = true;
            for (int64_t row = 0; row < rows; ++row) all = all && seen[row] == whole;
            if (all) {
                add(values, d, count, queries, next, out);
                for (int64_t q = 0; q < queries; ++q) next[q] += count;
                return;
            }
            for (int64_t row = 0; row < rows; ++row)
                for (uint32_t left = seen[row]; left;) {
                    const int64_t start = __builtin_ctz(left), run = __builtin_ctz(~(left >> start));
                    const int64_t own = row * tile.heads;
                    add(values + start * d, d, run, tile.heads, next + own, out + own);
                    for (int64_t q = own; q < own + tile.heads; ++q) next[q] += run;
                    left &= ~(((1u << run) - 1) << start);
                }
        });
        for (int64_t q = 0; q < queries; ++q) {
            for (int64_t i = 0; i < d; ++i) out[q][i] *= inverse[q];
            const int64_t row = span.start + tile.first + q / tile.heads;
            if (mixed.direct()) mixed.put(row, (tile.head + q % tile.heads) * d, d);
        }
    }

  private:
    static int64_t count_slots(const Span &span, int64_t layer) {
        const Slots &slots = span.of(layer);
        int64_t total = span.pending;
        for (int64_t v = 0; v < slots.views; ++v) total += slots.view[v].length;
        return total;
    }
    // Calls `visit(keys, values, count, seen)` for every 16 slots of which some row sees some; `seen` has a bit per slot.
    template <class Visit>
    void each_block(const Model &model, int64_t layer, int64_t kv_head, int64_t rows, Visit visit) {
        const int64_t d = model.head_dim;
        const Slots &slots = span_->of(layer);
        for (int64_t v = 0; v < slots.views; ++v) {
            const View &view = slots.view[v];
            const int64_t plane = (span_->index_of[layer] * model.kv_heads + kv_head) * view.capacity * d;
            const float *keys = view.keys + plane, *values = view.values + plane;
            const int64_t stop = view.length + (v + 1 == slots.views ? span_->pending : 0);
            for (int64_t slot = 0; slot < stop; slot += WIDTH) {
                const int64_t count = std::min(WIDTH, stop - slot);
                uint32_t seen[TILE], any = 0;
                for (int64_t row = 0; row < rows; ++row) any |= seen[row] = bits_of(view, first_ + row, slot, count);
                if (any) visit(keys + slot * d, values + slot * d, count, seen);
            }
        }
    }
    uint32_t bits_of(const View &view, int64_t row, int64_t slot, int64_t count) const {
        if (slot + count <= view.length && !window_) return (1u << count) - 1;
        const int64_t pending = span_->pending, own = pending - (span_->stop - span_->start) + row;
        // Up to its own slot.
        if (!span_->mask && !window_) return (1u << std::clamp<int64_t>(view.length + own + 1 - slot, 0, count)) - 1;
        uint32_t bits = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t other = slot + i - view.length;
            bool sees = other < 0 || (span_->mask ? span_->mask[row * pending + other] != 0 : other <= own);
            if (window_) sees = sees && view.positions[slot + i] > positions_[row * axes_] - window_;
            bits |= static_cast<uint32_t>(sees) << i;
        }
        return bits;
    }

    // Scores become e^(score - the largest); returns their sum.
    static float weigh(float *score, int64_t count) {
        for (int64_t i = count; i % WIDTH; ++i) score[i] = -INFINITY;
        Lanes largest = every(-INFINITY);
        for (int64_t i = 0; i < count; i += WIDTH) largest = larger(largest, load(score + i));
        float most = largest[0];
        for (int i = 1; i < WIDTH; ++i) most = std::max(most, largest[i]);
        Lanes total = {};
        for (int64_t i = 0; i < count; i += WIDTH) {
            store(score + i, exponential(load(score + i) - most));
            for (int64_t j = count; j < i + WIDTH; ++j) score[j] = 0.0f;
            total += load(score + i);
        }
        return sum(total);
    }

    const Span *span_ = nullptr;
    const int64_t *positions_ = nullptr;
    int64_t window_ = 0, first_ = 0, axes_ = 1;
    std::vector<float> scores_;
};

}  // namespace NAME
}  // namespace

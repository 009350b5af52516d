// Attention of the rows of a pass over the cache's own memory. Included once per instruction set.
//
// Each query sums over the slots that it sees in their order, so neither other rows nor slots that it does not see
// (other branches of a tree) change a bit of its result. Nor does it matter who reads them with it: what several sequences
// see of one block is read once for a tile of their queries (Hydragen, arXiv 2402.05099, section 3), in that same order, where the
// paper merges the sums of a shared part and of an own one.

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

// Some rows of a span.
struct Piece {
    int64_t span, first, rows;
};
// So many pieces, those from `piece` on, and of each row some heads that share a key head: at most TILE queries.
struct Tile {
    int64_t piece, pieces, head, heads;
};

// Slots that spans must share for their rows to share tiles.
constexpr int64_t LEAST_SHARED = 64;

// An order of spans in which those that see the same slots stand side by side: what is in a block goes before what left it.
inline bool before(const Slots &one, const Slots &other) {
    return std::lexicographical_compare(
        one.view, one.view + one.views, other.view, other.view + other.views,
        [](const View &a, const View &b) { return a.keys != b.keys ? a.keys < b.keys : a.length > b.length; });
}
// How many slots two spans both see before each sees some of its own.
inline int64_t shared(const Slots &one, const Slots &other) {
    int64_t total = 0;
    for (int64_t v = 0; v < std::min(one.views, other.views); ++v) {
        const View &a = one.view[v], &b = other.view[v];
        if (a.keys != b.keys) break;
        total += std::min(a.length, b.length);
        if (a.length != b.length) break;
    }
    return total;
}

class Attend {
  public:
    // `qkv` is [rows of the pass][width], queries rotated; the result goes to `mixed.row(row) + head * d`. Only the first
    // `present` rows are there in this layer, and only spans whose slots are known here.
    void operator()(const Model &model, const Batch &batch, const Piece *pieces, const Tile &tile, int64_t layer,
                    int64_t present, const float *qkv, int64_t width, Inputs &mixed) {
        const int64_t d = model.head_dim, heads = tile.heads;
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
        window_ = model.layer[layer].window;
        axes_ = batch.axes;
        d_ = d;
        const int64_t rows = gather(model, batch, pieces + tile.piece, tile, layer, present), queries = rows * heads;
        const int64_t room = (most_slots() + WIDTH - 1) / WIDTH * WIDTH + WIDTH;
        float *scores = grown(scores_, queries * room);
        const float *query[TILE];
        float *score[TILE], *out[TILE], *next[TILE];
        int64_t q = 0;
        for (int64_t p = 0; p < members_; ++p)
            for (int64_t i = 0; i < member_[p].rows * heads; ++i, ++q) {
                const int64_t row = member_[p].span->start + member_[p].first + i / heads, head = tile.head + i % heads;
                query[q] = qkv + row * width + head * d;
                score[q] = next[q] = scores + q * room;
                out[q] = mixed.row(row) + head * d;
                std::fill(out[q], out[q] + d, 0.0f);
            }
        each_block([&](const float *keys, const float *, int64_t count, int64_t row, int64_t rows, const uint32_t *seen) {
            const int64_t first = row * heads;
            Lanes found[TILE];
            dots(query + first, rows * heads, keys, count, d, found);
            for (int64_t i = 0; i < rows * heads; ++i) {
                const uint32_t bits = seen[i / heads];
                float *&to = next[first + i];
                found[i] = found[i] * scale;
                if (bits & (bits + 1)) {
                    for (uint32_t left = bits; left; left &= left - 1) *to++ = found[i][__builtin_ctz(left)];
                } else {
                    store(to, found[i]);
                    to += __builtin_popcount(bits);
                }
            }
        });
        float inverse[TILE];
        for (int64_t q = 0; q < queries; ++q) inverse[q] = 1.0f / weigh(score[q], next[q] - score[q]);
        std::copy(score, score + queries, next);
        each_block([&](const float *, const float *values, int64_t count, int64_t row, int64_t rows, const uint32_t *seen) {
            const uint32_t whole = (1u << count) - 1;
            const int64_t first = row * heads;
            bool all = true;
            for (int64_t i = 0; i < rows; ++i) all = all && seen[i] == whole;
            if (all) {
                add(values, d, count, rows * heads, next + first, out + first);
                for (int64_t q = first; q < first + rows * heads; ++q) next[q] += count;
                return;
            }
            for (int64_t i = 0; i < rows; ++i)
                for (uint32_t left = seen[i]; left;) {
                    const int64_t start = __builtin_ctz(left), run = __builtin_ctz(~(left >> start));
                    const int64_t own = first + i * heads;
                    add(values + start * d, d, run, heads, next + own, out + own);
                    for (int64_t q = own; q < own + heads; ++q) next[q] += run;
                    left &= ~(((1u << run) - 1) << start);
                }
        });
        q = 0;
        for (int64_t p = 0; p < members_; ++p)
            for (int64_t i = 0; i < member_[p].rows * heads; ++i, ++q) {
                for (int64_t j = 0; j < d; ++j) out[q][j] *= inverse[q];
                const int64_t row = member_[p].span->start + member_[p].first + i / heads;
                if (mixed.direct()) mixed.put(row, (tile.head + i % heads) * d, d);
            }
    }

  private:
    // Rows of one span in a tile: which of the span's and of the tile's they are, where in each view the slots of this layer
    // and key head are, and the slot that comes next.
    struct Member {
        const Span *span;
        const Slots *slots;
        const int64_t *positions;
        int64_t first, row, rows, plane, view, slot;
        // The view that it is in, as far as others can see the same of it.
        const View *committed() const {
            return view < slots->views && slot < slots->view[view].length ? slots->view + view : nullptr;
        }
        void go_on(int64_t stop) {
            slot = stop;
            if (slot == slots->view[view].length && view + 1 < slots->views) ++view, slot = 0;
        }
    };
    // Who is in a tile; returns how many rows they have.
    int64_t gather(const Model &model, const Batch &batch, const Piece *pieces, const Tile &tile, int64_t layer, int64_t present) {
        int64_t rows = 0;
        members_ = 0;
        for (int64_t p = 0; p < tile.pieces; ++p) {
            const Piece &piece = pieces[p];
            const Span &span = batch.span[piece.span];
            const int64_t count = std::min(piece.rows, present - span.start - piece.first);
            if (count <= 0 || span.of(layer).views == 0) continue;
            const int64_t plane = span.index_of[layer] * model.kv_heads + tile.head / (model.heads / model.kv_heads);
            member_[members_++] = {&span, &span.of(layer), batch.positions + span.start * axes_, piece.first, rows, count, plane, 0, 0};
            rows += count;
        }
        return rows;
    }
    int64_t most_slots() const {
        int64_t most = 0;
        for (int64_t p = 0; p < members_; ++p) {
            int64_t total = member_[p].span->pending;
            for (int64_t v = 0; v < member_[p].slots->views; ++v) total += member_[p].slots->view[v].length;
            most = std::max(most, total);
        }
        return most;
    }
    // Calls `visit(keys, values, count, row, rows, seen)` for every 16 slots of which some of these rows of the tile see some,
    // and for each row in the order of its slots; `seen` has a bit per slot for each of them. Slots that several spans see
    // come once for all of their rows.
    template <class Visit>
    void each_block(Visit visit) {
        for (int64_t p = 0; p < members_; ++p) member_[p].view = member_[p].slot = 0;
        // What a row sees through a window depends on its position.
        if (window_)
            for (int64_t p = 0; p < members_; ++p) alone(member_[p], visit);
        else
            together(0, members_, visit);
    }
    // From where these members, who have seen the same, are.
    template <class Visit>
    void together(int64_t first, int64_t last, Visit &visit) {
        for (int64_t from = first, to; from < last; from = to) {
            const View *view = member_[from].committed();
            int64_t stop = view ? view->length : 0;
            for (to = from + 1; view && to < last; ++to) {
                const View *other = member_[to].committed();
                if (!other || other->keys != view->keys) break;
                stop = std::min(stop, other->length);
            }
            if (to - from == 1) {
                alone(member_[from], visit);
                continue;
            }
            const int64_t row = member_[from].row, rows = member_[to - 1].row + member_[to - 1].rows - row;
            for (int64_t slot = member_[from].slot; slot < stop; slot += WIDTH) {
                const int64_t count = std::min(WIDTH, stop - slot), at = (member_[from].plane * view->capacity + slot) * d_;
                uint32_t seen[TILE];
                std::fill(seen, seen + rows, (1u << count) - 1);
                visit(view->keys + at, view->values + at, count, row, rows, seen);
            }
            for (int64_t p = from; p < to; ++p) member_[p].go_on(stop);
            together(from, to, visit);
        }
    }
    template <class Visit>
    void alone(const Member &member, Visit &visit) const {
        const Slots &slots = *member.slots;
        for (int64_t v = member.view, slot = member.slot; v < slots.views; ++v, slot = 0) {
            const View &view = slots.view[v];
            const int64_t stop = view.length + (v + 1 == slots.views ? member.span->pending : 0);
            for (; slot < stop; slot += WIDTH) {
                const int64_t count = std::min(WIDTH, stop - slot), at = (member.plane * view.capacity + slot) * d_;
                uint32_t seen[TILE], any = 0;
                for (int64_t i = 0; i < member.rows; ++i) any |= seen[i] = bits_of(member, view, member.first + i, slot, count);
                if (any) visit(view.keys + at, view.values + at, count, member.row, member.rows, seen);
            }
        }
    }
    uint32_t bits_of(const Member &member, const View &view, int64_t row, int64_t slot, int64_t count) const {
        if (slot + count <= view.length && !window_) return (1u << count) - 1;
        const Span &span = *member.span;
        const int64_t pending = span.pending, own = pending - (span.stop - span.start) + row;
        // Up to its own slot.
        if (!span.mask && !window_) return (1u << std::clamp<int64_t>(view.length + own + 1 - slot, 0, count)) - 1;
        uint32_t bits = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t other = slot + i - view.length;
            bool sees = other < 0 || (span.mask ? span.mask[row * pending + other] != 0 : other <= own);
            if (window_) sees = sees && view.positions[slot + i] > member.positions[row * axes_] - window_;
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

    Member member_[TILE];
    int64_t members_ = 0, window_ = 0, axes_ = 1, d_ = 0;
    std::vector<float> scores_;
};

}  // namespace NAME
}  // namespace

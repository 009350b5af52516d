// Linear layers over panels of sixteen outputs. Included once per instruction set.
//
// A sum adds its inputs in order, in one lane of one register, whatever other rows and panels share the pass: a row's
// result is the same bits in every batch.

namespace {
namespace NAME {

// Whether products go through tile registers, and the rows of one pass over the weights: the others have a vector register
// for each.
constexpr bool in_tiles(Format format) { return LEVEL >= 4 && format != FLOAT32; }
constexpr int64_t IN_VECTORS = LEVEL >= 4 ? VECTOR_ROWS : MOST;
// Groups take two registers for each row and panel: one for the sums of the group, one for those of all. So few rows as four
// have them anyhow.
constexpr int64_t GROUPED_ROWS = IN_VECTORS > 4 ? IN_VECTORS * 2 / 3 : IN_VECTORS;
constexpr int64_t vector_rows(Format format) { return grouped(format) ? GROUPED_ROWS : IN_VECTORS; }
constexpr int64_t most_rows(Format format) { return in_tiles(format) ? MOST : vector_rows(format); }

// The largest float, and the largest that is 0 beside its own scale: 127 over it would be infinite.
constexpr float MOST_FLOAT = std::numeric_limits<float>::max(), LEAST_CODED = 127.0f / MOST_FLOAT;

// The rows that a linear layer reads, in words as its format wants them. Rows lie in blocks that share a pass over the
// weights: [words / 16][rows of the block][16], so that the kernels read on and on, and no two threads write one line.
class Inputs {
  public:
    // Producers write floats to `row(r)`, then call `put` for what they wrote.
    void shape(const Linear &weight, int64_t rows) {
        format_ = weight.format;
        turned_ = weight.turned;
        rows_ = rows;
        width_ = weight.inputs;
        chunks_ = words_of(weight) / WIDTH;
        groups_ = grouped(format_) ? chunks_ * WIDTH / group_words(format_) : 1;
        const int64_t most = most_rows(format_);
        blocks_ = (rows + most - 1) / most;
        // Equal blocks, but whole tiles.
        size_ = blocks_ == 0 ? 0 : in_tiles(format_) ? std::min(rows, most) : (rows + blocks_ - 1) / blocks_;
        per_word_ = format_ == FLOAT32 ? 1 : format_ == BFLOAT16 ? 2 : 4;
        stride_ = chunks_ * WIDTH * per_word_;
        grown(plain_, rows * stride_);
        // Tiles read on behind the last row.
        grown(words_, (rows * chunks_ + MOST) * WIDTH);
        grown(scales_, rows * groups_);
        grown(starts_, rows * groups_);
        grown(sums_, rows * groups_);
        for (int64_t row = 0; row < rows; ++row) std::fill(this->row(row) + width_, this->row(row) + stride_, 0.0f);
    }
    float *row(int64_t row) { return plain_.data() + row * stride_; }
    // Whether a part of a row can become words by itself; codes need the scale of a whole group.
    bool direct() const { return !grouped(format_); }

    // The floats `first` to `first + count` of a row (whole words, or to its end) become words.
    void put(int64_t row, int64_t first, int64_t count) {
        const float *from = this->row(row);
        uint32_t *to = start(row);
        const int64_t last = first + count == width_ ? chunks_ * WIDTH : (first + count) / per_word_;
        for (int64_t word = first / per_word_; word < last;) {
            const int64_t chunk = word / WIDTH, skip = word % WIDTH, some = std::min(WIDTH - skip, last - word);
            const float *floats = from + chunk * WIDTH * per_word_;
            float own[2 * WIDTH];
            if (some < WIDTH) {
                // The rest belongs to another head: another thread may be writing it.
                std::memset(own, 0, sizeof own);
                std::memcpy(own + skip * per_word_, floats + skip * per_word_, some * per_word_ * sizeof(float));
                floats = own;
            }
            const Words bits = format_ == FLOAT32 ? as<Words>(load(floats)) : narrow_pairs(floats);
            uint32_t *place = to + chunk * WIDTH * size(row);
            if (some == WIDTH)
                std::memcpy(place, &bits, sizeof bits);
            else
                for (int64_t i = skip; i < skip + some; ++i) place[i] = bits[i];
            word += some;
        }
    }
    // Sixteen floats from `first` on, a multiple of sixteen, become words, or wait as floats for the rest of their row.
    void put(int64_t row, int64_t first, Lanes values) {
        if (format_ != BFLOAT16) {
            store(this->row(row) + first, values);
            if (format_ == FLOAT32) std::memcpy(start(row) + first * size(row), &values, sizeof values);
            return;
        }
        uint32_t *to = start(row) + first / (2 * WIDTH) * WIDTH * size(row) + first / 2 % WIDTH;
        const Halves bits = narrow(values);
        std::memcpy(to, &bits, sizeof bits);
        // The last word may have no other half.
        if (first + WIDTH == width_ && first / 2 % WIDTH == 0) std::memset(to + WIDTH / 2, 0, sizeof bits);
    }
    // A whole row becomes int8 codes with a scale per group. One that holds infinity or NaN makes all that is computed from
    // it NaN.
    void quantise(int64_t row) {
        const int64_t vectors = chunks_ * 4 / groups_, apart = WIDTH * size(row);  // one or two
        for (int64_t g = 0; g < groups_; ++g) {
            // The row ends in zeros.
            const float *from = this->row(row) + g * vectors * WIDTH;
            Lanes group[2] = {load(from), load(from + (vectors - 1) * WIDTH)};
            if (turned_) turn(group);
            // Without their signs, floats are ordered as their bits are: infinity and NaN are above all numbers.
            Whole largest = {};
            for (int64_t i = 0; i < vectors; ++i) {
                const Whole size = as<Whole>(group[i]) & 0x7fffffff;
                largest = larger(largest, size);
            }
            int32_t bits_of_most = 0;
            for (int i = 0; i < WIDTH; ++i) bits_of_most = std::max(bits_of_most, largest[i]);
            const float most = as<float>(bits_of_most);
            // What has no finite scale has no codes: all are 0, and a scale of NaN makes the sums NaN.
            const bool coded = most > LEAST_CODED && most <= MOST_FLOAT;
            const float inverse = 127.0f / most;
            Whole total = {};
            for (int64_t i = 0, place = g * vectors; i < vectors; ++i, ++place) {
                Whole codes = {};
                if (coded) codes = whole((group[i] * inverse + ROUND) - ROUND);
                total += codes;
                uint32_t bits[4];
                const Codes bytes = bytes_of(codes);
                std::memcpy(bits, &bytes, sizeof bits);
                std::memcpy(start(row) + place / 4 * apart + place % 4 * 4, bits, sizeof bits);
            }
            int32_t sum = 0;
            for (int i = 0; i < WIDTH; ++i) sum += total[i];
            const float scale = coded ? most / 127.0f : most <= LEAST_CODED ? 0.0f : NAN;
            const int64_t first = row / size_ * size_, at = first * groups_ + g * size(row) + row - first;
            scales_[at] = scale;
            starts_[at] = -offset(format_) * sum;
            sums_[at] = scale * static_cast<float>(sum);
        }
    }
    void put_row(int64_t row) { direct() ? put(row, 0, width_) : quantise(row); }

    int64_t rows() const { return rows_; }
    int64_t blocks() const { return blocks_; }
    int64_t first(int64_t block) const { return block * size_; }
    // Rows of the block that holds this row.
    int64_t size(int64_t row) const { return std::min(size_, rows_ - row / size_ * size_); }
    const uint32_t *words(int64_t first) const { return words_.data() + first * chunks_ * WIDTH; }
    // Of a block of rows, [groups][rows of the block]: what a code is worth.
    const float *scales(int64_t first) const { return scales_.data() + first * groups_; }
    // What the sums of a group begin with, as codes of weights are offset; and the sum of the group's inputs.
    const int32_t *starts(int64_t first) const { return starts_.data() + first * groups_; }
    const float *sums(int64_t first) const { return sums_.data() + first * groups_; }

  private:
    // Where the words of a row begin: sixteen, and the next sixteen behind those of the block's other rows.
    uint32_t *start(int64_t row) {
        const int64_t first = row / size_ * size_;
        return words_.data() + (first * chunks_ + row - first) * WIDTH;
    }
    Format format_ = FLOAT32;
    bool turned_ = false;
    int64_t rows_ = 0, width_ = 0, stride_ = 0, chunks_ = 0, per_word_ = 1, groups_ = 1, blocks_ = 0, size_ = 0;
    std::vector<float> plain_, scales_, sums_;
    std::vector<uint32_t> words_;
    std::vector<int32_t> starts_;
};

template <Format FORMAT>
inline Lanes add_word(Lanes total, Words weights, uint32_t input) {
    return FORMAT == FLOAT32 ? add_float(total, weights, input) : add_bf16(total, weights, input);
}

// Outputs are computed by pairs of panels, one from each half: gates, and what they let through. So each side reads on and
// on in memory.
struct Pairs {
    int64_t count;
    int64_t panel(int64_t pair, int side) const { return pair + side * count; }
};
inline Pairs pairs_of(const Linear &weight) { return {(weight.outputs + 2 * WIDTH - 1) / (2 * WIDTH)}; }

// The sums of a block of rows in the panels of up to two pairs.
struct alignas(64) Sums {
    Lanes of[4][MOST];
};

// Adds all words of ROWS rows of a block times PANELS panels to their sums; for formats without groups.
template <Format FORMAT, int ROWS, int PANELS>
inline void add_words(const Linear &weight, const int64_t *panel, const uint32_t *inputs, Lanes (&total)[ROWS][PANELS]) {
    const int64_t words = words_of(weight);
    for (int64_t k = 0; k < words; ++k) {
        const uint32_t *input = inputs + k / WIDTH * WIDTH * ROWS + k % WIDTH;
        Words now[PANELS];
        for (int p = 0; p < PANELS; ++p) now[p] = weights_at(weight.panels, panel[p] * words + k);
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) total[r][p] = add_word<FORMAT>(total[r][p], now[p], input[r * WIDTH]);
    }
}

// The same for formats with groups.
template <Format FORMAT, int ROWS, int PANELS>
inline void add_groups(const Linear &weight, const int64_t *panel, const Inputs &x, int64_t first,
                       Lanes (&result)[ROWS][PANELS]) {
    constexpr int64_t SIZE = group_words(FORMAT), UNIT = unit_words(FORMAT);
    const int64_t words = words_of(weight), groups = words / SIZE;
    for (int64_t g = 0; g < groups; ++g) {
        // Unrolled like all that follows: the sums stay in registers.
        Whole total[ROWS][PANELS];
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p)
                total[r][p] = Whole{} + (offset(FORMAT) ? x.starts(first)[g * ROWS + r] : 0);
        const uint32_t *input = x.words(first) + g * SIZE / WIDTH * WIDTH * ROWS + g * SIZE % WIDTH;
        for (int64_t k = 0; k < SIZE; k += UNIT, input += UNIT) {
            Words now[PANELS][UNIT];
            for (int p = 0; p < PANELS; ++p) unpack<FORMAT>(weight.panels, panel[p] * words + g * SIZE + k, now[p]);
#pragma GCC unroll 24
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
                    for (int u = 0; u < UNIT; ++u)
                        total[r][p] = add_code<FORMAT>(total[r][p], now[p][u], input[r * WIDTH + u]);
        }
        for (int p = 0; p < PANELS; ++p) {
            const Worth code = worth<FORMAT>(weight.scales, panel[p], groups, g);
#pragma GCC unroll 24
            for (int r = 0; r < ROWS; ++r) {
                result[r][p] += floats(total[r][p]) * (code.scale * x.scales(first)[g * ROWS + r]);
                if constexpr (has_minima(FORMAT)) result[r][p] += code.minimum * x.sums(first)[g * ROWS + r];
            }
        }
    }
}

// ROWS rows of a block times PANELS panels, to the first of `sums`.
template <Format FORMAT, int ROWS, int PANELS>
void product(const Linear &weight, const int64_t *panel, const Inputs &x, int64_t first, Lanes (*sums)[MOST]) {
    Lanes result[ROWS][PANELS] = {};
    if constexpr (grouped(FORMAT))
        add_groups<FORMAT>(weight, panel, x, first, result);
    else
        add_words<FORMAT>(weight, panel, x.words(first), result);
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) sums[p][r] = result[r][p];
}

// A pair of panels by vectors.
template <Format FORMAT, int ROWS>
inline void by_vectors(int64_t rows, const Linear &weight, const int64_t *panel, const Inputs &x, int64_t first,
                       Lanes (*sums)[MOST]) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) by_vectors<FORMAT, ROWS - 1>(rows, weight, panel, x, first, sums);
    } else if constexpr (ROWS * (grouped(FORMAT) ? 4 : 2) <= IN_VECTORS) {
        product<FORMAT, ROWS, 2>(weight, panel, x, first, sums);
    } else {
        product<FORMAT, ROWS, 1>(weight, panel, x, first, sums);
        product<FORMAT, ROWS, 1>(weight, panel + 1, x, first, sums + 1);
    }
}

#if LEVEL >= 4

// A block of up to 16 BLOCKS rows times PANELS panels of bf16. Only the first block of rows waits for the weights.
template <int BLOCKS, int PANELS>
inline void by_tiles(const Linear &weight, const int64_t *panel, const Inputs &x, int64_t first, Lanes (*sums)[MOST]) {
    const int64_t words = words_of(weight), rows = x.size(first);
    const char *panels[PANELS];
    for (int p = 0; p < PANELS; ++p) panels[p] = static_cast<const char *>(weight.panels) + panel[p] * words * 64;
    tile_products<BFLOAT16, BLOCKS, PANELS>(panels, first == 0, reinterpret_cast<const char *>(x.words(first)), rows * 64,
                                            words / WIDTH, sums);
}

// The same for formats with groups and two panels. A group is a tile where all other words are zero, so that its sums are by
// themselves: a tile's rows decide how long it takes. They become floats as in `add_groups`.
template <Format FORMAT, int BLOCKS>
inline void groups_by_tiles(const Linear &weight, const int64_t *panel, const Inputs &x, int64_t first, Lanes (*result)[MOST]) {
    constexpr int64_t SIZE = group_words(FORMAT), UNIT = unit_words(FORMAT), PLACES = WIDTH / SIZE;
    const int64_t words = words_of(weight), groups = words / SIZE, rows = x.size(first);
    const char *inputs = reinterpret_cast<const char *>(x.words(first));
    alignas(64) Words codes[PLACES][2][WIDTH] = {};
    Sums sums[2];
    for (int p = 0; p < 2; ++p) std::fill(result[p], result[p] + rows, Lanes{});
    // A group is unpacked while the one before it is multiplied and the one before that becomes floats.
    for (int64_t g = 0; g < groups + 2; ++g) {
        for (int p = 0; p < 2 && g < groups; ++p)
#pragma GCC unroll 8
            for (int64_t k = 0; k < SIZE; k += UNIT) {
                Words now[UNIT];
                unpack<FORMAT>(weight.panels, panel[p] * words + g * SIZE + k, now);
#pragma GCC unroll 4
                for (int64_t u = 0; u < UNIT; ++u) codes[g % PLACES][p][g % PLACES * SIZE + k + u] = now[u];
            }
        if (g > 0 && g <= groups) {
            const auto &unpacked = codes[(g - 1) % PLACES];
            const char *panels[2] = {reinterpret_cast<const char *>(unpacked[0]), reinterpret_cast<const char *>(unpacked[1])};
            tile_products<FORMAT, BLOCKS, 2>(panels, false, inputs + (g - 1) / PLACES * rows * 64, 0, 1, sums[~g & 1].of);
        }
        const int64_t done = g - 2;
        for (int p = 0; p < 2 && done >= 0; ++p) {
            const Worth code = worth<FORMAT>(weight.scales, panel[p], groups, done);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = done * rows + r;
                const Whole total = as<Whole>(sums[g & 1].of[p][r]) + (offset(FORMAT) ? x.starts(first)[at] : 0);
                result[p][r] += floats(total) * (code.scale * x.scales(first)[at]);
                if constexpr (has_minima(FORMAT)) result[p][r] += code.minimum * x.sums(first)[at];
            }
        }
    }
}

// Rows of formats with groups from which tiles are faster than vectors; the results are the same bits.
constexpr int64_t GROUPS_IN_TILES = std::min<int64_t>(9, GROUPED_ROWS + 1);

#endif

// A block of rows times one or two pairs of panels.
template <Format FORMAT>
void block_product(const Linear &weight, const int64_t *panel, int64_t pairs, const Inputs &x, int64_t first, Sums &sums) {
    const int64_t rows = x.size(first);
#if LEVEL >= 4
    if constexpr (FORMAT == BFLOAT16) {
        if (rows > TILE_ROWS)
            for (int64_t pair = 0; pair < pairs; ++pair)
                by_tiles<2, 2>(weight, panel + 2 * pair, x, first, sums.of + 2 * pair);
        else if (pairs == 2)
            by_tiles<1, 4>(weight, panel, x, first, sums.of);
        else
            by_tiles<1, 2>(weight, panel, x, first, sums.of);
        return;
    }
    if constexpr (grouped(FORMAT))
        if (rows >= GROUPS_IN_TILES) {
            for (int64_t pair = 0; pair < pairs; ++pair)
                if (rows > TILE_ROWS)
                    groups_by_tiles<FORMAT, 2>(weight, panel + 2 * pair, x, first, sums.of + 2 * pair);
                else
                    groups_by_tiles<FORMAT, 1>(weight, panel + 2 * pair, x, first, sums.of + 2 * pair);
            return;
        }
    constexpr int VECTORS = grouped(FORMAT) ? GROUPS_IN_TILES - 1 : vector_rows(FORMAT);
#else
    constexpr int VECTORS = vector_rows(FORMAT);
#endif
    if constexpr (LEVEL < 4 || FORMAT != BFLOAT16)
        for (int64_t pair = 0; pair < pairs; ++pair)
            by_vectors<FORMAT, VECTORS>(rows, weight, panel + 2 * pair, x, first, sums.of + 2 * pair);
}

// Bytes of weights that stay in a core's cache while the blocks of rows pass by.
constexpr int64_t KEPT = 512 * 1024;

// This thread's share of x W^T: `finish(pair, row, one, other)` gets a row's sums in the panels of a pair. With several
// blocks of rows, each takes as many panels as the cache keeps before the next has its turn.
template <class Finish>
inline void linear(const Linear &weight, Team &team, int number, const Inputs &x, const Finish &finish) {
    const Pairs pairs = pairs_of(weight);
    const int64_t at_once = in_tiles(weight.format) ? 2 : 1, last = pairs.count * (number + 1) / team.count();
    const int64_t kept = std::max(at_once, KEPT / (words_of(weight) * 2 * 64) / at_once * at_once);
    Sums sums;
    for (int64_t from = pairs.count * number / team.count(); from < last; from += kept)
        for (int64_t block = 0; block < x.blocks(); ++block)
            for (int64_t pair = from, stop = std::min(last, from + kept); pair < stop; pair += at_once) {
                const int64_t first = x.first(block), some = std::min(at_once, stop - pair);
                const int64_t panel[4] = {pairs.panel(pair, 0), pairs.panel(pair, 1), pairs.panel(pair + 1, 0),
                                          pairs.panel(pair + 1, 1)};
                switch (weight.format) {
                    case FLOAT32: block_product<FLOAT32>(weight, panel, some, x, first, sums); break;
                    case BFLOAT16: block_product<BFLOAT16>(weight, panel, some, x, first, sums); break;
                    case Q8_0: block_product<Q8_0>(weight, panel, some, x, first, sums); break;
                    case Q4_0: block_product<Q4_0>(weight, panel, some, x, first, sums); break;
                    case Q4_1: block_product<Q4_1>(weight, panel, some, x, first, sums); break;
                    case Q4_K: block_product<Q4_K>(weight, panel, some, x, first, sums); break;
                    case Q6_K: block_product<Q6_K>(weight, panel, some, x, first, sums); break;
                }
                for (int64_t p = 0; p < some; ++p)
                    finish(pair + p, first, x.size(first), sums.of[2 * p], sums.of[2 * p + 1]);
            }
}

// out [rows][outputs] = x W^T + bias (+ residual), this thread's share of the outputs; `stride` floats from row to row.
inline void linear(const Linear &weight, Team &team, int number, const Inputs &x, float *out, const float *residual,
                   int64_t stride) {
    auto panel_done = [&](int64_t panel, int64_t first, int64_t rows, const Lanes *sums) {
        const int64_t column = panel * WIDTH, some = std::min(WIDTH, weight.outputs - column);
        if (some == WIDTH) {
            const Lanes bias = weight.bias ? load(weight.bias + column) : Lanes{};
            int64_t at = first * stride + column;
            if (residual)
                for (int64_t r = 0; r < rows; ++r, at += stride) store(out + at, sums[r] + bias + load(residual + at));
            else
                for (int64_t r = 0; r < rows; ++r, at += stride) store(out + at, sums[r] + bias);
            return;
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t n = 0, at = (first + r) * stride + column; n < some; ++n)
                out[at + n] = sums[r][n] + (weight.bias ? weight.bias[column + n] : 0.0f) + (residual ? residual[at + n] : 0.0f);
    };
    const Pairs pairs = pairs_of(weight);
    linear(weight, team, number, x, [&](int64_t pair, int64_t first, int64_t rows, const Lanes *one, const Lanes *other) {
        panel_done(pairs.panel(pair, 0), first, rows, one);
        panel_done(pairs.panel(pair, 1), first, rows, other);
    });
}
inline void linear(const Linear &weight, Team &team, int number, const Inputs &x, float *out,
                   const float *residual = nullptr) {
    linear(weight, team, number, x, out, residual, weight.outputs);
}

// silu(gate) * up of x W^T + bias, this thread's share: both have as many outputs as `to` has inputs, whole vectors.
inline void gated(const Linear &weight, Team &team, int number, const Inputs &x, Inputs &to) {
    linear(weight, team, number, x,
           [&](int64_t pair, int64_t first, int64_t rows, const Lanes *gate, const Lanes *up) {
               const float *bias = weight.bias ? weight.bias + pair * WIDTH : nullptr;
               const Lanes gate_bias = bias ? load(bias) : Lanes{}, up_bias = bias ? load(bias + weight.outputs / 2) : Lanes{};
               for (int64_t r = 0; r < rows; ++r) {
                   const Lanes value = gate[r] + gate_bias;
                   to.put(first + r, pair * WIDTH, value / (1.0f + exponential(-value)) * (up[r] + up_bias));
               }
           });
}

}  // namespace NAME
}  // namespace

// Linear layers over panels of sixteen outputs. Included once per instruction set.
//
// A sum adds its inputs in order, in one lane of one register, whatever other rows and panels share the pass: a row's
// result is the same bits in every batch.

namespace {
namespace NAME {

// The rows that a linear layer reads, in words as its format wants them. Rows lie in blocks that share a pass over the
// weights: [words / 16][rows of the block][16], so that the kernels read on and on, and no two threads write one line.
class Inputs {
  public:
    // Producers write floats to `row(r)`, then call `put` for what they wrote.
    void shape(const Linear &weight, int64_t rows) {
        format_ = weight.format;
        rows_ = rows;
        width_ = weight.inputs;
        chunks_ = (words_of(weight) + WIDTH - 1) / WIDTH;
        groups_ = format_ == INT4 ? chunks_ : 1;
        blocks_ = (rows + MOST - 1) / MOST;
        size_ = blocks_ ? (rows + blocks_ - 1) / blocks_ : 0;
        per_word_ = format_ == FLOAT32 ? 1 : format_ == BFLOAT16 ? 2 : 4;
        stride_ = chunks_ * WIDTH * per_word_;
        // Conversions read 32 floats at a time.
        grown(plain_, rows * stride_ + 2 * WIDTH);
        grown(words_, rows * chunks_ * WIDTH);
        grown(scales_, rows * groups_);
        grown(starts_, rows * groups_);
        for (int64_t row = 0; row < rows; ++row) std::fill(this->row(row) + width_, this->row(row) + stride_, 0.0f);
    }
    float *row(int64_t row) { return plain_.data() + row * stride_; }
    // Whether a part of a row can become words by itself; codes need the scale of the whole row.
    bool direct() const { return format_ == FLOAT32 || format_ == BFLOAT16; }

    // The floats `first` to `first + count` of a row (even numbers, or to its end) become words.
    void put(int64_t row, int64_t first, int64_t count) {
        const float *from = this->row(row);
        uint32_t *to = start(row);
        const int64_t last = (first + count + per_word_ - 1) / per_word_;
        for (int64_t word = first / per_word_; word < last;) {
            const int64_t some = std::min(WIDTH - word % WIDTH, last - word);
            uint32_t bits[WIDTH];
            if (format_ == FLOAT32)
                std::memcpy(bits, from + word, sizeof bits);
            else
                for (int64_t i = 0; i < WIDTH; ++i)
                    bits[i] = narrow(from[2 * (word + i) + 1]) << 16 | narrow(from[2 * (word + i)]);
            uint32_t *place = to + word / WIDTH * WIDTH * size(row) + word % WIDTH;
            if (some == WIDTH)
                std::memcpy(place, bits, sizeof bits);
            else
                std::memcpy(place, bits, some * sizeof *bits);
            word += some;
        }
    }
    // A whole row becomes int8 codes, with one scale (int8 weights) or one per group (int4).
    void quantise(int64_t row) {
        const int64_t apart = WIDTH * size(row), chunks = chunks_ / groups_;
        for (int64_t g = 0; g < groups_; ++g) {
            // The row ends in zeros.
            const float *from = this->row(row) + g * chunks * 4 * WIDTH;
            Lanes largest = {};
            for (int64_t i = 0; i < chunks * 4; ++i) {
                const Lanes value = load(from + i * WIDTH), size = value < 0.0f ? -value : value;
                largest = largest > size ? largest : size;
            }
            float most = 0;
            for (int i = 0; i < WIDTH; ++i) most = std::max(most, largest[i]);
            const float inverse = most > 0 ? 127.0f / most : 0.0f;
            Whole total = {};
            uint32_t *to = start(row) + g * chunks * apart;
            for (int64_t i = 0; i < chunks * 4; ++i) {
                const Whole codes = __builtin_convertvector((load(from + i * WIDTH) * inverse + ROUND) - ROUND, Whole);
                total += codes;
                uint32_t bits[4];
                const Codes bytes = __builtin_convertvector(codes, Codes);
                std::memcpy(bits, &bytes, sizeof bits);
                if (format_ == INT8 && SHIFTED)
                    for (uint32_t &word : bits) word ^= 0x80808080u;
                std::memcpy(to + i / 4 * apart + i % 4 * 4, bits, sizeof bits);
            }
            int32_t sum = 0;
            for (int i = 0; i < WIDTH; ++i) sum += total[i];
            scales_[row * groups_ + g] = most / 127.0f;
            // A code of int4 stands for itself less 8.
            starts_[row * groups_ + g] = -8 * sum;
        }
    }
    void put_row(int64_t row) { direct() ? put(row, 0, width_) : quantise(row); }

    int64_t rows() const { return rows_; }
    int64_t blocks() const { return blocks_; }
    int64_t first(int64_t block) const { return block * size_; }
    // Rows of the block that holds this row.
    int64_t size(int64_t row) const { return std::min(size_, rows_ - row / size_ * size_); }
    const uint32_t *words(int64_t first) const { return words_.data() + first * chunks_ * WIDTH; }
    const float *scales(int64_t first) const { return scales_.data() + first * groups_; }
    const int32_t *starts(int64_t first) const { return starts_.data() + first * groups_; }

  private:
    // Where the words of a row begin: sixteen, and the next sixteen behind those of the block's other rows.
    uint32_t *start(int64_t row) {
        const int64_t first = row / size_ * size_;
        return words_.data() + (first * chunks_ + row - first) * WIDTH;
    }
    Format format_ = FLOAT32;
    int64_t rows_ = 0, width_ = 0, stride_ = 0, chunks_ = 0, per_word_ = 1, groups_ = 1, blocks_ = 0, size_ = 0;
    std::vector<float> plain_, scales_;
    std::vector<uint32_t> words_;
    std::vector<int32_t> starts_;
};

// Bytes. Weights that are wanted soon are fetched by hand where several rows keep the arithmetic busy: the processor's own
// guess then comes too late.
constexpr int64_t AHEAD = 2048;

template <int ROWS>
inline Words weights_at(const void *panels, int64_t vector) {
    const char *from = static_cast<const char *>(panels) + vector * 64;
    if (ROWS > 2) __builtin_prefetch(from + AHEAD);
    Words value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <Format FORMAT, class Sum>
inline Sum add_word(Sum total, Words weights, uint32_t input) {
    if constexpr (FORMAT == FLOAT32) return add_float(total, weights, input);
    else if constexpr (FORMAT == BFLOAT16) return add_bf16(total, weights, input);
    else return add_signed(total, weights, input);
}

// Adds all words of ROWS rows of a block times PANELS panels to their sums; not for int4, which adds by groups.
template <Format FORMAT, int ROWS, int PANELS, class Sum>
inline void add_words(const Linear &weight, int64_t panel, const uint32_t *inputs, Sum (&total)[ROWS][PANELS]) {
    const int64_t words = words_of(weight);
    for (int64_t k = 0; k < words; ++k) {
        const uint32_t *input = inputs + k / WIDTH * WIDTH * ROWS + k % WIDTH;
        Words now[PANELS];
        for (int p = 0; p < PANELS; ++p) now[p] = weights_at<ROWS>(weight.panels, (panel + p) * words + k);
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) total[r][p] = add_word<FORMAT>(total[r][p], now[p], input[r * WIDTH]);
    }
}

// ROWS rows of a block times PANELS panels from the `panel`th on.
template <Format FORMAT, int ROWS, int PANELS>
inline void product(const Linear &weight, int64_t panel, const Inputs &x, int64_t first, Lanes (&result)[ROWS][PANELS]) {
    const uint32_t *inputs = x.words(first);
    if constexpr (FORMAT == FLOAT32 || FORMAT == BFLOAT16) {
        Lanes total[ROWS][PANELS] = {};
        add_words<FORMAT>(weight, panel, inputs, total);
        std::memcpy(&result, &total, sizeof total);
    } else if constexpr (FORMAT == INT8) {
        Whole total[ROWS][PANELS];
        for (int p = 0; p < PANELS; ++p) {
            const Whole offset = load(weight.sums + (panel + p) * WIDTH) * (SHIFTED ? -128 : 0);
            for (int r = 0; r < ROWS; ++r) total[r][p] = offset;
        }
        add_words<FORMAT>(weight, panel, inputs, total);
        for (int p = 0; p < PANELS; ++p) {
            const Lanes scale = load(static_cast<const float *>(weight.scales) + (panel + p) * WIDTH);
            for (int r = 0; r < ROWS; ++r) result[r][p] = floats(total[r][p]) * (scale * x.scales(first)[r]);
        }
    } else {
        const int64_t words = words_of(weight), groups = words / GROUP_WORDS;
        for (int r = 0; r < ROWS; ++r)
            for (int p = 0; p < PANELS; ++p) result[r][p] = Lanes{};
        for (int64_t g = 0; g < groups; ++g) {
            Whole total[ROWS][PANELS];
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p < PANELS; ++p) total[r][p] = Whole{} + x.starts(first)[r * groups + g];
            const uint32_t *input = inputs + g * WIDTH * ROWS;
            for (int64_t k = 0; k < GROUP_WORDS; k += 2, input += 2) {
                Words low[PANELS], high[PANELS];
                for (int p = 0; p < PANELS; ++p) {
                    const Words both = weights_at<ROWS>(weight.panels, ((panel + p) * words + g * GROUP_WORDS + k) / 2);
                    low[p] = both & 0x0f0f0f0fu;
                    high[p] = both >> 4 & 0x0f0f0f0fu;
                }
#pragma GCC unroll 24
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                    for (int p = 0; p < PANELS; ++p) {
                        total[r][p] = add_unsigned(total[r][p], low[p], input[r * WIDTH]);
                        total[r][p] = add_unsigned(total[r][p], high[p], input[r * WIDTH + 1]);
                    }
            }
            for (int p = 0; p < PANELS; ++p) {
                const Lanes scale = wide(static_cast<const uint16_t *>(weight.scales) + ((panel + p) * groups + g) * WIDTH);
                for (int r = 0; r < ROWS; ++r)
                    result[r][p] += floats(total[r][p]) * (scale * x.scales(first)[r * groups + g]);
            }
        }
    }
}

// The same, with bias and residual, to `out` [rows][outputs].
template <Format FORMAT, int ROWS, int PANELS>
void tile(const Linear &weight, int64_t panel, const Inputs &x, int64_t first, float *out, const float *residual) {
    Lanes result[ROWS][PANELS];
    product<FORMAT, ROWS, PANELS>(weight, panel, x, first, result);
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) {
            const int64_t column = (panel + p) * WIDTH, at = (first + r) * weight.outputs + column;
            Lanes value = result[r][p];
            if (column + WIDTH <= weight.outputs) {
                if (weight.bias) value += load(weight.bias + column);
                if (residual) value += load(residual + at);
                store(out + at, value);
                continue;
            }
            for (int64_t n = 0; n < weight.outputs - column; ++n)
                out[at + n] = value[n] + (weight.bias ? weight.bias[column + n] : 0.0f) + (residual ? residual[at + n] : 0.0f);
        }
}

template <Format FORMAT, int ROWS>
inline void tiles(int64_t rows, const Linear &weight, int64_t panel, const Inputs &x, int64_t first, float *out,
                  const float *residual) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) tiles<FORMAT, ROWS - 1>(rows, weight, panel, x, first, out, residual);
    } else if constexpr (ROWS * 2 <= MOST) {
        tile<FORMAT, ROWS, 2>(weight, panel, x, first, out, residual);
    } else {
        tile<FORMAT, ROWS, 1>(weight, panel, x, first, out, residual);
        tile<FORMAT, ROWS, 1>(weight, panel + 1, x, first, out, residual);
    }
}

// out = x W^T + bias (+ residual), this thread's share of the outputs.
inline void linear(const Linear &weight, Team &team, int number, const Inputs &x, float *out,
                   const float *residual = nullptr) {
    const int64_t pairs = (weight.outputs + 2 * WIDTH - 1) / (2 * WIDTH);
    for (int64_t pair = pairs * number / team.count(); pair < pairs * (number + 1) / team.count(); ++pair)
        for (int64_t block = 0; block < x.blocks(); ++block) {
            const int64_t first = x.first(block), rows = x.size(first);
            switch (weight.format) {
                case FLOAT32: tiles<FLOAT32, MOST>(rows, weight, 2 * pair, x, first, out, residual); break;
                case BFLOAT16: tiles<BFLOAT16, MOST>(rows, weight, 2 * pair, x, first, out, residual); break;
                case INT8: tiles<INT8, MOST>(rows, weight, 2 * pair, x, first, out, residual); break;
                case INT4: tiles<INT4, MOST>(rows, weight, 2 * pair, x, first, out, residual); break;
            }
        }
}

}  // namespace NAME
}  // namespace

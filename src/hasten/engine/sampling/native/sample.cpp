// Which token: adjusts, filters and draws, for all rows of a step, in one call and on the thread that calls.
//
// A draw is the largest of score plus Gumbel noise. Noise is made from one integer per token; a bound on it, which takes no
// logarithm, leaves some ten tokens of a row whose noise must be known. Floating-point operations are not contracted
// (-ffp-contract=off), so that every instruction set gives the same bits. The structures are mirrored in library.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// Compiled twice, and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("default", "avx2")))
#else
#define CLONED
#endif
// What vectors are made of must be a part of the function that is compiled several times.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 256;
constexpr float LARGEST_NOISE = 36.8f;  // -log(-log(1 - 2^-53)) is 36.74

// What one request's choices depend on. `temperature` is 0 for greedy ones; below `tame`, logits over it might be infinite. `top_k` 0 and `top_p` 1 where they are off,
// `log_min_p` is -infinity then. `seen` and `counts` [vocabulary] are null without penalties; what
// is counted was seen.
struct Rule {
    float temperature, tame, top_p, log_min_p, repetition, presence, frequency;
    int64_t top_k;
    uint64_t stream;
    const int64_t *bias_tokens;
    const float *bias_values;
    int64_t biases;
    const uint8_t *seen;
    const float *counts;
};

// From the root of a draft down, as long as a child has what its parent's row chooses. Row i + 1 of `logits` is node i's.
// `above` are uncommitted tokens before the root's choice, `allowed` one bit per token, a row of `allowed_bytes` per row of
// logits, or null. Comes back with the `length` nodes of `path` and the `token` behind them.
struct Walk {
    const Rule *rule;
    const float *logits;
    int64_t stride, position, nodes, above_count, allowed_bytes;
    const int64_t *tokens, *parents, *above;
    const uint8_t *allowed;
    int64_t *path;
    int64_t length, token;
};

struct Candidate {
    float score;
    int32_t token;
};

// Likeliest first, the first of equal ones.
bool before(const Candidate &a, const Candidate &b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// Noise

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u, MIX1 = 0xBF58476D1CE4E5B9u, MIX2 = 0x94D049BB133111EBu;

INLINE uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * MIX1;
    z = (z ^ (z >> 27)) * MIX2;
    return z ^ (z >> 31);
}

float gumbel(uint64_t key, int64_t token) {
    const uint64_t z = mixed(key + (static_cast<uint64_t>(token) + 1) * GOLDEN);
    const double uniform = std::min((static_cast<double>(z >> 11) + 0.5) * 0x1p-53, 1 - 0x1p-53);
    return -static_cast<float>(std::log(-std::log(uniform)));
}

// Whether a token of a block may have `floor` or more, and in `bounds` the most that each can have.
//
// Noise -log(-log u) is at most -log(1 - u). The upper 31 bits of 1 - u, as a float, have an exponent e and a mantissa
// 1 + m, with log2(1 + m) >= m; e + m is what the float's own bits say, read as a number.
CLONED bool bounded(const float *x, float inverse, uint64_t start, float floor, float *__restrict bounds) {
    constexpr float LOG2 = 0.69314718f, MOST = LOG2 * (127 + 31), PER_BIT = LOG2 / (1 << 23);
    // Loops that compilers make vectors of.
    uint64_t words[BLOCK];
    int32_t rests[BLOCK], bits[BLOCK];
    float numbers[BLOCK];
    for (uint64_t i = 0; i < BLOCK; ++i) words[i] = mixed(start + (i + 1) * GOLDEN);
    for (int64_t i = 0; i < BLOCK; ++i) rests[i] = static_cast<int32_t>(~words[i] >> 33);
    for (int64_t i = 0; i < BLOCK; ++i) numbers[i] = static_cast<float>(rests[i]);
    std::memcpy(bits, numbers, sizeof(bits));
    int32_t any = 0;
    for (int64_t i = 0; i < BLOCK; ++i) {
        bounds[i] = x[i] * inverse + (MOST - static_cast<float>(bits[i]) * PER_BIT);
        any |= bounds[i] < floor ? 0 : 1;
    }
    return any != 0;
}

// Scores

// A block of numbers, filled up where there are no more.
const float *block(const float *x, int64_t first, int64_t count, float *filled) {
    if (count - first >= BLOCK) return x + first;
    std::copy(x + first, x + count, filled);
    std::fill(filled + (count - first), filled + BLOCK, NOTHING);
    return filled;
}

CLONED float largest(const float *x) {
    float lanes[16];
    for (float &lane : lanes) lane = NOTHING;
    for (int64_t i = 0; i < BLOCK; i += 16)
        for (int64_t j = 0; j < 16; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    return *std::max_element(lanes, lanes + 16);
}

CLONED void divided(const float *__restrict x, float by, float *__restrict out) {
    for (int64_t i = 0; i < BLOCK; ++i) out[i] = x[i] / by;
}

// e^x for x from -87 to 0, with x = whole * log(2) + rest, and the bits of 2^whole. The polynomial is Cephes's.
struct Parts {
    float whole;
    int32_t power;
};
INLINE Parts parts(float x) {
    const auto whole = static_cast<int32_t>(x * 1.44269504f - 0.5f);
    return {static_cast<float>(whole), (whole + 127) << 23};
}
INLINE float exponential(float x, float whole, float power) {
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    return (sum * rest * rest + rest + 1.0f) * power;
}

// What a score weighs beside the largest one; nothing below e^-87.
float weight(float score, float most) {
    const float x = score - most;
    if (!(x > -87.0f)) return 0.0f;
    const Parts own = parts(x);
    float power;
    std::memcpy(&power, &own.power, sizeof(power));
    return exponential(x, own.whole, power);
}

// Sum of the weights of what a block has before `limit`: more than that score, or as much and a lower number than its.
CLONED double mass(const float *x, float most, float limit, int32_t number) {
    float depths[BLOCK], wholes[BLOCK], powers[BLOCK], lanes[16] = {};
    int32_t bits[BLOCK];
    for (int32_t i = 0; i < BLOCK; ++i) depths[i] = x[i] - most > -87.0f ? x[i] - most : -87.0f;
    for (int32_t i = 0; i < BLOCK; ++i) {
        const Parts own = parts(depths[i]);
        wholes[i] = own.whole;
        bits[i] = own.power;
    }
    std::memcpy(powers, bits, sizeof(bits));
    for (int32_t i = 0; i < BLOCK; ++i) {
        const int32_t ahead = (x[i] > limit) | ((x[i] == limit) & (i < number));
        powers[i] = exponential(depths[i], wholes[i], powers[i]) * static_cast<float>(ahead & (depths[i] > -87.0f));
    }
    for (int64_t i = 0; i < BLOCK; i += 16)
        for (int64_t j = 0; j < 16; ++j) lanes[j] += powers[i + j];
    double sum = 0;
    for (const float lane : lanes) sum += static_cast<double>(lane);
    return sum;
}

float penalised(const Rule &rule, float x, float times) {
    const float other = x > 0 ? x / rule.repetition : x * rule.repetition;
    return other - rule.presence * (times > 0 ? 1.0f : 0.0f) - rule.frequency * times;
}

// Of all tokens few were seen.
void penalise(const Rule &rule, int64_t count, float *x) {
    for (int64_t first = 0; first < count; first += 8) {
        uint64_t any = 0;
        std::memcpy(&any, rule.seen + first, std::min<int64_t>(8, count - first));
        if (any == 0) continue;
        for (int64_t i = first; i < std::min(first + 8, count); ++i)
            if (rule.seen[i]) x[i] = penalised(rule, x[i], rule.counts[i]);
    }
}

// One row

struct Work {
    int64_t vocabulary;
    float *maxima, *scores;
    Candidate *candidates;

    int64_t blocks() const { return (vocabulary + BLOCK - 1) / BLOCK; }
};

float bias_of(const Rule &rule, int64_t token) {
    for (int64_t i = 0; i < rule.biases; ++i)
        if (rule.bias_tokens[i] == token) return rule.bias_values[i];
    return 0.0f;
}

// Logits with bias, penalties and grammar; where there is nothing to do, the logits themselves.
const float *adjusted(const Work &work, const Walk &walk, const float *logits, const uint8_t *allowed) {
    const Rule &rule = *walk.rule;
    if (rule.biases == 0 && rule.seen == nullptr && allowed == nullptr) return logits;
    float *x = work.scores;
    std::copy(logits, logits + work.vocabulary, x);
    for (int64_t i = 0; i < rule.biases; ++i) x[rule.bias_tokens[i]] += rule.bias_values[i];
    if (rule.seen != nullptr) {
        penalise(rule, work.vocabulary, x);
        const auto uncommitted = [&](int64_t i) {
            return i < walk.above_count ? walk.above[i] : walk.tokens[walk.path[i - walk.above_count]];
        };
        const int64_t count = walk.above_count + walk.length;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t token = uncommitted(i);
            float times = rule.counts[token];
            for (int64_t j = 0; j < count; ++j) times += uncommitted(j) == token ? 1.0f : 0.0f;
            x[token] = penalised(rule, logits[token] + bias_of(rule, token), times);
        }
    }
    if (allowed != nullptr)
        for (int64_t i = 0; i < work.vocabulary; ++i)
            if (!(allowed[i >> 3] >> (i & 7) & 1)) x[i] = NOTHING;
    return x;
}

const float *tempered(const Work &work, const float *x, float temperature) {
    float filled[BLOCK], scores[BLOCK];
    for (int64_t first = 0; first < work.vocabulary; first += BLOCK) {
        divided(block(x, first, work.vocabulary, filled), temperature, scores);
        std::copy(scores, scores + std::min(BLOCK, work.vocabulary - first), work.scores + first);
    }
    return work.scores;
}

// Fills `maxima`, and returns the largest of them.
float survey(const Work &work, const float *x) {
    float filled[BLOCK], most = NOTHING;
    for (int64_t i = 0; i < work.blocks(); ++i) {
        work.maxima[i] = largest(block(x, i * BLOCK, work.vocabulary, filled));
        most = std::max(most, work.maxima[i]);
    }
    return most;
}

// Logits less the largest of them; where none is possible, as they are.
const float *lowered_to_zero(const Work &work, const float *x) {
    const float most = survey(work, x);
    if (!(most > NOTHING)) return x;
    for (int64_t i = 0; i < work.vocabulary; ++i) work.scores[i] = x[i] - most;
    return work.scores;
}

// The first token that has `most`.
int64_t first_of(const Work &work, const float *x, float most) {
    const int64_t start = BLOCK * (std::find(work.maxima, work.maxima + work.blocks(), most) - work.maxima);
    return std::find(x + start, x + work.vocabulary, most) - x;
}

// What rounding may hide: of a score, of its noise, and of their sum.
float lowered(float best, float top) { return best - (1e-3f + 1e-6f * (std::fabs(best) + std::fabs(top))); }

// The draw among all tokens but for min-p; of equal ones the likeliest where they are ranked, and then the first.
Candidate drawn_of_all(const Work &work, const Rule &rule, const float *x, float most, float temperature,
                       uint64_t key) {
    const float inverse = 1 / temperature, top = most / temperature, least = top + rule.log_min_p;
    Candidate chosen{top, static_cast<int32_t>(first_of(work, x, most))};
    float best = top + gumbel(key, chosen.token), filled[BLOCK], bounds[BLOCK];
    for (int64_t i = 0; i < work.blocks(); ++i) {
        float floor = lowered(best, top);
        if (work.maxima[i] * inverse + LARGEST_NOISE < floor) continue;
        const int64_t first = i * BLOCK;
        const float *own = block(x, first, work.vocabulary, filled);
        if (!bounded(own, inverse, key + static_cast<uint64_t>(first) * GOLDEN, floor, bounds)) continue;
        for (int64_t j = 0; j < std::min(BLOCK, work.vocabulary - first); ++j) {
            if (bounds[j] < floor) continue;
            const Candidate candidate{own[j] / temperature, static_cast<int32_t>(first + j)};
            if (candidate.score < least) continue;
            const float value = candidate.score + gumbel(key, candidate.token);
            const bool earlier = rule.top_p < 1 ? before(candidate, chosen) : candidate.token < chosen.token;
            if (value > best || (value == best && earlier)) best = value, chosen = candidate;
            floor = lowered(best, top);
        }
    }
    return chosen;
}

// The likeliest `top_k`, in no order.
int64_t likeliest(const Work &work, const float *x, int64_t top_k) {
    Candidate *heap = work.candidates;
    int64_t count = 0;
    for (int64_t i = 0; i < work.blocks(); ++i) {
        if (count == top_k && !(work.maxima[i] > heap[0].score)) continue;
        for (int64_t token = i * BLOCK; token < std::min((i + 1) * BLOCK, work.vocabulary); ++token) {
            // What comes later is behind its equals.
            if (!(x[token] > (count == top_k ? heap[0].score : NOTHING))) continue;
            if (count == top_k) std::pop_heap(heap, heap + count--, before);
            heap[count++] = {x[token], static_cast<int32_t>(token)};
            std::push_heap(heap, heap + count, before);
        }
    }
    return count;
}

double mass_of(const Candidate *candidates, int64_t count, float most) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(weight(candidates[i].score, most));
    return sum;
}

// The fewest of the likeliest that have a mass, out of `candidates`, which have it.
int64_t nucleus(Candidate *candidates, int64_t count, float most, double wanted) {
    int64_t first = 0;
    double sum = 0;
    for (int64_t last = count; last - first > 1;) {
        const int64_t middle = first + (last - first) / 2;
        std::nth_element(candidates + first, candidates + middle, candidates + last, before);
        const double upper = mass_of(candidates + first, middle - first, most);
        if (sum + upper < wanted) {
            sum += upper;
            first = middle;
        } else {
            last = middle;
        }
    }
    return std::min(first + 1, count);
}

// Mass of all that comes before a candidate.
double mass_before(const Work &work, const float *x, float most, const Candidate &limit) {
    float filled[BLOCK];
    double sum = 0;
    for (int64_t i = 0; i < work.blocks(); ++i) {
        // Weights below are 0.
        if (!(work.maxima[i] > most - 88.0f) || work.maxima[i] < limit.score) continue;
        const auto number = static_cast<int32_t>(limit.token - i * BLOCK);
        sum += mass(block(x, i * BLOCK, work.vocabulary, filled), most, limit.score, number);
    }
    return sum;
}

// Tokens among which those of a mass are; few, where few have it.
int64_t heads(const Work &work, const float *x, float most, double wanted) {
    for (float depth = 3;; depth = depth < 96 ? 2 * depth : -NOTHING) {
        int64_t count = 0;
        for (int64_t i = 0; i < work.blocks(); ++i) {
            if (!(work.maxima[i] >= most - depth)) continue;
            for (int64_t token = i * BLOCK; token < std::min((i + 1) * BLOCK, work.vocabulary); ++token)
                if (x[token] >= most - depth && x[token] > NOTHING)
                    work.candidates[count++] = {x[token], static_cast<int32_t>(token)};
        }
        if (depth == -NOTHING || mass_of(work.candidates, count, most) >= wanted) return count;
    }
}

// The draw among candidates but for min-p; of equal ones the likeliest.
int64_t drawn(const Rule &rule, const Candidate *candidates, int64_t count, float most, uint64_t key) {
    const float least = most + rule.log_min_p;
    Candidate chosen{NOTHING, 0};
    float best = NOTHING;
    for (int64_t i = 0; i < count; ++i) {
        const Candidate &candidate = candidates[i];
        if (candidate.score < least || candidate.score + LARGEST_NOISE < best) continue;
        const float value = candidate.score + gumbel(key, candidate.token);
        if (value > best || (value == best && before(candidate, chosen))) best = value, chosen = candidate;
    }
    return chosen.token;
}

int64_t drawn_of_top_k(const Work &work, const Rule &rule, const float *x, float most, uint64_t key) {
    int64_t count = likeliest(work, x, rule.top_k);
    if (rule.top_p < 1) {
        const double wanted = static_cast<double>(rule.top_p) * mass_of(work.candidates, count, most);
        count = nucleus(work.candidates, count, most, wanted);
    }
    return drawn(rule, work.candidates, count, most, key);
}

// What is drawn of all is, mostly, among the likeliest, and then the one that is drawn of these.
int64_t drawn_of_top_p(const Work &work, const Rule &rule, const float *x, float most, uint64_t key) {
    const Candidate free = drawn_of_all(work, rule, x, most, 1, key);
    const Candidate end{NOTHING, 0};
    const double wanted = static_cast<double>(rule.top_p) * mass_before(work, x, most, end);
    const double ahead = mass_before(work, x, most, free);
    if (ahead < wanted || ahead == 0) return free.token;
    const int64_t count = nucleus(work.candidates, heads(work, x, most, wanted), most, wanted);
    return drawn(rule, work.candidates, count, most, key);
}

// What a row chooses for a position.
int64_t choice(const Work &work, const Walk &walk, const float *logits, const uint8_t *allowed, int64_t position) {
    const Rule &rule = *walk.rule;
    const float *x = adjusted(work, walk, logits, allowed);
    const bool top_k = rule.top_k > 0, top_p = rule.top_p < 1;
    if (rule.temperature > 0 && rule.temperature < rule.tame) x = lowered_to_zero(work, x);
    if (rule.temperature > 0 && (top_k || top_p)) x = tempered(work, x, rule.temperature);
    const float most = survey(work, x);
    if (!(most > NOTHING)) return 0;
    if (rule.temperature == 0) return first_of(work, x, most);
    const uint64_t key = mixed(rule.stream + static_cast<uint64_t>(position) + GOLDEN);
    if (top_k) return drawn_of_top_k(work, rule, x, most, key);
    if (top_p) return drawn_of_top_p(work, rule, x, most, key);
    return drawn_of_all(work, rule, x, most, rule.temperature, key).token;
}

int64_t child(const Walk &walk, int64_t node, int64_t token) {
    for (int64_t i = node + 1; i < walk.nodes; ++i)
        if (walk.parents[i] == node && walk.tokens[i] == token) return i;
    return -1;
}

void descend(const Work &work, Walk &walk) {
    walk.length = 0;
    for (int64_t node = -1;;) {
        const int64_t row = node + 1;
        const uint8_t *allowed = walk.allowed == nullptr ? nullptr : walk.allowed + row * walk.allowed_bytes;
        walk.token = choice(work, walk, walk.logits + row * walk.stride, allowed, walk.position + walk.length);
        node = child(walk, node, walk.token);
        if (node < 0) return;
        walk.path[walk.length++] = node;
    }
}

// The `most` largest logits of a row, largest first, and of equal ones the first. Where a row has none to choose from, token 0
// with -infinity.
void leaders(const float *x, int64_t vocabulary, int64_t most, float *values, int64_t *ids) {
    std::fill(values, values + most, NOTHING);
    std::fill(ids, ids + most, 0);
    float filled[BLOCK];
    for (int64_t first = 0; first < vocabulary; first += BLOCK) {
        if (!(largest(block(x, first, vocabulary, filled)) > values[most - 1])) continue;
        for (int64_t token = first; token < std::min(first + BLOCK, vocabulary); ++token) {
            if (!(x[token] > values[most - 1])) continue;
            int64_t place = most - 1;
            for (; place > 0 && x[token] > values[place - 1]; --place) {
                values[place] = values[place - 1];
                ids[place] = ids[place - 1];
            }
            values[place] = x[token];
            ids[place] = token;
        }
    }
}

}  // namespace

extern "C" {
const int64_t *hasten_sampling_sizes() {
    static const int64_t sizes[] = {sizeof(Rule), sizeof(Walk), sizeof(Candidate), 0};
    return sizes;
}

// All walks of a step. `maxima` has a float per 256 tokens of the vocabulary; `scores` one per token where a rule adjusts
// or filters, `candidates` eight bytes per token where one filters.
void hasten_sample(Walk *walks, int64_t count, int64_t vocabulary, float *maxima, float *scores, void *candidates) {
    const Work work{vocabulary, maxima, scores, static_cast<Candidate *>(candidates)};
    for (int64_t i = 0; i < count; ++i) descend(work, walks[i]);
}

// The `most` (at least 1) largest logits of each of `count` rows, `stride` apart; [count, most] of values and of tokens.
void hasten_leaders(const float *rows, int64_t count, int64_t stride, int64_t vocabulary, int64_t most, float *values,
                    int64_t *ids) {
    for (int64_t i = 0; i < count; ++i) leaders(rows + i * stride, vocabulary, most, values + i * most, ids + i * most);
}
}

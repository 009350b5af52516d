// Threads with teams of unequal size take steps of one model at the same time; each gets the bits that it gets alone.
// Built with sanitizers, and with `STEP` naming step.cpp.

#include STEP

#include <cstdio>
#include <random>

namespace {

constexpr int64_t LAYERS = 2, HIDDEN = 32, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 8, FFN = 48, VOCABULARY = 61, CAPACITY = 64;
constexpr int64_t ROWS = 5, STEPS = 6;

std::vector<std::vector<float>> numbers;
std::mt19937 random_bits(0);

uint32_t as_bits(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}
float from_bits(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

const float *random_numbers(int64_t count, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    numbers.emplace_back(count);
    for (float &number : numbers.back()) number = normal(random_bits);
    return numbers.back().data();
}

Linear random_linear(Format format, int64_t outputs, int64_t inputs) {
    Linear weight{format, nullptr, nullptr, random_numbers(outputs, 0.1f), outputs, inputs};
    // Both bf16 numbers of a word are the same one.
    weight.panels = random_numbers((outputs + 31) / 32 * 32 * words_of(weight), 0.2f);
    if (format == BFLOAT16)
        for (float &number : numbers.back()) {
            const uint32_t upper = as_bits(number) & 0xffff0000u;
            number = from_bits(upper | upper >> 16);
        }
    return weight;
}

// What a sequence says in `STEPS` passes of `ROWS` rows, and in a chain behind them.
std::vector<float> work(const Model &model, int64_t first, int count) {
    void *team = hasten_team(count);
    std::vector<float> keys(LAYERS * KV_HEADS * CAPACITY * HEAD_DIM), values(keys.size()), said, logits(ROWS * VOCABULARY);
    std::vector<int64_t> slots(CAPACITY), tokens(ROWS), positions(ROWS), wanted(ROWS);
    for (int64_t slot = 0; slot < CAPACITY; ++slot) slots[slot] = slot;
    View view{keys.data(), values.data(), slots.data(), CAPACITY, 0};
    const Slots all{1, &view};
    const int64_t group_of[LAYERS] = {0, 0}, index_of[LAYERS] = {0, 1};
    Span span{0, ROWS, ROWS, nullptr, &all, group_of, index_of};
    for (int64_t step = 0; step < STEPS; ++step, view.length += ROWS) {
        for (int64_t row = 0; row < ROWS; ++row) {
            tokens[row] = (first + 7 * step + row) % VOCABULARY;
            positions[row] = step * ROWS + row;
            wanted[row] = row;
        }
        const Batch batch{ROWS, tokens.data(), positions.data(), 1, nullptr, 1, &span, ROWS, wanted.data(), logits.data(), 0,
                          nullptr, nullptr, nullptr, nullptr, nullptr, 0};
        if (hasten_forward(&model, team, &batch, -1) != LAYERS) std::abort();
        said.insert(said.end(), logits.begin(), logits.end());
    }
    span.stop = 1;
    std::vector<int64_t> chain(ROWS);
    std::vector<float> probabilities(ROWS);
    const int64_t drafted = hasten_chain(&model, team, &span, first, STEPS * ROWS, VOCABULARY, ROWS, 0.0f, chain.data(), probabilities.data());
    said.insert(said.end(), probabilities.begin(), probabilities.begin() + drafted);
    hasten_disband(team);
    return said;
}

bool same_beside_others(Format format) {
    std::vector<Layer> layers;
    for (int64_t layer = 0; layer < LAYERS; ++layer)
        layers.push_back({random_numbers(HIDDEN, 1.0f), nullptr, nullptr, random_numbers(HIDDEN, 1.0f),
                          random_linear(format, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
                          random_linear(format, HIDDEN, HEADS * HEAD_DIM), random_linear(format, 2 * FFN, HIDDEN),
                          random_linear(format, HIDDEN, FFN), layer ? 9 : 0});
    std::vector<float> frequencies(HEAD_DIM / 2);
    for (int64_t i = 0; i < HEAD_DIM / 2; ++i) frequencies[i] = std::pow(1e4f, -2.0f * i / HEAD_DIM);
    const Model model{LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY, 1e-6f, 1.0f, frequencies.data(), nullptr,
                      random_numbers(VOCABULARY * HIDDEN, 1.0f), FLOAT32, random_numbers(HIDDEN, 1.0f),
                      random_linear(format, VOCABULARY, HIDDEN), layers.data()};

    constexpr int64_t THREADS = 6, ROUNDS = 4;
    std::vector<std::vector<float>> alone, beside(THREADS);
    for (int64_t number = 0; number < THREADS; ++number) alone.push_back(work(model, number, 1));
    for (int64_t round = 0; round < ROUNDS; ++round) {
        std::vector<std::thread> threads;
        for (int64_t number = 0; number < THREADS; ++number)
            threads.emplace_back([&, number] { beside[number] = work(model, number, 1 + (number + round) % 3); });
        for (auto &thread : threads) thread.join();
        if (beside != alone) return false;
    }
    return std::all_of(alone[0].begin(), alone[0].end(), [](float number) { return std::isfinite(number); });
}

}  // namespace

int main() { return same_beside_others(FLOAT32) && same_beside_others(BFLOAT16) ? 0 : 1; }

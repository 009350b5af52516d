// A pass in which the attention of consecutive layers reads one input, what enters the first of them (EasySpec): each layer
// of such a group is one thread's, the MLPs behind them are everybody's, in order. Included once per instruction set.

namespace {
namespace NAME {

// One layer over rows x [rows][hidden], of which `site` goes out; without its MLP where all rows are to pass by it.
inline void one_layer(const Model &model, Team &team, const Batch &batch, int64_t layer, const float *x, Site site, float *out,
                      const Gate *gate) {
    static thread_local std::vector<Span> spans;
    Model one = model;
    one.layers = 1;
    one.layer = model.layer + layer;
    spans.assign(batch.span, batch.span + batch.spans);
    for (Span &span : spans) span.group_of += layer, span.index_of += layer;
    const Tap tap{site, 0, out};
    Batch own = batch;
    own.embedded = x;
    own.span = spans.data();
    own.wanted = 0;
    own.taps = 1;
    own.tap = &tap;
    own.gate = gate;
    forward(one, team, own, -1);
}

// What one layer's attention adds to rows x, computed by the calling thread alone.
inline void attend_alone(const Model &model, const Batch &batch, int64_t layer, const float *x, float *added) {
    static thread_local Team alone(1);
    static thread_local std::vector<int64_t> left;
    static thread_local std::vector<uint8_t> skipped;
    left.assign(batch.rows, 1);
    skipped.assign(batch.rows, 0);
    const Gate gate{0, 0, 0, 0.0f, nullptr, left.data(), skipped.data()};
    one_layer(model, alone, batch, layer, x, ATTENTION_OUTPUT, added, &gate);
}

// See `hasten_grouped`.
void grouped(const Model &model, Team &team, const Batch &batch, int64_t groups, const int64_t *sizes, int64_t *spent) {
    struct Kept {
        std::vector<float> x, next, attended;
        std::vector<int64_t> nothing;
        Inputs normed, inner, last;
    };
    static thread_local Kept kept;
    Kept &of = kept;
    const int64_t hidden = model.hidden, rows = batch.rows, count = rows * hidden, most = *std::max_element(sizes, sizes + groups);
    float *x = grown(of.x, count), *next = grown(of.next, count), *attended = grown(of.attended, most * count);
    for (int64_t row = 0; row < rows; ++row) embed(model, batch, row, x + row * hidden);
    // Its rows are no tokens any more.
    of.nothing.assign(rows, -1);
    Batch inner_batch = batch;
    inner_batch.tokens = of.nothing.data();
    std::fill(spent, spent + 2 * model.layers + 1, 0);
    int64_t *attention = spent, *fed = spent + model.layers;
    for (int64_t group = 0, first = 0; group < groups; first += sizes[group++]) {
        const int64_t size = sizes[group];
        if (size == 1) {
            const int64_t began = now();
            one_layer(model, team, inner_batch, first, x, OUTPUT, next, nullptr);
            std::swap(x, next);
            attention[first] = now() - began;
            continue;
        }
        team.run([&](int number) {
            for (int64_t i = number; i < size; i += team.count()) {
                const int64_t began = now();
                attend_alone(model, inner_batch, first + i, x, attended + i * count);
                attention[first + i] = now() - began;
            }
            [[maybe_unused]] const TileRegisters registers;
            team.barrier();
            const int64_t threads = team.count();
            for (int64_t i = 0; i < size; ++i) {
                const Layer &layer = model.layer[first + i];
                const int64_t began = now();
                if (number == 0) of.normed.shape(layer.gate_up, rows);
                if (number == 0) of.inner.shape(layer.down, rows);
                team.barrier();
                for (int64_t row = rows * number / threads; row < rows * (number + 1) / threads; ++row) {
                    float *own = x + row * hidden;
                    const float *added = attended + i * count + row * hidden;
                    for (int64_t j = 0; j < hidden; ++j) own[j] += added[j];
                    norm(own, layer.mlp_norm, model.norm_eps, hidden, of.normed.row(row));
                    of.normed.put_row(row);
                }
                team.barrier();
                feed(layer, team, number, of.normed, of.inner, x, x);
                team.barrier();
                if (number == 0) fed[first + i] = now() - began;
            }
        });
    }
    const int64_t began = now();
    of.last.shape(model.head, batch.wanted);
    team.run([&](int number) {
        [[maybe_unused]] const TileRegisters registers;
        const int64_t threads = team.count(), wanted = batch.wanted;
        for (int64_t i = wanted * number / threads; i < wanted * (number + 1) / threads; ++i) {
            norm(x + batch.row_wanted[i] * hidden, model.final_norm, model.norm_eps, hidden, of.last.row(i));
            of.last.put_row(i);
        }
        team.barrier();
        linear(model.head, team, number, of.last, batch.logits);
    });
    spent[2 * model.layers] = now() - began;
}

}  // namespace NAME
}  // namespace

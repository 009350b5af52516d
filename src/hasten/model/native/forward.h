// The forward pass: every thread runs the same stages, with a barrier between them. Included once per instruction set.

namespace {
namespace NAME {

// NaN where the squares overflow: divided by infinity, the row would be zeros, and what follows plausible. Without a weight
// nothing is normed.
inline void norm(const float *x, const float *weight, float eps, int64_t count, float *out) {
    if (!weight) {
        std::memcpy(out, x, count * sizeof(float));
        return;
    }
    const float mean = dot(x, x, count) / static_cast<float>(count) + eps;
    const float scale = mean <= MOST_FLOAT ? 1.0f / __builtin_sqrtf(mean) : NAN;
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

inline void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

inline void look_up(const Model &model, int64_t token, float *out) {
    const int64_t hidden = model.hidden;
    if (model.embedding_format == FLOAT32) {
        std::memcpy(out, static_cast<const float *>(model.embedding) + token * hidden, hidden * sizeof(float));
    } else {
        const uint16_t *from = static_cast<const uint16_t *>(model.embedding) + token * hidden;
        for (int64_t i = 0; i < hidden; ++i) out[i] = as<float>(static_cast<uint32_t>(from[i]) << 16);
    }
}

inline void embed(const Model &model, const Batch &batch, int64_t row, float *out) {
    if (batch.tokens[row] < 0) std::memcpy(out, batch.embedded + row * model.hidden, model.hidden * sizeof(float));
    else look_up(model, batch.tokens[row], out);
}

// The sum of products of two rows' channels, each with its weight.
inline float weighed(const float *a, const float *b, const float *weight, int64_t count) {
    Lanes total = {};
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) total += load(a + i) * load(b + i) * load(weight + i);
    float rest = 0;
    for (; i < count; ++i) rest += a[i] * b[i] * weight[i];
    return sum(total) + rest;
}

// Whether a row's result of a feed-forward layer is as good as parallel to what it was added to.
inline bool parallel(const Gate &gate, const float *before, const float *after, int64_t count) {
    const float *weight = gate.channels;
    const float squares = weighed(before, before, weight, count) * weighed(after, after, weight, count);
    return weighed(before, after, weight, count) >= gate.threshold * __builtin_sqrtf(squares);
}

// Codes need the scale of a whole group, which several threads may have written. With a barrier before and behind.
inline void finish(Inputs &inputs, Team &team, int number) {
    team.barrier();
    if (inputs.direct()) return;
    const int64_t rows = inputs.rows(), threads = team.count();
    for (int64_t row = rows * number / threads; row < rows * (number + 1) / threads; ++row) inputs.quantise(row);
    team.barrier();
}

// This thread's share of a feed-forward layer: what it makes of normed rows, plus a residual.
inline void feed(const Layer &layer, Team &team, int number, const Inputs &normed, Inputs &inner, float *out,
                 const float *residual) {
    gated(layer.gate_up, team, number, normed, inner);
    finish(inner, team, number);
    linear(layer.down, team, number, inner, out, residual);
}

// Buffers that passes share; they only grow.
struct Buffers {
    std::vector<float> x, next, qkv, cosine, sine, fed, kept;
    // Of the rows that go through a feed-forward layer: which they are, and each row's place among them, or -1.
    std::vector<int64_t> fed_rows, place;
    std::vector<int64_t> span_of, order;
    std::vector<Piece> pieces;
    std::vector<Tile> tiles;
    std::vector<Attend> attend;
    Inputs normed, valued, mixed, inner, last;
};

// Cuts the rows of a pass, by spans in an `order` of their own, into tiles: spans that share slots share tiles.
inline void cut(const Model &model, const Team &team, const Batch &batch, std::vector<int64_t> &order,
                std::vector<Piece> &pieces, std::vector<Tile> &tiles) {
    const int64_t kv = model.kv_heads, group = model.heads / kv, wanted = 2 * team.most();
    // Heads that share keys are computed together, unless some threads would have nothing to do.
    const int64_t apart = std::min(group, (wanted + batch.rows * kv - 1) / (batch.rows * kv));
    const int64_t together = std::min(TILE, (group + apart - 1) / apart), most = std::max<int64_t>(1, TILE / together);
    auto slots = [&](int64_t i) -> const Slots & { return batch.span[order[i]].of(0); };
    order.resize(batch.spans);
    for (int64_t s = 0; s < batch.spans; ++s) order[s] = s;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return before(batch.span[a].of(0), batch.span[b].of(0)); });
    pieces.clear();
    tiles.clear();
    for (int64_t first = 0, last; first < batch.spans; first = last) {
        int64_t rows = batch.span[order[first]].stop - batch.span[order[first]].start;
        for (last = first + 1; last < batch.spans && shared(slots(last - 1), slots(last)) >= LEAST_SHARED; ++last)
            rows += batch.span[order[last]].stop - batch.span[order[last]].start;
        const int64_t share = (wanted * rows + batch.rows * kv - 1) / (batch.rows * kv);
        const int64_t parts = std::min(rows, std::max((rows + most - 1) / most, share));
        const int64_t from = tiles.size();
        for (int64_t part = 0, i = first, at = 0; part < parts; ++part) {
            Tile tile{static_cast<int64_t>(pieces.size()), 0, 0, 0};
            for (int64_t left = rows * (part + 1) / parts - rows * part / parts; left;) {
                const int64_t span = order[i], own = batch.span[span].stop - batch.span[span].start;
                const int64_t taken = std::min(left, own - at);
                if (taken) pieces.push_back({span, at, taken}), ++tile.pieces;
                left -= taken;
                at += taken;
                if (at == own) ++i, at = 0;
            }
            tiles.push_back(tile);
        }
        // Each of them for each key head, one after the other: what they share stays in the caches.
        const std::vector<Tile> once(tiles.begin() + from, tiles.end());
        tiles.resize(from);
        for (int64_t head = 0, some; head < model.heads; head += some) {
            some = std::min(together, group - head % group);
            for (Tile tile : once) {
                tile.head = head;
                tile.heads = some;
                tiles.push_back(tile);
            }
        }
    }
}

// See `hasten_forward`.
int64_t forward(const Model &model, Team &team, const Batch &batch, int64_t from) {
    static thread_local Buffers buffers;
    Buffers &of = buffers;
    const int64_t hidden = model.hidden, d = model.head_dim, half = d / 2, heads = model.heads, kv = model.kv_heads;
    const int64_t rows = batch.rows, width = (heads + 2 * kv) * d;
    float *now = grown(of.x, rows * hidden), *then = grown(of.next, rows * hidden);
    float *qkv = batch.qkv ? batch.qkv : grown(of.qkv, rows * width);
    float *cosine = grown(of.cosine, rows * half), *sine = grown(of.sine, rows * half);
    Inputs &normed = of.normed, &valued = of.valued, &mixed = of.mixed, &inner = of.inner, &last = of.last;
    of.attend.resize(team.most());
    of.span_of.resize(rows);
    of.place.resize(rows);
    const Gate *gate = batch.gate;
    auto gated_in = [&](int64_t l) { return gate && gate->first <= l && l <= gate->last; };
    if (gate) {
        grown(of.fed, rows * hidden);
        grown(of.kept, rows * hidden);
    }
    // How many rows there are in a layer.
    auto present = [&](int64_t layer) { return layer < batch.late_until ? rows - batch.late : rows; };
    for (int64_t s = 0; s < batch.spans; ++s)
        std::fill(of.span_of.begin() + batch.span[s].start, of.span_of.begin() + batch.span[s].stop, s);
    cut(model, team, batch, of.order, of.pieces, of.tiles);

    // The next layer with a span whose slots are unknown here, or where the pass is to pause.
    auto elsewhere = [&](int64_t s, int64_t layer) { return batch.span[s].of(layer).views == 0; };
    int64_t until = from + 1;
    for (bool known = true; until < model.layers; ++until) {
        for (int64_t s = 0; s < batch.spans; ++s) known = known && !elsewhere(s, until);
        if (!known || (batch.pause && until == batch.pause)) break;
    }

    team.run([&](int number) {
        [[maybe_unused]] const TileRegisters registers;
        const int64_t threads = team.count();
        // Contiguous shares where items are alike, every n-th item where later ones take longer.
        auto share = [&](int64_t count, auto work) {
            for (int64_t i = count * number / threads; i < count * (number + 1) / threads; ++i) work(i);
        };
        auto deal = [&](int64_t count, auto work) {
            for (int64_t i = number; i < count; i += threads) work(i);
        };
        auto shape = [&](Inputs &inputs, const Linear &weight, int64_t count) {
            if (number == 0) inputs.shape(weight, count);
        };
        // Hands out a row's state, less another one.
        auto tap = [&](Site site, int64_t layer, int64_t row, const float *state, const float *less = nullptr) {
            for (int64_t t = 0; t < batch.taps; ++t) {
                if (batch.tap[t].site != site || batch.tap[t].layer != layer) continue;
                float *to = batch.tap[t].states + row * hidden;
                for (int64_t i = 0; i < hidden; ++i) to[i] = state[i] - (less ? less[i] : 0.0f);
            }
        };
        auto norm_row = [&](const float *from, const float *weight, Inputs &to, int64_t row) {
            norm(from, weight, model.norm_eps, hidden, to.row(row));
            to.put_row(row);
        };
        // By one thread: which rows go through a feed-forward layer.
        auto choose = [&](int64_t l) {
            of.fed_rows.clear();
            for (int64_t row = 0; row < present(l); ++row) {
                if (gated_in(l) && gate->left[row] > 0) {
                    of.place[row] = -1;
                    --gate->left[row];
                    gate->skipped[l * rows + row] = 1;
                } else {
                    of.place[row] = of.fed_rows.size();
                    of.fed_rows.push_back(row);
                }
            }
        };
        // Rows that enter here.
        auto join = [&](int64_t l) {
            bool any = false;
            for (int64_t j = 0; j < batch.joins; ++j) any = any || batch.join[j].layer == l;
            if (!any) return;
            team.barrier();
            share(batch.joins * hidden, [&](int64_t item) {
                const Join &own = batch.join[item / hidden];
                const int64_t i = item % hidden;
                if (own.layer != l) return;
                const float *state = now + own.source * hidden;
                const float mapped = own.matrix ? dot(own.matrix + i * hidden, state, hidden) : state[i];
                now[own.row * hidden + i] = own.vector ? mapped + own.vector[i] : mapped;
            });
        };
        // A layer up to its attention, for the spans whose slots are known.
        auto mix = [&](int64_t l) {
            const Layer &layer = model.layer[l];
            const int64_t rows = present(l);
            join(l);
            shape(normed, layer.qkv, rows);
            if (layer.values.outputs) shape(valued, layer.values, rows);
            shape(mixed, layer.out, rows);
            team.barrier();
            share(rows, [&](int64_t row) {
                const bool tried = gated_in(l - 1) && gate->left[row] == 0 && !gate->skipped[(l - 1) * rows + row];
                if (tried && parallel(*gate, then + row * hidden, now + row * hidden, hidden)) gate->left[row] = gate->run;
                float *own = normed.row(row);
                if (layer.token_norm) {
                    look_up(model, batch.beside[row], own);
                    norm(own, layer.token_norm, model.norm_eps, hidden, own);
                    own += hidden;
                }
                norm(now + row * hidden, layer.attention_norm, model.norm_eps, hidden, own);
                normed.put_row(row);
                if (layer.values.outputs) {
                    std::memcpy(valued.row(row), normed.row(row), layer.values.inputs * sizeof(float));
                    valued.put_row(row);
                }
                tap(INPUT, l, row, now + row * hidden);
                tap(ATTENTION_INPUT, l, row, own);
                if (l) tap(OUTPUT, l - 1, row, now + row * hidden);
            });
            team.barrier();
            linear(layer.qkv, team, number, normed, qkv, nullptr, width);
            if (layer.values.outputs) linear(layer.values, team, number, valued, qkv + (heads + kv) * d, nullptr, width);
            team.barrier();
            share(rows * (heads + 2 * kv), [&](int64_t item) {
                const int64_t row = item / (heads + 2 * kv), head = item % (heads + 2 * kv);
                float *own = qkv + row * width + head * d;
                if (head < heads + kv) {
                    const float *weight = head < heads ? layer.query_norm : layer.key_norm;
                    if (weight) norm(own, weight, model.norm_eps, d, own);
                    rotate(own, cosine + row * half, sine + row * half, half);
                }
                if (head < heads) return;
                if (elsewhere(of.span_of[row], l)) return;
                const Span &span = batch.span[of.span_of[row]];
                const View &view = span.of(l).view[span.of(l).views - 1];
                const int64_t slot = view.length + span.pending - (span.stop - row), own_head = (head - heads) % kv;
                const int64_t place = ((span.index_of[l] * kv + own_head) * view.capacity + slot) * d;
                std::memcpy((head < heads + kv ? view.keys : view.values) + place, own, d * sizeof(float));
            });
            team.barrier();
            deal(of.tiles.size(), [&](int64_t item) {
                of.attend[number](model, batch, of.pieces.data(), of.tiles[item], l, rows, qkv, width, mixed);
            });
        };
        auto open = [&](int64_t row) {
            embed(model, batch, row, now + row * hidden);
            for (int64_t i = 0; i < half; ++i) {
                const int64_t axis = batch.axes > 1 && model.axis_of ? model.axis_of[i] : 0;
                const float angle = static_cast<float>(batch.positions[row * batch.axes + axis]) * model.inverse_frequencies[i];
                cosine[row * half + i] = std::cos(angle) * model.rope_factor;
                sine[row * half + i] = std::sin(angle) * model.rope_factor;
            }
        };
        if (from < 0) share(rows, open);
        for (int64_t l = std::max<int64_t>(from, 0); l < model.layers; ++l) {
            const Layer &layer = model.layer[l];
            const int64_t rows = present(l);
            if (l == from)
                share(rows, [&](int64_t row) {
                    if (!elsewhere(of.span_of[row], l)) return;
                    std::memcpy(mixed.row(row), batch.mixed + row * heads * d, heads * d * sizeof(float));
                    if (mixed.direct()) mixed.put(row, 0, heads * d);
                });
            else
                mix(l);
            if (l == until) return;
            finish(mixed, team, number);
            linear(layer.out, team, number, mixed, then, now);
            if (number == 0) choose(l);
            if (number == 0) normed.shape(layer.gate_up, of.fed_rows.size());
            if (number == 0) inner.shape(layer.down, of.fed_rows.size());
            team.barrier();
            const int64_t fed = of.fed_rows.size();
            share(rows, [&](int64_t row) {
                tap(ATTENTION_OUTPUT, l, row, then + row * hidden, now + row * hidden);
                const int64_t place = of.place[row];
                if (place < 0) {
                    std::memcpy(now + row * hidden, then + row * hidden, hidden * sizeof(float));
                    return;
                }
                norm_row(then + row * hidden, layer.mlp_norm, normed, place);
                tap(MLP_INPUT, l, row, normed.row(place));
                if (fed < rows) std::memcpy(&of.kept[place * hidden], then + row * hidden, hidden * sizeof(float));
            });
            team.barrier();
            if (fed) {
                const bool all = fed == rows;
                feed(layer, team, number, normed, inner, all ? now : of.fed.data(), all ? then : of.kept.data());
            }
            if (fed && fed < rows) {
                team.barrier();
                share(fed, [&](int64_t i) {
                    std::memcpy(now + of.fed_rows[i] * hidden, &of.fed[i * hidden], hidden * sizeof(float));
                });
            }
            if (l + 1 == model.layers) shape(last, model.head, batch.wanted);
            // The next layer's first stage begins with a barrier of its own.
        }
        team.barrier();
        share(batch.wanted, [&](int64_t i) { norm_row(now + batch.row_wanted[i] * hidden, model.final_norm, last, i); });
        if (batch.taps)
            share(rows, [&](int64_t row) {
                tap(OUTPUT, model.layers - 1, row, now + row * hidden);
                norm(now + row * hidden, model.final_norm, model.norm_eps, hidden, then + row * hidden);
                tap(FINAL_NORM, 0, row, then + row * hidden);
            });
        team.barrier();
        linear(model.head, team, number, last, batch.logits);
    });
    return until;
}

// One layer by itself: out [rows][outputs] from x [rows][inputs].
void apply(const Linear &weight, Team &team, int64_t rows, const float *x, const float *residual, float *out) {
    static thread_local Inputs buffer;
    Inputs &inputs = buffer;
    inputs.shape(weight, rows);
    team.run([&](int number) {
        [[maybe_unused]] const TileRegisters registers;
        const int64_t threads = team.count();
        for (int64_t row = rows * number / threads; row < rows * (number + 1) / threads; ++row) {
            std::memcpy(inputs.row(row), x + row * weight.inputs, weight.inputs * sizeof(float));
            inputs.put_row(row);
        }
        team.barrier();
        linear(weight, team, number, inputs, out, residual);
    });
}

}  // namespace NAME
}  // namespace

// Included once per instruction set: NAME is the namespace, BLOCK how many rows share a pass over a panel.

namespace NAME {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t WIDTH = 16;

inline Lanes load(const float *from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof value); }

// In a fixed order, whatever the instruction set makes of the lanes.
inline float sum(Lanes value) {
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = value[i] + value[i + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

inline float dot(const float *a, const float *b, int64_t count) {
    Lanes total = {};
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) total += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < count; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

// e^x to about 2 units in the last place; 0 far below.
inline Lanes exponential(Lanes x) {
    for (int i = 0; i < WIDTH; ++i) x[i] = x[i] < -87.0f ? -87.0f : (x[i] > 88.0f ? 88.0f : x[i]);
    Lanes scaled = x * 1.44269504088896341f;
    Lanes whole;
    for (int i = 0; i < WIDTH; ++i) whole[i] = __builtin_floorf(scaled[i] + 0.5f);
    Lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Lanes result;
    for (int i = 0; i < WIDTH; ++i) {
        const int32_t bits = (static_cast<int32_t>(whole[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        result[i] = p[i] * power;
    }
    return result;
}

// ROWS rows times one panel: each accumulator adds its inputs in order, one by one.
template <int ROWS>
inline void panel(const float *weights, const float *x, int64_t stride, int64_t inputs, float *out, int64_t out_stride,
                  int64_t outputs, const float *bias, const float *residual) {
    Lanes low[ROWS] = {}, high[ROWS] = {};
    for (int64_t k = 0; k < inputs; ++k) {
        const Lanes a = load(weights), b = load(weights + WIDTH);
        weights += PANEL;
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            const float value = x[row * stride + k];
            low[row] += a * value;
            high[row] += b * value;
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        float result[PANEL];
        store(result, low[row]);
        store(result + WIDTH, high[row]);
        float *to = out + row * out_stride;
        for (int64_t n = 0; n < outputs; ++n) {
            float value = result[n] + (bias ? bias[n] : 0.0f);
            if (residual) value += residual[row * out_stride + n];
            to[n] = value;
        }
    }
}

template <int ROWS>
inline void panels_of(int rows, const float *weights, const float *x, int64_t stride, int64_t inputs, float *out,
                      int64_t out_stride, int64_t outputs, const float *bias, const float *residual) {
    if (rows == ROWS)
        panel<ROWS>(weights, x, stride, inputs, out, out_stride, outputs, bias, residual);
    else if constexpr (ROWS > 1)
        panels_of<ROWS - 1>(rows, weights, x, stride, inputs, out, out_stride, outputs, bias, residual);
}

// out = x W^T + bias (+ residual), this thread's share of the panels. `out` and `residual` have `outputs` columns.
inline void linear(const Linear &weight, Team &team, int number, int64_t rows, const float *x, float *out,
                   const float *residual = nullptr) {
    const int64_t count = (weight.outputs + PANEL - 1) / PANEL;
    const int64_t first = count * number / team.count(), last = count * (number + 1) / team.count();
    for (int64_t p = first; p < last; ++p) {
        const int64_t column = p * PANEL, outputs = std::min(PANEL, weight.outputs - column);
        const float *weights = weight.panels + p * PANEL * weight.inputs;
        for (int64_t row = 0; row < rows; row += BLOCK) {
            const int block = static_cast<int>(std::min<int64_t>(BLOCK, rows - row));
            panels_of<BLOCK>(block, weights, x + row * weight.inputs, weight.inputs, weight.inputs,
                             out + row * weight.outputs + column, weight.outputs, outputs,
                             weight.bias ? weight.bias + column : nullptr,
                             residual ? residual + row * weight.outputs + column : nullptr);
        }
    }
}

inline void norm(const float *x, const float *weight, float eps, int64_t count, float *out) {
    const float scale = 1.0f / __builtin_sqrtf(dot(x, x, count) / static_cast<float>(count) + eps);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

inline void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

// One query of one head over all that it sees: scores in order of slots, then their softmax over the values.
inline void attend(const Model &model, const Span &span, int64_t row, int64_t layer, int64_t kv_head, const float *query,
                   std::vector<float> &scores, float *out) {
    const int64_t d = model.head_dim, rows = span.stop - span.start;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
    scores.clear();
    float most = -INFINITY;
    auto each = [&](auto visit) {
        for (int64_t v = 0; v < span.views; ++v) {
            const View &view = span.view[v];
            const int64_t block = model.kv_heads * view.capacity * d;
            const float *keys = view.storage + layer * block + kv_head * view.capacity * d;
            const float *values = keys + model.layers * block;
            for (int64_t slot = 0; slot < view.length; ++slot) visit(keys + slot * d, values + slot * d);
            if (v + 1 < span.views) continue;
            for (int64_t other = 0; other < span.pending; ++other) {
                const bool seen = span.mask ? span.mask[row * span.pending + other] != 0
                                            : other <= span.pending - rows + row;
                if (seen) visit(keys + (view.length + other) * d, values + (view.length + other) * d);
            }
        }
    };
    each([&](const float *key, const float *) {
        const float score = dot(query, key, d) * scale;
        scores.push_back(score);
        most = std::max(most, score);
    });
    const int64_t count = static_cast<int64_t>(scores.size());
    scores.resize((count + WIDTH - 1) / WIDTH * WIDTH, -INFINITY);
    Lanes total = {};
    for (int64_t i = 0; i < count; i += WIDTH) {
        Lanes weights = exponential(load(&scores[i]) - most);
        for (int64_t j = count - i; j < WIDTH; ++j) weights[j] = 0.0f;
        store(&scores[i], weights);
        total += weights;
    }
    const float inverse = 1.0f / sum(total);
    for (int64_t i = 0; i < d; ++i) out[i] = 0.0f;
    int64_t number = 0;
    each([&](const float *, const float *value) {
        const float weight = scores[number++] * inverse;
        for (int64_t i = 0; i < d; ++i) out[i] += weight * value[i];
    });
}

void forward(const Model &model, Team &team, int64_t rows, const float *embedded, const int64_t *positions,
             int64_t spans, const Span *span, int64_t wanted, const int64_t *rows_wanted, float *logits) {
    const int64_t hidden = model.hidden, d = model.head_dim, half = d / 2, heads = model.heads, kv = model.kv_heads;
    const int64_t width = (heads + 2 * kv) * d;
    std::vector<float> x(embedded, embedded + rows * hidden), next(rows * hidden), normed(rows * hidden);
    std::vector<float> qkv(rows * width), mixed(rows * heads * d), gate_up(rows * 2 * model.ffn), inner(rows * model.ffn);
    std::vector<float> cosine(rows * half), sine(rows * half), last(wanted * hidden);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(positions[row]) * model.inverse_frequencies[i];
            cosine[row * half + i] = std::cos(angle) * model.rope_factor;
            sine[row * half + i] = std::sin(angle) * model.rope_factor;
        }
    std::vector<int64_t> span_of(rows);
    for (int64_t s = 0; s < spans; ++s)
        for (int64_t row = span[s].start; row < span[s].stop; ++row) span_of[row] = s;

    team.run([&](int number) {
        const int threads = team.count();
        std::vector<float> scores;
        auto share = [&](int64_t count, auto work) {
            for (int64_t i = count * number / threads; i < count * (number + 1) / threads; ++i) work(i);
        };
        float *now = x.data(), *then = next.data();
        share(rows, [&](int64_t row) {
            norm(now + row * hidden, model.layer[0].attention_norm, model.norm_eps, hidden, &normed[row * hidden]);
        });
        team.barrier();
        for (int64_t l = 0; l < model.layers; ++l) {
            const Layer &layer = model.layer[l];
            linear(layer.qkv, team, number, rows, normed.data(), qkv.data());
            team.barrier();
            share(rows * (heads + 2 * kv), [&](int64_t item) {
                const int64_t row = item / (heads + 2 * kv), head = item % (heads + 2 * kv);
                float *own = &qkv[row * width + head * d];
                if (head < heads + kv) {
                    const float *weight = head < heads ? layer.query_norm : layer.key_norm;
                    if (weight) norm(own, weight, model.norm_eps, d, own);
                    rotate(own, &cosine[row * half], &sine[row * half], half);
                }
                if (head < heads) return;
                const Span &of = span[span_of[row]];
                const View &view = of.view[of.views - 1];
                const int64_t slot = view.length + of.pending - (of.stop - row);
                const int64_t block = kv * view.capacity * d, kind = head < heads + kv ? 0 : model.layers;
                const int64_t kv_head = (head - heads) % kv;
                std::memcpy(view.storage + (kind + l) * block + (kv_head * view.capacity + slot) * d, own, d * sizeof(float));
            });
            team.barrier();
            share(rows * heads, [&](int64_t item) {
                const int64_t row = item / heads, head = item % heads;
                const Span &of = span[span_of[row]];
                attend(model, of, row - of.start, l, head / (heads / kv), &qkv[row * width + head * d], scores,
                       &mixed[row * heads * d + head * d]);
            });
            team.barrier();
            linear(layer.out, team, number, rows, mixed.data(), then, now);
            team.barrier();
            share(rows, [&](int64_t row) {
                norm(then + row * hidden, layer.mlp_norm, model.norm_eps, hidden, &normed[row * hidden]);
            });
            team.barrier();
            linear(layer.gate_up, team, number, rows, normed.data(), gate_up.data());
            team.barrier();
            share(rows * ((model.ffn + WIDTH - 1) / WIDTH), [&](int64_t item) {
                const int64_t per_row = (model.ffn + WIDTH - 1) / WIDTH, row = item / per_row;
                const int64_t first = item % per_row * WIDTH, count = std::min(WIDTH, model.ffn - first);
                const float *gate = &gate_up[row * 2 * model.ffn + first], *up = gate + model.ffn;
                Lanes values = {};
                for (int64_t i = 0; i < count; ++i) values[i] = -gate[i];
                const Lanes e = exponential(values);
                for (int64_t i = 0; i < count; ++i) inner[row * model.ffn + first + i] = gate[i] / (1.0f + e[i]) * up[i];
            });
            team.barrier();
            linear(layer.down, team, number, rows, inner.data(), now, then);
            team.barrier();
            if (l + 1 < model.layers) {
                share(rows, [&](int64_t row) {
                    norm(now + row * hidden, model.layer[l + 1].attention_norm, model.norm_eps, hidden, &normed[row * hidden]);
                });
                team.barrier();
            }
        }
        share(wanted, [&](int64_t i) {
            norm(now + rows_wanted[i] * hidden, model.final_norm, model.norm_eps, hidden, &last[i * hidden]);
        });
        team.barrier();
        linear(model.head, team, number, wanted, last.data(), logits);
    });
}

}  // namespace NAME

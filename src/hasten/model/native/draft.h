// What is drafted from logits: the likeliest words of rows, and trees that grow by them. Included once per instruction set.

namespace {
namespace NAME {

// The sum of the exponentials of some logits less the largest of them.
inline float mass_of(const float *logits, int64_t count, float largest) {
    Lanes total = {};
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) total += exponential(load(logits + i) - largest);
    float mass = sum(total);
    for (; i < count; ++i) mass += std::exp(logits[i] - largest);
    return mass;
}

// The likeliest of some logits, the first where several are, and its probability.
int64_t likeliest(const float *logits, int64_t count, float *probability) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i)
        if (logits[i] > logits[best]) best = i;
    *probability = 1.0f / mass_of(logits, count, logits[best]);
    return best;
}

// The likeliest `most` of some logits, falling, the first of equal ones first; returns the logarithm of their mass.
float rank(const float *logits, int64_t count, int64_t most, float *values, int64_t *places) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (found == most && !(logits[i] > values[most - 1])) continue;
        int64_t at = found < most ? found++ : most - 1;
        for (; at > 0 && logits[i] > values[at - 1]; --at) values[at] = values[at - 1], places[at] = places[at - 1];
        values[at] = logits[i];
        places[at] = i;
    }
    return values[0] + std::log(mass_of(logits, count, values[0]));
}

// A request's tree while it grows.
struct Growing {
    struct Node {
        int64_t token, parent, depth;
        double chance;
        // Of a node that was read: its row among all outputs, and which of the sequence's pending rows it sees, itself the last.
        int64_t output;
        std::vector<int64_t> seen;
    };
    std::vector<Node> nodes;
    std::vector<int64_t> frontier;
    int64_t left, pending = 0;
    bool grows = true;
};

// The likeliest nodes of a level that may have a child in the draft; none where that is not worth it.
inline void choose_frontier(Growing &of, const Tree &tree, const Growth &growth, int64_t first) {
    auto &nodes = of.nodes;
    std::vector<double> ranked;
    for (const auto &node : nodes) ranked.push_back(node.chance);
    double bar = 0;
    if (static_cast<int64_t>(ranked.size()) >= tree.most) {
        std::nth_element(ranked.begin(), ranked.begin() + tree.most - 1, ranked.end(), std::greater<double>());
        bar = ranked[tree.most - 1];
    }
    of.frontier.clear();
    for (int64_t n = first; n < static_cast<int64_t>(nodes.size()); ++n) {
        const int64_t *end = tree.closed + tree.closed_count;
        if (nodes[n].chance > bar && std::find(tree.closed, end, nodes[n].token) == end) of.frontier.push_back(n);
    }
    std::stable_sort(of.frontier.begin(), of.frontier.end(),
                     [&](int64_t a, int64_t b) { return nodes[a].chance > nodes[b].chance; });
    if (static_cast<int64_t>(of.frontier.size()) > growth.width) of.frontier.resize(growth.width);
    std::sort(of.frontier.begin(), of.frontier.end());
    double together = 0;
    for (const int64_t n : of.frontier) together += nodes[n].chance;
    if (!(together >= growth.least)) of.frontier.clear();
}

// The likeliest nodes; of two that are as likely the one that is not as deep, so that none lacks its parent.
inline void write_draft(const Growing &of, Tree &tree) {
    const auto &nodes = of.nodes;
    std::vector<int64_t> order(nodes.size()), place(nodes.size(), -1);
    for (size_t n = 0; n < nodes.size(); ++n) order[n] = n;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return nodes[a].chance != nodes[b].chance ? nodes[a].chance > nodes[b].chance : nodes[a].depth < nodes[b].depth;
    });
    tree.count = std::min<int64_t>(tree.most, order.size());
    order.resize(tree.count);
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < tree.count; ++i) {
        const auto &node = nodes[order[i]];
        place[order[i]] = i;
        tree.tokens[i] = node.token;
        tree.parents[i] = node.parent < 0 ? -1 : place[node.parent];
        tree.estimates[i] = node.chance;
    }
}

// See `hasten_grow`.
void grow(const Model &model, Team &team, const Growth &growth, int64_t trees, Tree *tree) {
    const int64_t hidden = model.hidden, words = model.head.outputs, ranks = std::min(growth.ranks, words);
    std::vector<Growing> growing(trees);
    // Of the roots, then of each node that was read.
    std::vector<float> outputs, logits(trees * words), level, entering, values(ranks);
    std::vector<int64_t> places(ranks), beside, tokens, positions, wanted;
    for (int64_t t = 0; t < trees; ++t) {
        growing[t].left = tree[t].depth;
        outputs.insert(outputs.end(), tree[t].state, tree[t].state + hidden);
    }
    level.resize(trees * hidden);
    for (int64_t t = 0; t < trees; ++t)
        norm(&outputs[t * hidden], model.final_norm, model.norm_eps, hidden, &level[t * hidden]);
    apply(model.head, team, trees, level.data(), nullptr, logits.data());
    for (bool first = true;; first = false) {
        // Children of the level's nodes, whose rows come tree by tree.
        int64_t row = 0, rows = 0;
        for (int64_t t = 0; t < trees; ++t) {
            Growing &of = growing[t];
            if (!of.grows) continue;
            const int64_t before = of.nodes.size();
            const std::vector<int64_t> parents = first ? std::vector<int64_t>{-1} : of.frontier;
            for (const int64_t parent : parents) {
                const float mass = rank(&logits[row++ * words], words, ranks, values.data(), places.data());
                const double above = parent < 0 ? 1.0 : of.nodes[parent].chance;
                const int64_t depth = parent < 0 ? 0 : of.nodes[parent].depth;
                for (int64_t i = 0; i < ranks; ++i) {
                    // Rounding must not make a child likelier than its parent. What is not a number is no chance.
                    const float share = std::exp(values[i] - mass);
                    const double chance = above * (share > 0 ? std::min(1.0f, share) : 0.0f);
                    const int64_t token = growth.words ? growth.words[places[i]] : places[i];
                    of.nodes.push_back({token, parent, depth + 1, chance, -1, {}});
                }
            }
            of.frontier.clear();
            if (--of.left > 0) choose_frontier(of, tree[t], growth, before);
            of.grows = !of.frontier.empty();
            rows += of.frontier.size();
        }
        if (rows == 0) break;

        // The chosen nodes' rows: what their parents' rows gave, beside their tokens.
        std::vector<Span> spans;
        std::vector<std::vector<uint8_t>> masks;
        entering.resize(rows * hidden);
        beside.resize(rows);
        positions.resize(rows);
        row = 0;
        for (int64_t t = 0; t < trees; ++t) {
            Growing &of = growing[t];
            if (!of.grows) continue;
            Span span = *tree[t].span;
            span.start = row;
            for (const int64_t n : of.frontier) {
                auto &node = of.nodes[n];
                const int64_t from = node.parent < 0 ? t : of.nodes[node.parent].output;
                if (node.parent >= 0) node.seen = of.nodes[node.parent].seen;
                node.seen.push_back(of.pending++);
                node.output = outputs.size() / hidden + row;
                beside[row] = node.token;
                positions[row] = tree[t].position + node.depth;
                std::memcpy(&entering[row++ * hidden], &outputs[from * hidden], hidden * sizeof(float));
            }
            span.stop = row;
            span.pending = of.pending;
            auto &mask = masks.emplace_back(of.frontier.size() * of.pending, 0);
            for (size_t i = 0; i < of.frontier.size(); ++i)
                for (const int64_t other : of.nodes[of.frontier[i]].seen) mask[i * of.pending + other] = 1;
            span.mask = mask.data();
            spans.push_back(span);
        }
        if (growth.fusion) {
            level.resize(rows * 2 * hidden);
            for (int64_t i = 0; i < rows; ++i) {
                look_up(model, beside[i], &level[2 * i * hidden]);
                std::memcpy(&level[(2 * i + 1) * hidden], &entering[i * hidden], hidden * sizeof(float));
            }
            apply(*growth.fusion, team, rows, level.data(), nullptr, entering.data());
        } else if (growth.entrance) {
            for (int64_t i = 0; i < rows; ++i)
                norm(&entering[i * hidden], growth.entrance, model.norm_eps, hidden, &entering[i * hidden]);
        }
        tokens.assign(rows, -1);
        wanted.resize(rows);
        for (int64_t i = 0; i < rows; ++i) wanted[i] = i;
        logits.resize(rows * words);
        level.resize(rows * hidden);
        const Tap tap{OUTPUT, model.layers - 1, level.data()};
        Batch batch{};
        batch.rows = batch.wanted = rows;
        batch.tokens = tokens.data();
        batch.positions = positions.data();
        batch.axes = batch.taps = 1;
        batch.embedded = entering.data();
        batch.spans = spans.size();
        batch.span = spans.data();
        batch.row_wanted = wanted.data();
        batch.logits = logits.data();
        batch.tap = &tap;
        batch.beside = beside.data();
        forward(model, team, batch, -1);
        outputs.insert(outputs.end(), level.begin(), level.end());
    }
    for (int64_t t = 0; t < trees; ++t) write_draft(growing[t], tree[t]);
}

}  // namespace NAME
}  // namespace

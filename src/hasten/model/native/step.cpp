// The default forward pass of a Llama-like decoder on CPU: one call per step, over the cache's own memory.
//
// Every sum runs in an order that depends on the row alone, never on the rows beside it: a row's result is the same bits
// in every batch. One pass over the weights serves up to 32 rows. The structures here are mirrored in structs.py; the
// work is in lanes.h (over vectors.h, or neon.h on arm64), amx.h, blocks.h, linear.h, attention.h, forward.h, draft.h and
// grouped.h, compiled once per instruction set.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifndef WITHOUT_FUTEX
#define HAS_FUTEX 1
#include <linux/futex.h>
#endif
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PORTABLE)
#define HAS_TARGETS 1
#include <immintrin.h>
#if defined(__linux__) && __GNUC__ >= 11
#define HAS_TILES 1
#endif
#ifdef EMULATED_TILES
#include "emulated_tiles.h"
#endif
#endif

namespace {

// The OpenMP runtime that PyTorch computes with. Its threads spin for a while after each operation: threads of our own
// beside them would wait for a core, so a step borrows them instead. GOMP_parallel is what compilers call for a parallel
// region.
struct OpenMP {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
    int (*number)() = nullptr;
    int (*count)() = nullptr;
} openmp;

// Nanoseconds on a clock.
inline int64_t now(clockid_t clock = CLOCK_MONOTONIC) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

// How many threads of a team take part. Where another process has a core, all would wait for the thread that is there: for
// as long as a scheduler's turn takes, a hundred stages of a small model's step. Where steps wait for longer than they
// compute, the next ones do with a thread less; after a multiple of what was lost one more is tried.
class Attendance {
  public:
    explicit Attendance(int most) : most_(most), count_(most) {}
    // Of the step that begins.
    int count(int64_t began) {
        if (count_ < most_ && began >= until_) ++count_;
        return count_;
    }
    // A step of several threads is over. Its first one computed for so long, and waited for the rest of the time.
    void judge(int64_t computed, int64_t began, int64_t ended) {
        const int64_t waited = ended - began - computed;
        balance_ = std::min(balance_ + computed - waited, CREDIT);
        if (balance_ >= 0) return;
        --count_;
        balance_ = 0;
        until_ = ended + std::min(PATIENCE * waited, LONGEST);
    }

  private:
    // What happens now and then is waited for: steps that go well are a credit. In nanoseconds.
    static constexpr int64_t CREDIT = 20000000, PATIENCE = 16, LONGEST = 200000000;
    const int most_;
    int count_;
    int64_t balance_ = CREDIT, until_ = 0;
};

// Threads that run the same task side by side. They spin between the stages of a step; those of our own sleep between
// steps. A team works for one thread at a time.
class Team {
  public:
    explicit Team(int count) : most_(count), borrowed_(openmp.parallel != nullptr), attendance_(count) {
        if (borrowed_) return;
        for (int number = 1; number < count; ++number) threads_.emplace_back([this, number] { work(number); });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
            ++round_;
        }
        wake_.notify_all();
        for (auto &thread : threads_) thread.join();
    }
    int most() const { return most_; }
    // Inside a task: of the threads that run it. OpenMP may give fewer than were asked for.
    int count() const { return count_.load(std::memory_order_relaxed); }

    // Every thread that takes part calls `task(number)`; returns when all are done.
    void run(const std::function<void(int)> &task) {
        const int64_t began = now();
        const int count = attendance_.count(began);
        task_ = &task;
        if (count == 1) {
            count_ = 1;
            return task(0);
        }
        if (borrowed_) openmp.parallel(&Team::enter, this, count, 0);
        else run_own(count);
        attendance_.judge(computed_, began, now());
    }

    // Inside a task: wait until every thread has come so far.
    void barrier() {
        if (count() == 1) return;
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count() - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1);
            wake();
        } else {
            for (int spins = 0; spins < SPINS; ++spins) {
                if (phase_.load(std::memory_order_acquire) != phase) return;
                pause();
            }
            sleep(phase);
        }
    }

  private:
    static constexpr int SPINS = 1000;
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        // Its own hint to wait does nothing on most processors.
        __asm__ volatile("isb" ::: "memory");
#else
        std::this_thread::yield();
#endif
    }
    // Where another process has a core, the thread that is waited for may not be running. One that only yields its own core
    // gets it back behind all others; one that sleeps is woken in front of them.
#ifdef HAS_FUTEX
    void sleep(int phase) {
        sleepers_.fetch_add(1);
        while (phase_.load() == phase) syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1);
    }
    void wake() {
        if (sleepers_.load() != 0) syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, most_, nullptr, nullptr, 0);
    }
#else
    void sleep(int phase) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        passed_.wait(lock, [&] { return phase_.load() != phase; });
        sleepers_.fetch_sub(1);
    }
    void wake() {
        if (sleepers_.load() == 0) return;
        // Who counts as a sleeper, but has not yet gone to sleep, holds the lock.
        mutex_.lock();
        mutex_.unlock();
        passed_.notify_all();
    }
#endif
    // The first thread's part of a task. What it computes outside, it spins.
    void work_first() {
        const int64_t before = now(CLOCK_THREAD_CPUTIME_ID);
        (*task_)(0);
        computed_ = now(CLOCK_THREAD_CPUTIME_ID) - before;
    }
    void run_own(int count) {
        left_.store(count - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            count_ = count;
            ++round_;
        }
        wake_.notify_all();
        work_first();
        for (int spins = 0; left_.load(std::memory_order_acquire); ++spins) {
            if (spins < SPINS) pause();
            else std::this_thread::yield();
        }
    }
    static void enter(void *self) {
        Team &team = *static_cast<Team *>(self);
        // All write the same.
        team.count_.store(openmp.count(), std::memory_order_relaxed);
        const int number = openmp.number();
        if (number == 0) team.work_first();
        else (*team.task_)(number);
        // OpenMP spins for milliseconds where it waits.
        team.barrier();
    }
    void work(int number) {
        uint64_t seen = 0;
        for (;;) {
            for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < 8000; ++spins) pause();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                seen = round_.load(std::memory_order_relaxed);
                if (closing_) return;
                if (number >= count()) continue;
            }
            (*task_)(number);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }
    const int most_;
    const bool borrowed_;
    Attendance attendance_;
    std::atomic<int> count_{1};
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, passed_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> left_{0}, arrived_{0}, phase_{0}, sleepers_{0};
    const std::function<void(int)> *task_ = nullptr;
    int64_t computed_ = 0;
    bool closing_ = false;
};

enum Format : int64_t { FLOAT32, BFLOAT16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K };

// Panels of 16 outputs, an even number of them, with inputs in words of 32 bits per output, a multiple of 16 of them. What
// is missing is zero.
//   float32 [panels][inputs][16]
//   bf16    [panels][inputs / 2][16][2]
// The block formats of GGUF files, with the codes and scales that are stored. A weight is scale * (code - offset) + minimum:
//   Q8_0    [panels][inputs / 4][16][4], codes from 0 to 255, offset 128; a scale per 32 inputs
//   Q4_0    [panels][inputs / 8][16][4], inputs 0..3 in the lower halves of the bytes, 4..7 in the upper; codes from 0 to
//           15, offset 8; a scale per 32 inputs
//   Q4_1    as Q4_0, with a minimum beside each scale, offset 0
//   Q4_K    as Q4_1, scales and minima by super-blocks of 256 inputs: a byte for each, times the super-block's own
//   Q6_K    [panels][inputs / 16][3][16][4], codes from 0 to 63, offset 32: lower halves as in Q4_0, then the upper two bits,
//           inputs 0..3 in the lowest of each byte; a scale per 16 inputs, a byte times the super-block's own
struct Linear {
    Format format;
    const void *panels;
    // Q8_0, Q4_0: float16 [panels][inputs / 32][16]
    // Q4_1: float16 [panels][inputs / 32][2][16], scale and minimum
    // Q4_K: [panels][inputs / 256], each two times 16 float16, scale and minimum, and int8 [8][2][16]
    // Q6_K: [panels][inputs / 256], each 16 float16 and int8 [16][16]; else null
    const void *scales;
    const float *bias;  // [outputs] or null
    int64_t outputs, inputs;
    int64_t turned;  // whether weights are those of groups of 32 inputs that were turned, as `turn` does
};

// Words come by 16: a tile of the processors that have such registers.
inline int64_t words_of(const Linear &weight) {
    const int64_t together = 16 * (weight.format == FLOAT32 ? 1 : weight.format == BFLOAT16 ? 2 : 4);
    return (weight.inputs + together - 1) / together * 16;
}

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm;  // attention_norm may be null: its rows are not normed
    Linear qkv, out, gate_up, down;
    int64_t window;  // a row at position p sees positions above p - window; 0: all
    const float *token_norm;  // where attention reads the normed embedding of the token beside a row, before the row; or null
    Linear values;  // where those of `qkv` are of another format, and `qkv` ends before them; else without outputs
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary;
    float norm_eps, rope_factor;
    const float *inverse_frequencies;  // [head_dim / 2]
    const int64_t *axis_of;            // [head_dim / 2], by which axis of a position each turns; null: by the first
    const void *embedding;             // [vocabulary][hidden], float32 or bf16
    int64_t embedding_format;
    const float *final_norm;  // or null, as attention_norm
    Linear head;
    const Layer *layer;
};

// A block of the slots that some layers keep together; its first `length` are committed.
struct View {
    float *keys, *values;  // [layers][kv_heads][capacity][head_dim]
    const int64_t *positions;
    int64_t capacity, length;
};
// All slots of these layers; the last view holds the pending rows behind its own. Without views they are kept in a way that
// is unknown here, and somebody else attends.
struct Slots {
    int64_t views;
    const View *view;
};
// A sequence's rows in this pass, and what they see.
struct Span {
    int64_t start, stop, pending;
    const uint8_t *mask;  // [rows][pending], or null: causal
    const Slots *slots;
    const int64_t *group_of, *index_of;  // of each layer: which slots, and its place in their blocks
    const Slots &of(int64_t layer) const { return slots[group_of[layer]]; }
};
enum Site : int64_t { INPUT, ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, OUTPUT, FINAL_NORM };
struct Tap {
    Site site;
    int64_t layer;
    float *states;  // [rows][hidden]
};
// Which feed-forward layers rows pass by (FFN-SkipLLM): of layers `first` to `last`, so many behind one whose result is as
// good as parallel to what it was added to.
struct Gate {
    int64_t first, last, run;
    float threshold;        // least cosine
    const float *channels;  // [hidden], weights of channels in it
    int64_t *left;          // [rows], layers that a row still passes by; below 0 it never does
    uint8_t *skipped;       // [layers][rows], which it did: zeros at first
};
// A row that enters at a layer's input: the state of another row there, mapped and moved.
struct Join {
    int64_t layer, row, source;
    const float *matrix;  // [hidden][hidden], or null
    const float *vector;  // [hidden], or null
};
struct Batch {
    int64_t rows;
    const int64_t *tokens, *positions;  // positions [rows][axes]
    int64_t axes;
    const float *embedded;  // [rows][hidden] where tokens are -1, or null
    int64_t spans;
    const Span *span;
    int64_t wanted;
    const int64_t *row_wanted;
    float *logits;  // [wanted][vocabulary]
    int64_t taps;
    const Tap *tap;
    // Where somebody else attends in some layer: queries, keys and values go out, and what comes of them comes in. Else null.
    float *qkv;          // [rows][(heads + 2 kv_heads) * head_dim], rotated
    const float *mixed;  // [rows][heads * head_dim]
    const int64_t *beside;  // [rows] tokens that stand beside the rows, or null
    const Gate *gate;    // or null: all rows go through all layers
    int64_t joins;
    const Join *join;
    // The last `late` rows all join, none of them before layer `late_until`: below it they are not computed.
    int64_t late, late_until;
    int64_t pause;       // a layer behind whose attention somebody wants to look at what was tapped; 0 for none
};
// How trees of drafts grow (EAGLE-2): a network reads the likeliest nodes of a level, each as what its parent's row gave with
// its token beside it, and their likeliest words become the next level.
struct Growth {
    const Linear *fusion;   // where a token's embedding and an output, side by side, are made one (EAGLE-1); or null
    const float *entrance;  // [hidden] of a norm that outputs enter by, or null
    const int64_t *words;   // [head.outputs] tokens of the head's rows, or null: they are the rows' numbers
    int64_t width, ranks;   // nodes of a level that are read, at most, and children of each
    double least;           // a level is read where its nodes' chances come to so much together
};
// One request's tree. Its nodes come back, each behind its parent; -1 is the parent of the first ones.
struct Tree {
    const Span *span;     // its sequence, with room for width * depth rows
    const float *state;   // [hidden] what the network made of the text's last row
    int64_t position;     // of that row
    int64_t most, depth;  // nodes, and levels
    int64_t closed_count;
    const int64_t *closed;  // tokens below which nothing stands
    int64_t *tokens, *parents;  // [most]
    double *estimates;          // [most]
    int64_t count;
};

}  // namespace

// Rows that AVX-512's kernels keep in registers; each number up to it is a kernel of its own, which takes long to compile.
#ifndef VECTOR_ROWS
#define VECTOR_ROWS 24
#endif

// LEVEL: 0 plain C++, 1 AVX2, 2 AVX-512 with VNNI, 3 with BF16 as well, 4 with tile registers (AMX). MOST: rows of one pass
// over a panel.
#define NAME portable
#define LEVEL 0
#define MOST 4
#include "kernels.h"

#ifdef HAS_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define NAME avx2
#define LEVEL 1
#define MOST 6
#include "kernels.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#define NAME avx512
#define LEVEL 2
#define MOST VECTOR_ROWS
#include "kernels.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,prefer-vector-width=512")
#define NAME avx512bf16
#define LEVEL 3
#define MOST VECTOR_ROWS
#include "kernels.h"
#pragma GCC pop_options

#ifdef HAS_TILES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,prefer-vector-width=512")
#ifndef EMULATED_TILES
#pragma GCC target("amx-tile,amx-bf16,amx-int8")
#endif
#define NAME amx
#define LEVEL 4
#define MOST 32
#include "kernels.h"
#pragma GCC pop_options
#endif
#endif

#if defined(__aarch64__) && defined(__GNUC__) && !defined(PORTABLE)
#include "arm64.h"
#define HAS_NEON 1
#endif

namespace {

struct Kernels {
    const char *name;
    int64_t (*forward)(const Model &, Team &, const Batch &, int64_t);
    void (*grouped)(const Model &, Team &, const Batch &, int64_t, const int64_t *, int64_t *);
    void (*apply)(const Linear &, Team &, int64_t, const float *, const float *, float *);
    int64_t (*likeliest)(const float *, int64_t, float *);
    float (*rank)(const float *, int64_t, int64_t, float *, int64_t *);
    void (*grow)(const Model &, Team &, const Growth &, int64_t, Tree *);
};

#ifdef EMULATED_TILES
bool tiles_granted() { return true; }
#elif defined(HAS_TILES)
// Linux gives tile registers to a process that asks for them.
bool tiles_granted() {
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8"))
        return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

#define KERNELS(set) \
    Kernels{#set, set::forward, set::grouped, set::apply, set::likeliest, set::rank, set::grow}

// The best that the processor has, or the one that is asked for, if it has it.
Kernels choose() {
    const char *wanted = std::getenv("HASTEN_NATIVE");
    [[maybe_unused]] auto may = [&](const char *name) { return wanted == nullptr || !*wanted || !std::strcmp(wanted, name); };
#ifdef HAS_TARGETS
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
#ifdef HAS_TILES
    if (may("amx") && wide && __builtin_cpu_supports("avx512bf16") && tiles_granted()) return KERNELS(amx);
#endif
    if (may("avx512bf16") && wide && __builtin_cpu_supports("avx512bf16")) return KERNELS(avx512bf16);
    if (may("avx512") && wide) return KERNELS(avx512);
    if (may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return KERNELS(avx2);
#endif
#ifdef HAS_NEON
#ifdef HAS_DOT
    if (may("neonbf16") && has_dot() && has_bf16()) return KERNELS(neonbf16);
    if (may("neondot") && has_dot()) return KERNELS(neondot);
#endif
    if (may("neon")) return KERNELS(neon);
#endif
    return KERNELS(portable);
}

const Kernels &kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace

extern "C" {

// Of the structures that are mirrored, in the order of `STRUCTS`; then 0.
const int64_t *hasten_sizes() {
    static const int64_t sizes[] = {sizeof(Linear), sizeof(Layer), sizeof(Model), sizeof(View), sizeof(Slots),
                                    sizeof(Span),   sizeof(Tap),   sizeof(Gate),  sizeof(Join),
                                    sizeof(Batch),  sizeof(Growth), sizeof(Tree), 0};
    return sizes;
}
const char *hasten_kernels() { return kernels().name; }
// Borrow the threads of an OpenMP runtime that the process has loaded from `path`; whether that can be done.
int hasten_borrow(const char *path) {
#if defined(__linux__)
    // Once: another thread may be computing with it.
    if (openmp.parallel != nullptr) return 1;
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    OpenMP found;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.number = reinterpret_cast<decltype(found.number)>(dlsym(library, "omp_get_thread_num"));
    found.count = reinterpret_cast<decltype(found.count)>(dlsym(library, "omp_get_num_threads"));
    if (!found.parallel || !found.number || !found.count) return 0;
    openmp = found;
    return 1;
#else
    return 0;
#endif
}

void *hasten_team(int count) { return new Team(count); }
void hasten_disband(void *team) { delete static_cast<Team *>(team); }

// A pass, from its start (`from` -1) or, once somebody has attended in layer `from` for those spans whose slots are unknown
// here, from there on. Returns the next layer where that is to be done, or where it is to pause, `model->layers` when the
// pass is over, or -1 for a token that the embedding does not have. A pass that goes on must do so before the thread begins
// another one.
int64_t hasten_forward(const Model *model, void *team, const Batch *batch, int64_t from) {
    for (int64_t row = 0; row < batch->rows; ++row) {
        const int64_t token = batch->tokens[row];
        if (token >= model->vocabulary || (token < 0 && !batch->embedded)) return -1;
        if (batch->beside && (batch->beside[row] >= model->vocabulary || batch->beside[row] < 0)) return -1;
    }
    if (batch->rows == 0) return model->layers;
    return kernels().forward(*model, *static_cast<Team *>(team), *batch, from);
}

// A pass of token ids through all layers, where the attention of `sizes` of them at a time reads what enters the first one:
// those of a group on threads of their own, the rest by the whole team. Slots are known; nothing is tapped, joined, gated or
// paused. `spent` gets nanoseconds: [layers] of attention, of a layer that stands alone all of it; [layers] of the other
// feed-forward layers; the head's. Returns -1 for a token that the embedding does not have, else 0.
int64_t hasten_grouped(const Model *model, void *team, const Batch *batch, int64_t groups, const int64_t *sizes,
                       int64_t *spent) {
    for (int64_t row = 0; row < batch->rows; ++row)
        if (batch->tokens[row] < 0 || batch->tokens[row] >= model->vocabulary) return -1;
    kernels().grouped(*model, *static_cast<Team *>(team), *batch, groups, sizes, spent);
    return 0;
}

// Continues one sequence greedily: `token` at `position`, then what is likeliest among the first `vocabulary` tokens, up to
// `most` tokens or until all of them together have less probability than `confidence`. The span has one row; its slots are
// known, and have room for `most` more.
// Returns how many `tokens` and `probabilities` there are; -1 if the embedding does not have `token`. Where logits are not
// finite, the last probability is NaN.
int64_t hasten_chain(const Model *model, void *team, const Span *span, int64_t token, int64_t position, int64_t vocabulary,
                     int64_t most, float confidence, int64_t *tokens, float *probabilities) {
    std::vector<float> logits(model->head.outputs);
    const int64_t first = 0;
    float reached = 1.0f;
    for (int64_t i = 0; i < most; ++i, ++position) {
        Span now = *span;
        now.pending = i + 1;
        const Batch batch{1, &token, &position, 1, nullptr, 1, &now, 1, &first, logits.data(), 0, nullptr, nullptr,
                          nullptr, nullptr, nullptr, 0};
        if (hasten_forward(model, team, &batch, -1) < 0) return -1;
        token = tokens[i] = kernels().likeliest(logits.data(), vocabulary, &probabilities[i]);
        reached *= probabilities[i];
        // Not a number, either.
        if (!(reached >= confidence)) return i + 1;
    }
    return most;
}

// The likeliest `most` of each of some rows of logits: `values` and `places` [rows][most], falling, and the logarithm of each
// row's sum of exponentials.
void hasten_rank(const float *logits, int64_t rows, int64_t words, int64_t most, float *values, int64_t *places,
                 float *masses) {
    for (int64_t row = 0; row < rows; ++row)
        masses[row] = kernels().rank(logits + row * words, words, most, values + row * most, places + row * most);
}

// Grows the drafts of some requests together, level by level. The model's rows are embeddings with a token beside each.
void hasten_grow(const Model *model, void *team, const Growth *growth, int64_t trees, Tree *tree) {
    kernels().grow(*model, *static_cast<Team *>(team), *growth, trees, tree);
}

// One layer by itself: out [rows][outputs] = x [rows][inputs] W^T + bias (+ residual, or null).
void hasten_linear(const Linear *weight, void *team, int64_t rows, const float *x, const float *residual, float *out) {
    kernels().apply(*weight, *static_cast<Team *>(team), rows, x, residual, out);
}
}

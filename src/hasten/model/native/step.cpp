// The default forward pass of a Llama-like decoder on CPU: one call per step, over the cache's own memory.
//
// Every sum runs in an order that depends on the row alone, never on the rows beside it: a row's result is the same bits
// in every batch. Weights lie in panels of 32 outputs, so that one pass over them serves up to 12 rows.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// Threads: they spin between the stages of a step, and sleep between steps.

class Team {
  public:
    explicit Team(int count) : count_(count) {
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
    int count() const { return count_; }

    // Every thread calls `task(number)`; returns when all are done.
    void run(const std::function<void(int)> &task) {
        if (count_ == 1) return task(0);
        task_ = &task;
        left_.store(count_ - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ++round_;
        }
        wake_.notify_all();
        task(0);
        while (left_.load(std::memory_order_acquire)) pause();
    }

    // Inside a task: wait until every thread has come so far.
    void barrier() {
        if (count_ == 1) return;
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            int spins = 0;
            while (phase_.load(std::memory_order_acquire) == phase) {
                pause();
                // With fewer free cores than threads, spinning would keep the others from working.
                if (++spins > 1000) std::this_thread::yield();
            }
        }
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
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
            }
            (*task_)(number);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }
    int count_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> left_{0}, arrived_{0}, phase_{0};
    const std::function<void(int)> *task_ = nullptr;
    bool closing_ = false;
};

constexpr int64_t PANEL = 32;

struct Linear {
    const float *panels;  // [ceil(outputs / 32)][inputs][32]
    const float *bias;    // [outputs] or null
    int64_t outputs, inputs;
};

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm;
    Linear qkv, out, gate_up, down;
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary;
    float norm_eps, rope_factor;
    const float *inverse_frequencies;  // [head_dim / 2]
    const float *final_norm;
    Linear head;
    const Layer *layer;
};

// A sequence's rows in this pass, and the blocks that they see. The last view holds the pending rows behind its slots.
struct View {
    float *storage;  // [2][layers][kv_heads][capacity][head_dim]
    int64_t capacity, length;
};
struct Span {
    int64_t start, stop, pending;
    const uint8_t *mask;  // [rows][pending], or null: causal
    int64_t views;
    const View *view;
};

}  // namespace

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_TARGETS 1
#endif

#define NAME portable
#define BLOCK 4
#include "step_body.h"
#undef NAME
#undef BLOCK

#ifdef HAS_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME avx2
#define BLOCK 3
#include "step_body.h"
#undef NAME
#undef BLOCK
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define NAME avx512
#define BLOCK 12
#include "step_body.h"
#undef NAME
#undef BLOCK
#pragma GCC pop_options
#endif

namespace {
using Forward = void (*)(const Model &, Team &, int64_t, const float *, const int64_t *, int64_t, const Span *, int64_t,
                         const int64_t *, float *);

Forward choose() {
#ifdef HAS_TARGETS
    __builtin_cpu_init();
    const char *wanted = std::getenv("HASTEN_NATIVE");
    const bool any = wanted == nullptr;
    if ((any || !std::strcmp(wanted, "avx512")) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return avx512::forward;
    if ((any || !std::strcmp(wanted, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return avx2::forward;
#endif
    return portable::forward;
}
}  // namespace

extern "C" {

void *hasten_team(int count) { return new Team(count); }
void hasten_disband(void *team) { delete static_cast<Team *>(team); }

// [outputs][inputs] to panels; outputs that fill the last panel are zero.
void hasten_pack(const float *weight, int64_t outputs, int64_t inputs, float *panels) {
    for (int64_t first = 0; first < outputs; first += PANEL)
        for (int64_t k = 0; k < inputs; ++k)
            for (int64_t n = 0; n < PANEL; ++n)
                *panels++ = first + n < outputs ? weight[(first + n) * inputs + k] : 0.0f;
}

// The arrays are described where they are made, in backend.py.
void hasten_forward(const Model *model, void *team, int64_t rows, const float *embedded, const int64_t *positions,
                    int64_t spans, const Span *span, int64_t wanted, const int64_t *rows_wanted, float *logits) {
    static const Forward forward = choose();
    forward(*model, *static_cast<Team *>(team), rows, embedded, positions, spans, span, wanted, rows_wanted, logits);
}
}

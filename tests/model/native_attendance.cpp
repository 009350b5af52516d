// How many threads of a team take part in a step, by what the steps before it waited for.
// Built with sanitizers, and with `STEP` naming step.cpp.

#include STEP

#include <chrono>
#include <cstdio>

namespace {

constexpr int64_t MILLISECOND = 1000000;
int failures = 0;

void expect(int found, int wanted, const char *what) {
    if (found == wanted) return;
    std::fprintf(stderr, "%s: %d threads, not %d\n", what, found, wanted);
    ++failures;
}

// Steps on a clock of their own.
struct Steps {
    Attendance attendance;
    int64_t time = 0;
    // Takes some, each of which computes and waits for so many milliseconds; returns how many threads the next one has.
    int take(int count, int64_t computed, int64_t waited) {
        for (; count; --count) {
            const bool alone = attendance.count(time) == 1;
            const int64_t began = time;
            time += (computed + waited) * MILLISECOND;
            if (!alone) attendance.judge(computed * MILLISECOND, began, time);
        }
        return attendance.count(time);
    }
    int pass(int64_t milliseconds) {
        time += milliseconds * MILLISECOND;
        return attendance.count(time);
    }
};

void judged() {
    Steps steps{Attendance(3)};
    expect(steps.take(100, 1, 0), 3, "all is well");
    expect(steps.take(3, 1, 5), 3, "a few that wait");
    expect(steps.take(100, 2, 1), 3, "some waiting, less than computing");
    expect(steps.take(6, 1, 5), 2, "many that wait");
    expect(steps.take(1, 1, 0), 2, "one that does not, right behind");
    expect(steps.pass(81), 3, "after sixteen times what was lost");
    expect(steps.take(1, 1, 5), 2, "no credit for the one that is tried");
    expect(steps.take(1, 1, 5), 1, "with one thread less it is no better");
    expect(steps.take(10, 1, 1), 1, "alone");
    expect(steps.pass(61), 2, "one more is tried");
    expect(steps.take(1, 1, 0), 3, "another one, as that went well");
    expect(steps.take(10, 1, 0), 3, "all is well again");
    expect(steps.take(1, 1, 3600 * 1000), 2, "stopped for an hour");
    expect(steps.pass(201), 3, "which is not waited for sixteen times");
}

// Threads of our own: who takes part is whole at every barrier, and those that stay away harm nothing.
void taken_part() {
    Team team(3);
    int least = 3;
    for (int round = 0; round < 60; ++round) {
        std::atomic<int> came[3] = {}, seen{0};
        team.run([&](int number) {
            ++came[number];
            if (number && round < 12) std::this_thread::sleep_for(std::chrono::milliseconds(10));
            team.barrier();
            int all = 0;
            for (const auto &each : came) all += each;
            if (all == team.count()) ++seen;
        });
        int all = 0;
        for (const auto &each : came) all += each;
        expect(seen, all, "all of those that came");
        expect(came[0], 1, "the one that asks");
        least = std::min(least, all);
    }
    expect(least, 1, "after waiting");
}

}  // namespace

int main() {
    judged();
    taken_part();
    return failures;
}

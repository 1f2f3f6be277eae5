// The threads that share the work of a call. Each caller has workers of its own, which wait for its next call.
//
// Two things differ from a usual runtime, because other programs want the cores too. Nobody waits for a worker that has
// not come: a call begins at once, whoever comes takes what is left of its loops, and the caller does what nobody has
// taken. And whoever waits for another thread does so awake only as long as that has helped of late: on an idle machine
// that is all the time, beside busy neighbours a moment, and then the core is free for the thread that is waited for.
//
// Sums do not depend on who computes what. It lacks nesting: inside a team everybody works alone.
#pragma once

#include "vectors.h"

#include <atomic>
#include <chrono>
#include <climits>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

static inline void rest() { // a moment, for the other half of the core
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// For how long threads wait awake, in nanoseconds: shortened where it was in vain, lengthened where it was not.
struct Patience {
    static constexpr long LEAST = 2'000, MOST = 3'000'000, MORE = 2'000;
    std::atomic<long> now{MOST};
    void was_right() {
        const long before = now.load(std::memory_order_relaxed);
        if (before < MOST) now.store(before + MORE, std::memory_order_relaxed);
    }
    void was_vain() { now.store(std::max(LEAST, now.load(std::memory_order_relaxed) / 4), std::memory_order_relaxed); }
};

// A number that others change and that can be waited for.
struct Signal {
    std::atomic<uint32_t> value{0}, sleepers{0};
    void changed() { // after a change that somebody may wait for
        if (sleepers.load()) syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
    // Until is_over(value). `counts`: what is waited for is under way, so that patience learns from it.
    template <class F> void wait(F is_over, Patience &patience, bool counts) {
        if (is_over(value.load(std::memory_order_acquire))) return;
        typedef std::chrono::steady_clock Clock;
        const auto until = Clock::now() + std::chrono::nanoseconds(patience.now.load(std::memory_order_relaxed));
        do {
            for (int i = 0; i < 32; i++) {
                if (is_over(value.load(std::memory_order_acquire))) {
                    if (counts) patience.was_right();
                    return;
                }
                rest();
            }
        } while (Clock::now() < until);
        if (counts) patience.was_vain();
        sleepers++;
        for (uint32_t now; !is_over(now = value.load());)
            syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
        sleepers--;
    }
};

struct Loop { // one of a call
    std::atomic<uint64_t> taken{0};
    Signal done;
};

struct Workers;

// One thread of those that work on a call. Loops are taken in the same order by all; none has an end that is waited for
// but by `meet`.
struct Team {
    static constexpr int LOOPS = 4, PARTS = 64;
    Workers *workers; // null: it is alone
    int me, size, loop = 0;
    uint32_t end = 0; // of the loop before

    // f(i) for i below n, in as many stretches as there are threads. Each takes its own, if it is in time: what it
    // writes it reads again, most likely.
    template <class F> void shares(long n, F f);
    // f(i) for i below n, `chunk` at a time, to whoever comes first.
    template <class F> void each(long n, long chunk, F f);
    // Until the loop before is done.
    void meet();
    // Until all have come here: for calls that all take part in.
    void barrier();
};

struct Workers {
    static constexpr uint32_t CLOSED = 1u << 31;
    static inline std::atomic<int> forks{0};

    // The call. Written while nobody is inside.
    void (*body)(const void *, Team &) = nullptr;
    const void *context = nullptr;
    uint32_t number = 0;
    int size = 1;
    Loop loops[Team::LOOPS];

    Signal bell, gate; // calls so far; how many workers are inside, and whether more may come
    Signal turns;
    std::atomic<int> arrived{0};
    Patience patience;
    std::vector<pthread_t> threads;
    bool is_over = false;
    const int born = forks;

    struct Start {
        Workers *workers;
        int me;
    };
    static void *run(void *start) {
        const Start one = *(Start *)start;
        delete (Start *)start;
        one.workers->serve(one.me);
        return nullptr;
    }
    void hire(int count) {
        if ((int)threads.size() >= count) return;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        cpu_set_t cores;
        // A caller that is bound to a core (OMP_PROC_BIND) binds its workers to others.
        if (sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) <= count) {
            memset(&cores, 255, sizeof cores);
            pthread_attr_setaffinity_np(&attributes, sizeof cores, &cores);
        }
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); // signals are for threads that Python knows
        while ((int)threads.size() < count) {
            pthread_t thread;
            Start *start = new Start{this, (int)threads.size() + 1};
            if (pthread_create(&thread, &attributes, run, start) !=
                0) { // a limit of the system: the caller works alone
                delete start;
                break;
            }
            threads.push_back(thread);
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attributes);
    }
    void serve(int me) {
        for (uint32_t last = 0;;) {
            bell.wait([&](uint32_t now) { return now != last; }, patience, false);
            last = bell.value.load(std::memory_order_acquire);
            uint32_t inside = gate.value.load(std::memory_order_acquire);
            while (!(inside & CLOSED) && !gate.value.compare_exchange_weak(inside, inside + 1)) {
            }
            if (inside & CLOSED) {
                if (is_over) return;
                continue;
            }
            last = number;
            if (me < size) {
                Team team{this, me, size};
                body(context, team);
            }
            if (gate.value.fetch_sub(1) - 1 == CLOSED) gate.changed();
        }
    }
    void call(int count, const void *over, void (*with)(const void *, Team &)) {
        body = with, context = over, size = count;
        for (Loop &loop : loops) loop.taken.store(0), loop.done.value.store(0);
        number = bell.value.load() + 1;
        gate.value.store(0);
        bell.value.store(number);
        bell.changed();
        Team team{this, 0, count};
        with(over, team);
        gate.value.fetch_or(CLOSED);
        gate.wait([](uint32_t now) { return now == CLOSED; }, patience, true);
    }
    ~Workers() {
        if (born != forks) return; // their threads are in the parent
        is_over = true;
        bell.value.fetch_add(1);
        bell.changed();
        for (pthread_t thread : threads) pthread_join(thread, nullptr);
    }
    Workers() {
        gate.value.store(CLOSED);
        static const int known = pthread_atfork(nullptr, nullptr, [] { forks++; });
        (void)known;
    }
};

template <class F> void Team::shares(long n, F f) {
    const long parts = std::min<long>({size, n, PARTS});
    if (!workers) {
        for (long i = 0; i < n; i++) f(i);
        return;
    }
    Loop &here = workers->loops[loop++];
    end = (uint32_t)parts;
    for (long k = 0; k < parts; k++) {
        const long part = (me + k) % parts;
        if (here.taken.load(std::memory_order_relaxed) >> part & 1 || here.taken.fetch_or(1ull << part) >> part & 1)
            continue;
        for (long i = n * part / parts; i < n * (part + 1) / parts; i++) f(i);
        if (here.done.value.fetch_add(1) + 1 == parts) here.done.changed();
    }
}

template <class F> void Team::each(long n, long chunk, F f) {
    if (!workers) {
        for (long i = 0; i < n; i++) f(i);
        return;
    }
    Loop &here = workers->loops[loop++];
    end = (uint32_t)n;
    for (long from; (from = here.taken.fetch_add(chunk)) < n;) {
        const long to = std::min(from + chunk, n);
        for (long i = from; i < to; i++) f(i);
        if (here.done.value.fetch_add(to - from) + (to - from) == n) here.done.changed();
    }
}

inline void Team::meet() {
    if (!workers) return;
    workers->loops[loop - 1].done.wait([&](uint32_t now) { return now == end; }, workers->patience, true);
}

inline void Team::barrier() {
    if (!workers) return;
    const uint32_t turn = workers->turns.value.load();
    if (workers->arrived.fetch_add(1) + 1 == size) {
        workers->arrived.store(0);
        workers->turns.value.store(turn + 1);
        workers->turns.changed();
    } else workers->turns.wait([&](uint32_t now) { return now != turn; }, workers->patience, true);
}

// The caller's own.
static Workers *workers_of_caller(int count) {
    static thread_local struct Kept {
        Workers *workers = nullptr;
        ~Kept() { delete workers; }
    } kept;
    if (kept.workers && kept.workers->born != Workers::forks) kept.workers = nullptr; // a fork: they are the parent's
    if (!kept.workers) kept.workers = new Workers;
    kept.workers->hire(count - 1);
    return kept.workers;
}

// body(team) in up to so many threads, the caller among them, until all that they have begun is done.
template <class F> static void together(int threads, F body) {
    Workers *workers = threads > 1 ? workers_of_caller(threads) : nullptr;
    const int size = workers ? (int)workers->threads.size() + 1 : 1;
    if (size == 1) {
        Team alone{nullptr, 0, 1};
        body(alone);
        return;
    }
    workers->call(std::min(size, threads), &body, [](const void *one, Team &team) { (*(const F *)one)(team); });
}

// f(i) for i below n.
template <class F> static void shared_out(int threads, long n, F f) {
    together(n > 1 ? threads : 1, [&](Team &team) { team.shares(n, f); });
}

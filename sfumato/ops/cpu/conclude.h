// The end of a step: accept, renoise, stop, written to the state where it lies. `step.conclude_` says what it means.
//
// Entropies are summed in double and rounded once. torch sums floats along a row the same way on a CPU, so that what is
// accepted is equal to the bit; a mean is within a rounding of the exact one. The scratch row, the state's last, stays
// as it is.
#pragma once

#include "threads.h"

struct Ending { // in this order as pointers from outside
    // Of the rows that take the step.
    const int64_t *at, *sample, *argmax, *noise;
    const float *entropy;
    const void *hidden, *soft, *embed, *scale;
    // The state.
    int64_t *canvas, *pin, *last, *stood, *step, *settled;
    const int64_t *stability, *most_steps, *room, *ends;
    float *unsure;
    const float *bound, *confidence;
    uint8_t *accepted, *is_done, *is_finite;
    const uint8_t *early;
    void *seen; // soft embeddings
};
struct Extent {
    long batch, length, width, rows, ends, words, has_pins, has_early;
};

// Whether rows and pins are where they can be read. A row's room is no place: it is compared alone.
static bool is_inside(const Ending &s, const Extent &n) {
    for (long b = 0; b < n.batch; b++) {
        if (s.at[b] < 0 || s.at[b] >= n.rows) return false;
        for (long i = 0; n.has_pins && i < n.length; i++)
            if (s.pin[s.at[b] * n.length + i] >= n.words) return false;
    }
    return true;
}

// One position: its soft embedding, or a pin's own, into the state; whether all its numbers are finite.
template <class T> static bool place(const Ending &s, const Extent &n, long p) {
    const long there = s.at[p / n.length] * n.length + p % n.length;
    const int64_t pin = n.has_pins ? s.pin[there] : -1;
    const T *hidden = (const T *)s.hidden + p * n.width, *soft = (const T *)s.soft + p * n.width;
    const T *token = (const T *)s.embed + std::max(pin, (int64_t)0) * n.width;
    T *to = (T *)s.seen + there * n.width;
    const float scale = to_float(*(const T *)s.scale);
    const V infinite = splat(INFINITY);
    VI fit = absolute(splat(s.entropy[p])) < infinite;
    for (long i = 0; i < n.width; i += 16) {
        const long some = n.width - i;
        const V x = pin < 0 ? load_some(soft + i, some) : rounded(load_some(token + i, some) * scale, T());
        fit &= (absolute(load_some(hidden + i, some)) < infinite) & (absolute(x) < infinite);
        store_some(to + i, x, some);
    }
    int32_t all = -1;
    for (int i = 0; i < 16; i++) all &= fit[i];
    return all;
}

struct Line { // a row with what is pinned in its place
    std::vector<int64_t> argmax;
    std::vector<float> entropy;
    std::vector<uint64_t> order;
    std::vector<uint8_t> is_accepted;
};

// From the lowest entropy upwards, of equal ones the first position first, what is not a number last: while the
// entropies before it sum to at most the bound.
static void accept(Line &line, long length, float bound) {
    for (long i = 0; i < length; i++) { // keys: above an integer in the order of the entropies, below the position
        const float x = line.entropy[i];
        uint32_t u;
        memcpy(&u, &x, 4);
        u = x != x ? ~0u : u >> 31 ? ~u : u | 0x80000000u;
        line.order[i] = (uint64_t)u << 32 | (uint32_t)i;
    }
    std::sort(line.order.begin(), line.order.end());
    double sum = 0;
    for (const uint64_t key : line.order) {
        const long i = (uint32_t)key;
        sum += line.entropy[i];
        line.is_accepted[i] = (float)sum - line.entropy[i] <= bound;
    }
}

// Whether a row stands still and is sure. Of one that may settle early only what can become its answer is asked, all up
// to its first end and no more than its room; and `leading` is how many positions stand still there, each of them sure,
// before the first that does not.
static bool is_settled(const Ending &s, const Extent &n, long row, const Line &line, long *leading) {
    const int64_t *stood = s.stood + row * n.length, *ends = s.ends + n.ends, stability = s.stability[row];
    const float confidence = s.confidence[row];
    const bool is_early = n.has_early && s.early[row];
    long asked = n.length;
    if (is_early) {
        long end = 0;
        while (end < n.length && std::find(s.ends, ends, line.argmax[end]) == ends) end++;
        asked = std::min({n.length, end + 1, (long)s.room[row]});
    }
    double sum = 0;
    bool is_still = true;
    for (long i = 0; i < asked; i++) sum += line.entropy[i], is_still &= stood[i] >= stability;
    long sure = 0;
    if (is_early)
        while (sure < asked && stood[sure] >= stability && line.entropy[sure] < confidence) sure++;
    *leading = sure;
    return is_still && (float)sum / asked < confidence; // the mean of none is not a number
}

// One row, after all its positions.
static void finish(const Ending &s, const Extent &n, long b, bool is_fit, Line &line) {
    const long row = s.at[b], here = b * n.length, there = row * n.length;
    const bool was_done = s.is_done[row];
    for (long i = 0; i < n.length; i++) {
        const int64_t pin = n.has_pins ? s.pin[there + i] : -1;
        const int64_t argmax = line.argmax[i] = pin < 0 ? s.argmax[here + i] : pin;
        line.entropy[i] = pin < 0 ? s.entropy[here + i] : 0.0f;
        s.stood[there + i] = argmax == s.last[there + i] ? s.stood[there + i] + 1 : 0;
    }
    accept(line, n.length, s.bound[row]);
    long leading;
    const bool is_over = is_settled(s, n, row, line, &leading) || s.step[row] + 1 >= s.most_steps[row] || !is_fit;
    if (!was_done) { // a row that had stopped before stays as it was; of its other numbers nobody asks
        for (long i = 0; i < n.length; i++) {
            const int64_t pin = n.has_pins ? s.pin[there + i] : -1;
            const bool is_accepted = line.is_accepted[i] || pin >= 0;
            s.canvas[there + i] = !is_accepted ? s.noise[here + i] : pin < 0 ? s.sample[here + i] : pin;
            s.accepted[there + i] = is_accepted;
        }
        memcpy(s.last + there, line.argmax.data(), n.length * sizeof(int64_t));
        memcpy(s.unsure + there, line.entropy.data(), n.length * sizeof(float));
        s.step[row]++;
        s.is_done[row] = is_over;
        s.is_finite[row] &= is_fit;
    }
    if (n.has_early) {
        s.settled[row] = leading;
        memcpy(s.pin + there, line.argmax.data(), leading * sizeof(int64_t));
    }
}

template <class T> static void conclude(const Ending &s, const Extent &n, int threads) {
    std::vector<uint8_t> fit(n.batch * n.length);
    together(threads, [&](Team &team) {
        Line line{std::vector<int64_t>(n.length), std::vector<float>(n.length), std::vector<uint64_t>(n.length),
                  std::vector<uint8_t>(n.length)};
        team.shares(n.batch * n.length,
                    [&](long p) { fit[p] = s.at[p / n.length] == n.rows - 1 || place<T>(s, n, p); });
        team.meet();
        team.shares(n.batch, [&](long b) {
            if (s.at[b] == n.rows - 1) return;
            const auto from = fit.begin() + b * n.length;
            finish(s, n, b, std::find(from, from + n.length, 0) == from + n.length, line);
        });
    });
}

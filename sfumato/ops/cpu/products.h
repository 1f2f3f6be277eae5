// linear, feed_forward, experts.
#pragma once

#include "groups.h"
#include "lowrank.h"

// All rows in tiles, and what they make of the first factors beside some weights that take them.
template <class IO, class M>
static void pack_all(Team &team, const Weight<M> &w, const IO *x, long rows, char *out, float *beside,
                     const LowRank<IO> *low, int count_of_low) {
    team.shares(tiles_of(rows, 16), [&](long t) {
        const IO *pointers[16];
        const int count = (int)std::min(16L, rows - 16 * t);
        for (int r = 0; r < count; r++) pointers[r] = x + (16 * t + r) * w.inputs;
        pack_for<IO, M>(w, pointers, count, out + t * w.kc() * TILE, beside + t * w.side());
        for (int i = 0; i < count_of_low; i++) low[i].meet(pointers, 16 * t, count);
    });
    team.meet();
}

template <class IO> static inline void write_block(const float *c, IO *y, long rows, long columns, long ldy) {
    for (long r = 0; r < rows; r++) {
        store_some(y + r * ldy, load(c + 32 * r), columns);
        if (columns > 16) store_some(y + r * ldy + 16, load(c + 32 * r + 16), columns - 16);
    }
}

// Weights that take the same rows.
template <class IO, class M>
static void linear_of(const IO *x, long rows, int count, const Weight<M> *w, LowRank<IO> *low, IO *const *y,
                      int threads) {
    const long kc = w[0].kc(), side = w[0].side(), row_tiles = tiles_of(rows, 16);
    long panels = 0, wide = 0;
    for (int i = 0; i < count; i++) panels += w[i].panels(), wide += low[i].wide;
    char *a = shared.get(row_tiles * (kc * TILE + side * 4) + rows * wide * 4);
    float *beside = (float *)(a + row_tiles * kc * TILE), *h = beside + row_tiles * side;
    for (int i = 0; i < count; i++) low[i].h = h, h += rows * low[i].wide;
    const long bands = tiles_of(rows, BAND), chunk = std::max(1L, panels / (8 * threads));
    together(threads, [&](Team &team) {
        Tiles tiles;
        float *c = (float *)own.get(BAND * 32 * 4);
        pack_all<IO, M>(team, w[0], x, rows, a, beside, low, count);
        team.each(bands * panels, chunk, [&](long n) {
            const long band = n / panels, t = band * BAND / 16, some = std::min(rows - band * BAND, BAND);
            int i = 0;
            long p = n % panels;
            while (p >= w[i].panels()) p -= w[i++].panels();
            const bool is_last = p + 1 == w[i].panels();
            const Ahead next = !is_last ? w[i].ahead(p + 1) : i + 1 < count ? w[i + 1].ahead(0) : Ahead();
            const Panel<M> panel{w + i, p, next};
            panel_product<M>(some, a + t * kc * TILE, beside + t * side, &panel, 1, c);
            low[i].add(16 * t, some, 32 * p, c);
            write_block(c, y[i] + 16 * t * w[i].outputs + 32 * p, some, w[i].outputs - 32 * p, w[i].outputs);
        });
    });
}

template <class IO>
static void linear(const IO *x, long rows, long inputs, int count, const Operand *operands, const long *outputs,
                   IO *const *y, int threads) {
    for (int from = 0, to; from < count; from = to) { // neighbours that take the same rows go together
        const Operand &first = operands[from];
        for (to = from + 1; to < count && take_same_rows(first, operands[to]);) to++;
        by_kind(first, [&](auto tag) {
            typedef decltype(tag) M;
            std::vector<Weight<M>> w;
            std::vector<LowRank<IO>> low;
            for (int i = from; i < to; i++) {
                w.emplace_back(operands[i], outputs[i], inputs);
                low.emplace_back(operands[i].low, outputs[i], inputs, rows);
            }
            linear_of<IO, M>(x, rows, to - from, w.data(), low.data(), y + from, threads);
        });
    }
}

// gelu(gate) x up for a panel of each, into rows of h.
template <class IO>
static inline void gate_block(const float *gate, const float *up_, IO *h, long rows, long columns, long ldh) {
    alignas(64) float c[32];
    for (long r = 0; r < rows; r++) {
        for (int i = 0; i < 32; i += 16)
            store(c + i, rounded(gelu_tanh(rounded(load(gate + 32 * r + i), IO())), IO()) *
                             rounded(load(up_ + 32 * r + i), IO()));
        write_block(c, h + r * ldh, 1, columns, ldh);
    }
}

static thread_local Scratch hidden;

// gate and up take the same rows.
template <class IO, class M>
static void gate_up_of(const IO *x, long rows, const Weight<M> &gate, const Weight<M> &up_, LowRank<IO> *low, IO *h,
                       int threads) {
    const long kc = gate.kc(), side = gate.side(), inner = gate.outputs, row_tiles = tiles_of(rows, 16);
    char *a = shared.get(row_tiles * (kc * TILE + side * 4) + rows * (low[0].wide + low[1].wide) * 4);
    float *beside = (float *)(a + row_tiles * kc * TILE);
    low[0].h = beside + row_tiles * side, low[1].h = low[0].h + rows * low[0].wide;
    const long bands = tiles_of(rows, BAND);
    together(threads, [&](Team &team) {
        Tiles tiles;
        float *c = (float *)own.get(2 * BAND * 32 * 4);
        pack_all<IO, M>(team, gate, x, rows, a, beside, low, 2);
        team.each(bands * gate.panels(), 1, [&](long n) {
            const long band = n / gate.panels(), p = n % gate.panels();
            const long t = band * BAND / 16, some = std::min(rows - band * BAND, BAND);
            const long next = p + threads < gate.panels() ? p + threads : p;
            const Panel<M> both[2] = {{&gate, p, gate.ahead(next)}, {&up_, p, up_.ahead(next)}};
            panel_product<M>(some, a + t * kc * TILE, beside + t * side, both, 2, c);
            float *const second = c + up(some, 16) * 32;
            low[0].add(16 * t, some, 32 * p, c), low[1].add(16 * t, some, 32 * p, second);
            gate_block(c, second, h + 16 * t * inner + 32 * p, some, inner - 32 * p, inner);
        });
    });
}

template <class IO>
static void feed_forward(const IO *x, long rows, long width, long inner, const Operand *three, IO *y, int threads) {
    const Operand &gate = three[0], &up_ = three[1], &down = three[2];
    const bool is_joint = take_same_rows(gate, up_);
    IO *h = (IO *)hidden.get((is_joint ? 1 : 2) * rows * inner * sizeof(IO)), *u = h + rows * inner;
    if (is_joint)
        by_kind(gate, [&](auto tag) {
            typedef decltype(tag) M;
            LowRank<IO> low[2] = {{gate.low, inner, width, rows}, {up_.low, inner, width, rows}};
            gate_up_of<IO, M>(x, rows, Weight<M>(gate, inner, width), Weight<M>(up_, inner, width), low, h, threads);
        });
    else { // two products, each with rows of its own
        const long outputs[2] = {inner, inner};
        IO *const to[2] = {h, u};
        linear<IO>(x, rows, width, 2, three, outputs, to, threads);
        shared_out(threads, rows, [&](long r) {
            for (long i = r * inner; i < (r + 1) * inner; i += 16) {
                const long some = (r + 1) * inner - i;
                store_some(h + i, rounded(gelu_tanh(load_some(h + i, some)), IO()) * load_some(u + i, some), some);
            }
        });
    }
    linear<IO>(h, rows, inner, 1, &down, &width, &y, threads);
}

// ---- experts --------------------------------------------------------------------------------------------------------

struct Unit { // an expert, or some hundreds of its rows: what they need must fit the second cache
    long expert, first, size;
    const long *members; // of these rows: token x chosen + choice
};
static constexpr int MANY = 4; // panels at a time: each piece of the few rows meets them all

// h = gelu(gate(x)) x up(x) of a unit's rows. Where a token's row had to become another type, that is done: `as_left`,
// `row_bytes` a token, with its scale. after(i) is the panel that is read i-th when these are done.
template <class IO, class M, class F>
static void unit_gate_up(const Unit &unit, const IO *x, long chosen, const Weight<M> &g, const char *as_left,
                         long row_bytes, const float *token_scales, LowRank<IO> &low, IO *h, F after) {
    typedef typename Kind<M>::Left L;
    constexpr bool is_same = std::is_same_v<IO, L>;
    const long kc = g.kc(), size = unit.size, row_tiles = tiles_of(size, 16), inner = g.outputs / 2;
    const long block = row_tiles * 16 * 32, wide = up(2 * inner, 32);
    const bool is_aligned = inner % 32 == 0; // then a panel is all gate or all up
    const long mixed = is_aligned ? 0 : up(size, 16) * wide;
    char *a = own.get(row_tiles * (kc * TILE + g.side() * 4) + (MANY * block + mixed + size * low.wide) * 4);
    float *beside = (float *)(a + row_tiles * kc * TILE), *c = beside + row_tiles * g.side();
    float *gate_up = c + MANY * block; // where panels mix gate and up
    low.h = gate_up + mixed;
    for (long t = 0; t < row_tiles; t++) {
        const L *pointers[16];
        const IO *plain[16];
        const int held = (int)std::min(16L, size - 16 * t);
        for (int r = 0; r < held; r++) {
            const long token = unit.members[16 * t + r] / chosen;
            plain[r] = x + token * g.inputs;
            if constexpr (is_same) pointers[r] = plain[r];
            else pointers[r] = (const L *)(as_left + token * row_bytes);
            if constexpr (std::is_same_v<M, int8_t>) beside[t * g.side() + r] = token_scales[token];
        }
        tile_rows<L>(pointers, held, is_same ? g.inputs : kc * Kind<M>::K, a + t * kc * TILE);
        finish_rows(g, a + t * kc * TILE, beside + t * g.side());
        low.meet(plain, 16 * t, held);
    }
    Panel<M> panels[MANY];
    if (is_aligned) {
        const long half = inner / 32;
        for (long p = 0; p < half; p += MANY / 2) {
            const int pairs = (int)std::min((long)MANY / 2, half - p);
            for (int i = 0; i < 2 * pairs; i++) {
                const long here = p + i / 2 + i % 2 * half;
                panels[i] = {&g, here, p + pairs < half ? g.ahead(here + pairs) : after(i)};
            }
            panel_product<M>(size, a, beside, panels, 2 * pairs, c);
            for (int i = 0; i < 2 * pairs; i++) low.add(0, size, 32 * panels[i].p, c + i * block);
            for (int i = 0; i < pairs; i++)
                gate_block(c + 2 * i * block, c + (2 * i + 1) * block, h + 32 * (p + i), size, 32, inner);
        }
        return;
    }
    for (long p = 0; p < g.panels(); p++) {
        panels[0] = {&g, p, {}};
        panel_product<M>(size, a, beside, panels, 1, c);
        low.add(0, size, 32 * p, c);
        for (long r = 0; r < size; r++) memcpy(gate_up + r * wide + 32 * p, c + 32 * r, 128);
    }
    for (long r = 0; r < size; r++)
        for (long i = 0; i < inner; i += 16) {
            V gate = rounded(load_some(gate_up + r * wide + i, inner - i), IO());
            V u = rounded(load_some(gate_up + r * wide + inner + i, inner - i), IO());
            store_some(h + r * inner + i, rounded(gelu_tanh(gate), IO()) * u, inner - i);
        }
}

// The rows of `parts` that belong to a unit: weight x down(h).
template <class IO, class M, class F>
static void unit_down(const Unit &unit, const IO *h, const Weight<M> &w, LowRank<IO> &low, const float *weight,
                      IO *parts, F after) {
    const long kc = w.kc(), size = unit.size, row_tiles = tiles_of(size, 16), width = w.outputs;
    const long block = row_tiles * 16 * 32;
    char *a = own.get(row_tiles * (kc * TILE + w.side() * 4) + (MANY * block + size * low.wide) * 4);
    float *beside = (float *)(a + row_tiles * kc * TILE), *c = beside + row_tiles * w.side();
    low.h = c + MANY * block;
    for (long t = 0; t < row_tiles; t++) {
        const IO *pointers[16];
        const int held = (int)std::min(16L, size - 16 * t);
        for (int r = 0; r < held; r++) pointers[r] = h + (16 * t + r) * w.inputs;
        pack_for<IO, M>(w, pointers, held, a + t * kc * TILE, beside + t * w.side());
        low.meet(pointers, 16 * t, held);
    }
    Panel<M> panels[MANY];
    for (long p = 0; p < w.panels(); p += MANY) {
        const int some = (int)std::min((long)MANY, w.panels() - p);
        for (int i = 0; i < some; i++)
            panels[i] = {&w, p + i, p + i + some < w.panels() ? w.ahead(p + i + some) : after(i)};
        panel_product<M>(size, a, beside, panels, some, c);
        for (int i = 0; i < some; i++) low.add(0, size, 32 * (p + i), c + i * block);
        for (long r = 0; r < size; r++) {
            const long n = unit.members[r];
            for (int i = 0; i < some; i++) {
                float *at = c + i * block + 32 * r;
                for (int j = 0; j < 32; j += 16) store(at + j, rounded(load(at + j), IO()) * weight[n]);
                write_block(at, parts + n * width + 32 * (p + i), 1, width - 32 * (p + i), width);
            }
        }
    }
}

// Tokens grouped by expert; a thread takes an expert at a time, its weights are read once (unless it has very many).
template <class IO>
static void experts(const IO *x, long tokens, long width, long chosen, const int64_t *index, const float *weight,
                    long count, const Operand &gate_up, const Operand &down, long inner, IO *y, int threads) {
    const long all = tokens * chosen;
    std::vector<long> starts(count + 1, 0), member(all);
    for (long n = 0; n < all; n++) starts[index[n] + 1]++;
    for (long e = 0; e < count; e++) starts[e + 1] += starts[e];
    {
        std::vector<long> next(starts.begin(), starts.end() - 1);
        for (long n = 0; n < all; n++) member[next[index[n]]++] = n;
    }
    std::vector<Unit> units;
    for (long e = 0; e < count; e++)
        for (long n = starts[e]; n < starts[e + 1]; n += BAND)
            units.push_back({e, n, std::min(BAND, starts[e + 1] - n), member.data() + n});
    std::stable_sort(units.begin(), units.end(), // the largest first, so that no thread is left with one at the end
                     [](const Unit &a, const Unit &b) { return a.size > b.size; });
    const long unit_count = units.size();
    by_kind(gate_up, [&](auto first) {
        typedef decltype(first) M;
        typedef typename Kind<M>::Left L;
        const Weight<M> gu(gate_up, 2 * inner, width);
        constexpr bool is_same = std::is_same_v<IO, L>; // else every token becomes L once, and not once an expert
        const long row_bytes = is_same ? 0 : gu.kc() * 64;
        IO *parts = (IO *)shared.get(all * width * sizeof(IO) + tokens * (row_bytes + 4));
        char *as_left = (char *)(parts + all * width);
        float *token_scales = (float *)(as_left + tokens * row_bytes);
        by_kind(down, [&](auto second) {
            typedef decltype(second) N;
            const Weight<N> dn(down, width, inner);
            together(threads, [&](Team &team) {
                Tiles tiles;
                if constexpr (!is_same) {
                    team.shares(tokens, [&](long n) {
                        row_as<IO, L>(x + n * width, width, as_left + n * row_bytes, 64, token_scales + n);
                    });
                    team.meet();
                }
                team.each(unit_count, 1, [&](long u) {
                    const Unit &unit = units[u];
                    const Weight<N> w = dn.of(unit.expert);
                    IO *h = (IO *)hidden.get(unit.size * inner * sizeof(IO));
                    LowRank<IO> low(gate_up.low, 2 * inner, width, count, unit.expert, unit.members, unit.size, chosen),
                        low_down(down.low, width, inner, count, unit.expert, unit.members, unit.size, chosen);
                    unit_gate_up<IO, M>(unit, x, chosen, gu.of(unit.expert), as_left, row_bytes, token_scales, low, h,
                                        [&](int i) { return w.ahead(std::min((long)i, w.panels() - 1)); });
                    const bool goes_on = u + threads < unit_count; // most likely its next unit
                    const Weight<M> then = gu.of(units[goes_on ? u + threads : u].expert);
                    const long half = then.panels() / 2; // of gate and up in turns
                    unit_down<IO, N>(unit, h, w, low_down, weight, parts, [&](int i) {
                        return goes_on ? then.ahead(inner % 32 ? 0 : std::min(i / 2L, half - 1) + i % 2 * half)
                                       : Ahead();
                    });
                });
                team.meet();
                team.shares(tokens, [&](long n) {
                    for (long i = 0; i < width; i += 16) {
                        V sum = V{};
                        for (long j = 0; j < chosen; j++)
                            sum += load_some(parts + (n * chosen + j) * width + i, width - i);
                        store_some(y + n * width + i, sum, width - i);
                    }
                });
            });
        });
    });
}

// linear, feed_forward, experts.
#pragma once

#include "packing.h"

template <class IO, class M>
static void pack_all(const IO *x, long rows, long width, char *out, float *scales) { // inside a parallel region
    const long kc = tiles_of(width, Kind<M>::K);
#pragma omp for schedule(static)
    for (long t = 0; t < tiles_of(rows, 16); t++) {
        const IO *pointers[16];
        const int count = (int)std::min(16L, rows - 16 * t);
        for (int r = 0; r < count; r++) pointers[r] = x + (16 * t + r) * width;
        pack_rows<IO, M>(pointers, count, width, out + t * kc * TILE, scales + 16 * t);
    }
}

template <class IO> static inline void write_block(const float *c, IO *y, long rows, long columns, long ldy) {
    for (long r = 0; r < rows; r++) {
        store_some(y + r * ldy, load(c + 32 * r), columns);
        if (columns > 16) store_some(y + r * ldy + 16, load(c + 32 * r + 16), columns - 16);
    }
}

template <class IO, class M>
static void linear(const IO *x, long rows, int count, const Weight<M> *w, IO *const *y, int threads) {
    const long width = w[0].inputs, kc = w[0].kc(), row_tiles = tiles_of(rows, 16);
    char *a = shared.get(row_tiles * kc * TILE + up(rows, 16) * 4);
    float *scales = (float *)(a + row_tiles * kc * TILE);
    long panels = 0;
    for (int i = 0; i < count; i++) panels += w[i].panels();
    const long bands = tiles_of(rows, BAND), chunk = std::max(1L, panels / (8 * threads));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        float *c = (float *)own.get(BAND * 32 * 4);
        pack_all<IO, M>(x, rows, width, a, scales);
        for (long band = 0; band < bands; band++) {
            const long t = band * BAND / 16, some = std::min(row_tiles - t, BAND / 16);
#pragma omp for schedule(dynamic, chunk) nowait
            for (long n = 0; n < panels; n++) {
                int i = 0;
                long p = n;
                while (p >= w[i].panels()) p -= w[i++].panels();
                const char *next = p + 1 < w[i].panels() ? w[i].panel(p + 1) : i + 1 < count ? w[i + 1].data : nullptr;
                const Panel<M> panel{w + i, p, next};
                panel_product<M>(some, a + t * kc * TILE, scales + 16 * t, &panel, 1, c);
                write_block(c, y[i] + 16 * t * w[i].outputs + 32 * p, std::min(16 * some, rows - 16 * t),
                            w[i].outputs - 32 * p, w[i].outputs);
            }
        }
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

template <class IO, class M>
static void feed_forward(const IO *x, long rows, Weight<M> gate, Weight<M> up_, Weight<M> down, IO *y, int threads) {
    const long kc = gate.kc(), inner = gate.outputs, kc2 = down.kc(), row_tiles = tiles_of(rows, 16);
    const long first = row_tiles * kc * TILE, second = row_tiles * kc2 * TILE;
    char *a = shared.get(first + second + 2 * up(rows, 16) * 4 + rows * inner * sizeof(IO));
    float *scales = (float *)(a + first + second), *scales2 = scales + up(rows, 16);
    IO *h = (IO *)(scales2 + up(rows, 16));
    const long bands = tiles_of(rows, BAND);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        float *c = (float *)own.get(2 * BAND * 32 * 4);
        pack_all<IO, M>(x, rows, gate.inputs, a, scales);
        for (long band = 0; band < bands; band++) {
            const long t = band * BAND / 16, some = std::min(row_tiles - t, BAND / 16);
#pragma omp for schedule(dynamic, 1) nowait
            for (long p = 0; p < gate.panels(); p++) {
                const long next = p + threads < gate.panels() ? p + threads : p;
                const Panel<M> both[2] = {{&gate, p, gate.panel(next)}, {&up_, p, up_.panel(next)}};
                panel_product<M>(some, a + t * kc * TILE, scales + 16 * t, both, 2, c);
                gate_block(c, c + some * 16 * 32, h + 16 * t * inner + 32 * p, std::min(16 * some, rows - 16 * t),
                           inner - 32 * p, inner);
            }
        }
#pragma omp barrier
        pack_all<IO, M>(h, rows, inner, a + first, scales2);
        for (long band = 0; band < bands; band++) {
            const long t = band * BAND / 16, some = std::min(row_tiles - t, BAND / 16);
#pragma omp for schedule(dynamic, 1) nowait
            for (long p = 0; p < down.panels(); p++) {
                const long next = p + threads < down.panels() ? p + threads : p;
                const Panel<M> panel{&down, p, down.panel(next)};
                panel_product<M>(some, a + first + t * kc2 * TILE, scales2 + 16 * t, &panel, 1, c);
                write_block(c, y + 16 * t * down.outputs + 32 * p, std::min(16 * some, rows - 16 * t),
                            down.outputs - 32 * p, down.outputs);
            }
        }
    }
}

// Tokens grouped by expert; a thread takes an expert at a time, its weights are read once (unless it has very many).
template <class IO, class M>
static void experts(const IO *x, long tokens, long width, long chosen, const int64_t *index, const float *weight,
                    long count, const char *gate_up_data, const float *gate_up_scale, const char *down_data,
                    const float *down_scale, long inner, IO *y, int threads) {
    const long all = tokens * chosen;
    Weight<M> gu{gate_up_data, gate_up_scale, 2 * inner, width}, dn{down_data, down_scale, width, inner};
    std::vector<long> starts(count + 1, 0), member(all);
    for (long n = 0; n < all; n++) starts[index[n] + 1]++;
    for (long e = 0; e < count; e++) starts[e + 1] += starts[e];
    {
        std::vector<long> next(starts.begin(), starts.end() - 1);
        for (long n = 0; n < all; n++) member[next[index[n]]++] = n;
    }
    struct Unit {
        long expert, first, size;
    };
    std::vector<Unit> units; // an expert, or some hundreds of its rows: what they need must fit the second cache
    for (long e = 0; e < count; e++)
        for (long n = starts[e]; n < starts[e + 1]; n += BAND)
            units.push_back({e, n, std::min(BAND, starts[e + 1] - n)});
    std::stable_sort(units.begin(), units.end(), // the largest first, so that no thread is left with one at the end
                     [](const Unit &a, const Unit &b) { return a.size > b.size; });
    const long unit_count = units.size();
    const long kc = gu.kc(), kc2 = dn.kc();
    constexpr bool is_same = std::is_same_v<IO, M>; // else every token becomes M once, and not once an expert
    const long row_bytes = is_same ? 0 : kc * 64;
    IO *parts = (IO *)shared.get(all * width * sizeof(IO) + tokens * (row_bytes + 4));
    char *as_m = (char *)(parts + all * width);
    float *token_scales = (float *)(as_m + tokens * row_bytes);
    const bool is_aligned = inner % 32 == 0; // then a panel is all gate or all up
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        if constexpr (!is_same) {
#pragma omp for schedule(static)
            for (long n = 0; n < tokens; n++)
                row_as<IO, M>(x + n * width, width, as_m + n * row_bytes, 64, token_scales + n);
        }
#pragma omp for schedule(dynamic, 1)
        for (long u = 0; u < unit_count; u++) {
            const long e = units[u].expert, size = units[u].size, *members = &member[units[u].first];
            Weight<M> g = gu, w = dn;
            g.data += e * gu.bytes(), w.data += e * dn.bytes();
            if (g.scale) g.scale += e * gu.outputs, w.scale += e * dn.outputs;
            const long row_tiles = tiles_of(size, 16), first = row_tiles * kc * TILE, second = row_tiles * kc2 * TILE;
            const long wide = up(2 * inner, 32);
            constexpr int MANY = 4; // panels at a time: each piece of the few rows meets them all
            const long block = row_tiles * 16 * 32, mixed = is_aligned ? 0 : up(size, 16) * wide;
            char *a =
                own.get(first + second + (2 * up(size, 16) + MANY * block + mixed) * 4 + size * inner * sizeof(IO));
            float *scales = (float *)(a + first + second), *scales2 = scales + up(size, 16);
            float *c = scales2 + up(size, 16), *gate_up = c + MANY * block; // the latter where panels mix gate and up
            IO *h = (IO *)(gate_up + mixed);
            for (long t = 0; t < row_tiles; t++) {
                const M *pointers[16];
                const int held = (int)std::min(16L, size - 16 * t);
                for (int r = 0; r < held; r++) {
                    const long token = members[16 * t + r] / chosen;
                    if constexpr (is_same) pointers[r] = x + token * width;
                    else pointers[r] = (const M *)(as_m + token * row_bytes), scales[16 * t + r] = token_scales[token];
                }
                tile_rows<M>(pointers, held, is_same ? width : kc * Kind<M>::K, a + t * kc * TILE);
            }
            Panel<M> panels[MANY];
            if (is_aligned) {
                const long half = inner / 32;
                for (long p = 0; p < half; p += MANY / 2) {
                    const int pairs = (int)std::min((long)MANY / 2, half - p);
                    for (int i = 0; i < 2 * pairs; i++) {
                        const long here = p + i / 2 + i % 2 * half, then = here + pairs;
                        panels[i] = {&g, here,
                                     p + pairs < half ? g.panel(then) : w.panel(std::min((long)i, w.panels() - 1))};
                    }
                    panel_product<M>(row_tiles, a, scales, panels, 2 * pairs, c);
                    for (int i = 0; i < pairs; i++)
                        gate_block(c + 2 * i * block, c + (2 * i + 1) * block, h + 32 * (p + i), size, 32, inner);
                }
            } else {
                for (long p = 0; p < g.panels(); p++) {
                    panels[0] = {&g, p, nullptr};
                    panel_product<M>(row_tiles, a, scales, panels, 1, c);
                    for (long r = 0; r < 16 * row_tiles; r++) memcpy(gate_up + r * wide + 32 * p, c + 32 * r, 128);
                }
                for (long r = 0; r < size; r++)
                    for (long i = 0; i < inner; i += 16) {
                        V gate = rounded(load_some(gate_up + r * wide + i, inner - i), IO());
                        V u = rounded(load_some(gate_up + r * wide + inner + i, inner - i), IO());
                        store_some(h + r * inner + i, rounded(gelu_tanh(gate), IO()) * u, inner - i);
                    }
            }
            for (long t = 0; t < row_tiles; t++) {
                const IO *pointers[16];
                const int held = (int)std::min(16L, size - 16 * t);
                for (int r = 0; r < held; r++) pointers[r] = h + (16 * t + r) * inner;
                pack_rows<IO, M>(pointers, held, inner, a + first + t * kc2 * TILE, scales2 + 16 * t);
            }
            const bool goes_on = u + threads < unit_count; // most likely its next unit
            for (long p = 0; p < w.panels(); p += MANY) {
                const int some = (int)std::min((long)MANY, w.panels() - p);
                for (int i = 0; i < some; i++) {
                    const char *after =
                        goes_on ? gu.data + units[u + threads].expert * gu.bytes() + i * gu.kc() * 2 * TILE : nullptr;
                    panels[i] = {&w, p + i, p + i + some < w.panels() ? w.panel(p + i + some) : after};
                }
                panel_product<M>(row_tiles, a + first, scales2, panels, some, c);
                for (long r = 0; r < size; r++) {
                    const long n = members[r];
                    for (int i = 0; i < some; i++) {
                        float *at = c + i * block + 32 * r;
                        for (int j = 0; j < 32; j += 16) store(at + j, rounded(load(at + j), IO()) * weight[n]);
                        write_block(at, parts + n * width + 32 * (p + i), 1, width - 32 * (p + i), width);
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (long n = 0; n < tokens; n++)
            for (long i = 0; i < width; i += 16) {
                V sum = V{};
                for (long j = 0; j < chosen; j++) sum += load_some(parts + (n * chosen + j) * width + i, width - i);
                store_some(y + n * width + i, sum, width - i);
            }
    }
}

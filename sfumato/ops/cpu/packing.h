// What a product reads: weights packed once in panels, rows packed for each call, and the product of panels.
#pragma once

#include "threads.h"
#include "tiles.h"

// Memory that outlives a call, on huge pages where the system has them. What a long prompt needed is given back once
// many calls have needed far less.
struct Scratch {
    static constexpr size_t PAGE = 1 << 21;
    char *mapped = nullptr, *data = nullptr;
    size_t size = 0;
    int small_calls = 0;
    char *lent = nullptr; // somebody else's, for as long as they lend it: used where it is large enough
    size_t lent_size = 0;
    struct Loan { // for as long as it lives
        Scratch &to;
        Loan(Scratch &to, char *memory, size_t bytes) : to(to) { to.lent = memory, to.lent_size = bytes; }
        ~Loan() { to.lent = nullptr, to.lent_size = 0; }
    };
    char *get(size_t bytes) {
        if (bytes <= lent_size) {
            release(4 << 20);
            return lent;
        }
        small_calls = size > (64 << 20) && bytes < size / 4 ? small_calls + 1 : 0;
        if (bytes > size || small_calls > 1000) {
            release();
            size = up(bytes + bytes / 16, PAGE);
            mapped = (char *)mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (mapped == MAP_FAILED) abort();
            data = (char *)(((uintptr_t)mapped + PAGE - 1) / PAGE * PAGE);
            madvise(data, size, MADV_HUGEPAGE);
        }
        return data;
    }
    void release(size_t unless = 0) { // to the system, unless it is no more than this
        if (size <= unless) return;
        munmap(mapped, size + PAGE);
        data = nullptr, size = 0;
    }
    ~Scratch() { release(); }
};

// What the threads of a call share (the caller's), and what each has to itself.
static thread_local Scratch shared, own;

// A row as another type, in pieces of 64 bytes that lie `stride` bytes apart, with zeros behind its end; of int8 the
// scale is told. Null: zeros.
template <class IO, class M> static void row_as(const IO *row, long width, char *out, long stride, float *scale) {
    float inverse = 1;
    if constexpr (std::is_same_v<M, int8_t>) {
        VI most = VI{};
        if (row)
            for (long i = 0; i < width; i += 16) {
                const VI x = (VI)absolute(load_some(row + i, width - i));
                most = x > most ? x : most;
            }
        const float top = largest_or_nan(most); // int8 cannot say NaN: the scale does
        inverse = top > 0 ? 127.0f / top : 0.0f, *scale = top / 127.0f;
    }
    for (long k = 0; k < tiles_of(width, Kind<M>::K); k++)
        for (long part = 0; part < Kind<M>::K; part += 16) {
            const long i = k * Kind<M>::K + part;
            const V x = row && i < width ? load_some(row + i, width - i) : V{};
            M *to = (M *)(out + k * stride) + part;
            if constexpr (std::is_same_v<M, int8_t>) {
                const VI q = __builtin_convertvector((x * inverse + 12582912.0f) - 12582912.0f, VI);
                typedef int8_t VB __attribute__((vector_size(16)));
                const VB b = __builtin_convertvector(q, VB);
                memcpy(to, &b, 16);
            } else store(to, x);
        }
}

// Rows in A tiles: [row tile][k tile][1 KiB]; int8 rows with a scale each.
template <class IO, class M>
static void pack_rows(const IO *const *rows, int count, long width, char *out, float *scales) {
    if constexpr (std::is_same_v<IO, M>) tile_rows<M>(rows, count, width, out);
    else
        for (int r = 0; r < 16; r++)
            row_as<IO, M>(r < count ? rows[r] : nullptr, width, out + 64 * r, TILE, scales + r);
}

// A weight as it comes from outside; null where there is none. In panels: float32, bfloat16, int8 with one scale an
// output. As they lie: codes of 4 bits, two a byte, that stand for the values of a table, in bfloat16 and twice, so
// that the bit above them may be anything; int8, without a sign where there is a bias; and e4m3, whose product rounds
// its rows to e4m3 too where it is the format's own.
enum WeightKind { FLOAT, BF16, INT8, HALVES = 4, BYTES = 8, E4M3, E4M3_BOTH };
struct Run { // tokens of a pass, one behind the other, that have one lane
    long first, size, lane;
};
struct Factors {       // low-rank, beside a weight: see lowrank.h; a is null where there are none
    const void *a, *b; // [lane][rank][inputs], [lane][rank][outputs]; of a stack with the expert behind the lane
    const Run *runs;
    long count, tokens; // runs, and all tokens of the pass
    long from;          // tokens of the pass before the first row of a call
    long lanes, rank;
    double scale;
};
struct Operand {
    const void *data, *scale, *bias, *factor, *table; // factor: float32, of each output's product
    long kind, group;                                 // inputs that share a scale; 0: there is none but the factor
    long store;                                       // what scales and biases are, see `scales_at`
    long spread;                                      // outputs that share a scale
    Factors low;
};

struct Ahead { // where a panel begins that is read soon, and its scales and biases if they are many
    const char *data = nullptr, *scale = nullptr, *bias = nullptr;
};

template <class M> struct Weight {
    const char *data;
    const float *scale; // int8: one an output
    long outputs, inputs;
    Weight(const Operand &g, long outputs, long inputs)
        : data((const char *)g.data), scale((const float *)g.scale), outputs(outputs), inputs(inputs) {}
    Weight of(long expert) const { // one of a stack
        Weight w = *this;
        w.data += expert * panels() * kc() * 2 * TILE;
        if (scale) w.scale += expert * outputs;
        return w;
    }
    long kc() const { return tiles_of(inputs, Kind<M>::K); }
    long panels() const { return tiles_of(outputs, 32); }
    long side() const { return 32; } // what a tile of rows brings beside its elements: int8 scales and sums of rows
    const char *panel(long p) const { return data + p * kc() * 2 * TILE; }
    Ahead ahead(long p) const { return {panel(p)}; }
};
static inline long bytes_stored(long store) { return store == 0 ? 4 : store < 3 ? 2 : 1; }

template <> struct Weight<Codes> {
    const char *data, *scale, *bias;
    const float *factor;
    const void *table;
    long outputs, inputs, kind, group, store, spread;
    Weight(const Operand &g, long outputs, long inputs)
        : data((const char *)g.data), scale((const char *)g.scale), bias((const char *)g.bias),
          factor((const float *)g.factor), table(g.table), outputs(outputs), inputs(inputs), kind(g.kind),
          group(g.group), store(g.store), spread(g.spread) {}
    Weight of(long expert) const {
        Weight w = *this;
        const long scales = expert * tiles_of(outputs, spread) * scale_bytes();
        w.data += expert * outputs * row_bytes();
        if (scale) w.scale += scales;
        if (bias) w.bias += scales;
        if (factor) w.factor += expert * outputs;
        return w;
    }
    bool is_narrow() const { return group && group < 32; } // than a tile
    bool has_sums() const { return bias && !is_narrow(); }
    long bits() const { return kind == HALVES ? 4 : 8; }
    long kc() const { return tiles_of(inputs, 32); }
    long panels() const { return tiles_of(outputs, 32); }
    long groups() const { return group ? tiles_of(inputs, group) : 0; }
    long side() const { return has_sums() ? 16 * groups() : 16; } // the sum of each group of a row
    long row_bytes() const { return inputs * bits() / 8; }
    long scale_bytes() const { return groups() * bytes_stored(store); } // of an output
    const char *panel(long p) const { return data + p * 32 * row_bytes(); }
    Ahead ahead(long p) const {
        const long at = 32 * p / spread * scale_bytes();
        return {panel(p), scale ? scale + at : nullptr, bias ? bias + at : nullptr};
    }
};

// Whether the rows that are packed for one weight are those that the other one takes.
static bool take_same_rows(const Operand &a, const Operand &b) {
    if (a.kind != b.kind || a.kind < HALVES) return a.kind == b.kind;
    const Weight<Codes> one(a, 1, a.group), two(b, 1, b.group);
    return one.has_sums() == two.has_sums() && (!one.has_sums() || a.group == b.group);
}

template <class F> static inline void by_kind(const Operand &operand, F f) {
    if (operand.kind >= HALVES) f(Codes());
    else if (operand.kind == INT8) f(int8_t());
    else if (operand.kind == BF16) f(bf16());
    else f(float());
}

// Of a tile of rows the sum of each group, [group][16].
static void group_sums(const char *a, const Weight<Codes> &w, float *sums) {
    for (long g = 0; g < w.groups(); g++)
        for (int r = 0; r < 16; r++) {
            V sum = V{};
            for (long k = g * w.group / 32; k < (g + 1) * w.group / 32; k++) {
                const bf16 *x = (const bf16 *)(a + k * TILE + 64 * r);
                sum += load(x) + load(x + 16);
            }
            sums[16 * g + r] = total(sum);
        }
}

// A tile of rows rounded to e4m3, each with a scale of its own, as `Code.round_input` has it.
static void round_rows(char *a, long kc) {
    for (char *row = a; row < a + 1024; row += 64) {
        VI top = VI{};
        for (long k = 0; k < 2 * kc; k++) {
            const VI x = (VI)absolute(load((const bf16 *)(row + k / 2 * TILE) + k % 2 * 16));
            top = x > top ? x : top;
        }
        const float largest = largest_or_nan(top), scale = largest > 0 ? largest / 448.0f : 1.0f;
        for (long k = 0; k < 2 * kc; k++) {
            bf16 *at = (bf16 *)(row + k / 2 * TILE) + k % 2 * 16;
            const V x = load(at) / scale, below = (x + 0x1.8p14f) - 0x1.8p14f; // steps of 2^-9 near zero
            const VU bits = (VU)x;
            const V normal = (V)((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000u);
            store(at, (absolute(x) < splat(0x1p-6f) ? below : normal) * scale);
        }
    }
}

// A tile of rows in the order in which codes of 4 or 8 bits become pairs: see `unpack_tiles`.
static void pair_rows(char *a, long kc, long bits) {
    constexpr VS by_4 = {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                         16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31};
    constexpr VS by_2 = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,  11, 12, 14, 13, 15,
                         16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
    const VS order = bits == 4 ? by_4 : by_2;
    for (char *row = a; row < a + kc * TILE; row += 64) {
        VS x;
        memcpy(&x, row, 64);
        x = __builtin_shuffle(x, order);
        memcpy(row, &x, 64);
    }
}

// The last of a tile of rows: what stands beside it, but for int8's scales, and the order that codes of 4 bits come in.
template <class M> static void finish_rows(const Weight<M> &w, char *a, float *beside) {
    if constexpr (std::is_same_v<M, Codes>) {
        if (w.kind == E4M3_BOTH) round_rows(a, w.kc());
        if (w.has_sums()) group_sums(a, w, beside);
        pair_rows(a, w.kc(), w.bits());
    }
    if constexpr (std::is_same_v<M, int8_t>)
        for (int r = 0; way == DOTS && r < 16; r++) {
            VI sum = VI{};
            for (long k = 0; k < w.kc(); k++)
                for (int part = 0; part < 64; part += 16) {
                    typedef int8_t VB __attribute__((vector_size(16)));
                    VB x;
                    memcpy(&x, a + k * TILE + 64 * r + part, 16);
                    sum += __builtin_convertvector(x, VI);
                }
            int32_t all = 0;
            for (int i = 0; i < 16; i++) all += sum[i];
            memcpy(beside + 16 + r, &all, 4);
        }
}

// Rows as a weight meets them: in A tiles, with what stands beside them.
template <class IO, class M>
static void pack_for(const Weight<M> &w, const IO *const *rows, int count, char *out, float *beside) {
    pack_rows<IO, typename Kind<M>::Left>(rows, count, w.inputs, out, beside);
    finish_rows(w, out, beside);
}

// For each of `count` panels C [rows, 32], up to the next row tile, one behind the other, from all the rows in A. K
// goes in pieces, so that what meets again and again stays in the nearest cache. What comes next is fetched meanwhile:
// beside few rows only memory's delay has to be hidden, so it is the next tile of k; beside many, the panels that come
// `next`, spread over all the products. Integer sums are scaled.
template <class M> struct Panel {
    const Weight<M> *w;
    long p;
    Ahead next;
};
template <class M>
static inline void panel_product(long rows, const char *a, const float *beside, const Panel<M> *panels, int count,
                                 float *c) {
    typedef typename Kind<M>::Sum S;
    const long kc = panels[0].w->kc(), piece = kc > 12 ? PIECE : kc, row_tiles = tiles_of(rows, 16);
    const long size = row_tiles * 16 * 32;
    const bool is_few = row_tiles <= FEW;
    const long each = is_few ? 2 * TILE : up(2 * TILE / tiles_of(row_tiles, 2), 64); // over all passes: one panel
    auto begins = [&](int i, long k) { return panels[i].w->panel(panels[i].p) + 2 * k * TILE; };
    S *sums = (S *)c;
    for (long k = 0; k < kc; k += piece)
        for (int i = 0; i < count; i++) {
            const long some = std::min(piece, kc - k);
            const char *b = begins(i, k), *next = panels[i].next.data;
            if (is_few) {
                const char *then = i + 1 < count    ? begins(i + 1, k)
                                   : k + piece < kc ? begins(0, k + piece)
                                                    : panels[0].next.data;
                if (way == DOTS) next = then; // the first rows meet all of a piece, the next tile of which is too near
                else {
                    if (then) fetch(then, 2 * TILE);
                    next = b + 2 * TILE;
                }
            } else if (next) next += k * tiles_of(row_tiles, 2) * each;
            for (long t = 0; t < row_tiles; t += 2) {
                const char *at = a + (t * kc + k) * TILE;
                const bool fetches = next && (t == 0 || !is_few);
                product<M>(std::min(32L, rows - 16 * t), at, at + kc * TILE, b, some, sums + i * size + t * 16 * 32, 32,
                           k > 0, next, fetches ? each : 0);
                if (next) next += some * each;
            }
        }
    if constexpr (std::is_same_v<M, int8_t>)
        for (int i = 0; i < count; i++) {
            const Weight<M> &w = *panels[i].w;
            const long p = panels[i].p;
            V one = load_some(w.scale + 32 * p, w.outputs - 32 * p),
              two = load_some(w.scale + 32 * p + 16, w.outputs - 32 * p - 16);
            float *to = c + i * size;
            for (long r = 0; r < rows; r++) {
                const float *scale = beside + r / 16 * w.side() + r % 16;
                int32_t excess = 0; // see `dots`
                if (way == DOTS) memcpy(&excess, scale + 16, 4);
                VI x, y;
                memcpy(&x, to + 32 * r, 64);
                memcpy(&y, to + 32 * r + 16, 64);
                store(to + 32 * r, __builtin_convertvector(x - 128 * excess, V) * *scale * one);
                store(to + 32 * r + 16, __builtin_convertvector(y - 128 * excess, V) * *scale * two);
            }
        }
}

template <class M> static void pack_weight(const M *from, long outputs, long inputs, char *out, int threads) {
    const long kc = tiles_of(inputs, Kind<M>::K), panels = tiles_of(outputs, 32);
    shared_out(threads, panels, [&](long p) {
        const M *columns[32];
        for (int c = 0; c < 32; c++) columns[c] = 32 * p + c < outputs ? from + (32 * p + c) * inputs : nullptr;
        for (long k = 0; k < kc; k++)
            for (int n = 0; n < 2; n++)
                tile_columns<M>(columns + 16 * n, k * Kind<M>::K, inputs, out + ((p * kc + k) * 2 + n) * TILE);
    });
}

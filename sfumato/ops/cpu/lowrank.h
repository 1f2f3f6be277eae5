// Low-rank factors beside a weight: what the tokens of a lane add to their products, h B with h = x Aᵀ.
//
// Factors are read as they lie, because lanes come and go between passes: neither a product of rows with rows nor one
// with a few rows of B needs them in tiles. h is float32, and h B is added to the float32 sums of the product, before
// whatever comes next: an activation, a rounding, an expert's share. A row's sums depend on no other row.
#pragma once

#include "packing.h"

// x aᵀ of 4 rows and 4 others: [x][a].
template <class T, bool DOTS_OF_TWO> static inline V inner_16(const T *const *x, const T *const *a, long n) {
    V sum[4][4] = {};
    VU turned[16];
    constexpr long K = DOTS_OF_TWO ? 32 : 16;
    auto add = [&](auto load_x) {
        decltype(load_x(x[0])) one[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) one[i] = load_x(x[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const auto two = load_x(a[j]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
#if DOT_PRODUCTS
                if constexpr (DOTS_OF_TWO) {
                    sum[i][j] = (V)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)one[i], (__m512bh)two);
                    continue;
                }
#endif
                sum[i][j] = multiply_add((V)one[i], (V)two, sum[i][j]);
            }
        }
    };
    long k = 0;
    if constexpr (DOTS_OF_TWO) {
        for (; k + K <= n; k += K) add([&](const T *row) { return load_bytes(row + k, 64); });
        if (k < n) add([&](const T *row) { return load_bytes(row + k, (n - k) * (long)sizeof(T)); });
    } else {
        for (; k + K <= n; k += K) add([&](const T *row) { return load(row + k); });
        if (k < n) add([&](const T *row) { return load_some(row + k, n - k); });
    }
    memcpy(turned, sum, sizeof sum);
    transpose(turned, turned);
    V parts[16];
    memcpy(parts, turned, sizeof parts);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

// c [R, columns up to 32] += h [R, rank] x b.
template <class T, int R>
static inline void add_rows(const float *h, long wide, const T *b, long ldb, long rank, long columns, float *c,
                            long ldc) {
    V sum[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r][0] = load(c + r * ldc), sum[r][1] = load(c + r * ldc + 16);
    for (long j = 0; j < rank; j++, b += ldb) {
        const V one = load_some(b, columns), two = load_some(b + 16, columns - 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const V x = splat(h[r * wide + j]);
            sum[r][0] = multiply_add(x, one, sum[r][0]), sum[r][1] = multiply_add(x, two, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(c + r * ldc, sum[r][0]), store(c + r * ldc + 16, sum[r][1]);
}

template <class T> struct LowRank { // of one weight or, until `of` has chosen, of a stack; false: there is none
    const T *a = nullptr, *b = nullptr;
    const Run *runs = nullptr;
    long count = 0, from = 0; // runs; rows of the pass before the first one here
    long rank = 0, inputs = 0, outputs = 0, lane_a = 0, lane_b = 0;
    float scale = 1;
    float *h = nullptr; // [rows, wide()]

    LowRank() {}
    LowRank(const Factors &f, long outputs, long inputs, long experts = 1)
        : a((const T *)f.a), b((const T *)f.b), runs(f.runs), count(f.count), from(f.from), rank(f.rank),
          inputs(inputs), outputs(outputs), lane_a(experts * rank * inputs), lane_b(experts * rank * outputs),
          scale((float)f.scale) {}
    explicit operator bool() const { return a; }
    long wide() const { return a ? up(rank, 4) : 0; }
    // Of an expert, whose rows have lanes of their own.
    LowRank of(long expert, const std::vector<Run> &own) const {
        LowRank w = *this;
        if (!a) return w;
        w.a += expert * rank * inputs, w.b += expert * rank * outputs;
        w.runs = own.data(), w.count = (long)own.size(), w.from = 0;
        return w;
    }
    // f(first, size, lane) for all stretches of some rows that have a lane.
    template <class F> void stretches(long first, long rows, F f) const {
        for (const Run *run = runs; run < runs + count; run++) {
            const long begin = std::max(run->first - from, first),
                       end = std::min(run->first + run->size - from, first + rows);
            if (begin < end) f(begin, end - begin, run->lane);
        }
    }
    // h of rows from `first` on, each given by where its inputs lie.
    void meet(const T *const *rows, long first, long size) const {
        if (!a) return;
        stretches(first, size, [&](long begin, long some, long lane) {
            const T *const *own = rows + (begin - first), *const base = a + lane * lane_a;
            fetch(b + lane * lane_b, std::min(rank * outputs * (long)sizeof(T), 1L << 16));
            for (long r = 0; r < some; r += 4) {
                const T *x[4], *y[4];
                for (long i = 0; i < 4; i++) x[i] = own[std::min(r + i, some - 1)];
                for (long j = 0; j < rank; j += 4) {
                    for (long i = 0; i < 4; i++) y[i] = base + std::min(j + i, rank - 1) * inputs;
                    V all;
                    if constexpr (std::is_same_v<T, bf16>)
                        all = DOT_PRODUCTS && way != PLAIN ? inner_16<T, DOT_PRODUCTS>(x, y, inputs)
                                                           : inner_16<T, false>(x, y, inputs);
                    else all = inner_16<T, false>(x, y, inputs);
                    alignas(64) float kept[16];
                    store(kept, all * scale);
                    for (long i = 0; i < std::min(4L, some - r); i++)
                        memcpy(h + (begin + r + i) * wide() + j, kept + 4 * i, 16);
                }
            }
        });
    }
    // c [rows, 32] += what lanes add to 32 outputs from `column` on.
    void add(long first, long rows, long column, float *c, long ldc = 32) const {
        if (!a) return;
        stretches(first, rows, [&](long begin, long some, long lane) {
            const T *at = b + lane * lane_b + column;
            const float *own = h + begin * wide();
            float *to = c + (begin - first) * ldc;
            auto step = [&](auto count) {
                add_rows<T, count.value>(own, wide(), at, outputs, rank, outputs - column, to, ldc);
                own += count.value * wide(), to += count.value * ldc, some -= count.value;
            };
            while (some >= 8) step(std::integral_constant<int, 8>());
            if (some >= 4) step(std::integral_constant<int, 4>());
            if (some >= 2) step(std::integral_constant<int, 2>());
            if (some) step(std::integral_constant<int, 1>());
        });
    }
};

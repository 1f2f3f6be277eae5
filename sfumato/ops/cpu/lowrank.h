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

// The rank of factors without the zeros behind it: a lane whose adapter has a lower one here, or none.
template <class T> static inline long rank_of(const T *a, long rank, long inputs) {
    for (; rank; rank--)
        for (long i = 0; i < inputs; i += 16) {
            const V x = load_some(a + (rank - 1) * inputs + i, inputs - i);
            if (largest_or_nan((VI)absolute(x)) != 0) return rank;
        }
    return rank;
}

// Of the rows of a call; false: none of them has factors.
template <class T> struct LowRank {
    struct Part { // rows, one behind the other, with one pair of factors
        long first, size, rank;
        const T *a, *b;
    };
    std::vector<Part> parts;
    long wide = 0; // floats of a row of h
    long inputs, outputs;
    float scale;
    float *h = nullptr; // [rows, wide], of rows from `base` on
    long base = 0;

    // Beside a weight that meets all rows of a call.
    LowRank(const Factors &f, long outputs, long inputs, long rows)
        : inputs(inputs), outputs(outputs), scale((float)f.scale) {
        for (long i = 0; f.a && i < f.count; i++) {
            const long first = std::max(f.runs[i].first - f.from, 0L),
                       end = std::min(f.runs[i].first + f.runs[i].size - f.from, rows);
            if (first < end) add_part(f, f.runs[i].lane, first, end - first);
        }
    }
    // Beside one of some experts, which meets tokens[0] / chosen, tokens[1] / chosen, …, in order.
    LowRank(const Factors &f, long outputs, long inputs, long experts, long expert, const long *tokens, long rows,
            long chosen)
        : inputs(inputs), outputs(outputs), scale((float)f.scale) {
        for (long i = 0, at = 0; f.a && i < f.count && at < rows; i++) {
            const long first = f.runs[i].first - f.from, end = first + f.runs[i].size;
            while (at < rows && tokens[at] / chosen < first) at++;
            const long from = at;
            while (at < rows && tokens[at] / chosen < end) at++;
            if (at > from) add_part(f, f.runs[i].lane * experts + expert, from, at - from);
        }
    }
    void add_part(const Factors &f, long number, long first, long size) {
        const T *a = (const T *)f.a + number * f.rank * inputs, *b = (const T *)f.b + number * f.rank * outputs;
        const long rank = rank_of(a, f.rank, inputs);
        if (!rank) return;
        parts.push_back({first, size, rank, a, b});
        wide = up(f.rank, 4);
    }
    explicit operator bool() const { return !parts.empty(); }

    // f(first, size, part) for what parts have of some rows.
    template <class F> void each(long first, long size, F f) const {
        for (const Part &part : parts) {
            const long begin = std::max(part.first, first), end = std::min(part.first + part.size, first + size);
            if (begin < end) f(begin, end - begin, part);
        }
    }
    // h of rows from `first` on, each given by where its inputs lie.
    void meet(const T *const *rows, long first, long size) const {
        each(first, size, [&](long begin, long some, const Part &part) {
            const T *const *own = rows + (begin - first);
            float *to = h + (begin - base) * wide;
            fetch(part.b, std::min(part.rank * outputs * (long)sizeof(T), 1L << 16));
            for (long r = 0; r < some; r += 4) {
                const T *x[4], *a[4];
                for (long i = 0; i < 4; i++) x[i] = own[std::min(r + i, some - 1)];
                for (long j = 0; j < part.rank; j += 4) {
                    for (long i = 0; i < 4; i++) a[i] = part.a + std::min(j + i, part.rank - 1) * inputs;
                    alignas(64) float all[16];
                    constexpr bool has_dots = DOT_PRODUCTS && std::is_same_v<T, bf16>;
                    store(all, (way != PLAIN ? inner_16<T, has_dots>(x, a, inputs) : inner_16<T, false>(x, a, inputs)) *
                                   scale);
                    for (long i = 0; i < std::min(4L, some - r); i++)
                        memcpy(to + (r + i) * wide + j, all + 4 * i, 16);
                }
            }
        });
    }
    // c [rows, 32] += what rows from `first` on add to 32 outputs from `column` on.
    void add(long first, long rows, long column, float *c, long ldc = 32) const {
        each(first, rows, [&](long begin, long some, const Part &part) {
            const T *at = part.b + column;
            const float *own = h + (begin - base) * wide;
            float *to = c + (begin - first) * ldc;
            auto step = [&](auto count) {
                add_rows<T, count.value>(own, wide, at, outputs, part.rank, outputs - column, to, ldc);
                own += count.value * wide, to += count.value * ldc, some -= count.value;
            };
            while (some >= 8) step(std::integral_constant<int, 8>());
            if (some >= 4) step(std::integral_constant<int, 4>());
            if (some >= 2) step(std::integral_constant<int, 2>());
            if (some) step(std::integral_constant<int, 1>());
        });
    }
};

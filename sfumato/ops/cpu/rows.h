// What is done row by row: norms, rope, the end of a block, routing.
#pragma once

#include "lowrank.h"

template <class T> static inline V weight_at(const T *w, long i, long n) {
    return w ? load_some(w + i, n - i) : splat(1.0f);
}

// Where squares overflow it is NaN, not zero: zeros would pass for a state.
template <class A> static inline float inverse_rms(A at, long n, float eps) {
    V sum[4] = {};
    long i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; j++) {
            V x = at(i + 16 * j);
            sum[j] += x * x;
        }
    for (; i < n; i += 16) {
        V x = at(i);
        sum[0] += x * x;
    }
    const float mean = total((sum[0] + sum[1]) + (sum[2] + sum[3])) / n;
    return 1.0f / std::sqrt(mean + eps) + 0.0f * mean;
}

template <class T> static void rms_norm(const T *x, long rows, long n, const T *w, float eps, T *y, int threads) {
    shared_out(threads, rows, [&](long r) {
        const T *from = x + r * n;
        const float s = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
        for (long i = 0; i < n; i += 16)
            store_some(y + r * n + i, load_some(from + i, n - i) * s * weight_at(w, i, n), n - i);
    });
}

template <class T>
static void norm_rope(const T *x, long places, long heads, long n, const T *w, float eps, const T *cos, const T *sin,
                      T *y, int threads) {
    const long half = n / 2;
    shared_out(threads, places * heads, [&](long r) {
        const T *from = x + r * n, *c = cos + r / heads * n, *s = sin + r / heads * n;
        const float scale = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
        if (n == 16) { // both halves in one vector
            const V x = rounded(load(from) * scale * load(w), T());
            const V other = __builtin_shuffle(x, VI{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
            const V sign = {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1};
            store(y + r * n, x * load(c) + other * (load(s) * sign));
            return;
        }
        for (long i = 0; i < half; i += 16) {
            const long m = half - i;
            V one = rounded(load_some(from + i, m) * scale * load_some(w + i, m), T());
            V two = rounded(load_some(from + half + i, m) * scale * load_some(w + half + i, m), T());
            store_some(y + r * n + i, one * load_some(c + i, m) - two * load_some(s + i, m), m);
            store_some(y + r * n + half + i, two * load_some(c + half + i, m) + one * load_some(s + half + i, m), m);
        }
    });
}

template <class T>
static void norm_add(const T *residual, const T *x, long rows, long n, const T *w, float eps, T *y, int threads) {
    shared_out(threads, rows, [&](long r) {
        const T *from = x + r * n;
        const float s = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
        for (long i = 0; i < n; i += 16)
            store_some(y + r * n + i,
                       load_some(residual + r * n + i, n - i) +
                           rounded(load_some(from + i, n - i) * s * weight_at(w, i, n), T()),
                       n - i);
    });
}

template <class T>
static void join(const T *residual, const T *dense, const T *sparse, long rows, long n, const T *dense_w,
                 const T *sparse_w, const T *w, float eps, const T *scale, long scales, T *y, int threads) {
    together(threads, [&](Team &team) {
        std::vector<float> sum(up(n, 16));
        team.shares(rows, [&](long r) {
            const T *d = dense + r * n, *s = sparse + r * n;
            const float ds = inverse_rms([&](long i) { return load_some(d + i, n - i); }, n, eps);
            const float ss = inverse_rms([&](long i) { return load_some(s + i, n - i); }, n, eps);
            for (long i = 0; i < n; i += 16) {
                V a = rounded(load_some(d + i, n - i) * ds * weight_at(dense_w, i, n), T());
                V b = rounded(load_some(s + i, n - i) * ss * weight_at(sparse_w, i, n), T());
                store(sum.data() + i, rounded(a + b, T()));
            }
            const float js = inverse_rms([&](long i) { return load(sum.data() + i); }, n, eps);
            const float layer = to_float(scale[scales > 1 ? r : 0]);
            for (long i = 0; i < n; i += 16) {
                V a = rounded(load(sum.data() + i) * js * weight_at(w, i, n), T());
                store_some(y + r * n + i, rounded(load_some(residual + r * n + i, n - i) + a, T()) * layer, n - i);
            }
        });
    });
}

// Few outputs and exact ones: which experts a token takes must not hang on the rounding of a product's input.
template <class T>
static void route(const T *x, long rows, long n, const T *scale, const T *proj, const Factors &factors, long count,
                  const T *per_expert, long chosen, float eps, int64_t *index, float *weight, int threads) {
    const float root = 1.0f / std::sqrt((float)n);
    const LowRank<T> all_low(factors, count, n, rows);
    const long ldp = up(count, 32);
    together(threads, [&](Team &team) {
        std::vector<float> a(4 * up(n, 16)), p(4 * ldp), h(4 * all_low.wide);
        std::vector<T> low_rows(all_low ? 4 * n : 0);
        LowRank<T> low = all_low;
        low.h = h.data();
        team.shares(tiles_of(rows, 4), [&](long block) {
            const long some = std::min(4L, rows - 4 * block), wide = up(n, 16);
            for (long r = 0; r < some; r++) {
                const T *from = x + (4 * block + r) * n;
                const float s = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
                for (long i = 0; i < n; i += 16) {
                    V normed = rounded(rounded(load_some(from + i, n - i) * s, T()) * load_some(scale + i, n - i), T());
                    store(a.data() + r * wide + i, rounded(normed * root, T()));
                }
            }
            for (long r = some; r < 4; r++) memset(a.data() + r * wide, 0, wide * 4);
            for (long e = 0; e < count; e += 4) { // four by four, so that loads are fewer than products
                const T *w[4];
                V sum[4][4] = {};
                for (int j = 0; j < 4; j++) w[j] = proj + std::min(e + j, count - 1) * n;
                auto add = [&](long i, auto loaded) {
                    V x[4];
                    for (int r = 0; r < 4; r++) x[r] = load(a.data() + r * wide + i);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const V y = loaded(w[j] + i);
#pragma GCC unroll 4
                        for (int r = 0; r < 4; r++) sum[j][r] += y * x[r];
                    }
                };
                long i = 0;
                for (; i + 16 <= n; i += 16) add(i, [](const T *at) { return load(at); });
                if (i < n) add(i, [&](const T *at) { return load_some(at, n - i); });
                for (long j = 0; j < std::min(4L, count - e); j++)
                    for (int r = 0; r < 4; r++) p[r * ldp + e + j] = total(sum[j][r]);
            }
            if (low) { // its rows are numbers of T already
                low.base = 4 * block;
                const T *pointers[4];
                for (long r = 0; r < some; r++) {
                    pointers[r] = low_rows.data() + r * n;
                    for (long i = 0; i < n; i += 16)
                        store_some(low_rows.data() + r * n + i, load(a.data() + r * wide + i), n - i);
                }
                low.meet(pointers, low.base, some);
                for (long e = 0; e < count; e += 32) low.add(low.base, some, e, p.data() + e, ldp);
            }
            for (float &logit : p) {
                T kept;
                from_float(&kept, logit);
                logit = to_float(kept);
            }
            for (long r = 0; r < some; r++) {
                float *q = p.data() + r * ldp, top = q[0], sum = 0, picked = 0;
                for (long e = 0; e < count; e++) top = std::max(top, q[e]);
                for (long e = 0; e < count; e += 16)
                    store_some(q + e, exponential(load_some(q + e, count - e) - top), count - e);
                for (long e = 0; e < count; e++) sum += q[e];
                int64_t *at = index + (4 * block + r) * chosen;
                float *out = weight + (4 * block + r) * chosen;
                for (long j = 0; j < chosen; j++) {
                    long best = 0;
                    for (long e = 1; e < count; e++)
                        if (q[e] > q[best]) best = e;
                    at[j] = best, out[j] = q[best] / sum, picked += out[j], q[best] = -1;
                }
                for (long j = 0; j < chosen; j++) out[j] = out[j] / picked * to_float(per_expert[at[j]]);
            }
        });
    });
}

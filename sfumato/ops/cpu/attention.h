// attention: cached, newly encoded and canvas keys in one sweep.
#pragma once

#include "packing.h"

struct Seen {
    const int64_t *rows, *lengths, *counts;
    long batch, encode, canvas, window, ring; // window 0: none
};

// The keys of a row are numbered by position: cached, newly encoded, canvas. What a query sees is then an interval.
// A unit of work is some query blocks of one key-value head; for each chunk of keys it packs keys and values once.
// `out` may be q: a unit has its queries packed before it writes, and they are nobody else's.
template <class T>
static void attention(const T *q, const T *k, const T *v, const T *k_ring, const T *v_ring, Seen seen, long heads,
                      long groups, long n, T *out, int threads) {
    const long width = seen.encode + seen.canvas, share = heads / groups, kd = tiles_of(n, Kind<T>::K);
    const long d_panels = tiles_of(n, 32), wide = up(n, 32), blocks = tiles_of(width, 32) * share;
    const long kk = KEYS / Kind<T>::K;
    long splits = std::max(1L, tiles_of(blocks, 16)); // bounds what a unit keeps
    while (seen.batch * groups * splits < threads && splits < blocks) splits++;
    const long each = tiles_of(blocks, splits), units = seen.batch * groups * splits;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        const long q_bytes = 2 * kd * TILE, k_bytes = KEYS / 32 * kd * 2 * TILE, v_bytes = d_panels * kk * 2 * TILE;
        const long p_bytes = 2 * kk * TILE, s_bytes = 32 * KEYS * 4, o_bytes = 32 * wide * 4;
        char *a = own.get(each * (q_bytes + o_bytes + 4 * 32 * 8) + k_bytes + v_bytes + p_bytes + s_bytes);
        char *q_tiles = a, *k_tiles = q_tiles + each * q_bytes, *v_tiles = k_tiles + k_bytes,
             *p_tiles = v_tiles + v_bytes;
        float *scores = (float *)(p_tiles + p_bytes), *o = scores + 32 * KEYS;
        float *top = o + each * 32 * wide, *sum = top + each * 32;
        int64_t *low = (int64_t *)(sum + each * 32), *high = low + each * 32;
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < units; unit++) {
            const long b = unit / (groups * splits), g = unit / splits % groups, first = unit % splits * each;
            const long held = std::min(each, blocks - first);
            if (held <= 0) continue;
            const long length = seen.lengths[b], count = seen.counts[b], start = length + count,
                       end = start + seen.canvas;
            long from = end, to = 0;
            auto place = [&](long block, long r, long &h, long &t) {
                h = g * share + (first + block) / tiles_of(width, 32);
                t = (first + block) % tiles_of(width, 32) * 32 + r;
                return t < width;
            };
            for (long block = 0; block < held; block++) {
                const T *pointers[32];
                long h, t;
                for (int r = 0; r < 32; r++) {
                    const bool is_there = place(block, r, h, t);
                    pointers[r] = is_there ? q + ((b * width + t) * heads + h) * n : nullptr;
                    int64_t &lo = low[block * 32 + r], &hi = high[block * 32 + r];
                    if (!is_there) lo = hi = 0;
                    else if (t >= seen.encode) lo = seen.window ? std::max(0L, start - seen.window + 1) : 0, hi = end;
                    else if (t < count)
                        lo = seen.window ? std::max(0L, length + t - seen.window + 1) : 0, hi = length + t + 1;
                    else lo = std::max(0L, length - 1), hi = std::min(lo + 1, (int64_t)end); // padding
                    if (lo < hi) from = std::min(from, lo), to = std::max(to, hi);
                    top[block * 32 + r] = -1e30f, sum[block * 32 + r] = 0;
                }
                tile_rows<T>(pointers, 16, n, q_tiles + block * q_bytes);
                tile_rows<T>(pointers + 16, 16, n, q_tiles + block * q_bytes + kd * TILE);
            }
            memset(o, 0, held * o_bytes);
            for (long key = from; key < to; key += KEYS) {
                const T *keys[KEYS], *values[KEYS];
                for (long i = 0; i < KEYS; i++) {
                    const long p = key + i;
                    keys[i] = values[i] = nullptr;
                    if (p >= to) continue;
                    const bool is_cached = p < length;
                    const long slot = is_cached ? p % seen.ring : p < start ? p - length : seen.encode + p - start;
                    const long at = ((is_cached ? seen.rows[b] * (seen.ring + 1) : b * width) + slot) * groups + g;
                    keys[i] = (is_cached ? k_ring : k) + at * n, values[i] = (is_cached ? v_ring : v) + at * n;
                }
                const long filled = std::min(KEYS, to - key), panels = tiles_of(filled, 32),
                           k_used = tiles_of(filled, Kind<T>::K);
                for (long p = 0; p < panels; p++)
                    for (long i = 0; i < kd; i++)
                        for (int half = 0; half < 2; half++)
                            tile_columns<T>(keys + 32 * p + 16 * half, i * Kind<T>::K, n,
                                            k_tiles + ((p * kd + i) * 2 + half) * TILE);
                for (long p = 0; p < d_panels; p++)
                    for (long i = 0; i < k_used; i++)
                        tile_pair<T>(values + i * Kind<T>::K, 32 * p, n, v_tiles + (p * kk + i) * 2 * TILE);
                for (long block = 0; block < held; block++) {
                    const int64_t *lo = low + block * 32, *hi = high + block * 32;
                    int64_t least = INT64_MAX, most = 0, sure_low = 0, sure_high = INT64_MAX;
                    for (int r = 0; r < 32; r++)
                        if (lo[r] < hi[r]) {
                            least = std::min(least, lo[r]), most = std::max(most, hi[r]);
                            sure_low = std::max(sure_low, lo[r]), sure_high = std::min(sure_high, hi[r]);
                        }
                    if (least >= key + filled || most <= key) continue;
                    const bool is_whole = sure_low <= key && sure_high >= key + KEYS;
                    const char *qa = q_tiles + block * q_bytes;
                    for (long p = 0; p < panels; p++)
                        product<T>(2, qa, qa + kd * TILE, k_tiles + p * kd * 2 * TILE, kd, scores + 32 * p, KEYS);
                    float *block_o = o + block * 32 * wide;
                    for (int r = 0; r < 32; r++) {
                        float *s = scores + r * KEYS;
                        V most_v = splat(-1e30f);
                        const long vectors = 2 * panels;
                        if (!is_whole) {
                            const V ramp = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                            const float l = (float)std::max<int64_t>(lo[r] - key, 0),
                                        u = (float)std::max<int64_t>(0, std::min<int64_t>(hi[r] - key, KEYS));
                            for (long i = 0; i < vectors; i++) {
                                V at = ramp + (float)(16 * i), x = load(s + 16 * i);
                                x = at < splat(l) ? splat(-1e30f) : x;
                                x = at >= splat(u) ? splat(-1e30f) : x;
                                store(s + 16 * i, x);
                            }
                        }
                        for (long i = 0; i < vectors; i++) most_v = bigger(most_v, load(s + 16 * i));
                        const float old = top[block * 32 + r], now = std::max(old, largest(most_v));
                        T *p_row = (T *)(p_tiles + (r / 16) * kk * TILE) + (r % 16) * Kind<T>::K;
                        V acc = V{};
                        const long steps = k_used * Kind<T>::K / 16;
                        constexpr long PER = Kind<T>::K / 16;
                        const long seen_steps = now > -1e29f ? std::min(steps, vectors) : 0;
                        for (long i = 0; i < seen_steps; i++) {
                            const V e = exponential(load(s + 16 * i) - now);
                            acc += e;
                            store((T *)((char *)p_row + i / PER * TILE) + i % PER * 16, e);
                        }
                        for (long i = seen_steps; i < steps; i++)
                            store((T *)((char *)p_row + i / PER * TILE) + i % PER * 16, V{});
                        if (now > old) {
                            top[block * 32 + r] = now;
                            if (old > -1e29f) { // else there is nothing yet
                                const float fade = std::exp(old - now);
                                sum[block * 32 + r] *= fade;
                                for (long i = 0; i < wide; i += 16)
                                    store(block_o + r * wide + i, load(block_o + r * wide + i) * fade);
                            }
                        }
                        sum[block * 32 + r] += total(acc);
                    }
                    for (long p = 0; p < d_panels; p++)
                        product<T>(2, p_tiles, p_tiles + kk * TILE, v_tiles + p * kk * 2 * TILE, k_used,
                                   block_o + 32 * p, wide, true, nullptr, 0, n - 32 * p);
                }
            }
            for (long block = 0; block < held; block++) {
                long h, t;
                for (int r = 0; r < 32; r++)
                    if (place(block, r, h, t)) {
                        const float s = sum[block * 32 + r], inverse = s > 0 ? 1.0f / s : 0.0f;
                        for (long i = 0; i < n; i += 16)
                            store_some(out + ((b * width + t) * heads + h) * n + i,
                                       load(o + (block * 32 + r) * wide + i) * inverse, n - i);
                    }
            }
        }
    }
}

// attention: cached, newly encoded and canvas keys in one sweep.
#pragma once

#include "packing.h"

struct Seen {
    const int64_t *rows, *lengths, *counts;
    long batch, encode, canvas, window, ring; // window 0: none
};

// What one query sees of a chunk of keys, [low, high), and the largest of its scores there; those at the edges that it
// does not see become nothing.
static inline float peak(float *s, long low, long high) {
    const long first = low / 16, last = tiles_of(high, 16);
    const V ramp = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (low % 16) {
        float *edge = s + 16 * first;
        store(edge, ramp < splat((float)(low % 16)) ? splat(-1e30f) : load(edge));
    }
    if (high % 16) {
        float *edge = s + 16 * (last - 1);
        store(edge, ramp < splat((float)(high % 16)) ? load(edge) : splat(-1e30f));
    }
    V one = load(s + 16 * (last - 1)), two = one;
    for (long i = first; i + 1 < last; i += 2)
        one = bigger(one, load(s + 16 * i)), two = bigger(two, load(s + 16 * i + 16));
    return largest(bigger(one, two));
}

// Scores s[low, high) as weights, under `top`, in a row p of A tiles, zeros elsewhere up to `used` tiles. Their sum.
template <class T> static inline float weigh(const float *s, long low, long high, float top, T *p, long used) {
    constexpr long PER = Kind<T>::K / 16;
    auto at = [&](long i) { return (T *)((char *)p + i / PER * TILE) + i % PER * 16; };
    const long first = low / 16, last = low < high ? tiles_of(high, 16) : first;
    V sum = V{};
    for (long i = 0; i < first; i++) store(at(i), V{});
    for (long i = first; i < last; i++) {
        const V e = exponential_below(load(s + 16 * i) - top);
        sum += e;
        store(at(i), e);
    }
    for (long i = last; i < used * PER; i++) store(at(i), V{});
    return total(sum);
}

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
    together(units > 1 ? threads : 1, [&](Team &team) {
        Tiles tiles;
        const long q_bytes = 2 * kd * TILE, k_bytes = KEYS / 32 * kd * 2 * TILE, v_bytes = d_panels * kk * 2 * TILE;
        const long p_bytes = 2 * kk * TILE, s_bytes = 32 * KEYS * 4, o_bytes = 32 * wide * 4;
        char *a = own.get(each * (q_bytes + o_bytes + 4 * 32 * 8) + k_bytes + v_bytes + p_bytes + s_bytes);
        char *q_tiles = a, *k_tiles = q_tiles + each * q_bytes, *v_tiles = k_tiles + k_bytes,
             *p_tiles = v_tiles + v_bytes;
        float *scores = (float *)(p_tiles + p_bytes), *o = scores + 32 * KEYS;
        float *top = o + each * 32 * wide, *sum = top + each * 32;
        int64_t *low = (int64_t *)(sum + each * 32), *high = low + each * 32;
        team.each(units, 1, [&](long unit) {
            const long b = unit / (groups * splits), g = unit / splits % groups, first = unit % splits * each;
            const long held = std::min(each, blocks - first);
            if (held <= 0) return;
            const long length = seen.lengths[b], count = seen.counts[b], start = length + count,
                       end = start + seen.canvas;
            long from = end, to = 0;
            auto place = [&](long block, long &h, long &t) { // the head of a block, and its first query
                h = g * share + (first + block) / tiles_of(width, 32);
                t = (first + block) % tiles_of(width, 32) * 32;
            };
            for (long block = 0; block < held; block++) {
                const T *pointers[32];
                long h, t;
                place(block, h, t);
                for (int r = 0; r < 32; r++, t++) {
                    const bool is_there = t < width;
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
                const long filled = std::min(KEYS, to - key), panels = tiles_of(filled, 32),
                           k_used = tiles_of(filled, Kind<T>::K);
                for (long i = 0, turned = key % std::max(seen.ring, 1L); i < filled; i++, turned++) {
                    const long p = key + i;
                    const bool is_cached = p < length;
                    if (turned == seen.ring) turned = 0;
                    const long slot = is_cached ? turned : p < start ? p - length : seen.encode + p - start;
                    const long at = ((is_cached ? seen.rows[b] * (seen.ring + 1) : b * width) + slot) * groups + g;
                    keys[i] = (is_cached ? k_ring : k) + at * n, values[i] = (is_cached ? v_ring : v) + at * n;
                }
                for (long i = filled; i < 32 * panels; i++) keys[i] = values[i] = nullptr;
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
                    int64_t least = INT64_MAX, most = 0;
                    for (int r = 0; r < 32; r++)
                        if (lo[r] < hi[r]) least = std::min(least, lo[r]), most = std::max(most, hi[r]);
                    if (least >= key + filled || most <= key) continue;
                    const char *qa = q_tiles + block * q_bytes;
                    for (long p = 0; p < panels; p++)
                        product<T>(32, qa, qa + kd * TILE, k_tiles + p * kd * 2 * TILE, kd, scores + 32 * p, KEYS);
                    float *block_o = o + block * 32 * wide;
                    long seen_from[32], seen_to[32];
                    for (int r = 0; r < 32; r++) { // the maxima first: no row then waits for its own
                        const long l = seen_from[r] = std::min(std::max(lo[r] - key, 0L), filled),
                                   h = seen_to[r] = std::min(std::max(hi[r] - key, 0L), filled);
                        if (l >= h) continue;
                        float &most_yet = top[block * 32 + r];
                        const float now = peak(scores + r * KEYS, l, h);
                        if (now <= most_yet) continue;
                        if (most_yet > -1e29f) { // else there is nothing yet
                            const float fade = std::exp(most_yet - now);
                            sum[block * 32 + r] *= fade;
                            for (long i = 0; i < wide; i += 16)
                                store(block_o + r * wide + i, load(block_o + r * wide + i) * fade);
                        }
                        most_yet = now;
                    }
                    for (int r = 0; r < 32; r++)
                        sum[block * 32 + r] +=
                            weigh<T>(scores + r * KEYS, seen_from[r], seen_to[r], top[block * 32 + r],
                                     (T *)(p_tiles + (r / 16) * kk * TILE) + (r % 16) * Kind<T>::K, k_used);
                    for (long p = 0; p < d_panels; p++)
                        product<T>(32, p_tiles, p_tiles + kk * TILE, v_tiles + p * kk * 2 * TILE, k_used,
                                   block_o + 32 * p, wide, true, nullptr, 0, n - 32 * p);
                }
            }
            for (long block = 0; block < held; block++) {
                long h, t;
                place(block, h, t);
                for (long r = 0; r < std::min(32L, width - t); r++) {
                    const float s = sum[block * 32 + r], inverse = s > 0 ? 1.0f / s : 0.0f;
                    for (long i = 0; i < n; i += 16)
                        store_some(out + ((b * width + t + r) * heads + h) * n + i,
                                   load(o + (block * 32 + r) * wide + i) * inverse, n - i);
                }
            }
        });
    });
}

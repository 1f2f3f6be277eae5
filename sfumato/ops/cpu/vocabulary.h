// read_out and soft_embedding.
#pragma once

#include "packing.h"

// Logits of WORDS words for all positions at a time: words along the rows of a tile, positions along its lanes, so that
// what is gathered over words needs no sums across lanes. Per position and tile of words: the largest logit and its
// word, the sums of e^(x - largest), of (x - largest) e^(x - largest), and of the former as the stored logits give it.
template <class T>
static void read_out(const T *hidden, long positions, long n, const T *embed, long words, float cap,
                     const float *inverse_heat, const uint8_t *is_banned, const int64_t *banned, long bans,
                     const float *uniform, T *logits, float *mass, int64_t *sample, int64_t *argmax, float *entropy,
                     float *peak, int threads) {
    const long kc = tiles_of(n, Kind<T>::K), places = tiles_of(positions, 32), word_tiles = tiles_of(words, WORDS);
    char *b = left_side.get(places * kc * 2 * TILE);
    const long lanes = 32 * places;
    float *stats = (float *)middle.get(word_tiles * lanes * 5 * 4);
    float *most = stats, *which = most + word_tiles * lanes, *sums = which + word_tiles * lanes;
    float *dots = sums + word_tiles * lanes, *kept = dots + word_tiles * lanes;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(static)
        for (long p = 0; p < places; p++) {
            const T *columns[32];
            for (int i = 0; i < 32; i++) columns[i] = 32 * p + i < positions ? hidden + (32 * p + i) * n : nullptr;
            for (long k = 0; k < kc; k++)
                for (int half = 0; half < 2; half++)
                    tile_columns<T>(columns + 16 * half, k * Kind<T>::K, n, b + ((p * kc + k) * 2 + half) * TILE);
        }
        char *a = own.get(2 * kc * TILE + WORDS * lanes * 4);
        float *x = (float *)(a + 2 * kc * TILE); // [places, WORDS, 32]
#pragma omp for schedule(dynamic, 2)
        for (long w = 0; w < word_tiles; w++) {
            const long here = std::min(WORDS, words - w * WORDS);
            for (long pair = 0; pair < tiles_of(here, 32); pair++) {
                const T *rows[32];
                for (int i = 0; i < 32; i++) {
                    const long word = w * WORDS + 32 * pair + i;
                    rows[i] = word < words ? embed + word * n : nullptr;
                }
                tile_rows<T>(rows, 16, n, a);
                tile_rows<T>(rows + 16, 16, n, a + kc * TILE);
                for (long k = 0; k < kc; k += PIECE)
                    for (long p = 0; p < places; p++)
                        product<T>(2, a + k * TILE, a + (kc + k) * TILE, b + (p * kc + k) * 2 * TILE, std::min(PIECE, kc - k),
                                   x + (p * WORDS + 32 * pair) * 32, 32, k > 0);
            }
            for (long l = 0; l < lanes; l += 16) {
                const V heat = load_some(inverse_heat + l, positions - l);
                float *xl = x + l / 32 * WORDS * 32 + l % 32;
                V top = splat(-3e38f), at = V{};
                for (long i = 0; i < here; i++) {
                    V y = softcapped(load(xl + 32 * i), cap) * heat;
                    at = y > top ? splat((float)i) : at;
                    top = bigger(top, y);
                    store(xl + 32 * i, y);
                }
                bool is_changed = false;
                for (long i = 0; i < bans; i++) {
                    const long word = banned[i] - w * WORDS;
                    if (word < 0 || word >= here) continue;
                    for (long p = l; p < std::min(l + 16, positions); p++)
                        if (is_banned[p]) xl[32 * word + p - l] = -1e30f, is_changed = true;
                }
                if (is_changed) {
                    top = splat(-3e38f), at = V{};
                    for (long i = 0; i < here; i++) {
                        V y = load(xl + 32 * i);
                        at = y > top ? splat((float)i) : at;
                        top = bigger(top, y);
                    }
                }
                V s = V{}, d = V{}, r = V{};
                for (long i = 0; i < here; i++) {
                    V y = load(xl + 32 * i), e = exponential(y - top);
                    s += e, d += (y - top) * e;
                    if constexpr (!std::is_same_v<T, float>) r += exponential(rounded(y, T()) - top);
                }
                if constexpr (std::is_same_v<T, float>) r = s;
                const long to = w * lanes + l;
                store(most + to, top), store(which + to, at), store(sums + to, s), store(dots + to, d), store(kept + to, r);
            }
            for (long p = 0; p < positions; p += 16)
                for (long i = 0; i < here; i += 16) { // to [position, word]
                    VU in[16], turned[16];
                    for (int j = 0; j < 16; j++) {
                        in[j] = VU{};
                        if (i + j < here) memcpy(&in[j], x + p / 32 * WORDS * 32 + (i + j) * 32 + p % 32, 64);
                    }
                    transpose(in, turned);
                    for (long j = 0; j < std::min(16L, positions - p); j++)
                        store_some(logits + (p + j) * words + w * WORDS + i, (V)turned[j], here - i);
                }
        }
        float *fades = (float *)blocks.get(word_tiles * 16 * 4);
#pragma omp for schedule(static)
        for (long p16 = 0; p16 < positions; p16 += 16) {
            V top_v = load(most + p16), best_v = V{};
            for (long w = 1; w < word_tiles; w++) {
                V m = load(most + w * lanes + p16);
                best_v = m > top_v ? splat((float)w) : best_v;
                top_v = bigger(top_v, m);
            }
            for (long w = 0; w < word_tiles; w++) store(fades + 16 * w, exponential(load(most + w * lanes + p16) - top_v));
          for (long p = p16; p < std::min(p16 + 16, positions); p++) {
            const float top = top_v[p - p16], best = best_v[p - p16];
            double sum = 0, dot = 0, rest = 0;
            for (long w = 0; w < word_tiles; w++) {
                const double fade = fades[16 * w + p - p16], here = sums[w * lanes + p];
                sum += fade * here, rest += fade * kept[w * lanes + p];
                dot += fade * (dots[w * lanes + p] + ((double)most[w * lanes + p] - top) * here);
            }
            argmax[p] = (long)best * WORDS + (long)which[(long)best * lanes + p];
            entropy[p] = (float)(std::log(sum) - dot / sum);
            peak[2 * p] = top, peak[2 * p + 1] = (float)(1 / rest);
            for (long w = 0; w < word_tiles; w++) mass[p * word_tiles + w] = (float)(fades[16 * w + p - p16] * sums[w * lanes + p] / sum);
            if (!uniform) {
                sample[p] = argmax[p];
                continue;
            }
            const double target = uniform[p] * sum;
            double before = 0, within = 0;
            long w = 0;
            for (;; w++) { // the tile in which the cumulative distribution passes the target
                within = (double)fades[16 * w + p - p16] * sums[w * lanes + p];
                if (before + within > target || w + 1 == word_tiles) break;
                before += within;
            }
            float value[WORDS]; // its words as the stored logits have them
            const long here = std::min(WORDS, words - w * WORDS);
            double again = 0;
            for (long i = 0; i < here; i += 16) {
                V e = exponential(load_some(logits + p * words + w * WORDS + i, here - i) - most[w * lanes + p]);
                store(value + i, e);
            }
            for (long i = 0; i < here; i++) again += value[i];
            const double share = within > 0 ? (target - before) / within * again : 0;
            double passed = 0;
            long i = 0, last = 0;
            for (; i < here; i++) {
                if (value[i] > 0) last = i;
                passed += value[i];
                if (passed > share) break;
            }
            sample[p] = w * WORDS + (i < here ? i : last);
          }
        }
    }
}

// softmax(logits) @ E x scale; `peak` is each position's largest logit and 1 / sum of e^(logit - largest). Tiles of words whose mass is below `least` at every position of a block of 32 are left
// out of its sum; tiles that no block needs are not read.
template <class T>
static void soft_embedding(const T *logits, long positions, long words, const T *embed, long n, const float *peak,
                           const float *mass, float least, float scale, T *y, int threads) {
    constexpr long K = Kind<T>::K, PER = WORDS / K, RUN = 4; // RUN tiles of words at a time
    const long word_tiles = tiles_of(words, WORDS), places = tiles_of(positions, 32), wide = up(n, 32);
    std::vector<uint8_t> needs(word_tiles * places, mass ? 0 : 1);
    std::vector<long> list;
    if (mass)
        for (long p = 0; p < positions; p++)
            for (long w = 0; w < word_tiles; w++) needs[w * places + p / 32] |= mass[p * word_tiles + w] >= least;
    for (long w = 0; w < word_tiles; w++)
        for (long p = 0; p < places; p++)
            if (needs[w * places + p]) {
                list.push_back(w);
                break;
            }
    const long p_bytes = places * 2 * RUN * PER * TILE; // [place][2][RUN x PER][1 KiB]
    char *a = left_side.get(p_bytes + wide / 32 * RUN * PER * 2 * TILE), *b = a + p_bytes; // b: [panel][RUN x PER][2][1 KiB]
    float *sum = (float *)middle.get(places * 32 * wide * 4);
    const long panels = wide / 32;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(static)
        for (long p = 0; p < places; p++) memset(sum + p * 32 * wide, 0, 32 * wide * 4);
        for (long first = 0; first < (long)list.size(); first += RUN) {
            const long run = std::min(RUN, (long)list.size() - first);
#pragma omp for schedule(dynamic, 1) nowait // E is read row by row, as it lies
            for (long j = 0; j < run * PER; j++) {
                const long w = list[first + j / PER];
                const T *rows[K];
                for (long r = 0; r < K; r++) {
                    const long word = w * WORDS + j % PER * K + r;
                    rows[r] = word < words ? embed + word * n : nullptr;
                }
                for (long column = 0; column < wide; column += 16) {
                    char *tile = b + (column / 32 * RUN * PER * 2 + j * 2 + column / 16 % 2) * TILE;
                    if (column < n) tile_across<T>(rows, K, column, n - column, tile);
                    else memset(tile, 0, TILE);
                }
            }
#pragma omp for schedule(dynamic, 1) // its barrier: all see what was packed
            for (long p = 0; p < places; p++)
                for (long i = 0; i < run; i++) {
                    const long w = list[first + i], here = std::min(WORDS, words - w * WORDS);
                    if (!needs[w * places + p]) continue;
                    for (long r = 0; r < 32; r++) {
                        const long position = 32 * p + r;
                        char *tile = a + ((p * 2 + r / 16) * RUN + i) * PER * TILE + (r % 16) * 64;
                        for (long j = 0; j < WORDS; j += 16) {
                            V e = V{};
                            if (position < positions && j < here) {
                                e = exponential(load_some(logits + position * words + w * WORDS + j, here - j) - peak[2 * position]) * peak[2 * position + 1];
                                if (here - j < 16) { // what does not exist has no probability
                                    float t[16];
                                    store(t, e);
                                    for (long z = here - j; z < 16; z++) t[z] = 0;
                                    e = load(t);
                                }
                            }
                            store((T *)(tile + j / K * TILE) + j % K, e);
                        }
                    }
                }
#pragma omp for schedule(dynamic, 1)
            for (long d = 0; d < panels; d++) {
                const char *bd = b + d * RUN * PER * 2 * TILE;
                for (long p = 0; p < places; p++) {
                    float *c = sum + p * 32 * wide + 32 * d;
                    const char *a0 = a + p * 2 * RUN * PER * TILE, *a1 = a0 + RUN * PER * TILE;
                    long i = 0;
                    while (i < run) { // neighbours that are needed, in one product
                        long until = i;
                        while (until < run && needs[list[first + until] * places + p]) until++;
                        if (until > i)
                            product<T>(2, a0 + i * PER * TILE, a1 + i * PER * TILE, bd + i * PER * 2 * TILE, (until - i) * PER, c, wide, true);
                        i = until + (until == i);
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (long p = 0; p < positions; p++)
            for (long i = 0; i < n; i += 16)
                store_some(y + p * n + i, rounded(load(sum + p * wide + i), T()) * scale, n - i);
    }
}

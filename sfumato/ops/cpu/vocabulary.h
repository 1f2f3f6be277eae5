// read_out and soft_embedding.
#pragma once

#include "packing.h"

static constexpr long WORDS = 256; // words of a tile of the vocabulary
static constexpr long PART = 8;    // k tiles of the embedding that meet all positions before the next ones do
static constexpr long PLACES = 16; // blocks of 32 positions whose logits are held at a time

// ---- read-out -------------------------------------------------------------------------------------------------------

struct Places { // of the canvas, and what their distributions are told
    long count, words;
    float cap;
    const float *inverse_temperature;
    const uint8_t *is_banned;
    const int64_t *banned;
    long bans;
};

// What one tile of words says, per position: the largest logit and its word, and of e^(x - largest) the sum and the sum
// weighted with x - largest. [tile of words][lane]; a lane is a position, up to a multiple of 32.
struct Stats {
    float *most, *sums, *dots;
    uint8_t *which;
};

// Logits of 16 positions and the words of a tile, x [WORDS, 32]: softcap, temperature, bans, and what they say.
template <bool is_near>
static inline void read_tile(float *x, long first_word, long here, long lane, const Places &at, const Stats &to) {
    const V temperature = load_some(at.inverse_temperature + lane, at.count - lane);
    V top = splat(-3e38f), best = V{};
    for (long i = 0; i < here; i++) {
        V y = softcapped<is_near>(load(x + 32 * i), at.cap) * temperature;
        best = y > top ? splat((float)i) : best;
        top = bigger(top, y);
        store(x + 32 * i, y);
    }
    bool is_changed = false;
    for (long i = 0; i < at.bans; i++) {
        const long word = at.banned[i] - first_word;
        if (word < 0 || word >= here) continue;
        for (long p = lane; p < std::min(lane + 16, at.count); p++)
            if (at.is_banned[p]) x[32 * word + p - lane] = -1e30f, is_changed = true;
    }
    if (is_changed) {
        top = splat(-3e38f), best = V{};
        for (long i = 0; i < here; i++) {
            V y = load(x + 32 * i);
            best = y > top ? splat((float)i) : best;
            top = bigger(top, y);
        }
    }
    V sum = V{}, dot = V{};
    for (long i = 0; i < here; i++) {
        V y = load(x + 32 * i) - top, e = exponential(y);
        sum += e, dot += y * e;
    }
    store(to.most, top), store(to.sums, sum), store(to.dots, dot);
    for (int i = 0; i < 16; i++) to.which[i] = (uint8_t)best[i];
}

// From [word, position] to [position, word], a cache line at a time.
template <class T> static inline void turn_tile(const float *x, long here, long positions, long words, T *to) {
    for (long i = 0; i < here; i += 32) {
        VU in[2][16];
        for (int j = 0; j < 32; j++) {
            in[j / 16][j % 16] = VU{};
            if (i + j < here) memcpy(&in[j / 16][j % 16], x + (i + j) * 32, 64);
        }
        transpose(in[0], in[0]);
        transpose(in[1], in[1]);
        for (long j = 0; j < positions; j++) {
#if defined(__AVX512BF16__)
            if constexpr (std::is_same_v<T, bf16>)
                if (here - i >= 32 && (uintptr_t)(to + j * words + i) % 64 == 0) {
                    _mm512_stream_si512((__m512i *)(to + j * words + i),
                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)in[1][j], (__m512)in[0][j]));
                    continue;
                }
#endif
            store_some(to + j * words + i, (V)in[0][j], here - i);
            store_some(to + j * words + i + 16, (V)in[1][j], here - i - 16);
        }
    }
}

// The word of a tile at which the stored logits' cumulative distribution passes this share of it.
template <class T> static long word_at(const T *logits, long here, float most, double share) {
    float value[WORDS];
    double all = 0, passed = 0;
    for (long i = 0; i < here; i += 16) store(value + i, exponential(load_some(logits + i, here - i) - most));
    for (long i = 0; i < here; i++) all += value[i];
    long last = 0;
    for (long i = 0; i < here; i++) {
        if (value[i] > 0) last = i;
        passed += value[i];
        if (passed > share * all) return i;
    }
    return last;
}

// What the tiles say together, for 16 positions from `lane` on. `sums` become the tiles' shares of the distribution.
template <class T>
static void gather(const T *logits, long lane, long lanes, const Places &at, const Stats &said, const float *uniform,
                   float *fades, int64_t *sample, int64_t *argmax, float *entropy, float *peak) {
    const long tiles = tiles_of(at.words, WORDS);
    V top_v = load(said.most + lane), best_v = V{};
    for (long w = 1; w < tiles; w++) {
        V most = load(said.most + w * lanes + lane);
        best_v = most > top_v ? splat((float)w) : best_v;
        top_v = bigger(top_v, most);
    }
    for (long w = 0; w < tiles; w++) {
        V most = load(said.most + w * lanes + lane) - top_v;
        V fade = exponential(most), sum = load(said.sums + w * lanes + lane) * fade;
        store(said.dots + w * lanes + lane,
              load(said.dots + w * lanes + lane) * fade + bigger(most, splat(-1e4f)) * sum);
        store(fades + 16 * w, sum);
    }
    for (long i = 0; i < std::min(16L, at.count - lane); i++) {
        const long p = lane + i, best = (long)best_v[i];
        double sum = 0, dot = 0;
        for (long w = 0; w < tiles; w++) sum += fades[16 * w + i], dot += said.dots[w * lanes + p];
        sample[p] = argmax[p] = best * WORDS + said.which[best * lanes + p];
        entropy[p] = (float)(std::log(sum) - dot / sum);
        peak[p] = top_v[i];
        if (uniform) {
            const double target = uniform[p] * sum;
            double before = 0;
            long w = 0; // the tile in which the cumulative distribution passes the target
            while (w + 1 < tiles && before + fades[16 * w + i] <= target) before += fades[16 * w++ + i];
            const double share = fades[16 * w + i] > 0 ? (target - before) / fades[16 * w + i] : 0;
            const long here = std::min(WORDS, at.words - w * WORDS);
            sample[p] = w * WORDS + word_at(logits + p * at.words + w * WORDS, here, said.most[w * lanes + p], share);
        }
        for (long w = 0; w < tiles; w++) said.sums[w * lanes + p] = (float)(fades[16 * w + i] / sum);
    }
}

// Words lie along the rows of a product's tiles and positions along its lanes, so that what is gathered over words
// needs no sums across lanes. `mass` [tiles of words, lanes] is each tile's share of a position's distribution.
template <class T>
static void read_out(const T *hidden, long n, const T *embed, const Places &at, const float *uniform, T *logits,
                     float *mass, int64_t *sample, int64_t *argmax, float *entropy, float *peak, int threads) {
    const long kc = tiles_of(n, Kind<T>::K), places = tiles_of(at.count, 32), word_tiles = tiles_of(at.words, WORDS);
    const long lanes = 32 * places, all = word_tiles * lanes;
    char *b = shared.get(places * kc * 2 * TILE + all * 9);
    float *most = (float *)(b + places * kc * 2 * TILE), *dots = most + all;
    uint8_t *which = (uint8_t *)(dots + all);
    const long chunk = std::clamp(word_tiles * tiles_of(places, PLACES) / (8 * threads), 1L, 4L);
    together(threads, [&](Team &team) {
        Tiles tiles;
        team.shares(places, [&](long p) {
            const T *columns[32];
            for (int i = 0; i < 32; i++) columns[i] = 32 * p + i < at.count ? hidden + (32 * p + i) * n : nullptr;
            for (long k = 0; k < kc; k++)
                for (int half = 0; half < 2; half++)
                    tile_columns<T>(columns + 16 * half, k * Kind<T>::K, n, b + ((p * kc + k) * 2 + half) * TILE);
        });
        team.meet();
        const long held = std::min(places, PLACES);
        own.release(2 << 20); // what attention took: from here on there are logits
        char *a = own.get(WORDS / 16 * PART * TILE + WORDS * 32 * held * 4);
        float *x = (float *)(a + WORDS / 16 * PART * TILE); // [held, WORDS, 32]
        const long pieces = tiles_of(places, PLACES);
        team.each(word_tiles * pieces, chunk, [&](long unit) {
            const long w = unit / pieces, p0 = unit % pieces * PLACES;
            const long first = w * WORDS, here = std::min(WORDS, at.words - first), rows = tiles_of(here, 16);
            const long some = std::min(PLACES, places - p0);
            for (long k = 0; k < kc; k += PART) {
                const long deep = std::min(PART, kc - k), begins = k * Kind<T>::K;
                for (long r = 0; r < up(rows, 2); r++) {
                    const T *pointers[16];
                    for (long i = 0; i < 16; i++)
                        pointers[i] = 16 * r + i < here ? embed + (first + 16 * r + i) * n + begins : nullptr;
                    tile_rows<T>(pointers, 16, std::min(n - begins, deep * Kind<T>::K), a + r * PART * TILE);
                }
                // What is read next comes in between the products: as many of its rows with each as there are.
                const bool is_last = k + PART >= kc;
                const long next_row = is_last ? first + WORDS : first,
                           share = tiles_of(WORDS, tiles_of(rows, 2) * some);
                const T *next = embed + next_row * n + (is_last ? 0 : begins + deep * Kind<T>::K);
                long fetched = is_last && p0 + PLACES < places ? WORDS : 0;
                for (long r = 0; r < rows; r += 2)
                    for (long p = 0; p < some; p++) {
                        for (const long until = fetched + share; fetched < until && fetched < WORDS; fetched++)
                            if (next_row + fetched < at.words) fetch(next + fetched * n, PART * 64);
                        product<T>(32, a + r * PART * TILE, a + (r + 1) * PART * TILE,
                                   b + ((p0 + p) * kc + k) * 2 * TILE, deep, x + (p * WORDS + 16 * r) * 32, 32, k > 0);
                    }
            }
            for (long p = 0; p < some; p++) {
                for (long half = 0; half < 32; half += 16) {
                    const long lane = 32 * (p0 + p) + half, to = w * lanes + lane;
                    float *xl = x + p * WORDS * 32 + half;
                    read_tile<std::is_same_v<T, float>>(xl, first, here, lane, at,
                                                        {most + to, mass + to, dots + to, which + to});
                    turn_tile(xl, here, std::min(16L, at.count - lane), at.words, logits + lane * at.words + first);
                }
            }
        });
        team.meet();
        float *fades = (float *)own.get(word_tiles * 16 * 4);
        team.shares(tiles_of(at.count, 16), [&](long i) {
            gather(logits, 16 * i, lanes, at, {most, mass, dots, which}, uniform, fades, sample, argmax, entropy, peak);
        });
    });
}

// ---- soft embedding -------------------------------------------------------------------------------------------------

// e^(logit - largest) of a position and the words of a tile, as a row of a product's left side.
template <class T> static inline V exponentials(const T *logits, long here, float peak, char *row) {
    constexpr long K = Kind<T>::K;
    V sum = V{};
    for (long j = 0; j < WORDS; j += 16) {
        V e = j < here ? rounded(exponential(load_some(logits + j, here - j) - peak), T()) : V{};
        if (here - j < 16) { // what does not exist has no probability
            const V ramp = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            e = ramp < splat((float)(here - j)) ? e : V{};
        }
        sum += e;
        store((T *)(row + j / K * TILE) + j % K, e);
    }
    return sum;
}

// softmax(logits) @ E x scale, for `batch` rows of `length` positions. `mass` (or null) is the read-out's; tiles of
// words whose mass is below `least` at every position of a block of 32 of a row are left out of its sum; tiles that no
// block needs are not read. Several tiles of words are multiplied at a time: their exponentials for all positions, then
// E by groups of panels, each packed by its thread.
template <class T>
static void soft_embedding(const T *logits, long batch, long length, long words, const T *embed, long n,
                           const float *peak, const float *mass, float least, float scale, T *y, int threads) {
    constexpr long K = Kind<T>::K, PER = WORDS / K, RUN = 1, GROUP = 8; // tiles of words at a time; panels of E
    const long positions = batch * length, lanes = up(positions, 32), each = tiles_of(length, 32),
               places = batch * each;
    const long word_tiles = tiles_of(words, WORDS);
    const long panels = tiles_of(n, 32), groups = tiles_of(panels, GROUP), deep = RUN * PER;
    std::vector<uint8_t> needs(word_tiles * places, mass ? 0 : 1);
    std::vector<long> list;
    for (long w = 0; w < word_tiles; w++) {
        bool is_needed = !mass;
        for (long p = 0; mass && p < places; p++) {
            const long begins = p / each * length + p % each * 32,
                       ends = std::min(begins + 32, (p / each + 1) * length);
            const float *m = mass + w * lanes;
            is_needed |= needs[w * places + p] = *std::max_element(m + begins, m + ends) >= least;
        }
        if (is_needed) list.push_back(w);
    }
    const long runs = tiles_of((long)list.size(), RUN), a_bytes = places * 2 * deep * TILE;
    char *a =
        shared.get(2 * a_bytes + places * 32 * (64 + panels * 32 * 4)); // two runs of [place][2][RUN x PER][1 KiB]
    V *sums = (V *)(a + 2 * a_bytes);                                   // [places x 32], 16 lanes each
    float *out = (float *)(sums + places * 32);                         // [panel][place][32, 32]
    memset((void *)sums, 0, places * 32 * (64 + panels * 32 * 4));
    together(threads, [&](Team &team) {
        Tiles tiles;
        char *b = own.get(GROUP * deep * 2 * TILE); // [panel][RUN x PER][2][1 KiB]
        const long from = groups * team.me / team.size, to = groups * (team.me + 1) / team.size;
        const long all_lanes = 32 * places;
        for (long number = 0; number < runs; number++) {
            const long first = number * RUN, run = std::min(RUN, (long)list.size() - first);
            char *now = a + number % 2 * a_bytes;
            for (long lane = all_lanes * team.me / team.size; lane < all_lanes * (team.me + 1) / team.size; lane++) {
                const long in_row = lane / 32 % each * 32 + lane % 32, p = lane / 32 / each * length + in_row;
                const bool is_there = in_row < length;
                for (long i = 0; i < run; i++) {
                    const long w = list[first + i];
                    if (is_there && first + i + RUN < (long)list.size())
                        fetch(logits + p * words + list[first + i + RUN] * WORDS, WORDS * sizeof(T));
                    if (!needs[w * places + lane / 32]) continue;
                    const long here = is_there ? std::min(WORDS, words - w * WORDS) : 0;
                    char *row = now + ((lane / 16 * RUN + i) * PER * 16 + lane % 16) * 64;
                    sums[lane] += exponentials(logits + p * words + w * WORDS, here, is_there ? peak[p] : 0, row);
                }
            }
            team.barrier(); // all see them; nobody is more than a run ahead
            for (long g = from; g < to; g++) {
                const long panel = g * GROUP, some = std::min(GROUP, panels - panel);
                for (long j = 0; j < run * PER; j++) { // E is read as it lies
                    const long word = list[first + j / PER] * WORDS + j % PER * K;
                    const T *rows[K];
                    for (long r = 0; r < K; r++) rows[r] = word + r < words ? embed + (word + r) * n : nullptr;
                    for (long d = 0; d < some; d++)
                        tile_pair<T>(rows, (panel + d) * 32, n, b + (d * deep + j) * 2 * TILE);
                }
                // Meanwhile what this thread packs next is fetched, some rows with each product.
                const long then = g + 1 < to ? first : first + RUN,
                           column = (g + 1 < to ? panel + GROUP : from * GROUP) * 32;
                const long next = std::min(RUN, (long)list.size() - then) * WORDS,
                           share = tiles_of(RUN * WORDS, some * places);
                long fetched = 0;
                for (long d = 0; d < some; d++)
                    for (long p = 0; p < places; p++) {
                        for (const long until = fetched + share; fetched < std::min(until, next); fetched++) {
                            const long word = list[then + fetched / WORDS] * WORDS + fetched % WORDS;
                            if (word < words) fetch(embed + word * n + column, GROUP * 32 * sizeof(T));
                        }
                        const char *a0 = now + p * 2 * deep * TILE, *a1 = a0 + deep * TILE;
                        float *c = out + ((panel + d) * places + p) * 32 * 32;
                        long i = 0;
                        while (i < run) { // neighbours that are needed, in one product
                            long until = i;
                            while (until < run && needs[list[first + until] * places + p]) until++;
                            if (until > i)
                                product<T>(32, a0 + i * PER * TILE, a1 + i * PER * TILE,
                                           b + (d * deep + i * PER) * 2 * TILE, (until - i) * PER, c, 32, true);
                            i = until + (until == i);
                        }
                    }
            }
        }
        team.barrier();
        for (long p = positions * team.me / team.size; p < positions * (team.me + 1) / team.size; p++) {
            const long lane = p / length * each * 32 + p % length;
            const float inverse = 1 / total(sums[lane]);
            for (long d = 0; d < 2 * panels; d++) {
                const float *from = out + ((d / 2 * places + lane / 32) * 32 + lane % 32) * 32 + d % 2 * 16;
                if (16 * d < n) store_some(y + p * n + 16 * d, rounded(load(from) * inverse, T()) * scale, n - 16 * d);
            }
        }
    });
}

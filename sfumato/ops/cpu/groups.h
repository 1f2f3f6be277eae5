// Weights in 4 or 8 bits, read as they lie in a file: [output][byte]. 16 outputs at a time become bfloat16 tiles of what
// their codes stand for before any scale, which bfloat16 holds exactly (but for the quantiles of nf4 and bitsandbytes'
// fp4, which it rounds). A product of a group of 32, 64 or 128 inputs is made in float32 and meets its scale there; a
// bias is a multiple of the sum of the group's inputs. Groups of 16, narrower than a tile, meet scale and bias before
// the product and are rounded to bfloat16 there. A factor of each output comes last. What differs between kinds of codes
// is how a word of them becomes pairs (`Halves`, `Bytes`, `Floats`), and how scales are stored (`scales_at`).
#pragma once

#include "packing.h"

typedef uint8_t VB __attribute__((vector_size(16)));

static inline V from_e4m3(VU code) { // of bytes in words
    const VU size = code & 0x7f;
    const V value = (V)(size << 20) * 0x1p120f; // right for subnormal numbers too
    return (V)((VU)(size == 0x7f ? splat(NAN) : value) | (code & 0x80) << 24);
}

// As they are stored: 0 float32, 1 bfloat16, 2 float16, 3 e4m3, 4 exponents of two.
static inline V scales_at(const char *p, long n, long store) {
    const VU bits = load_bytes(p, std::min(n, 16L) * bytes_stored(store));
    if (store == 0) return (V)bits;
    if (store >= 3) {
        VB byte;
        memcpy(&byte, &bits, 16);
        const VU u = __builtin_convertvector(byte, VU);
        if (store == 3) return from_e4m3(u);
        const VU exponent = u == 0 ? VU{} + (1u << 22) : u << 23; // 2^-127 is a subnormal number
        return u == 255 ? splat(NAN) : (V)exponent;
    }
    VH half;
    memcpy(&half, &bits, 32);
    const VU u = __builtin_convertvector(half, VU);
    if (store == 1) return (V)(u << 16);
    const V size = (V)((u & 0x7fff) << 13) * 0x1p112f; // right for subnormal numbers too
    return (V)((VU)size | (u & 0x8000) << 16);
}

// Groups whose scales `turn_scales` writes: all that a tile reaches into.
static inline long turned_groups(const Weight<Codes> &w) { return w.is_narrow() ? w.kc() * 32 / w.group : w.groups(); }

// Scales and biases of a panel, turned: [group][scale, bias][32].
static void turn_scales(const Weight<Codes> &w, long p, float *out) {
    const long groups = w.groups(), wide = bytes_stored(w.store);
    for (long g = groups; g < turned_groups(w); g++) memset(out + g * 64, 0, 256);
    for (int which = 0; which < (w.bias ? 2 : 1); which++)
        for (int half = 0; half < 2; half++)
            for (long g = 0; g < groups; g += 16) {
                VU x[16];
                for (int i = 0; i < 16; i++) {
                    const long output = std::min(32 * p + 16 * half + i, w.outputs - 1) / w.spread;
                    const char *from = which ? w.bias : w.scale;
                    x[i] = (VU)scales_at(from + (output * groups + g) * wide, groups - g, w.store);
                }
                transpose(x, x);
                for (long i = 0; i < std::min(16L, groups - g); i++)
                    store(out + (g + i) * 64 + 32 * which + 16 * half, (V)x[i]);
            }
}

static constexpr long LATE = 512; // bytes of a tile of k whose codes are looked up with the product

// 16 bytes of each of 16 rows that lie `apart`, as 4 vectors of words: a word of every row.
static inline void transpose_words(const char *from, long apart, VU out[4]) {
#if defined(__AVX512F__)
    __m512i x[4];
    for (int i = 0; i < 4; i++) { // rows i, i + 4, …: the 4 x 4 words of each quarter are then turned by themselves
        auto at = [&](int row) { return _mm_loadu_si128((const __m128i *)(from + row * apart)); };
        x[i] = _mm512_castsi128_si512(at(i));
        x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00f0, at(i + 4));
        x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0f00, at(i + 8));
        x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xf000, at(i + 12));
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]),
                  c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = (VU)_mm512_unpacklo_epi64(a, c), out[1] = (VU)_mm512_unpackhi_epi64(a, c);
    out[2] = (VU)_mm512_unpacklo_epi64(b, d), out[3] = (VU)_mm512_unpackhi_epi64(b, d);
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) {
            uint32_t word;
            memcpy(&word, from + i * apart + 4 * j, 4);
            out[j][i] = word;
        }
#endif
}

// 16 bytes of each of 16 outputs of a panel from byte `at` of their rows on, as words; see `transpose_words`.
static inline void turn_codes(const Weight<Codes> &w, long output, long at, VU out[4]) {
    const long row = w.row_bytes(), some = std::min(16L, row - at);
    const char *from = w.data + output * row + at;
    if (output + 16 <= w.outputs && some == 16) return transpose_words(from, row, out);
    char rows[16][16] = {}; // outputs that do not exist are the last one's, inputs that do not meet zeros
    for (int i = 0; i < 16; i++) memcpy(rows[i], from + (std::min(output + i, w.outputs - 1) - output) * row, some);
    transpose_words(rows[0], 16, out);
}

// ---- a word of codes of each of 16 outputs, as pairs of bfloat16: the i-th of them, and the one that far behind it ----

struct Halves { // 8 codes of 4 bits, which stand for the values of a table
    static constexpr int PAIRS = 4;
    VS values;
    Halves(const Weight<Codes> &w) { memcpy(&values, w.table, sizeof values); }
    VS operator()(VU word, int i) const { return __builtin_shuffle(values, (VS)(word >> 4 * i)); }
};
struct Bytes { // 4 integers
    static constexpr int PAIRS = 2;
    bool is_signed;
    Bytes(const Weight<Codes> &w) : is_signed(!w.bias) {}
    VS operator()(VU word, int i) const {
        V low, high;
        if (is_signed) {
            low = __builtin_convertvector((VI)(word << (24 - 8 * i)) >> 24, V);
            high = __builtin_convertvector((VI)(word << (8 - 8 * i)) >> 24, V);
        } else {
            low = __builtin_convertvector(word >> 8 * i & 255, V);
            high = __builtin_convertvector(word >> (8 * i + 16) & 255, V);
        }
        return (VS)((VU)low >> 16 | ((VU)high & 0xffff0000u));
    }
};
struct Floats { // 4 in e4m3: the sizes that there are, looked up
    static constexpr int PAIRS = 2;
    VS sizes[4];
    Floats(const Weight<Codes> &) {
        static const struct Table {
            VS sizes[4];
            Table() {
                for (uint32_t code = 0; code < 128; code++)
                    sizes[code / 32][code % 32] = (uint16_t)((VU)from_e4m3(VU{} + code) >> 16)[0];
            }
        } table;
        memcpy(sizes, table.sizes, sizeof sizes);
    }
    VS operator()(VU word, int i) const {
        const VS code = (VS)(word >> 8 * i);
        const VS small = __builtin_shuffle(sizes[0], sizes[1], code), large = __builtin_shuffle(sizes[2], sizes[3], code);
        return ((code & 0x40) == 0 ? small : large) | (code & 0x80) << 8;
    }
};

// A pair of each of 16 outputs times its scale, with its bias, rounded once.
static inline VS scaled_pairs(VS pairs, V scale, V bias) {
    const V low = multiply_add((V)((VU)pairs << 16), scale, bias),
            high = multiply_add((V)((VU)pairs & 0xffff0000u), scale, bias);
#if defined(__AVX512BF16__)
    constexpr VS turn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return __builtin_shuffle((VS)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low), turn);
#else
    auto round = [](V v) { return (VU)v + 0x7fff + ((VU)v >> 16 & 1); };
    return (VS)(round(low) >> 16 | (round(high) & 0xffff0000u));
#endif
}

// The codes of 32 outputs and some tiles of k (at most 4), as B tiles; a word gives the pairs (0, 4), (1, 5), (2, 6) and
// (3, 7) of 8 codes, (0, 2) and (1, 3) of 4, in whose order the rows lie too.
template <class U>
static inline void unpack_with(const U &pairs_of, const Weight<Codes> &w, long p, long k, long some,
                               const float *scales, char *out) {
    constexpr long PARTS = 4 / U::PAIRS; // pieces of 16 bytes of a tile
    for (int half = 0; half < 2; half++)
        for (long part = 0; part < some * PARTS; part++) {
            VU x[4];
            turn_codes(w, 32 * p + 16 * half, (k * PARTS + part) * 16, x);
            char *tile = out + part / PARTS * 2 * TILE + half * TILE + part % PARTS * 512;
            for (int d = 0; d < 4; d++) {
                if (!w.is_narrow()) {
                    for (int i = 0; i < U::PAIRS; i++) {
                        const VS pairs = pairs_of(x[d], i);
                        memcpy(tile + (U::PAIRS * d + i) * 64, &pairs, 64);
                    }
                    continue;
                }
                const long input = k * 32 + part * 32 / PARTS + d * 2 * U::PAIRS;
                const float *by = scales + input / w.group * 64 + 16 * half;
                const V scale = load(by), bias = w.bias ? load(by + 32) : V{};
                for (int i = 0; i < U::PAIRS; i++) {
                    const VS pairs = scaled_pairs(pairs_of(x[d], i), scale, bias);
                    memcpy(tile + (U::PAIRS * d + i) * 64, &pairs, 64);
                }
            }
        }
}

// The same codes as words of 4 bits that are looked up with the product, [k tile][4][half].
static inline void turn_late(const Weight<Codes> &w, long p, long k, long some, char *out) {
    for (int half = 0; half < 2; half++)
        for (long part = 0; part < some; part++) {
            VU x[4];
            turn_codes(w, 32 * p + 16 * half, (k + part) * 16, x);
            for (int d = 0; d < 4; d++) memcpy(out + part * LATE + (2 * d + half) * 64, x + d, 64);
        }
}

static inline void unpack_tiles(const Weight<Codes> &w, long p, long k, long some, bool is_late, const float *scales,
                                char *out) {
    if (is_late) turn_late(w, p, k, some, out);
    else if (w.kind == HALVES) unpack_with(Halves(w), w, p, k, some, scales, out);
    else if (w.kind == BYTES) unpack_with(Bytes(w), w, p, k, some, scales, out);
    else unpack_with(Floats(w), w, p, k, some, scales, out);
}

// c [rows, 32] (+)= the products of some groups, each x its scale; of two row tiles of A, with some tiles of B.
template <int GROUPS>
static inline void scale_groups(long rows, const float *part, const float *by, float *c, bool adds) {
    for (int half = 0; half < 32; half += 16) {
        V scale[GROUPS];
        for (int g = 0; g < GROUPS; g++) scale[g] = load(by + 64 * g + half);
        for (long r = 0; r < rows; r++) {
            float *to = c + 32 * r + half;
            V x = adds ? load(to) : V{};
            for (int g = 0; g < GROUPS; g++) x = multiply_add(load(part + 1024 * g + 32 * r + half), scale[g], x);
            store(to, x);
        }
    }
}

#if DOT_PRODUCTS
// `dots` of codes of 4 bits that are looked up on their way into the product: beside few rows, storing them as tiles
// would take a fifth of the time.
template <int R>
static inline __attribute__((always_inline)) void dots_of_codes(V (&sum)[R][2], const char *a, const char *b, long kc,
                                                                VS values, const char *ahead, long each) {
    for (long k = 0; k < kc; k++, a += TILE, b += LATE) {
        for (const char *until = ahead + each; ahead < until; ahead += 64) __builtin_prefetch(ahead, 0, 2);
        for (int d = 0; d < 4; d++) {
            VU one, two;
            memcpy(&one, b + 128 * d, 64), memcpy(&two, b + 128 * d + 64, 64);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512bh w[2] = {(__m512bh)__builtin_shuffle(values, (VS)(one >> 4 * i)),
                                       (__m512bh)__builtin_shuffle(values, (VS)(two >> 4 * i))};
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    int32_t word;
                    memcpy(&word, a + 64 * r + 16 * d + 4 * i, 4);
                    const __m512bh x = (__m512bh)_mm512_set1_epi32(word);
                    sum[r][0] = (V)_mm512_dpbf16_ps((__m512)sum[r][0], x, w[0]);
                    sum[r][1] = (V)_mm512_dpbf16_ps((__m512)sum[r][1], x, w[1]);
                }
            }
        }
    }
}

// `scale_groups` where a group's product need not leave the registers before it meets its scale. `values`: of codes
// that are late, or null.
template <int R>
static void dot_groups(const char *a, const char *b, const VS *values, long some, long wide, const float *by, float *c,
                       bool adds, const char *ahead, long each) {
    for (; some > 0; some -= wide, a += wide * TILE, by += 64, ahead += wide * each, adds = true) {
        const long deep = std::min(wide, some);
        V sum[R][2] = {};
        if (values) dots_of_codes<R>(sum, a, b, deep, *values, ahead, each);
        else dots<bf16, R, 2>(sum, a, b, deep, ahead, each);
        b += wide * (values ? LATE : 2 * TILE);
        const V one = load(by), two = load(by + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            float *to = c + 32 * r;
            store(to, multiply_add(sum[r][0], one, adds ? load(to) : V{}));
            store(to + 16, multiply_add(sum[r][1], two, adds ? load(to + 16) : V{}));
        }
    }
}
#endif

// Of some tiles of k, `wide` of them a group; the last group may be shorter.
static inline void groups_product(long rows, const char *a0, const char *a1, const char *b, const VS *values, long some,
                                  long wide, const float *by, float *part, float *c, bool adds, const char *ahead,
                                  long each) {
#if DOT_PRODUCTS
    if (way == DOTS) {
        by_rows(rows, [&](auto count, long first) {
            dot_groups<count.value>(row_of(a0, a1, first), b, values, some, wide, by, c + 32 * first, adds, ahead,
                                    first ? 0 : each);
        });
        return;
    }
#endif
    const long count = tiles_of(some, wide);
    for (long g = 0; g < count; g++)
        product<bf16>(rows, a0 + g * wide * TILE, a1 + g * wide * TILE, b + g * wide * 2 * TILE,
                      std::min(wide, some - g * wide), part + g * 1024, 32, false, ahead + g * wide * each, each);
    if (count == 1) scale_groups<1>(rows, part, by, c, adds);
    else if (count == 2) scale_groups<2>(rows, part, by, c, adds);
    else if (count == 3) scale_groups<3>(rows, part, by, c, adds);
    else scale_groups<4>(rows, part, by, c, adds);
}

// c [rows, 32] += the biases of some groups x the rows' sums.
static inline void add_biases(long rows, long count, const float *by, const float *sums, long side, float *c) {
    for (long r = 0; r < rows; r++) {
        const float *sum = sums + r / 16 * side + r % 16;
        V one = load(c + 32 * r), two = load(c + 32 * r + 16);
        for (long g = 0; g < count; g++) {
            const V s = splat(sum[16 * g]);
            one = multiply_add(load(by + 64 * g + 32), s, one), two = multiply_add(load(by + 64 * g + 48), s, two);
        }
        store(c + 32 * r, one), store(c + 32 * r + 16, two);
    }
}

// c [rows, 32] x the factor of each output.
static inline void multiply_factors(const Weight<Codes> &w, long p, long rows, float *c) {
    const V one = load_some(w.factor + 32 * p, w.outputs - 32 * p),
            two = load_some(w.factor + 32 * p + 16, w.outputs - 32 * p - 16);
    for (long r = 0; r < rows; r++) {
        store(c + 32 * r, load(c + 32 * r) * one);
        store(c + 32 * r + 16, load(c + 32 * r + 16) * two);
    }
}

static thread_local Scratch turned;

template <>
inline void panel_product<Codes>(long rows, const char *a, const float *sums, const Panel<Codes> *panels,
                                 int count_of_panels, float *c) {
    for (int i = 0; i < count_of_panels; i++, c += up(rows, 16) * 32) {
        const Weight<Codes> &w = *panels[i].w;
        const bool is_whole = !w.group || w.is_narrow(); // nothing is left to do between one tile of k and the next
        const long p = panels[i].p, kc = w.kc(), side = w.side(), CHUNK = 4, wide = is_whole ? CHUNK : w.group / 32;
        float *scales = (float *)turned.get(turned_groups(w) * 256 + CHUNK * 4096 + CHUNK * 2 * TILE);
        float *part = scales + turned_groups(w) * 64;
        char *b = (char *)(part + CHUNK * 1024);
        turn_scales(w, p, scales);
        const bool is_late = way == DOTS && w.kind == HALVES && !is_whole;
        VS values = {};
        if (is_late) values = Halves(w).values;
        // Of the panel that comes next, as much as there is of this one.
        const Ahead next = i + 1 < count_of_panels ? panels[i + 1].w->ahead(panels[i + 1].p) : panels[0].next;
        const long each = next.data ? up(tiles_of(32 * w.row_bytes(), kc), 64) : 0, // with a tile of k
            scale_each = up(tiles_of(tiles_of(32, w.spread) * w.scale_bytes(), tiles_of(kc, CHUNK)), 64);
        for (long k = 0; k < kc; k += CHUNK) {
            if (next.scale) fetch(next.scale + k / CHUNK * scale_each, scale_each);
            if (next.bias) fetch(next.bias + k / CHUNK * scale_each, scale_each);
            const long some = std::min(CHUNK, kc - k);
            unpack_tiles(w, p, k, some, is_late, scales, b);
            for (long t = 0; 16 * t < rows; t += 2) {
                const long some_rows = std::min(32L, rows - 16 * t);
                const char *at = a + (t * kc + k) * TILE;
                float *to = c + t * 512;
                const char *ahead = next.data + k * each;
                const long here = t ? 0 : each;
                if (is_whole) {
                    product<bf16>(some_rows, at, at + kc * TILE, b, some, to, 32, k > 0, ahead, here);
                    continue;
                }
                const float *by = scales + k / wide * 64;
                groups_product(some_rows, at, at + kc * TILE, b, is_late ? &values : nullptr, some, wide, by, part, to,
                               k > 0, ahead, here);
                if (w.bias) add_biases(some_rows, tiles_of(some, wide), by, sums + t * side + k / wide * 16, side, to);
            }
        }
        if (w.factor) multiply_factors(w, p, rows, c);
    }
}

// Weights in 4 or 8 bits with a scale for each group of 32, 64 or 128 inputs, read as they lie in a file:
// [output][byte], a low half byte before its high one. 16 outputs x 128 inputs at a time become bfloat16 tiles (a code
// is an integer that bfloat16 holds exactly), a group's product is made in float32 and meets its scale there. A bias is
// a multiple of the sum of the group's inputs. Groups of 16, narrower than a tile, meet their scale before the product,
// and are rounded to bfloat16 there.
#pragma once

#include "packing.h"

static inline V scales_at(const char *p, long n, long store) { // as they are stored: see Operand
    const VU bits = load_bytes(p, std::min(n, 16L) * (store ? 2 : 4));
    if (!store) return (V)bits;
    VH half;
    memcpy(&half, &bits, 32);
    const VU u = __builtin_convertvector(half, VU);
    if (store == 1) return (V)(u << 16);
    const V size = (V)((u & 0x7fff) << 13) * 0x1p112f; // right for subnormal numbers too
    return (V)((VU)size | (u & 0x8000) << 16);
}

// Scales and biases of a panel, turned: [group][scale, bias][32].
static void turn_scales(const Weight<Codes> &w, long p, float *out) {
    const long groups = w.groups(), wide = w.store ? 2 : 4;
    for (int which = 0; which < (w.bias ? 2 : 1); which++)
        for (int half = 0; half < 2; half++)
            for (long g = 0; g < groups; g += 16) {
                VU x[16];
                for (int i = 0; i < 16; i++) {
                    const long output = std::min(32 * p + 16 * half + i, w.outputs - 1);
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

// What codes of 4 bits stand for in bfloat16, twice, so that the bit above them may be anything.
static inline VS code_values(const Weight<Codes> &w) {
    constexpr VS plain = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
                          0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                          0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    constexpr VS less_8 = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000,
                           0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                           0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    return w.bias ? plain : less_8;
}

// 16 bytes of each of 16 outputs of a panel from byte `at` of their rows on, as words; see `transpose_words`.
static inline void turn_codes(const Weight<Codes> &w, long output, long at, VU out[4]) {
    const long row = w.row_bytes();
    const char *from = w.data + output * row + at;
    if (output + 16 <= w.outputs) return transpose_words(from, row, out);
    char rows[16][16]; // outputs that do not exist are the last one's
    for (int i = 0; i < 16; i++) memcpy(rows[i], from + (std::min(output + i, w.outputs - 1) - output) * row, 16);
    transpose_words(rows[0], 16, out);
}

// The codes of 32 outputs and some tiles of k (at most 4), as B tiles; where `is_late`, 4 bits as words that are looked
// up with the product, [k tile][4][half]. A word of 8 codes gives the pairs (0, 4), (1, 5), (2, 6) and (3, 7), in whose
// order the rows lie too.
static inline void unpack_tiles(const Weight<Codes> &w, long p, long k, long some, bool is_late, const float *scales,
                                char *out) {
    const VS values = code_values(w);
    for (int half = 0; half < 2; half++)
        for (long part = 0; part < some * w.bits / 4; part++) { // 16 bytes of a row
            VU x[4];
            turn_codes(w, 32 * p + 16 * half, k * 4 * w.bits + 16 * part, x);
            if (is_late) {
                for (int d = 0; d < 4; d++) memcpy(out + part * LATE + (2 * d + half) * 64, x + d, 64);
                continue;
            }
            if (w.bits == 4) {
                char *tile = out + part * 2 * TILE + half * TILE;
                for (int d = 0; d < 4; d++)
                    for (int i = 0; i < 4; i++) {
                        const VS word = __builtin_shuffle(values, (VS)(x[d] >> 4 * i));
                        memcpy(tile + (4 * d + i) * 64, &word, 64);
                    }
                continue;
            }
            char *tile = out + part / 2 * 2 * TILE + half * TILE + part % 2 * 512;
            for (int d = 0; d < 4; d++)
                for (int b = 0; b < 4; b += 2) {
                    V low, high;
                    if (w.bias) {
                        low = __builtin_convertvector(x[d] >> (8 * b) & 255, V);
                        high = __builtin_convertvector(x[d] >> (8 * b + 8) & 255, V);
                    } else {
                        low = __builtin_convertvector((VI)(x[d] << (24 - 8 * b)) >> 24, V);
                        high = __builtin_convertvector((VI)(x[d] << (16 - 8 * b)) >> 24, V);
                    }
                    if (w.is_narrow()) {
                        const float *by = scales + (k * 32 + 16 * part + 4 * d) / w.group * 64 + 16 * half;
                        const V offset = w.bias ? load(by + 32) : V{};
                        low = rounded(low * load(by) + offset, bf16());
                        high = rounded(high * load(by) + offset, bf16());
                    }
                    const VU word = (VU)low >> 16 | ((VU)high & 0xffff0000u);
                    memcpy(tile + 128 * d + 32 * b, &word, 64);
                }
        }
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
            for (int g = 0; g < GROUPS; g++) x += load(part + 1024 * g + 32 * r + half) * scale[g];
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
static void dot_groups(const char *a, const char *b, const VS *values, long count, long wide, const float *by, float *c,
                       bool adds, const char *ahead, long each) {
    for (; count > 0; count--, a += wide * TILE, by += 64, ahead += wide * each, adds = true) {
        V sum[R][2] = {};
        if (values) dots_of_codes<R>(sum, a, b, wide, *values, ahead, each);
        else dots<bf16, R, 2>(sum, a, b, wide, ahead, each);
        b += wide * (values ? LATE : 2 * TILE);
        const V one = load(by), two = load(by + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            float *to = c + 32 * r;
            store(to, (adds ? load(to) : V{}) + sum[r][0] * one);
            store(to + 16, (adds ? load(to + 16) : V{}) + sum[r][1] * two);
        }
    }
}
#endif

static inline void groups_product(long rows, const char *a0, const char *a1, const char *b, const VS *values,
                                  long count, long wide, const float *by, float *part, float *c, bool adds,
                                  const char *ahead, long each) {
#if DOT_PRODUCTS
    if (way == DOTS) {
        by_rows(rows, [&](auto some, long first) {
            dot_groups<some.value>(row_of(a0, a1, first), b, values, count, wide, by, c + 32 * first, adds, ahead,
                                   first ? 0 : each);
        });
        return;
    }
#endif
    for (long g = 0; g < count; g++)
        product<bf16>(rows, a0 + g * wide * TILE, a1 + g * wide * TILE, b + g * wide * 2 * TILE, wide, part + g * 1024,
                      32, false, ahead + g * wide * each, each);
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
        for (long g = 0; g < count; g++)
            one += load(by + 64 * g + 32) * sum[16 * g], two += load(by + 64 * g + 48) * sum[16 * g];
        store(c + 32 * r, one), store(c + 32 * r + 16, two);
    }
}

static thread_local Scratch turned;

template <>
inline void panel_product<Codes>(long rows, const char *a, const float *sums, const Panel<Codes> *panels,
                                 int count_of_panels, float *c) {
    for (int i = 0; i < count_of_panels; i++, c += up(rows, 16) * 32) {
        const Weight<Codes> &w = *panels[i].w;
        const long p = panels[i].p, kc = w.kc(), side = w.side(), CHUNK = 4,
                   wide = w.is_narrow() ? CHUNK : w.group / 32;
        float *scales = (float *)turned.get(w.groups() * 256 + CHUNK * 4096 + CHUNK * 2 * TILE);
        float *part = scales + w.groups() * 64;
        char *b = (char *)(part + CHUNK * 1024);
        turn_scales(w, p, scales);
        const bool is_late = way == DOTS && w.bits == 4;
        const VS values = code_values(w);
        // Of the panel that comes next, as much as there is of this one.
        const Ahead next = i + 1 < count_of_panels ? panels[i + 1].w->ahead(panels[i + 1].p) : panels[0].next;
        const long each = next.data ? up(tiles_of(32 * w.row_bytes(), kc), 64) : 0, // with a tile of k
            scale_each = up(tiles_of(32 * w.scale_bytes(), tiles_of(kc, CHUNK)), 64);
        for (long k = 0; k < kc; k += CHUNK) {
            if (next.scale) fetch(next.scale + k / CHUNK * scale_each, scale_each);
            if (next.bias) fetch(next.bias + k / CHUNK * scale_each, scale_each);
            const long some = std::min(CHUNK, kc - k), count = w.is_narrow() ? 1 : some / wide;
            unpack_tiles(w, p, k, some, is_late, scales, b);
            for (long t = 0; 16 * t < rows; t += 2) {
                const long some_rows = std::min(32L, rows - 16 * t);
                const char *at = a + (t * kc + k) * TILE;
                float *to = c + t * 512;
                const char *ahead = next.data + k * each;
                const long here = t ? 0 : each;
                if (w.is_narrow()) {
                    product<bf16>(some_rows, at, at + kc * TILE, b, some, to, 32, k > 0, ahead, here);
                    continue;
                }
                const float *by = scales + k / wide * 64;
                groups_product(some_rows, at, at + kc * TILE, b, is_late ? &values : nullptr, count, wide, by, part, to,
                               k > 0, ahead, here);
                if (w.bias) add_biases(some_rows, count, by, sums + t * side + k / wide * 16, side, to);
            }
        }
    }
}

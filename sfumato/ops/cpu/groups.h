// Weights in 4 or 8 bits with a scale for each group of 32, 64 or 128 inputs, read as they lie in a file:
// [output][byte], a low half byte before its high one. 16 outputs x 128 inputs at a time become bfloat16 tiles (a code
// is an integer that bfloat16 holds exactly), a group's product is made in float32 and meets its scale there. A bias is
// a multiple of the sum of the group's inputs. Groups of 16, narrower than a tile, meet their scale before the product,
// and are rounded to bfloat16 there.
#pragma once

#include "packing.h"

static inline V scales_at(const char *p, long n, long store) { // as they are stored: see Given
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

// The codes of 32 outputs and some tiles of k (at most 4), as B tiles. 4 bits are looked up: what they stand for in
// bfloat16, twice, so that the bit above them may be anything. A word of 8 codes gives the pairs (0, 4), (1, 5), (2, 6)
// and (3, 7), in whose order the rows lie too.
static inline void unpack_tiles(const Weight<Codes> &w, long p, long k, long some, const float *scales, char *out) {
    const long row = w.row_bytes(), apart = 32 * p + 31 < w.outputs ? row : 0;
    constexpr VS plain = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
                          0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                          0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    constexpr VS less_8 = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000,
                           0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                           0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const VS values = w.bias ? plain : less_8;
    for (int half = 0; half < 2; half++)
        for (long part = 0; part < some * w.bits / 4; part++) { // 16 bytes of a row
            const char *from = w.data + (32 * p + 16 * half) * row + k * 4 * w.bits + 16 * part;
            VU x[4];
            if (apart) transpose_words(from, apart, x);
            else { // outputs that do not exist are the last one's
                char rows[16][16];
                for (int i = 0; i < 16; i++)
                    memcpy(rows[i], from + (std::min(32 * p + 16 * half + i, w.outputs - 1) - 32 * p - 16 * half) * row,
                           16);
                transpose_words(rows[0], 16, x);
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
// The same where a group's product need not leave the registers before it meets its scale.
template <int R>
static void dot_groups(const char *a, const char *b, long count, long wide, const float *by, float *c, bool adds,
                       const char *ahead, long each) {
    for (; count > 0; count--, a += wide * TILE, b += wide * 2 * TILE, by += 64, ahead += wide * each, adds = true) {
        V sum[R][2] = {};
        dots<bf16, R, 2>(sum, a, b, wide, ahead, each);
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

static inline void groups_product(long rows, const char *a0, const char *a1, const char *b, long count, long wide,
                                  const float *by, float *part, float *c, bool adds, const char *ahead, long each) {
#if DOT_PRODUCTS
    if (way == DOTS) {
        by_rows(rows, [&](auto some, long first) {
            dot_groups<some.value>(row_of(a0, a1, first), b, count, wide, by, c + 32 * first, adds, ahead,
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
        // Of the panel that comes next, as much as there is of this one.
        const Ahead next = i + 1 < count_of_panels ? panels[i + 1].w->ahead(panels[i + 1].p) : panels[0].next;
        const long each = next.data ? up(tiles_of(32 * w.row_bytes(), kc), 64) : 0, // with a tile of k
            scale_each = up(tiles_of(32 * w.scale_bytes(), tiles_of(kc, CHUNK)), 64);
        for (long k = 0; k < kc; k += CHUNK) {
            if (next.scale) fetch(next.scale + k / CHUNK * scale_each, scale_each);
            if (next.bias) fetch(next.bias + k / CHUNK * scale_each, scale_each);
            const long some = std::min(CHUNK, kc - k), count = w.is_narrow() ? 1 : some / wide;
            unpack_tiles(w, p, k, some, scales, b);
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
                groups_product(some_rows, at, at + kc * TILE, b, count, wide, by, part, to, k > 0, ahead, here);
                if (w.bias) add_biases(some_rows, count, by, sums + t * side + k / wide * 16, side, to);
            }
        }
    }
}

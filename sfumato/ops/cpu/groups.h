// Weights in 4 or 8 bits with a scale for each group of 32, 64 or 128 inputs, read as they lie in a file:
// [output][byte], a low half byte before its high one. 16 outputs x 128 inputs at a time become bfloat16 tiles (a code
// is an integer that bfloat16 holds exactly), a group's product is made in float32 and meets its scale there. A bias,
// and what codes are off by, is a multiple of the sum of the group's inputs. Groups of 16, narrower than a tile, meet
// their scale before the product, and are rounded to bfloat16 there.
#pragma once

#include "packing.h"

// Up to 64 bytes, zeros behind them.
static inline VU load_bytes(const char *p, long n) {
    if (n >= 64) {
        VU all;
        memcpy(&all, p, 64);
        return all;
    }
#if defined(__AVX512BW__)
    return (VU)_mm512_maskz_loadu_epi8((1ull << std::max(n, 0L)) - 1, p);
#else
    VU some = {};
    if (n > 0) memcpy(&some, p, n);
    return some;
#endif
}

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

// Scales and offsets of a panel, turned: [group][scale, offset][32].
static void turn_scales(const Weight<Codes> &w, long p, float *out) {
    const long groups = w.groups(), wide = w.store ? 2 : 4;
    auto at = [&](const char *from, long output, long g) {
        return scales_at(from + (std::min(output, w.outputs - 1) * groups + g) * wide, groups - g, w.store);
    };
    for (int half = 0; half < 2; half++)
        for (long g = 0; g < groups; g += 16) {
            VU scale[16], bias[16];
            for (int i = 0; i < 16; i++) {
                scale[i] = (VU)at(w.scale, 32 * p + 16 * half + i, g);
                if (w.bias) bias[i] = (VU)at(w.bias, 32 * p + 16 * half + i, g);
            }
            transpose(scale, scale);
            if (w.bias) transpose(bias, bias);
            for (long i = 0; i < std::min(16L, groups - g); i++) {
                const V s = (V)scale[i];
                V offset = w.bias ? (V)bias[i] : w.bits == 4 ? s * -8.0f : V{};
                if (w.bits == 4) offset -= s * 128.0f;
                float *to = out + (g + i) * 64 + 16 * half;
                store(to, s), store(to + 32, offset);
            }
        }
}

// The codes of 32 outputs and some tiles of k (at most 4), as B tiles. A code of 4 bits under the exponent of 128 is
// the number 128 + code.
static inline void unpack_tiles(const Weight<Codes> &w, long p, long k, long some, const float *scales, char *out) {
    const long row = w.row_bytes(), each = w.bits == 4 ? 64 : 128; // bytes of 128 inputs
    for (int half = 0; half < 2; half++) {
        char *to = out + half * TILE;
        const char *first = w.data + k * 4 * w.bits;
        const long left = std::min(each, row - k * 4 * w.bits);
        for (long piece = 0; piece < left; piece += 64) {
            VU x[16];
            for (int i = 0; i < 16; i++) {
                const char *from = first + std::min(32 * p + 16 * half + i, w.outputs - 1) * row + piece;
                x[i] = load_bytes(from, left - piece);
            }
            transpose(x, x);
            if (w.bits == 4) {
                for (long d = 0; d < std::min(16L, 4 * some); d++) { // a word: 8 codes of an output, in pairs
                    char *tile = to + d / 4 * 2 * TILE + d % 4 * 256;
                    const VU y = x[d];
                    const VU pairs[4] = {(y & 15) | (y << 12 & 0xf0000), (y >> 8 & 15) | (y << 4 & 0xf0000),
                                         (y >> 16 & 15) | (y >> 4 & 0xf0000), (y >> 24 & 15) | (y >> 12 & 0xf0000)};
                    for (int b = 0; b < 4; b++) {
                        const VU word = pairs[b] | 0x43004300;
                        memcpy(tile + 64 * b, &word, 64);
                    }
                }
            } else {
                for (long d = 0; d < std::min(16L, 8 * some - piece / 4); d++) { // a word: 4 codes
                    const long place = piece / 4 + d;
                    char *tile = to + place / 8 * 2 * TILE + place % 8 * 128;
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
                            const float *by = scales + (k * 32 + 4 * place) / w.group * 64 + 16 * half;
                            low = rounded(low * load(by) + load(by + 32), bf16());
                            high = rounded(high * load(by) + load(by + 32), bf16());
                        }
                        const VU word = (VU)low >> 16 | ((VU)high & 0xffff0000u);
                        memcpy(tile + 32 * b, &word, 64);
                    }
                }
            }
        }
    }
}

// c [rows, 32] (+)= the products of some groups [group][32, 32], each x its scale, and its offset x the rows' sums.
template <int GROUPS>
static inline void scale_groups(int pair, const float *part, const float *by, const float *sums, long side, float *c,
                                bool adds) {
    for (int half = 0; half < 32; half += 16) {
        V scale[GROUPS], offset[GROUPS];
        for (int g = 0; g < GROUPS; g++) scale[g] = load(by + 64 * g + half), offset[g] = load(by + 64 * g + 32 + half);
        for (long r = 0; r < 16 * pair; r++) {
            const float *sum = sums + r / 16 * side + r % 16;
            float *to = c + 32 * r + half;
            V x = adds ? load(to) : V{};
            for (int g = 0; g < GROUPS; g++) x += load(part + 1024 * g + 32 * r + half) * scale[g];
            for (int g = 0; g < GROUPS; g++) x += offset[g] * sum[16 * g];
            store(to, x);
        }
    }
}

static thread_local Scratch turned;

template <>
inline void panel_product<Codes>(long row_tiles, const char *a, const float *sums, const Panel<Codes> *panels,
                                 int count, float *c) {
    for (int i = 0; i < count; i++, c += row_tiles * 16 * 32) {
        const Weight<Codes> &w = *panels[i].w;
        const long p = panels[i].p, kc = w.kc(), side = w.side(), CHUNK = 4,
                   wide = w.is_narrow() ? CHUNK : w.group / 32;
        float *scales = (float *)turned.get(w.groups() * 256 + CHUNK * 4096 + CHUNK * 2 * TILE);
        float *part = scales + w.groups() * 64;
        char *b = (char *)(part + CHUNK * 1024);
        turn_scales(w, p, scales);
        const long each = up(tiles_of(32 * w.row_bytes(), tiles_of(kc, CHUNK)), 64);
        for (long k = 0; k < kc; k += CHUNK) {
            if (panels[i].next) fetch(panels[i].next + k / CHUNK * each, each);
            const long some = std::min(CHUNK, kc - k), count = w.is_narrow() ? 1 : some / wide;
            unpack_tiles(w, p, k, some, scales, b);
            for (long t = 0; t < row_tiles; t += 2) {
                const int pair = t + 1 < row_tiles ? 2 : 1;
                const char *at = a + (t * kc + k) * TILE;
                float *to = c + t * 512;
                if (w.is_narrow()) {
                    product<bf16>(pair, at, at + kc * TILE, b, some, to, 32, k > 0);
                    continue;
                }
                for (long g = 0; g < count; g++)
                    product<bf16>(pair, at + g * wide * TILE, at + (kc + g * wide) * TILE, b + g * wide * 2 * TILE,
                                  wide, part + g * 1024, 32);
                const float *by = scales + k / wide * 64, *sum = sums + t * side + k / wide * 16;
                if (count == 1) scale_groups<1>(pair, part, by, sum, side, to, k > 0);
                else if (count == 2) scale_groups<2>(pair, part, by, sum, side, to, k > 0);
                else if (count == 3) scale_groups<3>(pair, part, by, sum, side, to, k > 0);
                else scale_groups<4>(pair, part, by, sum, side, to, k > 0);
            }
        }
    }
}

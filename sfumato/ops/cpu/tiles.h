// Tiles of 16 rows x 64 bytes: their product, and how rows and columns become tiles.
//
// The product comes in three ways over one layout. AMX: an instruction a pair of tiles. Without it, AVX-512's dot
// products of 2 bfloat16 or 4 int8, for which neighbours along k already lie together in a word. Else plain vector
// code, which runs anywhere. The first two take subnormal numbers in bfloat16 as zeros.
#pragma once

#include "vectors.h"

template <class M> struct Kind; // M: what the elements of a product are
template <> struct Kind<float> {
    static constexpr long K = 16, GROUP = 1; // elements a tile row; neighbours along k that lie together in B
    typedef float Sum, Left;                 // what is added up; what rows on the left side become
};
template <> struct Kind<bf16> {
    static constexpr long K = 32, GROUP = 2;
    typedef float Sum;
    typedef bf16 Left;
};
template <> struct Kind<int8_t> {
    static constexpr long K = 64, GROUP = 4;
    typedef int32_t Sum;
    typedef int8_t Left;
};
struct Codes {}; // in groups: groups.h
template <> struct Kind<Codes> {
    static constexpr long K = 32, GROUP = 2;
    typedef float Sum;
    typedef bf16 Left;
};

enum Way { PLAIN, DOTS, AMX_TILES };
static Way way = PLAIN;

#if defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define DOT_PRODUCTS 1
#else
#define DOT_PRODUCTS 0
#endif

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define AMX 1
struct Tiles { // the tile registers of this thread, for as long as it lives
    Tiles() {
        if (way != AMX_TILES) return;
        alignas(64) static const struct Config {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Tiles() {
        if (way == AMX_TILES) _tile_release();
    }
};
#else
#define AMX 0
struct Tiles {};
#endif

// Rows r, r + 1, … of the two tiles of rows.
static inline const char *row_of(const char *a0, const char *a1, long r) {
    return (r < 16 ? a0 : a1) + r % 16 * 64;
}

template <class M, int HALVES>
static void plain_product(long rows, const char *a0, const char *a1, const char *b, long kc, typename Kind<M>::Sum *c,
                          long ldc, bool adds) {
    typedef typename Kind<M>::Sum S;
    typedef S VS __attribute__((vector_size(64)));
    for (long first = 0; first < rows; first += 8, c += 8 * ldc) {
        const char *a = row_of(a0, a1, first);
        VS sum[8][HALVES];
        for (int r = 0; r < 8; r++)
            for (int n = 0; n < HALVES; n++) {
                if (adds) memcpy(&sum[r][n], c + r * ldc + 16 * n, 64);
                else sum[r][n] = VS{};
            }
        for (long k = 0; k < kc; k++) {
            const M *at = (const M *)(a + k * TILE);
            const M *bt = (const M *)(b + 2 * k * TILE);
            constexpr long G = Kind<M>::GROUP;
            for (int j = 0; j < 16; j++)
                for (int g = 0; g < G; g++) {
                    VS w[HALVES];
                    for (int n = 0; n < HALVES; n++) {
                        const M *row = bt + n * 16 * Kind<M>::K + j * 16 * G + g;
                        if constexpr (std::is_same_v<M, float>) memcpy(&w[n], row, 64);
                        else
                            for (int i = 0; i < 16; i++) {
                                if constexpr (std::is_same_v<M, bf16>) w[n][i] = to_float(row[i * G]);
                                else w[n][i] = row[i * G];
                            }
                    }
                    for (int r = 0; r < 8; r++) {
                        M x = at[r * Kind<M>::K + j * G + g];
                        S value;
                        if constexpr (std::is_same_v<M, bf16>) value = to_float(x);
                        else value = x;
                        for (int n = 0; n < HALVES; n++) sum[r][n] += value * w[n];
                    }
                }
        }
        for (int r = 0; r < 8; r++)
            for (int n = 0; n < HALVES; n++) memcpy(c + r * ldc + 16 * n, &sum[r][n], 64);
    }
}

#if DOT_PRODUCTS
// Sums in the very type of the numbers: cast to another, GCC 12 copies them from register to register.
template <class M> using Sums = std::conditional_t<std::is_same_v<M, bf16>, V, VI>;

// sum [R, HALVES] += A (R rows of a tile) x B, over kc tiles of k. int8 has no product of two signed bytes: B's become
// 128 more, and what comes out is more by 128 x the sum of A's row.
template <class M, int R, int HALVES>
static inline __attribute__((always_inline)) void dots(Sums<M> (&sum)[R][HALVES], const char *a, const char *b, long kc,
                                                       const char *ahead, long each) {
    for (long k = 0; k < kc; k++, a += TILE, b += 2 * TILE) {
        for (const char *until = ahead + each; ahead < until; ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 2
        for (int j = 0; j < 16; j++) {
            __m512i w[HALVES];
#pragma GCC unroll 2
            for (int n = 0; n < HALVES; n++) {
                w[n] = _mm512_loadu_si512(b + n * TILE + 64 * j);
                if constexpr (std::is_same_v<M, int8_t>) w[n] = _mm512_xor_si512(w[n], _mm512_set1_epi8((char)0x80));
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                int32_t word;
                memcpy(&word, a + 64 * r + 4 * j, 4);
                const __m512i x = _mm512_set1_epi32(word);
#pragma GCC unroll 2
                for (int n = 0; n < HALVES; n++) {
                    if constexpr (std::is_same_v<M, bf16>)
                        sum[r][n] = (V)_mm512_dpbf16_ps((__m512)sum[r][n], (__m512bh)x, (__m512bh)w[n]);
                    else sum[r][n] = (VI)_mm512_dpbusd_epi32((__m512i)sum[r][n], w[n], x);
                }
            }
        }
    }
}

// f(as many rows as fit the registers, rounded up to two, and the first of them) for all of some rows, tile by tile.
template <class F> static inline void by_rows(long rows, F f) {
    for (long t = 0; t < rows; t += 16) {
        long first = t, left = std::min(16L, rows - t);
        if (left > 12) f(std::integral_constant<int, 8>(), first), first += 8, left -= 8;
        if (left > 10) f(std::integral_constant<int, 12>(), first);
        else if (left > 8) f(std::integral_constant<int, 10>(), first);
        else if (left > 6) f(std::integral_constant<int, 8>(), first);
        else if (left > 4) f(std::integral_constant<int, 6>(), first);
        else if (left > 2) f(std::integral_constant<int, 4>(), first);
        else f(std::integral_constant<int, 2>(), first);
    }
}

template <class M, int R, int HALVES>
static void dot_rows(const char *a, const char *b, long kc, typename Kind<M>::Sum *c, long ldc, bool adds,
                     const char *ahead, long each) {
    Sums<M> sum[R][HALVES];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < HALVES; n++) {
            if (adds) memcpy(&sum[r][n], c + r * ldc + 16 * n, 64);
            else sum[r][n] = Sums<M>{};
        }
    dots<M, R, HALVES>(sum, a, b, kc, ahead, each);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < HALVES; n++) memcpy(c + r * ldc + 16 * n, &sum[r][n], 64);
}

template <class M, int HALVES>
static void dot_product(long rows, const char *a0, const char *a1, const char *b, long kc, typename Kind<M>::Sum *c,
                        long ldc, bool adds, const char *ahead, long each) {
    const long share = ahead ? up(tiles_of(each * 8, rows), 64) : 0; // of what is ahead, with all rows
    by_rows(rows, [&](auto some, long first) {
        dot_rows<M, some.value, HALVES>(row_of(a0, a1, first), b, kc, c + first * ldc, ldc, adds, ahead, share);
        ahead += kc * share;
    });
}
#endif

#if AMX
#define PRODUCT(op, twice, wide)                                                                            \
    for (long k = 0; k < kc; k++) {                                                                         \
        for (const char *until = ahead + each; ahead < until; ahead += 64) __builtin_prefetch(ahead, 0, 2); \
        _tile_loadd(6, b + 2 * k * TILE, 64);                                                               \
        _tile_loadd(4, a0 + k * TILE, 64);                                                                  \
        op(0, 4, 6);                                                                                        \
        if (wide) {                                                                                         \
            _tile_loadd(7, b + 2 * k * TILE + TILE, 64);                                                    \
            op(1, 4, 7);                                                                                    \
        }                                                                                                   \
        if (twice) {                                                                                        \
            _tile_loadd(5, a1 + k * TILE, 64);                                                              \
            op(2, 5, 6);                                                                                    \
            if (wide) op(3, 5, 7);                                                                          \
        }                                                                                                   \
    }
#endif

// C [rows, 32] (+)= A (rows of two row tiles, at most 32) x B (a panel), over kc tiles of k; of `columns` up to 16 the
// first half alone. More rows of C may be written, up to the next tile. `each` bytes from `ahead` on are fetched into
// the cache with every tile of k: what comes next arrives while this is computed. Of int8 see `dots`.
template <class M>
static inline void product(long rows, const char *a0, const char *a1, const char *b, long kc, typename Kind<M>::Sum *c,
                           long ldc, bool adds = false, const char *ahead = nullptr, long each = 0, long columns = 32) {
#if AMX
    if constexpr (!std::is_same_v<M, float>)
        if (way == AMX_TILES) {
            const bool is_pair = rows > 16;
            if constexpr (std::is_same_v<M, bf16>)
                if (is_pair && columns <= 16) { // a head of attention that is this small
                    if (adds) {
                        _tile_loadd(0, c, ldc * 4);
                        _tile_loadd(2, c + 16 * ldc, ldc * 4);
                    } else {
                        _tile_zero(0);
                        _tile_zero(2);
                    }
                    PRODUCT(_tile_dpbf16ps, true, false)
                    _tile_stored(0, c, ldc * 4);
                    _tile_stored(2, c + 16 * ldc, ldc * 4);
                    return;
                }
            if (adds) {
                _tile_loadd(0, c, ldc * 4);
                _tile_loadd(1, c + 16, ldc * 4);
                if (is_pair) {
                    _tile_loadd(2, c + 16 * ldc, ldc * 4);
                    _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
                }
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            if constexpr (std::is_same_v<M, bf16>) {
                if (is_pair) {
                    PRODUCT(_tile_dpbf16ps, true, true)
                } else {
                    PRODUCT(_tile_dpbf16ps, false, true)
                }
            } else if (is_pair) {
                PRODUCT(_tile_dpbssd, true, true)
            } else {
                PRODUCT(_tile_dpbssd, false, true)
            }
            _tile_stored(0, c, ldc * 4);
            _tile_stored(1, c + 16, ldc * 4);
            if (is_pair) {
                _tile_stored(2, c + 16 * ldc, ldc * 4);
                _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
            }
            return;
        }
#endif
#if DOT_PRODUCTS
    if constexpr (!std::is_same_v<M, float>)
        if (way == DOTS) {
            if (columns <= 16) dot_product<M, 1>(rows, a0, a1, b, kc, c, ldc, adds, ahead, each);
            else dot_product<M, 2>(rows, a0, a1, b, kc, c, ldc, adds, ahead, each);
            return;
        }
#endif
    if (columns <= 16) plain_product<M, 1>(rows, a0, a1, b, kc, c, ldc, adds);
    else plain_product<M, 2>(rows, a0, a1, b, kc, c, ldc, adds);
}

// 16 x 16 words of 32 bits, rows to columns.
static inline void transpose(const VU in[16], VU out[16]) {
    VU a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = __builtin_shuffle(in[i], in[i + 8], VU{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
        a[2 * i + 1] =
            __builtin_shuffle(in[i], in[i + 8], VU{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    }
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + 8], VU{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
            b[2 * i + 1] =
                __builtin_shuffle(a[i], a[i + 8], VU{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
        }
        memcpy(a, b, sizeof a);
    }
    memcpy(out, a, sizeof a);
}

// A tiles from rows: rows[i] points to row i or is null (zeros); `width` elements each. Writes [k tile][16 rows][64 B].
template <class M> static void tile_rows(const M *const *rows, int count, long width, char *out) {
    const long kc = tiles_of(width, Kind<M>::K);
    for (int r = 0; r < 16; r++) {
        const char *from = r < count ? (const char *)rows[r] : nullptr;
        const long bytes = width * (long)sizeof(M);
        for (long k = 0; k < kc; k++) {
            const VU v = from ? load_bytes(from + k * 64, bytes - k * 64) : VU{};
            memcpy(out + k * TILE + r * 64, &v, 64);
        }
    }
}

// One B tile of 16 columns, each given by a pointer to its elements along k (a row of a weight [O, I]): elements
// first .. first + K; null columns are zeros.
template <class M> static inline void tile_columns(const M *const *columns, long first, long width, char *out) {
    VU in[16], turned[16];
    const long bytes = (width - first) * (long)sizeof(M);
    for (int c = 0; c < 16; c++) in[c] = columns[c] ? load_bytes(columns[c] + first, bytes) : VU{};
    transpose(in, turned); // words of 32 bits: a float, 2 bfloat16 or 4 int8 that stay together
    memcpy(out, turned, sizeof turned);
}

// One B tile from rows along k (a matrix [k, columns]): K rows, null ones zeros; 16 columns from `column` on, of which
// `wide` exist.
template <class M> static inline void tile_across(const M *const *rows, long column, long wide, char *out) {
    if constexpr (std::is_same_v<M, float>) {
        for (int k = 0; k < 16; k++) store((float *)out + 16 * k, rows[k] ? load_some(rows[k] + column, wide) : V{});
    } else {
        for (int pair = 0; pair < 16; pair++) {
            const M *one = rows[2 * pair], *two = rows[2 * pair + 1];
            VH a = {}, b = {};
            const long bytes = wide < 16 ? wide * 2 : 32;
            if (one) memcpy(&a, one + column, bytes);
            if (two) memcpy(&b, two + column, bytes);
            VU both = __builtin_convertvector(a, VU) | (__builtin_convertvector(b, VU) << 16);
            memcpy(out + 64 * pair, &both, 64);
        }
    }
}

// The two B tiles of 32 columns from `column` on, of a matrix with `width` columns.
template <class M> static inline void tile_pair(const M *const *rows, long column, long width, char *out) {
    if constexpr (std::is_same_v<M, bf16>)
        if (column + 32 <= width && rows[Kind<M>::K - 1]) {
            constexpr VS low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
            for (int pair = 0; pair < 16; pair++) {
                VS a, b;
                memcpy(&a, rows[2 * pair] + column, 64);
                memcpy(&b, rows[2 * pair + 1] + column, 64);
                VS one = __builtin_shuffle(a, b, low), two = __builtin_shuffle(a, b, low + 16);
                memcpy(out + 64 * pair, &one, 64);
                memcpy(out + TILE + 64 * pair, &two, 64);
            }
            return;
        }
    for (int half = 0; half < 2; half++) {
        if (column + 16 * half < width)
            tile_across<M>(rows, column + 16 * half, width - column - 16 * half, out + half * TILE);
        else memset(out + half * TILE, 0, TILE);
    }
}

// The CPU operations as one small library with a C interface; `__init__.py` builds, loads and documents it.
//
// Every matrix product goes through one shape of tile: 16 rows of 64 bytes. A holds 16 rows of the left side, B 16
// columns of the right side with its elements interleaved as AMX wants them, C is 16 x 16 in 32 bits. What a tile's 64
// bytes hold is the only difference between the precisions: 16 floats, 32 bfloat16, 64 int8. With AMX a product of two
// tiles is one instruction; without, the same layout is walked by plain vector code, so that all the rest can be
// tested on any machine. Weights lie packed in panels of 32 outputs: [panel][k tile][2][1 KiB], read as one stream.
//
// Sums have a fixed order that depends neither on the number of threads nor on the other rows of a batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint16_t VH __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

static constexpr long TILE = 1024;   // bytes of a tile
static constexpr long WORDS = 128;   // words of a vocabulary tile
static constexpr long KEYS = 256;    // keys that attention takes at once
static constexpr long PIECE = 8;     // tiles of k that stay in the nearest cache while the other side passes by
static constexpr long BAND = 512;    // rows of a product that share a panel while it is warm

// ---- vectors --------------------------------------------------------------------------------------------------------

static inline V splat(float x) { return x - V{}; }
static inline V load(const float *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float *p, V v) { memcpy(p, &v, sizeof v); }
static inline V load(const bf16 *p) {
    VH h;
    memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, VU) << 16);
}
static inline void store(bf16 *p, V v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    VU u = (VU)v;
    VH h = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, VH);
    memcpy(p, &h, sizeof h);
#endif
}
template <class T> static inline V load_some(const T *p, long n) {
    if (n >= 16) return load(p);
    T t[16] = {};
    if (n > 0) memcpy(t, p, n * sizeof(T));
    return load(t);
}
template <class T> static inline void store_some(T *p, V v, long n) {
    if (n >= 16) return store(p, v);
    T t[16];
    store(t, v);
    if (n > 0) memcpy(p, t, n * sizeof(T));
}
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline void from_float(float *p, float x) { *p = x; }
static inline void from_float(bf16 *p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    p->bits = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
// Rounded to what the type can hold: the value that whoever reads it back will see.
static inline V rounded(V v, float) { return v; }
static inline V rounded(V v, bf16) {
    bf16 t[16];
    store(t, v);
    return load(t);
}
static inline float total(V v) { // in halves: a fixed order
    v += __builtin_shuffle(v, VI{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, VI{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, VI{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return v[0] + v[1];
}
static inline float largest(V v) {
    V w = __builtin_shuffle(v, VI{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v = v > w ? v : w;
    w = __builtin_shuffle(v, VI{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v = v > w ? v : w;
    w = __builtin_shuffle(v, VI{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v = v > w ? v : w;
    return std::max(v[0], v[1]);
}
static inline V bigger(V a, V b) { return a > b ? a : b; }
static inline V smaller(V a, V b) { return a < b ? a : b; }
static inline V absolute(V a) { return (V)((VU)a & 0x7fffffffu); }

// Within 1e-7 of e^x, relative; 0 below -87.3.
static inline V exponential(V x) {
    x = smaller(x, splat(88.0f));
    V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // nearest integer
    V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    VI e = __builtin_convertvector(n, VI);
    V scaled = (V)((VI)p + (e << 23));
    return x < splat(-87.3f) ? V{} : scaled;
}
static inline V over(V a, V b) { // a / b for b in [1, 1e38], within an ulp or two
#if defined(__AVX512F__)
    V r = (V)_mm512_rcp14_ps((__m512)b);
    r += r * (1.0f - b * r);
    V q = a * r;
    return q + r * (a - b * q);
#else
    return a / b;
#endif
}
static inline V gelu_tanh(V x) { // x / (1 + e^-2u) is x (1 + tanh u) / 2
    V u = x * (0.7978845608f + 0.0356774081f * x * x);
    return over(x, 1.0f + exponential(-2.0f * u));
}
static inline V softcapped(V x, float cap) { return cap - over(splat(2.0f * cap), exponential(x * (2.0f / cap)) + 1.0f); }

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class M> struct Kind; // M: what the elements of a product are
template <> struct Kind<float> {
    static constexpr long K = 16, GROUP = 1; // elements a tile row; neighbours along k that lie together in B
    typedef float Sum;
};
template <> struct Kind<bf16> {
    static constexpr long K = 32, GROUP = 2;
    typedef float Sum;
};
template <> struct Kind<int8_t> {
    static constexpr long K = 64, GROUP = 4;
    typedef int32_t Sum;
};

static bool has_amx = false;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define AMX 1
struct Tiles { // the tile registers of this thread, for as long as it lives
    Tiles() {
        if (!has_amx) return;
        alignas(64) static const struct Config {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Tiles() {
        if (has_amx) _tile_release();
    }
};
#else
#define AMX 0
struct Tiles {};
#endif

// C [mr x 16, 32] (+)= A (mr row tiles) x B (a panel), over kc tiles of k. `each` bytes from `ahead` on are fetched
// into the cache with every tile of k: what comes next arrives while this is computed.
template <class M>
static void plain_product(int mr, const char *a0, const char *a1, const char *b, long kc, typename Kind<M>::Sum *c,
                          long ldc, bool adds) {
    typedef typename Kind<M>::Sum S;
    typedef S VS __attribute__((vector_size(64)));
    for (int t = 0; t < mr; t++) {
        const char *a = t ? a1 : a0;
        for (int half = 0; half < 16; half += 8) {
            VS sum[8][2];
            for (int r = 0; r < 8; r++)
                for (int n = 0; n < 2; n++) {
                    if (adds) memcpy(&sum[r][n], c + (16 * t + half + r) * ldc + 16 * n, 64);
                    else sum[r][n] = VS{};
                }
            for (long k = 0; k < kc; k++) {
                const M *at = (const M *)(a + k * TILE);
                const M *bt = (const M *)(b + 2 * k * TILE);
                constexpr long G = Kind<M>::GROUP;
                for (int j = 0; j < 16; j++)
                    for (int g = 0; g < G; g++) {
                        VS w[2];
                        for (int n = 0; n < 2; n++) {
                            const M *row = bt + n * 16 * Kind<M>::K + j * 16 * G + g;
                            if constexpr (std::is_same_v<M, float>) memcpy(&w[n], row, 64);
                            else
                                for (int i = 0; i < 16; i++) {
                                    if constexpr (std::is_same_v<M, bf16>) w[n][i] = to_float(row[i * G]);
                                    else w[n][i] = row[i * G];
                                }
                        }
                        for (int r = 0; r < 8; r++) {
                            M x = at[(half + r) * Kind<M>::K + j * G + g];
                            S value;
                            if constexpr (std::is_same_v<M, bf16>) value = to_float(x);
                            else value = x;
                            sum[r][0] += value * w[0];
                            sum[r][1] += value * w[1];
                        }
                    }
            }
            for (int r = 0; r < 8; r++)
                for (int n = 0; n < 2; n++) memcpy(c + (16 * t + half + r) * ldc + 16 * n, &sum[r][n], 64);
        }
    }
}

#if AMX
#define PRODUCT(op, twice)                                                                                             \
    for (long k = 0; k < kc; k++) {                                                                                    \
        for (const char *until = ahead + each; ahead < until; ahead += 64) __builtin_prefetch(ahead, 0, 2);            \
        _tile_loadd(6, b + 2 * k * TILE, 64);                                                                          \
        _tile_loadd(4, a0 + k * TILE, 64);                                                                             \
        op(0, 4, 6);                                                                                                   \
        _tile_loadd(7, b + 2 * k * TILE + TILE, 64);                                                                   \
        op(1, 4, 7);                                                                                                   \
        if (twice) {                                                                                                   \
            _tile_loadd(5, a1 + k * TILE, 64);                                                                         \
            op(2, 5, 6);                                                                                               \
            op(3, 5, 7);                                                                                               \
        }                                                                                                              \
    }
#endif

template <class M>
static inline void product(int mr, const char *a0, const char *a1, const char *b, long kc, typename Kind<M>::Sum *c,
                           long ldc, bool adds = false, const char *ahead = nullptr, long each = 0) {
#if AMX
    if constexpr (!std::is_same_v<M, float>)
        if (has_amx) {
            if (adds) {
                _tile_loadd(0, c, ldc * 4);
                _tile_loadd(1, c + 16, ldc * 4);
                if (mr == 2) {
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
                if (mr == 2) {
                    PRODUCT(_tile_dpbf16ps, true)
                } else {
                    PRODUCT(_tile_dpbf16ps, false)
                }
            } else if (mr == 2) {
                PRODUCT(_tile_dpbssd, true)
            } else {
                PRODUCT(_tile_dpbssd, false)
            }
            _tile_stored(0, c, ldc * 4);
            _tile_stored(1, c + 16, ldc * 4);
            if (mr == 2) {
                _tile_stored(2, c + 16 * ldc, ldc * 4);
                _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
            }
            return;
        }
#endif
    plain_product<M>(mr, a0, a1, b, kc, c, ldc, adds);
}

static inline long up(long n, long to) { return (n + to - 1) / to * to; }
static inline long tiles_of(long n, long to) { return (n + to - 1) / to; }

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
            char *to = out + k * TILE + r * 64;
            const long left = bytes - k * 64;
            if (!from) memset(to, 0, 64);
            else if (left >= 64) memcpy(to, from + k * 64, 64);
            else {
                memset(to, 0, 64);
                memcpy(to, from + k * 64, left);
            }
        }
    }
}

// One B tile of 16 columns, each given by a pointer to its elements along k (a row of a weight [O, I]): elements
// first .. first + K; null columns are zeros.
template <class M> static inline void tile_columns(const M *const *columns, long first, long width, char *out) {
    VU in[16], turned[16];
    const long bytes = (width - first) * (long)sizeof(M);
    for (int c = 0; c < 16; c++) {
        in[c] = VU{};
        if (columns[c]) memcpy(&in[c], columns[c] + first, bytes < 64 ? bytes : 64);
    }
    transpose(in, turned); // words of 32 bits: a float, 2 bfloat16 or 4 int8 that stay together
    memcpy(out, turned, sizeof turned);
}

// One B tile from rows along k (a matrix [k, columns]): K rows, 16 columns from `column` on, of which `wide` exist.
template <class M> static inline void tile_across(const M *const *rows, long count, long column, long wide, char *out) {
    if constexpr (std::is_same_v<M, float>) {
        for (int k = 0; k < 16; k++) store((float *)out + 16 * k, k < count && rows[k] ? load_some(rows[k] + column, wide) : V{});
    } else {
        for (int pair = 0; pair < 16; pair++) {
            const M *one = 2 * pair < count ? rows[2 * pair] : nullptr, *two = 2 * pair + 1 < count ? rows[2 * pair + 1] : nullptr;
            VH a = {}, b = {};
            const long bytes = wide < 16 ? wide * 2 : 32;
            if (one) memcpy(&a, one + column, bytes);
            if (two) memcpy(&b, two + column, bytes);
            VU both = __builtin_convertvector(a, VU) | (__builtin_convertvector(b, VU) << 16);
            memcpy(out + 64 * pair, &both, 64);
        }
    }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Scratch { // grows, never shrinks; one a thread and purpose
    char *data = nullptr;
    size_t size = 0;
    char *get(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = up(bytes + bytes / 4, 1 << 21);
            data = (char *)aligned_alloc(1 << 21, size);
            if (!data) abort();
#if defined(__linux__)
            madvise(data, size, MADV_HUGEPAGE);
#endif
        }
        return data;
    }
    ~Scratch() { free(data); }
};

// ---- the left side of a product -------------------------------------------------------------------------------------

// Rows in A tiles: [row tile][k tile][1 KiB]; int8 rows with a scale each.
template <class IO, class M>
static void pack_rows(const IO *const *rows, int count, long width, char *out, float *scales) {
    if constexpr (std::is_same_v<IO, M>) {
        tile_rows<M>(rows, count, width, out);
    } else if constexpr (std::is_same_v<M, int8_t>) {
        const long kc = tiles_of(width, 64);
        for (int r = 0; r < 16; r++) {
            V most = V{};
            if (r < count)
                for (long i = 0; i < width; i += 16) most = bigger(most, absolute(load_some(rows[r] + i, width - i)));
            const float top = largest(most), inverse = top > 0 ? 127.0f / top : 0.0f;
            scales[r] = top / 127.0f;
            for (long k = 0; k < kc; k++)
                for (int part = 0; part < 64; part += 16) {
                    const long i = k * 64 + part;
                    V x = r < count && i < width ? load_some(rows[r] + i, width - i) * inverse : V{};
                    VI q = __builtin_convertvector((x + 12582912.0f) - 12582912.0f, VI);
                    typedef int8_t VB __attribute__((vector_size(16)));
                    VB b = __builtin_convertvector(q, VB);
                    memcpy(out + k * TILE + r * 64 + part, &b, 16);
                }
        }
    } else { // float rows for a product in bfloat16, or the other way round
        const long kc = tiles_of(width, Kind<M>::K);
        for (int r = 0; r < 16; r++)
            for (long k = 0; k < kc; k++)
                for (long part = 0; part < Kind<M>::K; part += 16) {
                    const long i = k * Kind<M>::K + part;
                    V x = r < count && i < width ? load_some(rows[r] + i, width - i) : V{};
                    store((M *)(out + k * TILE) + r * Kind<M>::K + part, x);
                }
    }
}

template <class M> struct Weight {
    const char *data;
    const float *scale; // int8: one an output
    long outputs, inputs;
    long kc() const { return tiles_of(inputs, Kind<M>::K); }
    long panels() const { return tiles_of(outputs, 32); }
    long bytes() const { return panels() * kc() * 2 * TILE; }
    const char *panel(long p) const { return data + p * kc() * 2 * TILE; }
};

// For each of `count` panels C [row tiles x 16, 32], one behind the other, from all the rows in A. K goes in pieces, so
// that what meets again and again stays in the nearest cache. Meanwhile the panels that come `next` are fetched.
// Integer sums are scaled.
template <class M> struct Panel {
    const Weight<M> *w;
    long p;
    const char *next;
};
template <class M>
static inline void panel_product(long row_tiles, const char *a, const float *row_scale, const Panel<M> *panels, int count,
                                 float *c) {
    typedef typename Kind<M>::Sum S;
    const long kc = panels[0].w->kc(), piece = kc > 12 ? PIECE : kc, size = row_tiles * 16 * 32;
    const long each = up(2 * TILE / tiles_of(row_tiles, 2), 64); // over all passes: one panel
    S *sums = (S *)c;
    for (long k = 0; k < kc; k += piece)
        for (int i = 0; i < count; i++) {
            const long some = std::min(piece, kc - k);
            const char *b = panels[i].w->panel(panels[i].p) + 2 * k * TILE, *next = panels[i].next;
            if (next) next += k * tiles_of(row_tiles, 2) * each;
            for (long t = 0; t < row_tiles; t += 2) {
                const char *at = a + (t * kc + k) * TILE;
                product<M>(t + 1 < row_tiles ? 2 : 1, at, at + kc * TILE, b, some, sums + i * size + t * 16 * 32, 32, k > 0, next, next ? each : 0);
                if (next) next += some * each;
            }
        }
    if constexpr (std::is_same_v<M, int8_t>)
        for (int i = 0; i < count; i++) {
            const Weight<M> &w = *panels[i].w;
            const long p = panels[i].p;
            V one = load_some(w.scale + 32 * p, w.outputs - 32 * p), two = load_some(w.scale + 32 * p + 16, w.outputs - 32 * p - 16);
            float *to = c + i * size;
            for (long r = 0; r < 16 * row_tiles; r++) {
                VI x, y;
                memcpy(&x, to + 32 * r, 64);
                memcpy(&y, to + 32 * r + 16, 64);
                store(to + 32 * r, __builtin_convertvector(x, V) * row_scale[r] * one);
                store(to + 32 * r + 16, __builtin_convertvector(y, V) * row_scale[r] * two);
            }
        }
}

template <class M> static void pack_weight(const void *from, int io, long outputs, long inputs, char *out, float *scale, int threads) {
    const long kc = tiles_of(inputs, Kind<M>::K), panels = tiles_of(outputs, 32);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < panels; p++) {
        std::vector<M> copy(32 * inputs);
        const M *columns[32];
        for (int c = 0; c < 32; c++) {
            const long o = 32 * p + c;
            columns[c] = nullptr;
            if (o >= outputs) continue;
            columns[c] = copy.data() + c * inputs;
            float top = 0;
            auto value = [&](long i) {
                return io ? to_float(((const bf16 *)from)[o * inputs + i]) : ((const float *)from)[o * inputs + i];
            };
            if constexpr (std::is_same_v<M, int8_t>) {
                for (long i = 0; i < inputs; i++) top = std::max(top, std::fabs(value(i)));
                scale[o] = top / 127.0f;
                for (long i = 0; i < inputs; i++)
                    copy[c * inputs + i] = (int8_t)std::lrintf(top > 0 ? value(i) * (127.0f / top) : 0.0f);
            } else
                for (long i = 0; i < inputs; i++) from_float(&copy[c * inputs + i], value(i));
        }
        for (long k = 0; k < kc; k++)
            for (int n = 0; n < 2; n++)
                tile_columns<M>(columns + 16 * n, k * Kind<M>::K, inputs, out + ((p * kc + k) * 2 + n) * TILE);
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

static thread_local Scratch left_side, middle, parts_buffer, own, blocks;

template <class IO, class M>
static void pack_all(const IO *x, long rows, long width, char *out, float *scales) { // inside a parallel region
    const long kc = tiles_of(width, Kind<M>::K);
#pragma omp for schedule(static)
    for (long t = 0; t < tiles_of(rows, 16); t++) {
        const IO *pointers[16];
        const int count = (int)std::min(16L, rows - 16 * t);
        for (int r = 0; r < count; r++) pointers[r] = x + (16 * t + r) * width;
        pack_rows<IO, M>(pointers, count, width, out + t * kc * TILE, scales + 16 * t);
    }
}

template <class IO> static inline void write_block(const float *c, IO *y, long rows, long columns, long ldy) {
    for (long r = 0; r < rows; r++) {
        store_some(y + r * ldy, load(c + 32 * r), columns);
        if (columns > 16) store_some(y + r * ldy + 16, load(c + 32 * r + 16), columns - 16);
    }
}

template <class IO, class M>
static void linear(const IO *x, long rows, int count, const Weight<M> *w, IO *const *y, int threads) {
    const long width = w[0].inputs, kc = w[0].kc(), row_tiles = tiles_of(rows, 16);
    char *a = left_side.get(row_tiles * kc * TILE + up(rows, 16) * 4);
    float *scales = (float *)(a + row_tiles * kc * TILE);
    long panels = 0;
    for (int i = 0; i < count; i++) panels += w[i].panels();
    const long bands = tiles_of(rows, BAND), chunk = std::max(1L, panels / (8 * threads));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        float *c = (float *)blocks.get(BAND * 32 * 4);
        pack_all<IO, M>(x, rows, width, a, scales);
        for (long band = 0; band < bands; band++) {
            const long t = band * BAND / 16, some = std::min(row_tiles - t, BAND / 16);
#pragma omp for schedule(dynamic, chunk) nowait
            for (long n = 0; n < panels; n++) {
                int i = 0;
                long p = n;
                while (p >= w[i].panels()) p -= w[i++].panels();
                const char *next = p + 1 < w[i].panels() ? w[i].panel(p + 1) : i + 1 < count ? w[i + 1].data : nullptr;
                const Panel<M> panel{w + i, p, next};
                panel_product<M>(some, a + t * kc * TILE, scales + 16 * t, &panel, 1, c);
                write_block(c, y[i] + 16 * t * w[i].outputs + 32 * p, std::min(16 * some, rows - 16 * t), w[i].outputs - 32 * p, w[i].outputs);
            }
        }
    }
}

// gelu(gate) x up for a panel of each, into rows of h.
template <class IO>
static inline void gate_block(const float *gate, const float *up_, IO *h, long rows, long columns, long ldh) {
    alignas(64) float c[32];
    for (long r = 0; r < rows; r++) {
        for (int i = 0; i < 32; i += 16)
            store(c + i, rounded(gelu_tanh(rounded(load(gate + 32 * r + i), IO())), IO()) * rounded(load(up_ + 32 * r + i), IO()));
        write_block(c, h + r * ldh, 1, columns, ldh);
    }
}

template <class IO, class M>
static void feed_forward(const IO *x, long rows, Weight<M> gate, Weight<M> up_, Weight<M> down, IO *y, int threads) {
    const long kc = gate.kc(), inner = gate.outputs, kc2 = down.kc(), row_tiles = tiles_of(rows, 16);
    const long first = row_tiles * kc * TILE, second = row_tiles * kc2 * TILE;
    char *a = left_side.get(first + second + 2 * up(rows, 16) * 4);
    float *scales = (float *)(a + first + second), *scales2 = scales + up(rows, 16);
    IO *h = (IO *)middle.get(rows * inner * sizeof(IO));
    const long bands = tiles_of(rows, BAND);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        float *c = (float *)blocks.get(2 * BAND * 32 * 4);
        pack_all<IO, M>(x, rows, gate.inputs, a, scales);
        for (long band = 0; band < bands; band++) {
            const long t = band * BAND / 16, some = std::min(row_tiles - t, BAND / 16);
#pragma omp for schedule(dynamic, 1) nowait
            for (long p = 0; p < gate.panels(); p++) {
                const long next = p + threads < gate.panels() ? p + threads : p;
                const Panel<M> both[2] = {{&gate, p, gate.panel(next)}, {&up_, p, up_.panel(next)}};
                panel_product<M>(some, a + t * kc * TILE, scales + 16 * t, both, 2, c);
                gate_block(c, c + some * 16 * 32, h + 16 * t * inner + 32 * p, std::min(16 * some, rows - 16 * t), inner - 32 * p, inner);
            }
        }
#pragma omp barrier
        pack_all<IO, M>(h, rows, inner, a + first, scales2);
        for (long band = 0; band < bands; band++) {
            const long t = band * BAND / 16, some = std::min(row_tiles - t, BAND / 16);
#pragma omp for schedule(dynamic, 1) nowait
            for (long p = 0; p < down.panels(); p++) {
                const long next = p + threads < down.panels() ? p + threads : p;
                const Panel<M> panel{&down, p, down.panel(next)};
                panel_product<M>(some, a + first + t * kc2 * TILE, scales2 + 16 * t, &panel, 1, c);
                write_block(c, y + 16 * t * down.outputs + 32 * p, std::min(16 * some, rows - 16 * t), down.outputs - 32 * p, down.outputs);
            }
        }
    }
}

// Tokens grouped by expert; a thread takes an expert at a time, its weights are read once.
template <class IO, class M>
static void experts(const IO *x, long tokens, long width, long chosen, const int64_t *index, const float *weight,
                    long count, const char *gate_up_data, const float *gate_up_scale, const char *down_data,
                    const float *down_scale, long inner, IO *y, int threads) {
    const long all = tokens * chosen;
    Weight<M> gu{gate_up_data, gate_up_scale, 2 * inner, width}, dn{down_data, down_scale, width, inner};
    std::vector<long> starts(count + 1, 0), member(all), order(count);
    for (long n = 0; n < all; n++) starts[index[n] + 1]++;
    for (long e = 0; e < count; e++) starts[e + 1] += starts[e];
    {
        std::vector<long> next(starts.begin(), starts.end() - 1);
        for (long n = 0; n < all; n++) member[next[index[n]]++] = n;
    }
    for (long e = 0; e < count; e++) order[e] = e;
    std::stable_sort(order.begin(), order.end(), // the largest first, so that no thread is left with one at the end
                     [&](long a, long b) { return starts[a + 1] - starts[a] > starts[b + 1] - starts[b]; });
    float *parts = (float *)parts_buffer.get(all * width * 4);
    const long kc = gu.kc(), kc2 = dn.kc();
    const bool is_aligned = inner % 32 == 0; // then a panel is all gate or all up
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (long o = 0; o < count; o++) {
            const long e = order[o], size = starts[e + 1] - starts[e];
            if (!size) continue;
            Weight<M> g = gu, w = dn;
            g.data += e * gu.bytes(), w.data += e * dn.bytes();
            if (g.scale) g.scale += e * gu.outputs, w.scale += e * dn.outputs;
            const long row_tiles = tiles_of(size, 16), first = row_tiles * kc * TILE, second = row_tiles * kc2 * TILE;
            const long wide = up(2 * inner, 32);
            char *a = own.get(first + second + 2 * up(size, 16) * 4 + up(size, 32) * wide * 4 + size * inner * sizeof(IO) + 256);
            float *scales = (float *)(a + first + second), *scales2 = scales + up(size, 16);
            float *gate_up = scales2 + up(size, 16); // only where panels mix gate and up
            IO *h = (IO *)(gate_up + up(size, 32) * wide);
            for (long t = 0; t < row_tiles; t++) {
                const IO *pointers[16];
                const int held = (int)std::min(16L, size - 16 * t);
                for (int r = 0; r < held; r++) pointers[r] = x + member[starts[e] + 16 * t + r] / chosen * width;
                pack_rows<IO, M>(pointers, held, width, a + t * kc * TILE, scales + 16 * t);
            }
            constexpr int MANY = 4; // panels at a time: each piece of the few rows meets them all
            const long block = row_tiles * 16 * 32;
            float *c = (float *)blocks.get(MANY * block * 4);
            Panel<M> panels[MANY];
            if (is_aligned) {
                const long half = inner / 32;
                for (long p = 0; p < half; p += MANY / 2) {
                    const int pairs = (int)std::min((long)MANY / 2, half - p);
                    for (int i = 0; i < 2 * pairs; i++) {
                        const long here = p + i / 2 + i % 2 * half, then = here + pairs;
                        panels[i] = {&g, here, p + pairs < half ? g.panel(then) : w.panel(std::min((long)i, w.panels() - 1))};
                    }
                    panel_product<M>(row_tiles, a, scales, panels, 2 * pairs, c);
                    for (int i = 0; i < pairs; i++)
                        gate_block(c + 2 * i * block, c + (2 * i + 1) * block, h + 32 * (p + i), size, 32, inner);
                }
            } else {
                for (long p = 0; p < g.panels(); p++) {
                    panels[0] = {&g, p, nullptr};
                    panel_product<M>(row_tiles, a, scales, panels, 1, c);
                    for (long r = 0; r < 16 * row_tiles; r++) memcpy(gate_up + r * wide + 32 * p, c + 32 * r, 128);
                }
                for (long r = 0; r < size; r++)
                    for (long i = 0; i < inner; i += 16) {
                        V gate = rounded(load_some(gate_up + r * wide + i, inner - i), IO());
                        V u = rounded(load_some(gate_up + r * wide + inner + i, inner - i), IO());
                        store_some(h + r * inner + i, rounded(gelu_tanh(gate), IO()) * u, inner - i);
                    }
            }
            for (long t = 0; t < row_tiles; t++) {
                const IO *pointers[16];
                const int held = (int)std::min(16L, size - 16 * t);
                for (int r = 0; r < held; r++) pointers[r] = h + (16 * t + r) * inner;
                pack_rows<IO, M>(pointers, held, inner, a + first + t * kc2 * TILE, scales2 + 16 * t);
            }
            const bool goes_on = o + threads < count; // most likely its next expert
            for (long p = 0; p < w.panels(); p += MANY) {
                const int some = (int)std::min((long)MANY, w.panels() - p);
                for (int i = 0; i < some; i++) {
                    const char *after = goes_on ? gu.data + order[o + threads] * gu.bytes() + i * gu.kc() * 2 * TILE : nullptr;
                    panels[i] = {&w, p + i, p + i + some < w.panels() ? w.panel(p + i + some) : after};
                }
                panel_product<M>(row_tiles, a + first, scales2, panels, some, c);
                for (long r = 0; r < size; r++) {
                    const long n = member[starts[e] + r];
                    for (int i = 0; i < some; i++) {
                        float *at = c + i * block + 32 * r;
                        for (int j = 0; j < 32; j += 16) store(at + j, rounded(load(at + j), IO()) * weight[n]);
                        write_block(at, parts + n * width + 32 * (p + i), 1, width - 32 * (p + i), width);
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (long n = 0; n < tokens; n++)
            for (long i = 0; i < width; i += 16) {
                V sum = V{};
                for (long j = 0; j < chosen; j++) sum += load_some(parts + (n * chosen + j) * width + i, width - i);
                store_some(y + n * width + i, sum, width - i);
            }
    }
}

// ---- norms, rope, routing -------------------------------------------------------------------------------------------

template <class T> static inline V weight_at(const T *w, long i, long n) { return w ? load_some(w + i, n - i) : splat(1.0f); }

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
    return 1.0f / std::sqrt(total((sum[0] + sum[1]) + (sum[2] + sum[3])) / n + eps);
}

template <class T> static void rms_norm(const T *x, long rows, long n, const T *w, float eps, T *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        const T *from = x + r * n;
        const float s = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
        for (long i = 0; i < n; i += 16) store_some(y + r * n + i, load_some(from + i, n - i) * s * weight_at(w, i, n), n - i);
    }
}

template <class T>
static void norm_rope(const T *x, long places, long heads, long n, const T *w, float eps, const T *cos, const T *sin,
                      T *y, int threads) {
    const long half = n / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < places * heads; r++) {
        const T *from = x + r * n, *c = cos + r / heads * n, *s = sin + r / heads * n;
        const float scale = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
        for (long i = 0; i < half; i += 16) {
            const long m = half - i;
            V one = rounded(load_some(from + i, m) * scale * load_some(w + i, m), T());
            V two = rounded(load_some(from + half + i, m) * scale * load_some(w + half + i, m), T());
            store_some(y + r * n + i, one * load_some(c + i, m) - two * load_some(s + i, m), m);
            store_some(y + r * n + half + i, two * load_some(c + half + i, m) + one * load_some(s + half + i, m), m);
        }
    }
}

template <class T>
static void norm_add(const T *residual, const T *x, long rows, long n, const T *w, float eps, T *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        const T *from = x + r * n;
        const float s = inverse_rms([&](long i) { return load_some(from + i, n - i); }, n, eps);
        for (long i = 0; i < n; i += 16)
            store_some(y + r * n + i, load_some(residual + r * n + i, n - i) + rounded(load_some(from + i, n - i) * s * weight_at(w, i, n), T()), n - i);
    }
}

template <class T>
static void join(const T *residual, const T *dense, const T *sparse, long rows, long n, const T *dense_w,
                 const T *sparse_w, const T *w, float eps, const T *scale, long scales, T *y, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sum(up(n, 16));
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
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
        }
    }
}

// Few outputs and exact ones: which experts a token takes must not hang on the rounding of a product's input.
template <class T>
static void route(const T *x, long rows, long n, const T *scale, const T *proj, long count, const T *per_expert,
                  long chosen, float eps, int64_t *index, float *weight, int threads) {
    const float root = 1.0f / std::sqrt((float)n);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> a(4 * up(n, 16)), p(4 * count);
#pragma omp for schedule(static)
        for (long block = 0; block < tiles_of(rows, 4); block++) {
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
            for (long e = 0; e < count; e++) {
                V sum[4] = {};
                for (long i = 0; i < n; i += 16) {
                    V w = load_some(proj + e * n + i, n - i);
                    for (int r = 0; r < 4; r++) sum[r] += w * load(a.data() + r * wide + i);
                }
                for (int r = 0; r < 4; r++) {
                    T kept;
                    from_float(&kept, total(sum[r]));
                    p[r * count + e] = to_float(kept);
                }
            }
            for (long r = 0; r < some; r++) {
                float *q = p.data() + r * count, top = q[0], sum = 0, picked = 0;
                for (long e = 0; e < count; e++) top = std::max(top, q[e]);
                for (long e = 0; e < count; e++) sum += q[e] = std::exp(q[e] - top);
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
        }
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------

struct Seen {
    const int64_t *rows, *lengths, *counts;
    long batch, encode, canvas, window, ring; // window 0: none
};

// The keys of a row are numbered by position: cached, newly encoded, canvas. What a query sees is then an interval.
// A unit of work is some query blocks of one key-value head; for each chunk of keys it packs keys and values once.
template <class T>
static void attention(const T *q, const T *k, const T *v, const T *k_ring, const T *v_ring, Seen seen, long heads,
                      long groups, long n, T *out, int threads) {
    const long width = seen.encode + seen.canvas, share = heads / groups, kd = tiles_of(n, Kind<T>::K);
    const long d_panels = tiles_of(n, 32), wide = up(n, 32), blocks = tiles_of(width, 32) * share;
    const long kk = KEYS / Kind<T>::K;
    long splits = std::max(1L, tiles_of(blocks, 64)); // bounds what a unit keeps
    while (seen.batch * groups * splits < threads && splits < blocks) splits++;
    const long each = tiles_of(blocks, splits), units = seen.batch * groups * splits;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        const long q_bytes = 2 * kd * TILE, k_bytes = KEYS / 32 * kd * 2 * TILE, v_bytes = d_panels * kk * 2 * TILE;
        const long p_bytes = 2 * kk * TILE, s_bytes = 32 * KEYS * 4, o_bytes = 32 * wide * 4;
        char *a = own.get(each * (q_bytes + o_bytes + 4 * 32 * 8) + k_bytes + v_bytes + p_bytes + s_bytes);
        char *q_tiles = a, *k_tiles = q_tiles + each * q_bytes, *v_tiles = k_tiles + k_bytes, *p_tiles = v_tiles + v_bytes;
        float *scores = (float *)(p_tiles + p_bytes), *o = scores + 32 * KEYS;
        float *top = o + each * 32 * wide, *sum = top + each * 32;
        int64_t *low = (int64_t *)(sum + each * 32), *high = low + each * 32;
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < units; unit++) {
            const long b = unit / (groups * splits), g = unit / splits % groups, first = unit % splits * each;
            const long held = std::min(each, blocks - first);
            if (held <= 0) continue;
            const long length = seen.lengths[b], count = seen.counts[b], start = length + count, end = start + seen.canvas;
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
                    else if (t < count) lo = seen.window ? std::max(0L, length + t - seen.window + 1) : 0, hi = length + t + 1;
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
                const long filled = std::min(KEYS, to - key), panels = tiles_of(filled, 32), k_used = tiles_of(filled, Kind<T>::K);
                for (long p = 0; p < panels; p++)
                    for (long i = 0; i < kd; i++)
                        for (int half = 0; half < 2; half++)
                            tile_columns<T>(keys + 32 * p + 16 * half, i * Kind<T>::K, n, k_tiles + ((p * kd + i) * 2 + half) * TILE);
                for (long p = 0; p < d_panels; p++)
                    for (long i = 0; i < k_used; i++)
                        for (int half = 0; half < 2; half++) {
                            const long column = 32 * p + 16 * half;
                            char *tile = v_tiles + ((p * kk + i) * 2 + half) * TILE;
                            if (column < n) tile_across<T>(values + i * Kind<T>::K, Kind<T>::K, column, n - column, tile);
                            else memset(tile, 0, TILE);
                        }
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
                            const float l = (float)std::max<int64_t>(lo[r] - key, 0), u = (float)std::max<int64_t>(0, std::min<int64_t>(hi[r] - key, KEYS));
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
                        for (long i = 0; i < steps; i++) {
                            V e = i < vectors && now > -1e29f ? exponential(load(s + 16 * i) - now) : V{};
                            acc += e;
                            constexpr long PER = Kind<T>::K / 16;
                            store((T *)((char *)p_row + i / PER * TILE) + i % PER * 16, e);
                        }
                        if (now > old) {
                            const float fade = std::exp(old - now);
                            sum[block * 32 + r] *= fade;
                            if (fade != 1.0f)
                                for (long i = 0; i < wide; i += 16) store(block_o + r * wide + i, load(block_o + r * wide + i) * fade);
                            top[block * 32 + r] = now;
                        }
                        sum[block * 32 + r] += total(acc);
                    }
                    for (long p = 0; p < d_panels; p++)
                        product<T>(2, p_tiles, p_tiles + kk * TILE, v_tiles + p * kk * 2 * TILE, k_used, block_o + 32 * p, wide, true);
                }
            }
            for (long block = 0; block < held; block++) {
                long h, t;
                for (int r = 0; r < 32; r++)
                    if (place(block, r, h, t)) {
                        const float s = sum[block * 32 + r], inverse = s > 0 ? 1.0f / s : 0.0f;
                        for (long i = 0; i < n; i += 16)
                            store_some(out + ((b * width + t) * heads + h) * n + i, load(o + (block * 32 + r) * wide + i) * inverse, n - i);
                    }
            }
        }
    }
}

// ---- vocabulary -----------------------------------------------------------------------------------------------------

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

// ---- the C interface: io is 0 for float, 1 for bfloat16; kind is 0 float, 1 bfloat16, 2 int8 ---------------------------

template <class M> static Weight<M> weight_of(const void *data, const float *scale, long outputs, long inputs) {
    return Weight<M>{(const char *)data, scale, outputs, inputs};
}

#define BY_IO(...)                                                                                                    \
    if (io) {                                                                                                          \
        typedef bf16 T;                                                                                                \
        __VA_ARGS__;                                                                                                          \
    } else {                                                                                                           \
        typedef float T;                                                                                               \
        __VA_ARGS__;                                                                                                          \
    }
#define BY_BOTH(...)                                                                                                  \
    if (kind == 2) {                                                                                                   \
        typedef int8_t M;                                                                                              \
        BY_IO(__VA_ARGS__)                                                                                                    \
    } else if (kind == 1) {                                                                                            \
        typedef bf16 M;                                                                                                \
        BY_IO(__VA_ARGS__)                                                                                                    \
    } else {                                                                                                           \
        typedef float M;                                                                                               \
        BY_IO(__VA_ARGS__)                                                                                                    \
    }

extern "C" {

int sf_start() { // asks the kernel for the tile registers; 1 where products run on them
#if AMX && defined(__linux__)
    has_amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0; // ARCH_REQ_XCOMP_PERM, XTILEDATA
#endif
    return has_amx;
}

void sf_plain(int is_plain) { // tests: walk the tiles without AMX
    if (is_plain) has_amx = false;
    else sf_start();
}

long sf_packed_bytes(int kind, long outputs, long inputs) {
    const long k = kind == 2 ? 64 : kind == 1 ? 32 : 16;
    return tiles_of(outputs, 32) * tiles_of(inputs, k) * 2 * TILE;
}

void sf_pack(int io, int kind, const void *from, long outputs, long inputs, void *to, float *scale, int threads) {
    if (kind == 2) pack_weight<int8_t>(from, io, outputs, inputs, (char *)to, scale, threads);
    else if (kind == 1) pack_weight<bf16>(from, io, outputs, inputs, (char *)to, scale, threads);
    else pack_weight<float>(from, io, outputs, inputs, (char *)to, scale, threads);
}

void sf_linear(int io, int kind, const void *x, long rows, long inputs, int count, const void *const *data,
               const float *const *scale, const long *outputs, void *const *y, int threads) {
    BY_BOTH({
        Weight<M> w[4];
        for (int i = 0; i < count; i++) w[i] = weight_of<M>(data[i], scale[i], outputs[i], inputs);
        linear<T, M>((const T *)x, rows, count, w, (T *const *)y, threads);
    })
}

void sf_feed_forward(int io, int kind, const void *x, long rows, long width, long inner, const void *gate,
                     const float *gate_scale, const void *up_, const float *up_scale, const void *down,
                     const float *down_scale, void *y, int threads) {
    BY_BOTH((feed_forward<T, M>((const T *)x, rows, weight_of<M>(gate, gate_scale, inner, width),
                                weight_of<M>(up_, up_scale, inner, width), weight_of<M>(down, down_scale, width, inner),
                                (T *)y, threads)))
}

void sf_experts(int io, int kind, const void *x, long tokens, long width, long chosen, const int64_t *index,
                const float *weight, long count, const void *gate_up, const float *gate_up_scale, const void *down,
                const float *down_scale, long inner, void *y, int threads) {
    BY_BOTH((experts<T, M>((const T *)x, tokens, width, chosen, index, weight, count, (const char *)gate_up, gate_up_scale,
                           (const char *)down, down_scale, inner, (T *)y, threads)))
}

void sf_rms_norm(int io, const void *x, long rows, long n, const void *w, float eps, void *y, int threads) {
    BY_IO((rms_norm<T>((const T *)x, rows, n, (const T *)w, eps, (T *)y, threads)))
}

void sf_norm_rope(int io, const void *x, long places, long heads, long n, const void *w, float eps, const void *cos,
                  const void *sin, void *y, int threads) {
    BY_IO((norm_rope<T>((const T *)x, places, heads, n, (const T *)w, eps, (const T *)cos, (const T *)sin, (T *)y, threads)))
}

void sf_norm_add(int io, const void *residual, const void *x, long rows, long n, const void *w, float eps, void *y,
                 int threads) {
    BY_IO((norm_add<T>((const T *)residual, (const T *)x, rows, n, (const T *)w, eps, (T *)y, threads)))
}

void sf_join(int io, const void *residual, const void *dense, const void *sparse, long rows, long n, const void *dense_w,
             const void *sparse_w, const void *w, float eps, const void *scale, long scales, void *y, int threads) {
    BY_IO((join<T>((const T *)residual, (const T *)dense, (const T *)sparse, rows, n, (const T *)dense_w,
                   (const T *)sparse_w, (const T *)w, eps, (const T *)scale, scales, (T *)y, threads)))
}

void sf_route(int io, const void *x, long rows, long n, const void *scale, const void *proj, long count,
              const void *per_expert, long chosen, float eps, int64_t *index, float *weight, int threads) {
    BY_IO((route<T>((const T *)x, rows, n, (const T *)scale, (const T *)proj, count, (const T *)per_expert, chosen, eps,
                    index, weight, threads)))
}

void sf_attention(int io, const void *q, const void *k, const void *v, const void *k_ring, const void *v_ring,
                  const int64_t *rows, const int64_t *lengths, const int64_t *counts, long batch, long encode,
                  long canvas, long window, long ring, long heads, long groups, long n, void *out, int threads) {
    Seen seen{rows, lengths, counts, batch, encode, canvas, window, ring};
    BY_IO((attention<T>((const T *)q, (const T *)k, (const T *)v, (const T *)k_ring, (const T *)v_ring, seen, heads, groups,
                        n, (T *)out, threads)))
}

long sf_words() { return WORDS; }

void sf_read_out(int io, const void *hidden, long positions, long n, const void *embed, long words, float cap,
                 const float *inverse_heat, const uint8_t *is_banned, const int64_t *banned, long bans,
                 const float *uniform, void *logits, float *mass, int64_t *sample, int64_t *argmax, float *entropy,
                 float *peak, int threads) {
    BY_IO((read_out<T>((const T *)hidden, positions, n, (const T *)embed, words, cap, inverse_heat, is_banned, banned,
                       bans, uniform, (T *)logits, mass, sample, argmax, entropy, peak, threads)))
}

void sf_soft_embedding(int io, const void *logits, long positions, long words, const void *embed, long n,
                       const float *peak, const float *mass, float least, float scale, void *y, int threads) {
    BY_IO((soft_embedding<T>((const T *)logits, positions, words, (const T *)embed, n, peak, mass, least, scale, (T *)y, threads)))
}
}

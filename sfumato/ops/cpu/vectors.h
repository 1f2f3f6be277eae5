// Vectors of 16 lanes in float32, what bfloat16 becomes in them, and the functions that the operations need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint16_t VH __attribute__((vector_size(32)));
typedef uint16_t VS __attribute__((vector_size(64)));

struct bf16 {
    uint16_t bits;
};

static constexpr long TILE = 1024;    // bytes of a tile
static constexpr long KEYS = 256;     // keys that attention takes at once
static constexpr long FEW = 4;        // row tiles beside which a product waits for memory, not for arithmetic
static constexpr long PIECE = 8;      // tiles of k that stay in the nearest cache while the other side passes by
static constexpr long BAND = 512;     // rows of a product that share a panel while it is warm
static constexpr long WARM = 1 << 20; // bytes of a layer's weights that stay in the second cache of each core

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
#if defined(__AVX512F__)
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (V)(__builtin_convertvector(h, VU) << 16);
#endif
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
// The first n of 16; zeros behind them.
template <class T> static inline V load_some(const T *p, long n) {
    if (n >= 16) return load(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const uint16_t some = (1u << std::max(n, 0L)) - 1;
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps(some, p);
    else return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16);
#else
    T t[16] = {};
    if (n > 0) memcpy(t, p, n * sizeof(T));
    return load(t);
#endif
}
template <class T> static inline void store_some(T *p, V v, long n) {
    if (n >= 16) return store(p, v);
    T t[16];
    store(t, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const uint16_t some = (1u << std::max(n, 0L)) - 1;
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, some, (__m512)v);
    else {
        __m256i h;
        memcpy(&h, t, sizeof h);
        _mm256_mask_storeu_epi16(p, some, h);
    }
#else
    if (n > 0) memcpy(p, t, n * sizeof(T));
#endif
}
// Up to 64 bytes; zeros behind them.
static inline VU load_bytes(const void *p, long bytes) {
    VU v = {};
    if (bytes >= 64) memcpy(&v, p, 64);
#if defined(__AVX512BW__)
    else v = (VU)_mm512_maskz_loadu_epi8((1ull << bytes) - 1, p);
#else
    else memcpy(&v, p, bytes);
#endif
    return v;
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
    alignas(32) bf16 t[16];
    store(t, v);
    return load(t);
}
static inline float total(V v) { // in halves: a fixed order
    v += __builtin_shuffle(v, VI{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, VI{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, VI{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return v[0] + v[1];
}
#if defined(__AVX512F__)
static inline V bigger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline V bigger(V a, V b) { return a > b ? a : b; }
static inline V smaller(V a, V b) { return a < b ? a : b; }
#endif
static inline float largest(V v) {
    v = bigger(v, __builtin_shuffle(v, VI{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    v = bigger(v, __builtin_shuffle(v, VI{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    v = bigger(v, __builtin_shuffle(v, VI{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    return std::max(v[0], v[1]);
}
// Of lanes without a sign, read as integers: their order is the same, and NaN is above them all.
static inline float largest_or_nan(VI v) {
    auto with = [&](VI other) { v = other > v ? other : v; };
    with(__builtin_shuffle(v, VI{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    with(__builtin_shuffle(v, VI{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    with(__builtin_shuffle(v, VI{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    const int32_t most = std::max(v[0], v[1]);
    float f;
    memcpy(&f, &most, 4);
    return f;
}
static inline V multiply_add(V a, V b, V c) { // a b + c in one rounding: left to the compiler, not each row gets it
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}
static inline V absolute(V a) { return (V)((VU)a & 0x7fffffffu); }

// Within 1e-7 of e^x, relative; 0 below -87.3, NaN of NaN.
static inline V exponential(V x) {
    x = smaller(splat(88.0f), x);                        // of a pair with a NaN the second one is taken
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
// Within 3e-7 of e^x, relative, from -10 to 0 (exactly 1 at 0), and within 2e-6 down to -87.3; 0 below. A third fewer
// operations than `exponential`.
static inline V exponential_below(V x) {
    const V shifted = x * 1.44269504f + 12582912.0f; // 1.5 x 2^23: the nearest integer is in the lowest bits
    const V r = x * 1.44269504f - (shifted - 12582912.0f);
    V p = splat(1.3264720656e-3f);
    p = p * r + 9.6715135959e-3f;
    p = p * r + 5.5507337695e-2f;
    p = p * r + 2.4022242068e-1f;
    p = p * r + 6.9314697758e-1f;
    p = p * r + 1.0f;
    const V scaled = (V)((VI)p + ((VI)shifted << 23));
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
// cap x tanh(x / cap), within 1e-7 of cap; where `is_near` also within 2e-7 of itself, however small.
template <bool is_near> static inline V softcapped(V x, float cap) {
    V far = cap - over(splat(2.0f * cap), exponential(x * (2.0f / cap)) + 1.0f);
    if constexpr (!is_near) return far;
    V u = x * (1.0f / cap), z = u * u;
    V p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return absolute(u) < splat(0.625f) ? x + x * z * p : far;
}

static inline long up(long n, long to) { return (n + to - 1) / to * to; }
static inline long tiles_of(long n, long to) { return (n + to - 1) / to; }

static inline void fetch(const void *from, long bytes) { // into the second cache
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

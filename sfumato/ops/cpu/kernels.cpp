// The CPU operations as one small library with a C interface; `__init__.py` builds, loads and documents it.
//
// Every matrix product goes through one shape of tile: 16 rows of 64 bytes. A holds 16 rows of the left side, B 16
// columns of the right side with its elements interleaved as AMX wants them, C is 16 x 16 in 32 bits. What a tile's 64
// bytes hold is the only difference between the precisions: 16 floats, 32 bfloat16, 64 int8. With AMX a product of two
// tiles is one instruction; without, the same layout is walked by plain vector code, so that all the rest can be
// tested on any machine. Weights lie packed in panels of 32 outputs: [panel][k tile][2][1 KiB], read as one stream.
//
// What Python can see of an argument (type, size, place) it has checked before a call (`calls.py`); numbers that say
// where to read or write are looked at here, and a function gives back what is wrong with them, or 0.
//
// Sums have a fixed order that depends neither on the number of threads nor on the other rows of a batch.

#include "block.h"
#include "conclude.h"
#include "vocabulary.h"

#define BY_IO(...)       \
    if (io) {            \
        typedef bf16 T;  \
        __VA_ARGS__;     \
    } else {             \
        typedef float T; \
        __VA_ARGS__;     \
    }                    \
    return FINE;

enum Refusal { FINE, NO_EXPERT, NO_ROW, NO_HEADS, NO_STATE, FEW_EXPERTS, NO_LANE }; // calls.py has a sentence for each

// Of what attention reads: rows of the cache, new tokens, heads.
static Refusal refusal_of(const Seen &seen, long cache_rows, long heads, long groups, long n) {
    const bool fits = seen.encode >= 0 && seen.canvas >= 0 && seen.ring >= 0 && seen.window >= 0;
    if (!fits || groups < 1 || heads % groups || n % 2) return NO_HEADS;
    for (long b = 0; b < seen.batch; b++) {
        const bool is_row = seen.rows[b] >= 0 && seen.rows[b] < cache_rows && seen.lengths[b] >= 0;
        if (!is_row || seen.counts[b] < 0 || seen.counts[b] > seen.encode) return NO_ROW;
        if (seen.lengths[b] > 0 && seen.ring == 0) return NO_ROW;
    }
    return FINE;
}

// Of weights with factors beside them, in a call of so many tokens.
static Refusal refusal_of(const Operand *weights, long count, long tokens) {
    for (long i = 0; i < count; i++) {
        const Factors &low = weights[i].low;
        if (!low.a) continue;
        if (low.tokens != tokens) return NO_LANE;
        long end = 0;
        for (const Run *run = low.runs; run < low.runs + low.count; run++) {
            const bool fits = run->first >= end && run->size >= 0 && run->size <= tokens - run->first;
            if (!fits || run->lane < 0 || run->lane >= low.lanes) return NO_LANE;
            end = run->first + run->size;
        }
    }
    return FINE;
}

extern "C" {

int sf_start() { // asks the kernel for the tile registers; says which way products go: see tiles.h
    way = DOT_PRODUCTS ? DOTS : PLAIN;
#if AMX
    if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) way = AMX_TILES; // ARCH_REQ_XCOMP_PERM, XTILEDATA
#endif
    return way;
}

int sf_limit(int most) { // tests: no further way than this
    way = std::min((Way)sf_start(), (Way)most);
    if (way == DOTS && !DOT_PRODUCTS) way = PLAIN;
    return way;
}

void sf_place_embedding(void *data, long bytes,
                        int) { // whole huge pages of it; a system without them says no, and nothing is lost
    const uintptr_t page = 1 << 21, from = ((uintptr_t)data + page - 1) / page * page,
                    to = ((uintptr_t)data + bytes) / page * page;
    if (to <= from) return;
    madvise((void *)from, to - from, MADV_HUGEPAGE);
    madvise((void *)from, to - from, 25); // MADV_COLLAPSE, since Linux 6.1
}

long sf_packed_bytes(int kind, long outputs, long inputs) {
    const long k = kind == 2 ? 64 : kind == 1 ? 32 : 16;
    return tiles_of(outputs, 32) * tiles_of(inputs, k) * 2 * TILE;
}

void sf_pack(int kind, const void *from, long outputs, long inputs, void *to, int threads) {
    if (kind == 2) pack_weight<int8_t>((const int8_t *)from, outputs, inputs, (char *)to, threads);
    else if (kind == 1) pack_weight<bf16>((const bf16 *)from, outputs, inputs, (char *)to, threads);
    else pack_weight<float>((const float *)from, outputs, inputs, (char *)to, threads);
}

int sf_linear(int io, const void *x, long rows, long inputs, long count, const Operand *operands, const long *outputs,
              void *const *y, int threads) {
    if (const Refusal no = refusal_of(operands, count, rows)) return no;
    BY_IO((linear<T>((const T *)x, rows, inputs, (int)count, operands, outputs, (T *const *)y, threads)))
}

int sf_feed_forward(int io, const void *x, long rows, long width, long inner, const Operand *three, void *y,
                    int threads) {
    if (const Refusal no = refusal_of(three, 3, rows)) return no;
    BY_IO((feed_forward<T>((const T *)x, rows, width, inner, three, (T *)y, threads)))
}

int sf_experts(int io, const void *x, long tokens, long width, long chosen, const int64_t *index, const float *weight,
               long count, const Operand *two, long inner, void *y, int threads) {
    for (long n = 0; n < tokens * chosen; n++)
        if (index[n] < 0 || index[n] >= count) return NO_EXPERT;
    if (const Refusal no = refusal_of(two, 2, tokens)) return no;
    BY_IO(
        (experts<T>((const T *)x, tokens, width, chosen, index, weight, count, two[0], two[1], inner, (T *)y, threads)))
}

int sf_rms_norm(int io, const void *x, long rows, long n, const void *w, float eps, void *y, int threads) {
    BY_IO((rms_norm<T>((const T *)x, rows, n, (const T *)w, eps, (T *)y, threads)))
}

int sf_norm_rope(int io, const void *x, long places, long heads, long n, const void *w, float eps, const void *cos,
                 const void *sin, void *y, int threads) {
    if (n % 2) return NO_HEADS;
    BY_IO((norm_rope<T>((const T *)x, places, heads, n, (const T *)w, eps, (const T *)cos, (const T *)sin, (T *)y,
                        threads)))
}

int sf_norm_add(int io, const void *residual, const void *x, long rows, long n, const void *w, float eps, void *y,
                int threads) {
    BY_IO((norm_add<T>((const T *)residual, (const T *)x, rows, n, (const T *)w, eps, (T *)y, threads)))
}

int sf_join(int io, const void *residual, const void *dense, const void *sparse, long rows, long n, const void *dense_w,
            const void *sparse_w, const void *w, float eps, const void *scale, long scales, void *y, int threads) {
    if (scales != 1 && scales != rows) return NO_HEADS;
    BY_IO((join<T>((const T *)residual, (const T *)dense, (const T *)sparse, rows, n, (const T *)dense_w,
                   (const T *)sparse_w, (const T *)w, eps, (const T *)scale, scales, (T *)y, threads)))
}

int sf_route(int io, const void *x, long rows, long n, const void *scale, const void *proj, const Operand *beside,
             long count, const void *per_expert, long chosen, float eps, int64_t *index, float *weight, int threads) {
    if (chosen > count) return FEW_EXPERTS;
    if (const Refusal no = refusal_of(beside, 1, rows)) return no;
    BY_IO((route<T>((const T *)x, rows, n, (const T *)scale, (const T *)proj, beside->low, count, (const T *)per_expert,
                    chosen, eps, index, weight, threads)))
}

int sf_attention(int io, const void *q, const void *k, const void *v, const void *k_ring, const void *v_ring,
                 const int64_t *rows, const int64_t *lengths, const int64_t *counts, long cache_rows, long batch,
                 long encode, long canvas, long window, long slots, long heads, long groups, long n, void *out,
                 int threads) {
    Seen seen{rows, lengths, counts, batch, encode, canvas, window, slots - 1};
    if (const Refusal no = refusal_of(seen, cache_rows, heads, groups, n)) return no;
    BY_IO((attention<T>((const T *)q, (const T *)k, (const T *)v, (const T *)k_ring, (const T *)v_ring, seen, heads,
                        groups, n, (T *)out, threads)))
}

int sf_block(int io, const void *x, const void *const *pointers, const Operand *products, const long *sizes, float eps,
             const void *cos, const void *sin, const void *k_ring, const void *v_ring, const int64_t *rows,
             const int64_t *lengths, const int64_t *counts, long cache_rows, long batch, long encode, long canvas,
             long window, long slots, const void *scale, long scales, void *y, void *k, void *v, void *lent,
             long lent_bytes, int threads) {
    Seen seen{rows, lengths, counts, batch, encode, canvas, window, slots - 1};
    Layer w;
    Sizes n;
    memcpy(&w, pointers, sizeof w);
    memcpy(&n, sizes, sizeof n);
    if (const Refusal no = refusal_of(seen, cache_rows, n.heads, n.groups, n.head)) return no;
    if (scales != 1 && scales != batch * (encode + canvas)) return NO_HEADS;
    if (n.chosen > n.experts) return FEW_EXPERTS;
    if (const Refusal no = refusal_of(products, PRODUCTS, batch * (encode + canvas))) return no;
    const long half = lent_bytes / 2 / 64 * 64;
    const Scratch::Loan one(between, (char *)lent, half), two(shared, (char *)lent + half, half);
    BY_IO((block<T>((const T *)x, w, products, n, eps, (const T *)cos, (const T *)sin, (const T *)k_ring,
                    (const T *)v_ring, seen, (const T *)scale, scales, (T *)y, (T *)k, (T *)v, threads)))
}

long sf_words() { return WORDS; }

int sf_read_out(int io, const void *hidden, long positions, long n, const void *embed, long words, float cap,
                const float *inverse_temperature, const uint8_t *is_banned, const int64_t *banned, long bans,
                const float *uniform, void *logits, float *mass, int64_t *sample, int64_t *argmax, float *entropy,
                float *peak, int threads) {
    between.release(4 << 20), shared.release(4 << 20); // before the logits are there
    Places at{positions, words, cap, inverse_temperature, is_banned, banned, bans};
    BY_IO((read_out<T>((const T *)hidden, n, (const T *)embed, at, uniform, (T *)logits, mass, sample, argmax, entropy,
                       peak, threads)))
}

int sf_soft_embedding(int io, const void *logits, long batch, long length, long words, const void *embed, long n,
                      const float *peak, const float *mass, float least, float scale, void *y, int threads) {
    BY_IO((soft_embedding<T>((const T *)logits, batch, length, words, (const T *)embed, n, peak, mass, least, scale,
                             (T *)y, threads)))
}

int sf_conclude(int io, const void *const *pointers, const long *sizes, int threads) {
    Ending step;
    Extent extent;
    memcpy(&step, pointers, sizeof step);
    memcpy(&extent, sizes, sizeof extent);
    if (!is_inside(step, extent)) return NO_STATE;
    BY_IO((conclude<T>(step, extent, threads)))
}
}

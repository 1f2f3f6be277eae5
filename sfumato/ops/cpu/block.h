// A whole layer: the operations one after the other, with what lies between them in memory that stays warm.
#pragma once

#include "attention.h"
#include "products.h"
#include "rows.h"

struct Layer { // in this order as pointers from outside
    const void *input_norm, *q_norm, *k_norm, *after_attention, *before_dense, *after_dense, *router_scale, *router;
    const void *per_expert, *before_experts, *after_experts, *after;
};
// Weights of products, in this order; of the router the factors alone.
enum { Q, KEYS_OF, VALUES_OF, O, GATE, UP, DOWN, GATE_UP, EXPERT_DOWN, ROUTER, PRODUCTS };
struct Sizes {
    long width, heads, groups, head, inner, experts, expert_inner, chosen;
};

static thread_local Scratch between;

// x and y are [batch, encode + canvas, width]; k and v come out normed and turned, for the cache.
template <class T>
static void block_of(const T *x, const Layer &w, const Operand *products, Sizes n, float eps, const T *cos,
                     const T *sin, const T *k_ring, const T *v_ring, Seen seen, const T *scale, long scales, T *y, T *k,
                     T *v, int threads) {
    const long rows = seen.batch * (seen.encode + seen.canvas), wide = n.heads * n.head, narrow = n.groups * n.head;
    // Columns of every row, one behind the other; what attention needed makes room for what comes after it.
    const long column = up(rows * sizeof(T), 64), first = wide + 2 * narrow, second = 3 * n.width;
    char *at = between.get(column * (n.width + std::max(first, second)) + rows * n.chosen * 12);
    T *normed = (T *)at, *mixed = normed;
    T *q = (T *)(at + column * n.width), *k_raw = (T *)((char *)q + column * wide);
    T *v_raw = (T *)((char *)k_raw + column * narrow);
    T *residual = q, *dense = (T *)((char *)q + column * n.width), *sparse = (T *)((char *)dense + column * n.width);
    int64_t *index = (int64_t *)(at + column * (n.width + std::max(first, second)));
    float *share = (float *)(index + rows * n.chosen);

    rms_norm<T>(x, rows, n.width, (const T *)w.input_norm, eps, normed, threads);
    T *const to[3] = {q, k_raw, v_raw};
    const long outputs[3] = {wide, narrow, narrow};
    const bool has_values = products[VALUES_OF].data;
    linear<T>(normed, rows, n.width, has_values ? 3 : 2, products + Q, outputs, to, threads);
    norm_rope<T>(q, rows, n.heads, n.head, (const T *)w.q_norm, eps, cos, sin, q, threads);
    norm_rope<T>(k_raw, rows, n.groups, n.head, (const T *)w.k_norm, eps, cos, sin, k, threads);
    rms_norm<T>(has_values ? v_raw : k_raw, rows * n.groups, n.head, nullptr, eps, v, threads);
    attention<T>(q, k, v, k_ring, v_ring, seen, n.heads, n.groups, n.head, q, threads);
    linear<T>(q, rows, wide, 1, products + O, &n.width, &mixed, threads);
    norm_add<T>(x, mixed, rows, n.width, (const T *)w.after_attention, eps, residual, threads);

    rms_norm<T>(residual, rows, n.width, (const T *)w.before_dense, eps, normed, threads);
    feed_forward<T>(normed, rows, n.width, n.inner, products + GATE, dense, threads);
    route<T>(residual, rows, n.width, (const T *)w.router_scale, (const T *)w.router,
             products[ROUTER].low, n.experts, (const T *)w.per_expert, n.chosen, eps, index, share, threads);
    rms_norm<T>(residual, rows, n.width, (const T *)w.before_experts, eps, normed, threads);
    experts<T>(normed, rows, n.width, n.chosen, index, share, n.experts, products[GATE_UP], products[EXPERT_DOWN],
               n.expert_inner, sparse, threads);
    join<T>(residual, dense, sparse, rows, n.width, (const T *)w.after_dense, (const T *)w.after_experts,
            (const T *)w.after, eps, scale, scales, y, threads);
}

static long bytes_of(const Operand &w, long outputs, long inputs) {
    const long elements = up(outputs, 32) * inputs;
    return w.kind == HALVES ? elements / 2 : w.kind >= INT8 ? elements : w.kind == BF16 ? 2 * elements : 4 * elements;
}

// Where the weights of a layer stay in the second cache, a thread takes a row of the batch through all of the layer:
// nothing of it leaves the nearest caches, and nobody waits for the other threads between two operations.
template <class T>
static void block(const T *x, const Layer &w, const Operand *products, Sizes n, float eps, const T *cos, const T *sin,
                  const T *k_ring, const T *v_ring, Seen seen, const T *scale, long scales, T *y, T *k, T *v,
                  int threads) {
    const long wide = n.heads * n.head, narrow = n.groups * n.head;
    long weights = bytes_of(products[Q], 2 * wide + 2 * narrow, n.width);
    weights += bytes_of(products[GATE], n.inner, n.width) + bytes_of(products[UP], 2 * n.inner, n.width);
    weights += n.experts * bytes_of(products[GATE_UP], 3 * n.expert_inner, n.width);
    if (threads == 1 || seen.batch < 2 * threads || weights > WARM) {
        block_of<T>(x, w, products, n, eps, cos, sin, k_ring, v_ring, seen, scale, scales, y, k, v, threads);
        return;
    }
    const long rows = seen.encode + seen.canvas;
    auto one_row = [&](long b) {
        const Seen one{seen.rows + b, seen.lengths + b, seen.counts + b, 1,
                       seen.encode,   seen.canvas,      seen.window,     seen.ring};
        const long from = b * rows;
        Operand own[PRODUCTS];
        memcpy(own, products, sizeof own);
        for (Operand &product : own) product.low.from = from;
        block_of<T>(x + from * n.width, w, own, n, eps, cos + from * n.head, sin + from * n.head, k_ring, v_ring,
                    one, scale + (scales > 1 ? from : 0), scales > 1 ? rows : 1, y + from * n.width, k + from * narrow,
                    v + from * narrow, 1);
    };
    together(threads, [&](Team &team) { team.each(seen.batch, 1, one_row); });
}

// A whole layer: the operations one after the other, with what lies between them in memory that stays warm.
#pragma once

#include "attention.h"
#include "products.h"
#include "rows.h"

struct Layer { // in this order as pointers from outside; a packed weight is its data and its scales
    const void *input_norm, *q, *q_scale, *k, *k_scale, *v, *v_scale, *o, *o_scale, *q_norm, *k_norm, *after_attention;
    const void *before_dense, *gate, *gate_scale, *up, *up_scale, *down, *down_scale, *after_dense;
    const void *router_scale, *router, *per_expert, *before_experts, *gate_up, *gate_up_scale, *expert_down;
    const void *expert_down_scale, *after_experts, *after;
};
struct Sizes {
    long width, heads, groups, head, inner, experts, expert_inner, chosen;
};

static thread_local Scratch between;

// x and y are [batch, encode + canvas, width]; k and v come out normed and turned, for the cache.
template <class T, class M>
static void block(const T *x, const Layer &w, Sizes n, float eps, const T *cos, const T *sin, const T *k_ring,
                  const T *v_ring, Seen seen, const T *scale, long scales, T *y, T *k, T *v, int threads) {
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
    const Weight<M> three[3] = {weight_of<M>(w.q, w.q_scale, wide, n.width),
                                weight_of<M>(w.k, w.k_scale, narrow, n.width),
                                weight_of<M>(w.v, w.v_scale, narrow, n.width)};
    T *const to[3] = {q, k_raw, v_raw};
    linear<T, M>(normed, rows, w.v ? 3 : 2, three, to, threads);
    norm_rope<T>(q, rows, n.heads, n.head, (const T *)w.q_norm, eps, cos, sin, q, threads);
    norm_rope<T>(k_raw, rows, n.groups, n.head, (const T *)w.k_norm, eps, cos, sin, k, threads);
    rms_norm<T>(w.v ? v_raw : k_raw, rows * n.groups, n.head, nullptr, eps, v, threads);
    attention<T>(q, k, v, k_ring, v_ring, seen, n.heads, n.groups, n.head, q, threads);
    const Weight<M> o = weight_of<M>(w.o, w.o_scale, n.width, wide);
    linear<T, M>(q, rows, 1, &o, &mixed, threads);
    norm_add<T>(x, mixed, rows, n.width, (const T *)w.after_attention, eps, residual, threads);

    rms_norm<T>(residual, rows, n.width, (const T *)w.before_dense, eps, normed, threads);
    feed_forward<T, M>(normed, rows, weight_of<M>(w.gate, w.gate_scale, n.inner, n.width),
                       weight_of<M>(w.up, w.up_scale, n.inner, n.width),
                       weight_of<M>(w.down, w.down_scale, n.width, n.inner), dense, threads);
    route<T>(residual, rows, n.width, (const T *)w.router_scale, (const T *)w.router, n.experts,
             (const T *)w.per_expert, n.chosen, eps, index, share, threads);
    rms_norm<T>(residual, rows, n.width, (const T *)w.before_experts, eps, normed, threads);
    experts<T, M>(normed, rows, n.width, n.chosen, index, share, n.experts, (const char *)w.gate_up,
                  (const float *)w.gate_up_scale, (const char *)w.expert_down, (const float *)w.expert_down_scale,
                  n.expert_inner, sparse, threads);
    join<T>(residual, dense, sparse, rows, n.width, (const T *)w.after_dense, (const T *)w.after_experts,
            (const T *)w.after, eps, scale, scales, y, threads);
}

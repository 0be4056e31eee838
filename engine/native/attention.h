// Paged attention of a few queries that share one key-value head. Pages hold sixteen tokens: keys as [units][16] like a
// weight panel, so that scores of sixteen tokens come from one accumulator; values as [16][head_dim].
#pragma once
#include "simd.h"

static const int PAGE = 16, QUERIES = 8;

template <class A> struct Pages {
    const uint8_t *keys, *values;   // [blocks][kv_heads][16 * head_dim elements]
    const int64_t *table;           // block numbers of this sequence
    int kv_heads, head, head_dim;

    size_t page(int block) const {
        return ((size_t)table[block] * kv_heads + head) * PAGE * head_dim * sizeof(typename A::element);
    }
};

// scores[q][16 * block ..]: minus infinity where query q, at position at[q], may not look.
template <class A, int N>
static void score(const Pages<A> &pages, const uint32_t *const *q, const int *at, int window, int first, int last,
                  float *scores, size_t stride) {
    const int units = pages.head_dim / A::values;
    const v16i lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int block = first; block <= last; block++) {
        const uint8_t *keys = pages.keys + pages.page(block), *soon = pages.values + pages.page(block);
        const uint8_t *next = pages.keys + pages.page(block < last ? block + 1 : block);
        v16f acc[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) acc[i] = (v16f){};
        for (int u = 0; u < units; u++) {
            // Pages lie apart, so the processor cannot guess the next one.
            __builtin_prefetch(next + (size_t)u * 64);
            __builtin_prefetch(soon + (size_t)u * 64, 0, 2);
            v16u w = A::weights(keys + (size_t)u * 64);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) acc[i] = A::mac(acc[i], w, q[i][u]);
        }
        v16i position = lanes + block * PAGE;
        for (int i = 0; i < N; i++) {
            if (block * PAGE + PAGE - 1 > at[i]) acc[i] = position > at[i] ? splat(-INFINITY) : acc[i];
            if (window && block * PAGE <= at[i] - window)
                acc[i] = position <= at[i] - window ? splat(-INFINITY) : acc[i];
            store(scores + i * stride + block * PAGE, acc[i]);
        }
    }
}

// Turns scores into unnormalised weights in place; returns their sum.
static float soften(float *scores, int from, int to) {
    v16f best = splat(-INFINITY), total = {};
    for (int t = from; t < to; t += 16) best = larger(best, load(scores + t));
    v16f top = splat(largest(best));
    for (int t = from; t < to; t += 16) {
        v16f s = load(scores + t), weight = s == -INFINITY ? splat(0) : exp16(s - top);
        store(scores + t, weight);
        total += weight;
    }
    return sum(total);
}

template <class A, int N>
static void mix(const Pages<A> &pages, const float *scores, size_t stride, const float *sums, int from, int to,
                uint8_t *const *out) {
    typedef typename A::element element;
    for (int d = 0; d < pages.head_dim; d += 64) {
        int vectors = (pages.head_dim - d) / 16 < 4 ? (pages.head_dim - d) / 16 : 4;
        v16f acc[N][4] = {};
        for (int t = from; t < to; t++) {
            const element *row = (const element *)(pages.values + pages.page(t / PAGE)) + (t % PAGE) * pages.head_dim + d;
            if (vectors == 4) {
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) {
                    v16f value = A::get(row + v * 16);
#pragma GCC unroll 4
                    for (int i = 0; i < N; i++) acc[i][v] += value * scores[i * stride + t];
                }
            } else {
                for (int v = 0; v < vectors; v++)
                    for (int i = 0; i < N; i++) acc[i][v] += A::get(row + v * 16) * scores[i * stride + t];
            }
        }
        for (int i = 0; i < N; i++)
            for (int v = 0; v < vectors; v++) A::put((element *)out[i] + d + v * 16, acc[i][v] / sums[i]);
    }
}

// `count` <= QUERIES queries at positions `at`; `scores` holds QUERIES rows of `stride` floats.
template <class A>
static void attend(const Pages<A> &pages, const uint32_t *const *q, const int *at, int count, int window,
                   uint8_t *const *out, float *scores, size_t stride) {
    typedef void (*Score)(const Pages<A> &, const uint32_t *const *, const int *, int, int, int, float *, size_t);
    static const Score score_of[] = {score<A, 1>, score<A, 2>, score<A, 3>, score<A, 4>,
                                     score<A, 5>, score<A, 6>, score<A, 7>, score<A, 8>};
    typedef void (*Mix)(const Pages<A> &, const float *, size_t, const float *, int, int, uint8_t *const *);
    static const Mix mix_of[] = {mix<A, 1>, mix<A, 2>, mix<A, 3>, mix<A, 4>};
    int from = window && at[0] >= window ? (at[0] - window + 1) : 0, to = at[count - 1] + 1;
    int first = from / PAGE, last = (to - 1) / PAGE;
    score_of[count - 1](pages, q, at, window, first, last, scores, stride);
    float sums[QUERIES];
    for (int i = 0; i < count; i++) sums[i] = soften(scores + i * stride, first * PAGE, (last + 1) * PAGE);
    for (int i = 0; i < count; i += 4) {
        int some = count - i < 4 ? count - i : 4;
        mix_of[some - 1](pages, scores + i * stride, stride, sums + i, from, to, out + i);
    }
}

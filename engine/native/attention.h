// Paged attention of a few queries that share one key-value head. Pages hold sixteen tokens: keys as [units][16] like a
// weight panel, so that scores of sixteen tokens come from one accumulator; values as [16][head_dim].
#pragma once
#include "simd.h"

static const int PAGE = 16, QUERIES = 8;
// Queries that are scored and mixed at a time.
static const int SCORED = SUMS < QUERIES ? SUMS : QUERIES, MIXED = SUMS < 4 ? SUMS : 4;

// The first of the fewest shares of at most `most` into which `left` can be split evenly.
static inline int share(int left, int most) {
    int shares = (left + most - 1) / most;
    return (left + shares - 1) / shares;
}

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
    static const int32_t counted[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const v16i lanes = read<v16i>(counted);
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
#pragma GCC unroll 2
            for (int part = 0; part < A::parts; part++) {
                v16u w = A::weights(keys + (size_t)u * 64, part);
                if (N > 1) hold(w);
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) acc[i] = A::mac(acc[i], w, q[i][u * A::parts + part]);
            }
        }
        v16i position = lanes + block * PAGE;
        for (int i = 0; i < N; i++) {
            if (block * PAGE + PAGE - 1 > at[i]) acc[i] = select(position > at[i], splat(-INFINITY), acc[i]);
            if (window && block * PAGE <= at[i] - window)
                acc[i] = select(position <= at[i] - window, splat(-INFINITY), acc[i]);
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
        v16f s = load(scores + t);
        v16f weight = select(s == -INFINITY, splat(0.0f), exp16(s - top));
        store(scores + t, weight);
        total += weight;
    }
    return sum(total);
}

// V vectors of each query's output, the first of them vector `v`.
template <class A, int N, int V>
static void mix_some(const Pages<A> &pages, const float *scores, size_t stride, const float *sums, int from, int to, int v,
                     uint8_t *const *out) {
    typedef typename A::element element;
    typedef typename A::Input X;
    v16f acc[N][V];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) acc[i][j] = v16f{};
    for (int t = from; t < to;) {
        const element *row = (const element *)(pages.values + pages.page(t / PAGE)) + (t % PAGE) * pages.head_dim + v * 16;
        for (int end = t / PAGE * PAGE + PAGE < to ? t / PAGE * PAGE + PAGE : to; t < end; t++, row += pages.head_dim) {
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) {
                v16f value = A::get(row + j * 16);
                if (N > 1) hold(value);
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) acc[i][j] += value * scores[i * stride + t];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) X::put((typename X::element *)out[i] + (v + j) * 16, acc[i][j] / sums[i]);
}

template <class A, int N>
static void mix(const Pages<A> &pages, const float *scores, size_t stride, const float *sums, int from, int to,
                uint8_t *const *out) {
    const int most = SUMS / N >= 4 ? 4 : SUMS / N >= 2 ? 2 : 1;
    int vectors = pages.head_dim / 16, v = 0;
    for (; v + most <= vectors; v += most) mix_some<A, N, most>(pages, scores, stride, sums, from, to, v, out);
    for (; v < vectors; v++) mix_some<A, N, 1>(pages, scores, stride, sums, from, to, v, out);
}

// `count` <= QUERIES queries at positions `at`; `scores` holds QUERIES rows of `stride` floats.
template <class A>
static void attend(const Pages<A> &pages, const uint32_t *const *q, const int *at, int count, int window,
                   uint8_t *const *out, float *scores, size_t stride) {
    typedef void (*Score)(const Pages<A> &, const uint32_t *const *, const int *, int, int, int, float *, size_t);
#define SCORE(n) score<A, n <= SCORED ? n : 1>
    static const Score score_of[] = {SCORE(1), SCORE(2), SCORE(3), SCORE(4), SCORE(5), SCORE(6), SCORE(7), SCORE(8)};
#undef SCORE
    typedef void (*Mix)(const Pages<A> &, const float *, size_t, const float *, int, int, uint8_t *const *);
    static const Mix mix_of[] = {mix<A, 1>, mix<A, 2>, mix<A, 3>, mix<A, 4>};
    int from = window && at[0] >= window ? (at[0] - window + 1) : 0, to = at[count - 1] + 1;
    int first = from / PAGE, last = (to - 1) / PAGE;
    for (int i = 0, some; i < count; i += some) {
        some = share(count - i, SCORED);
        score_of[some - 1](pages, q + i, at + i, window, first, last, scores + i * stride, stride);
    }
    float sums[QUERIES];
    for (int i = 0; i < count; i++) sums[i] = soften(scores + i * stride, first * PAGE, (last + 1) * PAGE);
    for (int i = 0, some; i < count; i += some) {
        some = share(count - i, MIXED);
        mix_of[some - 1](pages, scores + i * stride, stride, sums + i, from, to, out + i);
    }
}

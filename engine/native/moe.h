// A mixture of experts: tokens are sorted by expert, every expert in use multiplies its tokens once, and each token adds
// its experts' answers in the order of their weights, so its result does not depend on the tokens beside it.
#pragma once
#include "products.h"

struct Moe {
    Matrix router;
    const Matrix *gate_up, *down;   // [experts]
    int32_t experts, per_token, normalize, unused;  // experts 0: the layer is dense
};

// Room for `pairs` (token, expert) pairs, sorted by expert.
struct MoeRoom {
    uint8_t *x, *wide;      // [pairs, hidden], [pairs, intermediate] elements
    float *y, *weight;      // [pairs, hidden], [pairs]
    int32_t *chosen, *place, *starts;   // [pairs], [pairs], [experts + 1]
};

// The token's experts, most likely first, and their weights; `logits` becomes scratch.
static void route(const Moe &moe, float *logits, int32_t *chosen, float *weight) {
    float top = logits[0], total = 0, kept = 0;
    for (int e = 1; e < moe.experts; e++) top = logits[e] > top ? logits[e] : top;
    for (int e = 0; e < moe.experts; e++) total += logits[e] = expf(logits[e] - top);
    for (int k = 0; k < moe.per_token; k++) {
        int best = 0;
        for (int e = 1; e < moe.experts; e++)
            if (logits[e] > logits[best]) best = e;
        chosen[k] = best, weight[k] = logits[best] / total, kept += weight[k];
        logits[best] = -1;
    }
    for (int k = 0; moe.normalize && k < moe.per_token; k++) weight[k] /= kept;
}

// h += mixture(x) for `rows` tokens; `logits` holds [rows, padded experts] floats.
template <class A>
static void add_experts(Pool &pool, const Moe &moe, const MoeRoom &room, const uint32_t *x, int rows, int hidden,
                        float *logits, float *h) {
    typedef typename A::Input X;
    const int pairs = rows * moe.per_token, stride = hidden / X::values, wide = moe.gate_up[0].outputs / 2;
    multiply<A>(pool, moe.router, x, rows, {logits, nullptr, moe.router.outputs, STORE});
    memset(room.starts, 0, sizeof(int32_t) * (moe.experts + 1));
    for (int t = 0; t < rows; t++) {
        int32_t *chosen = room.chosen + t * moe.per_token;
        route(moe, logits + (size_t)t * moe.router.outputs, chosen, room.weight + t * moe.per_token);
        for (int k = 0; k < moe.per_token; k++) room.starts[chosen[k] + 1]++;
    }
    for (int e = 0; e < moe.experts; e++) room.starts[e + 1] += room.starts[e];
    for (int pair = pairs - 1; pair >= 0; pair--) {
        // Counting down, each expert's start moves to its first pair: the starts are whole again afterwards.
        int place = room.place[pair] = --room.starts[room.chosen[pair] + 1];
        memcpy(room.x + (size_t)place * stride * 4, x + (size_t)(pair / moe.per_token) * stride, (size_t)stride * 4);
    }
    pool.each(moe.experts, [&](int, int expert) {
        int start = room.starts[expert + 1], end = expert + 2 <= moe.experts ? room.starts[expert + 2] : pairs;
        if (start == end) return;
        static thread_local Pool alone;
        const uint32_t *mine = (const uint32_t *)room.x + (size_t)start * stride;
        uint8_t *gated = room.wide + (size_t)start * wide * sizeof(typename X::element);
        multiply<A>(alone, moe.gate_up[expert], mine, end - start, {nullptr, gated, 2 * wide, SWIGLU});
        multiply<A>(alone, moe.down[expert], (const uint32_t *)gated, end - start,
                    {room.y + (size_t)start * hidden, nullptr, hidden, STORE});
    });
    for (int pair = 0; pair < pairs; pair++) {
        float *to = h + (size_t)(pair / moe.per_token) * hidden;
        const float *y = room.y + (size_t)room.place[pair] * hidden;
        for (int i = 0; i < hidden; i += 16) store(to + i, load(to + i) + load(y + i) * room.weight[pair]);
    }
}

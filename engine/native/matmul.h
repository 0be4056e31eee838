// y = x Wᵀ for a few or many rows. Weights are packed in panels of sixteen outputs, [outputs / 16][units][16], so that
// one load feeds sixteen dot products. Every output sums its terms in the same order whatever the number of rows: a
// row's result does not depend on its company.
#pragma once
#include "pool.h"
#include "simd.h"

enum Kind { FP32 = 0, BF16 = 1, INT8 = 2 };

struct Matrix {
    const uint8_t *data;  // packed panels, 64-byte aligned
    const float *scale;   // per output, for INT8
    const float *bias;    // per output, or null
    int32_t outputs, inputs, kind, unused;
};

enum Mode { STORE, ADD, SWIGLU };

struct Out {
    float *to;          // [rows, stride], for STORE and ADD
    uint8_t *units;     // [rows, outputs / 2] elements, for SWIGLU: gate and up panels alternate
    int stride;
    Mode mode;
};

template <class W, int MR, int NP>
static inline __attribute__((always_inline)) void tile(const uint8_t *w, size_t panel, int units, const uint32_t *x,
                                                       int stride, v16f acc[MR][NP]) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
        for (int p = 0; p < NP; p++) acc[m][p] = (v16f){};
    for (int k = 0; k < units; k++) {
        v16u weights[NP];
#pragma GCC unroll 16
        for (int p = 0; p < NP; p++) weights[p] = W::weights(w + p * panel + (size_t)k * W::bytes);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
            for (int p = 0; p < NP; p++) acc[m][p] = W::mac(acc[m][p], weights[p], x[(size_t)m * stride + k]);
    }
}

template <class A>
static inline void finish(const Matrix &w, v16f *acc, int panels, int panel, int row, const Out &out) {
    for (int p = 0; p < panels; p++) {
        int column = (panel + p) * 16;
        if (w.scale) acc[p] *= load(w.scale + column);
        if (w.bias) acc[p] += load(w.bias + column);
        float *to = out.to + (size_t)row * out.stride + column;
        if (out.mode == STORE) store(to, acc[p]);
        if (out.mode == ADD) store(to, load(to) + acc[p]);
        if (out.mode == SWIGLU && p % 2)
            A::put((typename A::element *)out.units + ((size_t)row * w.outputs / 2 + column / 2 - 8),
                   silu(acc[p - 1]) * acc[p]);
    }
}

template <class W, class A, int MR, int NP>
static void block(const Matrix &w, const uint32_t *x, int stride, int row, int panel, const Out &out) {
    int units = w.inputs / W::values;
    size_t bytes = (size_t)units * W::bytes;
    v16f acc[MR][NP];
    tile<W, MR, NP>(w.data + panel * bytes, bytes, units, x + (size_t)row * stride, stride, acc);
    for (int m = 0; m < MR; m++) finish<A>(w, acc[m], NP, panel, row + m, out);
}

template <class W, class A, int NP>
static void rows_of(const Matrix &w, const uint32_t *x, int stride, int rows, int panel, const Out &out) {
    typedef void (*Block)(const Matrix &, const uint32_t *, int, int, int, const Out &);
    static const Block blocks[] = {
        block<W, A, 1, NP>, block<W, A, 2, NP>, block<W, A, 3, NP>, block<W, A, 4, NP>,
        block<W, A, NP == 2 ? 5 : 1, NP>, block<W, A, NP == 2 ? 6 : 1, NP>, block<W, A, NP == 2 ? 7 : 1, NP>,
        block<W, A, NP == 2 ? 8 : 1, NP>, block<W, A, NP == 2 ? 9 : 1, NP>, block<W, A, NP == 2 ? 10 : 1, NP>,
        block<W, A, NP == 2 ? 11 : 1, NP>, block<W, A, NP == 2 ? 12 : 1, NP>};
    const int most = NP == 2 ? 12 : 4;
    int tiles = (rows + most - 1) / most;
    for (int t = 0, row = 0; t < tiles; t++) {
        int take = (rows - row + tiles - t - 1) / (tiles - t);
        blocks[take - 1](w, x, stride, row, panel, out);
        row += take;
    }
}

// `x` is [rows, stride] units. Panels are shared out in groups; a group stays in cache while all rows pass over it.
template <class W, class A>
static void matmul(Pool &pool, const Matrix &w, const uint32_t *x, int stride, int rows, const Out &out) {
    int panels = w.outputs / 16;
    int width = rows == 1 ? 8 : rows <= 4 ? 4 : 2;
    // Few groups would leave a thread idle at the end.
    while (width > 2 && panels < 4 * width * pool.threads) width /= 2;
    int groups = (panels + width - 1) / width;
    pool.each(groups, [&](int, int group) {
        int panel = group * width, left = panels - panel < width ? panels - panel : width;
        while (left) {
            if (left >= 8 && rows == 1) block<W, A, 1, 8>(w, x, stride, 0, panel, out), panel += 8, left -= 8;
            else if (left >= 4 && rows <= 4) rows_of<W, A, 4>(w, x, stride, rows, panel, out), panel += 4, left -= 4;
            else if (left >= 2) rows_of<W, A, 2>(w, x, stride, rows, panel, out), panel += 2, left -= 2;
            else for (int row = 0; row < rows; row++) block<W, A, 1, 1>(w, x, stride, row, panel, out), left = 0;
        }
    });
}

template <class A>
static void multiply(Pool &pool, const Matrix &w, const uint32_t *x, int rows, const Out &out) {
    int stride = w.inputs / A::values;
    if (w.kind == INT8) matmul<Int8, A>(pool, w, x, stride, rows, out);
    else matmul<A, A>(pool, w, x, stride, rows, out);
}

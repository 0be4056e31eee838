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
    int32_t outputs, inputs, kind;
    int32_t far;          // the model is larger than the caches: one slower pass over its weights beats two
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
                                                       int stride, bool ahead, v16f out[MR][NP]) {
    // Few rows over weights from memory are done before the processor has noticed what it should have fetched.
    const bool soon = ahead && SUMS < 24 && MR <= 2;
    ahead = ahead && !soon;
    // Sums live in registers only if nobody takes the address of the array they are in.
    v16f acc[MR][NP];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
        for (int p = 0; p < NP; p++) acc[m][p] = (v16f){};
    for (int k = 0; k < units; k++) {
        if (ahead)
#pragma GCC unroll 16
            for (int p = 0; p < NP; p++) __builtin_prefetch(w + (NP + p) * panel + (size_t)k * W::bytes, 0, 2);
        if (soon)
#pragma GCC unroll 16
            for (int p = 0; p < NP; p++) __builtin_prefetch(w + p * panel + (size_t)(k + 16) * W::bytes);
#pragma GCC unroll 2
        for (int part = 0; part < W::parts; part++) {
            v16u weights[NP];
#pragma GCC unroll 16
            for (int p = 0; p < NP; p++) {
                weights[p] = W::weights(w + p * panel + (size_t)k * W::bytes, part);
                if (MR > 1 && p + MR * NP <= SUMS) hold(weights[p]);
            }
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
                for (int p = 0; p < NP; p++) acc[m][p] = W::mac(acc[m][p], weights[p], x[(size_t)m * stride + k * W::parts + part]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
        for (int p = 0; p < NP; p++) out[m][p] = acc[m][p];
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
static void block(const Matrix &w, const uint32_t *x, int stride, int row, int panel, bool ahead, const Out &out) {
    int units = w.inputs / W::values;
    size_t bytes = (size_t)units * W::bytes;
    v16f acc[MR][NP];
    const uint8_t *from = w.data + panel * bytes;
    x += (size_t)row * stride;
    // A weight that is taken in parts needs a register more.
    if (MR * NP <= SUMS - (W::parts > 1 && SUMS < 24 ? 2 : 0)) {
        tile<W, MR, NP>(from, bytes, units, x, stride, ahead, acc);
    } else {  // more sums than registers: one panel after the other
        v16f one[MR][1];
        for (int p = 0; p < NP; p++) {
            tile<W, MR, 1>(from + p * bytes, bytes, units, x, stride, true, one);
            for (int m = 0; m < MR; m++) acc[m][p] = one[m][0];
        }
    }
    for (int m = 0; m < MR; m++) finish<A>(w, acc[m], NP, panel, row + m, out);
}

// All rows over NP panels, in tiles as tall as registers allow (MOST), all about equally tall.
template <class W, class A, int NP, int MOST>
static void rows_of(const Matrix &w, const uint32_t *x, int stride, int rows, int panel, bool ahead, const Out &out) {
    typedef void (*Block)(const Matrix &, const uint32_t *, int, int, int, bool, const Out &);
#define TALL(n) block<W, A, n <= MOST ? n : 1, NP>
    static const Block blocks[] = {TALL(1), TALL(2),  TALL(3),  TALL(4),  TALL(5),  TALL(6),  TALL(7),  TALL(8),
                                   TALL(9), TALL(10), TALL(11), TALL(12), TALL(13), TALL(14), TALL(15), TALL(16)};
#undef TALL
    int tiles = (rows + MOST - 1) / MOST;
    for (int t = 0, row = 0; t < tiles; t++) {
        int take = (rows - row + tiles - t - 1) / (tiles - t);
        blocks[take - 1](w, x, stride, row, panel, ahead && t == tiles - 1, out);
        row += take;
    }
}

// Panels `panel` .. `panel + left` for all rows; a group of them stays in cache while the rows pass over it, and the
// last rows fetch the next group meanwhile.
template <class W, class A>
static void panels_of(const Matrix &w, const uint32_t *x, int stride, int rows, int panel, int left, const Out &out) {
    for (int width; left; panel += width, left -= width) {
#if defined(__AVX512F__)
        if (rows == 1 && left >= 8) width = 8, rows_of<W, A, 8, 1>(w, x, stride, rows, panel, false, out);
        else if (rows <= 4 && left >= 4) width = 4, rows_of<W, A, 4, 4>(w, x, stride, rows, panel, false, out);
        else if (w.far && rows > 12 && rows <= 16 && left >= 2)
            width = 2, rows_of<W, A, 2, 16>(w, x, stride, rows, panel, false, out);
        else if (left >= 2) width = 2, rows_of<W, A, 2, 12>(w, x, stride, rows, panel, left >= 4, out);
        else width = 1, rows_of<W, A, 1, 12>(w, x, stride, rows, panel, false, out);
#else
        // Few rows need several panels to keep the multipliers busy; many would not leave room for them.
        const int lone = SUMS < 4 || W::bytes < 64 ? 2 : 4, few = SUMS / 2 - (W::parts > 1);
        if (rows == 1 && left >= lone) width = lone, rows_of<W, A, lone, 1>(w, x, stride, rows, panel, w.far, out);
        else if (rows <= few && left >= 2) width = 2, rows_of<W, A, 2, few ? few : 1>(w, x, stride, rows, panel, w.far, out);
        else if (left >= 2) width = 2, rows_of<W, A, 2, SUMS>(w, x, stride, rows, panel, left >= 4, out);
        else width = 1, rows_of<W, A, 1, SUMS>(w, x, stride, rows, panel, false, out);
#endif
    }
}

// y = x Wᵀ, on the threads there are: in matrix tiles where the CPU has them and the weights allow, else in vectors.
#pragma once
#include "matmul.h"
#include "tiles.h"

// `x` is [rows, stride] units; chunks of panels are shared out among the threads.
template <class W, class A>
static void matmul(Pool &pool, const Matrix &w, const uint32_t *x, int stride, int rows, const Out &out) {
    int panels = w.outputs / 16, threads = pool.active(), width = threads == 1 ? panels : 16;
    // Few chunks would leave a thread idle at the end.
    while (threads > 1 && width > 2 && panels < 4 * width * threads) width /= 2;
    pool.each((panels + width - 1) / width, [&](int, int chunk) {
        int panel = chunk * width, left = panels - panel < width ? panels - panel : width;
        if (fits_tiles<A>(w)) tiles_of<W, A>(w, x, stride, rows, panel, left, out);
        else panels_of<W, A>(w, x, stride, rows, panel, left, out);
    });
}

template <class A>
static void multiply(Pool &pool, const Matrix &w, const uint32_t *x, int rows, const Out &out) {
    typedef typename A::Input X;
    int stride = w.inputs / X::values;
    if (w.kind == INT8) matmul<Int8, X>(pool, w, x, stride, rows, out);
    else matmul<A, X>(pool, w, x, stride, rows, out);
}

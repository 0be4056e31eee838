// The same products on CPUs with matrix tiles (AMX): sixteen rows by sixteen outputs by 32 values an instruction. Packed
// panels are what a tile wants, so weights stay as they are; a few rows cost hardly more than one. Sums have one order
// whatever the number of rows, and every product of a matrix goes this way or none does.
#pragma once
#include "matmul.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

static const int TALL = 16, DEEP = 16;  // rows of a tile, and units: what fits into 64 bytes

// Linux lends tiles to processes that ask (ARCH_REQ_XCOMP_PERM for XTILEDATA); some sandboxes refuse. WHET_NO_TILES is
// for comparing with the vectors' path.
static const bool TILES = !getenv("WHET_NO_TILES") && !syscall(SYS_arch_prctl, 0x1023, 18);

// Compilers are not told that tile instructions read memory, so what was written must be there before.
static inline void written() { asm volatile("" ::: "memory"); }

// Sums of the upper rows are in tiles 0 and 1 (with few rows up to 3), of the lower in 2 and 3; activations in 4 and 5,
// weights in 6 and 7.
static inline void shape(int upper, int lower) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, DEEP, DEEP};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = (uint8_t)rows[t];
    written();
    _tile_loadconfig(&config);
}

// Where sixteen units of a panel lie as bf16 pairs: in the panel, or for eight-bit weights brought into `room`.
template <class W> static inline const void *deep(const uint8_t *w, int k, uint8_t *room) {
    w += (size_t)k * DEEP * W::bytes;
    if (W::bytes == 64) return w;
    for (int u = 0; u < DEEP; u++) write(room + 64 * u, W::weights(w + (size_t)u * W::bytes, 0));
    written();
    return room;
}

// Up to sixteen rows over four panels: sums [4][16][16].
template <class W>
static void over_four(const uint8_t *w, size_t panel, int steps, const uint32_t *x, int stride, float *sums) {
    alignas(64) uint8_t room[1024];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < steps; k++) {
        // Weights come from far; what the next four panels need at this depth is fetched meanwhile.
        const uint8_t *next = w + 4 * panel + (size_t)k * DEEP * W::bytes;
        for (int p = 0; p < 4; p++)
            for (int line = 0; line < DEEP * W::bytes; line += 64) __builtin_prefetch(next + p * panel + line, 0, 2);
        _tile_loadd(4, x + k * DEEP, stride * 4);
        _tile_loadd(6, deep<W>(w, k, room), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, deep<W>(w + panel, k, room), 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, deep<W>(w + 2 * panel, k, room), 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, deep<W>(w + 3 * panel, k, room), 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// Up to sixteen rows over one panel: sums [16][16].
template <class W>
static void over_one(const uint8_t *w, int steps, const uint32_t *x, int stride, float *sums) {
    alignas(64) uint8_t room[1024];
    _tile_zero(0);
    for (int k = 0; k < steps; k++) {
        _tile_loadd(4, x + k * DEEP, stride * 4);
        _tile_loadd(6, deep<W>(w, k, room), 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
}

// Sixteen upper and up to sixteen lower rows over two panels: sums [2 upper, 2 lower][16][16].
template <class W>
static void over_two(const uint8_t *w, size_t panel, int steps, const uint32_t *x, int stride, float *sums) {
    alignas(64) uint8_t room[1024];
    const uint32_t *lower = x + (size_t)TALL * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < steps; k++) {
        _tile_loadd(4, x + k * DEEP, stride * 4);
        _tile_loadd(5, lower + k * DEEP, stride * 4);
        _tile_loadd(6, deep<W>(w, k, room), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, deep<W>(w + panel, k, room), 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

template <class A>
static void finish_rows(const Matrix &w, const float *sums, int panels, int panel, int row, int rows, const Out &out) {
    for (int m = 0; m < rows; m++) {
        v16f acc[4];
        for (int p = 0; p < panels; p++) acc[p] = load(sums + (p * TALL + m) * 16);
        finish<A>(w, acc, panels, panel, row + m, out);
    }
}

// All rows over panels `panel` .. `panel + left`.
template <class W, class A>
static void tiles_of(const Matrix &w, const uint32_t *x, int stride, int rows, int panel, int left, const Out &out) {
    const int steps = w.inputs / W::values / DEEP;
    const size_t bytes = (size_t)steps * DEEP * W::bytes;
    alignas(64) float sums[4 * 256];
    for (int row = 0; row < rows;) {
        const int rest = rows - row, upper = rest < TALL ? rest : TALL;
        const int lower = rest - upper < TALL ? rest - upper : TALL;
        const uint32_t *from = x + (size_t)row * stride;
        shape(upper, lower ? lower : upper);
        for (int at = panel, end = panel + left, width; at < end; at += width) {
            const uint8_t *weights = w.data + at * bytes;
            if (lower && end - at >= 2) {
                width = 2, over_two<W>(weights, bytes, steps, from, stride, sums);
                finish_rows<A>(w, sums, 2, at, row, upper, out);
                finish_rows<A>(w, sums + 512, 2, at, row + TALL, lower, out);
            } else if (lower) {
                width = 1, over_one<W>(weights, steps, from, stride, sums);
                finish_rows<A>(w, sums, 1, at, row, upper, out);
                shape(lower, lower);
                over_one<W>(weights, steps, from + (size_t)TALL * stride, stride, sums);
                finish_rows<A>(w, sums, 1, at, row + TALL, lower, out);
            } else if (end - at >= 4) {
                width = 4, over_four<W>(weights, bytes, steps, from, stride, sums);
                finish_rows<A>(w, sums, 4, at, row, upper, out);
            } else {
                // A pair of panels belongs together where gate and up alternate.
                width = end - at >= 2 ? 2 : 1;
                for (int p = 0; p < width; p++) over_one<W>(weights + p * bytes, steps, from, stride, sums + p * 256);
                finish_rows<A>(w, sums, width, at, row, upper, out);
            }
        }
        row += upper + lower;
    }
    // Tiles that are in use make every switch of the thread dearer.
    _tile_release();
}

template <class A> static inline bool fits_tiles(const Matrix &w) {
    return TILES && A::values == 2 && w.kind != FP32 && w.inputs % (2 * DEEP) == 0;
}
#else
static const bool TILES = false;
template <class W, class A>
static void tiles_of(const Matrix &, const uint32_t *, int, int, int, int, const Out &) {}
template <class A> static inline bool fits_tiles(const Matrix &) { return false; }
#endif

// Adapters added to rows that each name a slot. One slot holds A as panels of all ranks of a fused projection, and B part
// by part, as panels of `width` ranks: an output reads the ranks of its own part only.
#pragma once
#include "products.h"

static const int PIECE = SUMS < 12 ? SUMS : 12, PARTS = 3, MOST_RANKS = PARTS * 256;

struct Lora {
    uint8_t *a, *b;             // [slots][a_bytes], [slots][b_bytes]
    int64_t a_bytes, b_bytes;
    const int32_t *width;       // per slot: ranks of one part, even; 0 when the slot has none
    int32_t parts, inputs;
    int32_t first[PARTS], panels[PARTS];  // where a part's output panels begin and how many there are
    int32_t spacing, unused;    // 2 where panels of two parts alternate, else 1
};

struct Piece {
    int row, rows, slot;
};

// Rows in a row with the same slot, cut into pieces small enough for one tile. Returns how many.
static int pieces_of(const int32_t *slots, int rows, Piece *pieces) {
    int count = 0;
    for (int row = 0; row < rows; row++) {
        if (!slots[row]) continue;
        bool joins = count && pieces[count - 1].slot == slots[row] && pieces[count - 1].rows < PIECE &&
                     pieces[count - 1].row + pieces[count - 1].rows == row;
        if (joins) pieces[count - 1].rows++;
        else pieces[count++] = {row, 1, slots[row]};
    }
    return count;
}

template <class A, int MR, int NP>
static void lift(const uint8_t *b, int units, const uint32_t *x, int stride, float *y, int y_stride, int spacing) {
    v16f acc[MR][NP];
    tile<A, MR, NP>(b, (size_t)units * 64, units, x, stride, false, acc);
    for (int m = 0; m < MR; m++)
        for (int p = 0; p < NP; p++) {
            float *to = y + (size_t)m * y_stride + p * spacing * 16;
            store(to, load(to) + acc[m][p]);
        }
}

// One part of B for all rows of a piece, at most PIECE: as many panels at a time as the registers hold sums of.
template <class A, int MR>
static void lift_part(const uint8_t *b, int panels, int units, const uint32_t *x, int stride, float *y, int y_stride,
                      int spacing) {
    const int most = SUMS / MR >= 4 ? 4 : SUMS / MR >= 2 ? 2 : 1;
    size_t panel = (size_t)units * 64;
    int p = 0;
    for (; p + most <= panels; p += most)
        lift<A, MR, most>(b + p * panel, units, x, stride, y + p * spacing * 16, y_stride, spacing);
    for (; p < panels; p++) lift<A, MR, 1>(b + p * panel, units, x, stride, y + p * spacing * 16, y_stride, spacing);
}

template <class A>
static void add_piece(const Lora &lora, const uint32_t *x, const Piece &piece, float *y, int stride) {
    typedef typename A::Input X;
    int width = lora.width[piece.slot], ranks = (lora.parts * width + 15) / 16 * 16;
    if (!width) return;
    alignas(64) float low[PIECE * MOST_RANKS];
    alignas(64) typename X::element units[PIECE * MOST_RANKS];
    int inputs = lora.inputs / X::values;
    Matrix a = {lora.a + piece.slot * lora.a_bytes, nullptr, nullptr, ranks, lora.inputs, 0, 0};
    panels_of<A, X>(a, x + (size_t)piece.row * inputs, inputs, piece.rows, 0, ranks / 16, {low, nullptr, ranks, STORE});
    for (int i = 0; i < piece.rows * ranks; i += 16) X::put(units + i, load(low + i));
    typedef void (*Lift)(const uint8_t *, int, int, const uint32_t *, int, float *, int, int);
#define RISE(n) lift_part<A, n <= PIECE ? n : 1>
    static const Lift lifts[] = {RISE(1), RISE(2), RISE(3), RISE(4),  RISE(5),  RISE(6),
                                 RISE(7), RISE(8), RISE(9), RISE(10), RISE(11), RISE(12)};
#undef RISE
    const uint8_t *b = lora.b + piece.slot * lora.b_bytes;
    for (int part = 0; part < lora.parts; part++) {
        lifts[piece.rows - 1](b, lora.panels[part], width / A::values, (const uint32_t *)(units + part * width),
                              ranks / X::values, y + (size_t)piece.row * stride + lora.first[part] * 16, stride,
                              lora.spacing);
        b += (size_t)lora.panels[part] * width * 16 * sizeof(typename A::element);
    }
}

template <class A>
static void add_lora(Pool &pool, const Lora &lora, const uint32_t *x, const Piece *pieces, int count, float *y,
                     int stride) {
    if (lora.a) pool.each(count, [&](int, int i) { add_piece<A>(lora, x, pieces[i], y, stride); });
}

// Adapters added to rows that each name a slot. One slot holds A as panels of `parts * width` ranks and B as panels of
// `width` units per sixteen outputs; an output panel reads the ranks of its own part of a fused projection only.
#pragma once
#include "matmul.h"

static const int PIECE = 12, MOST_RANKS = 3 * 256;

struct Lora {
    uint8_t *a, *b;             // [slots][a_bytes], [slots][b_bytes]
    int64_t a_bytes, b_bytes;
    const int32_t *width;       // per slot: ranks of one part, a multiple of 16; 0 when the slot has none
    const int32_t *part;        // per output panel
    int32_t parts, inputs, outputs, unused;
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

template <class A>
static void add_piece(const Lora &lora, const uint32_t *x, const Piece &piece, float *y, int stride) {
    typedef typename A::element element;
    int width = lora.width[piece.slot], ranks = lora.parts * width;
    if (!width) return;
    static thread_local Pool alone;
    alignas(64) float low[PIECE * 64];
    alignas(64) element units[PIECE * MOST_RANKS];
    const uint32_t *rows = x + (size_t)piece.row * (lora.inputs / A::values);
    size_t panel = (size_t)lora.inputs * sizeof(element) * 16;
    for (int rank = 0; rank < ranks; rank += 64) {
        int some = ranks - rank < 64 ? ranks - rank : 64;
        Matrix a = {lora.a + piece.slot * lora.a_bytes + rank / 16 * panel, nullptr, nullptr, some, lora.inputs, 0, 0};
        matmul<A, A>(alone, a, rows, lora.inputs / A::values, piece.rows, {low, nullptr, 64, STORE});
        for (int row = 0; row < piece.rows; row++)
            for (int i = 0; i < some; i += 16) A::put(units + row * ranks + rank + i, load(low + row * 64 + i));
    }
    Matrix b = {lora.b + piece.slot * lora.b_bytes, nullptr, nullptr, lora.outputs, width, 0, 0};
    Out out = {y + (size_t)piece.row * stride, nullptr, stride, ADD};
    for (int p = 0; p < lora.outputs / 16; p++) {
        const uint32_t *part = (const uint32_t *)units + lora.part[p] * width / A::values;
        rows_of<A, A, 1, 12>(b, part, ranks / A::values, piece.rows, p, false, out);
    }
}

template <class A>
static void add_lora(Pool &pool, const Lora &lora, const uint32_t *x, const Piece *pieces, int count, float *y,
                     int stride) {
    if (lora.a) pool.each(count, [&](int, int i) { add_piece<A>(lora, x, pieces[i], y, stride); });
}

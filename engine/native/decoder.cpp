// A whole decoder step in one call: what engine/models/decoder.py computes, without an interpreter between the layers.
// Activations between layers are fp32; products take them in the precision of the weights. engine/native/library.py
// mirrors the structures below.
#include <alloca.h>

#include "attention.h"
#include "lora.h"
#include "products.h"
#include "moe.h"
#include "sampler.h"
#include "suffix.h"

struct Layer {
    Matrix qkv, o, gate_up, down;
    Moe moe;                    // in place of gate_up and down where it has experts
    Lora lora_qkv, lora_o, lora_gate_up, lora_down;
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
    uint8_t *keys, *values;
    int64_t window;
};

struct Model {
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, fp32;
    int32_t tokens, context;    // most tokens of one step, most positions of one sequence
    int32_t experts, per_token, expert_intermediate;  // of the mixtures, or 0
    int32_t solo;               // steps of fewer tokens run on one thread: waking another would cost more than it does
    float eps, scale;
    const Layer *layer;
    Matrix head;
    Lora lora_head;
    const void *embedding;      // [vocabulary, hidden] elements, or null: read it from the head
    const float *norm, *cos, *sin;
};

struct Step {
    int32_t rows, tokens, takes, unused;
    const int64_t *token_ids;           // [tokens]
    const int32_t *starts, *lengths, *slots;  // [rows]
    const int64_t *const *tables;       // [rows]
    const int32_t *take;                // [takes], ascending: tokens whose hidden state is wanted
    float *hidden;                      // [takes, hidden]: the LM head's input
    float *logits;                      // [takes, padded vocabulary], or null
};

static const int MOST_THREADS = 256;

struct Engine {
    Model model;
    Pool pool;
    float *h, *fused;
    uint8_t *x, *q, *mixed, *wide;
    int32_t *token_slot, *token_row;
    Piece *pieces;
    MoeRoom room;
    float *scores[MOST_THREADS];
    size_t score_stride;
};

static void *aligned(size_t bytes) {
    void *memory = nullptr;
    return posix_memalign(&memory, 64, bytes + 64) ? nullptr : memory;
}

template <class F> static void over_tokens(Pool &pool, int tokens, int width, F f) {
    int chunk = tokens * width > 1 << 15 ? (tokens + 4 * pool.active() - 1) / (4 * pool.active()) : tokens;
    pool.each((tokens + chunk - 1) / chunk, [&](int, int item) {
        int end = (item + 1) * chunk < tokens ? (item + 1) * chunk : tokens;
        for (int t = item * chunk; t < end; t++) f(t);
    });
}

static float inverse_rms(const float *x, int size, float eps) {
    v16f squares = {};
    for (int i = 0; i < size; i += 16) squares += load(x + i) * load(x + i);
    return 1.0f / sqrtf(sum(squares) / size + eps);
}

template <class A>
static void norm(Engine &engine, const float *h, const float *weight, int rows, uint8_t *x, float *plain = nullptr) {
    typedef typename A::Input X;
    int size = engine.model.hidden;
    over_tokens(engine.pool, rows, size, [&](int t) {
        const float *from = h + (size_t)t * size;
        float inverse = inverse_rms(from, size, engine.model.eps);
        for (int i = 0; i < size; i += 16) {
            v16f y = load(from + i) * inverse * load(weight + i);
            X::put((typename X::element *)x + (size_t)t * size + i, y);
            if (plain) store(plain + (size_t)t * size + i, y);
        }
    });
}

template <class A> static void embed(Engine &engine, const Step &step) {
    const Model &m = engine.model;
    typedef typename A::element element;
    over_tokens(engine.pool, step.tokens, m.hidden, [&](int t) {
        float *to = engine.h + (size_t)t * m.hidden;
        int64_t id = step.token_ids[t];
        if (m.embedding) {
            for (int i = 0; i < m.hidden; i += 16) store(to + i, A::get((const element *)m.embedding + id * m.hidden + i));
            return;
        }
        int values = m.head.kind == FP32 ? 1 : 2, bytes = m.head.kind == INT8 ? 2 : 4;
        const uint8_t *from = m.head.data + (size_t)(id / 16) * (m.hidden / values) * 16 * bytes + id % 16 * bytes;
        for (int i = 0; i < m.hidden / values; i++, from += 16 * bytes) {
            if (m.head.kind == FP32) memcpy(to + i, from, 4);
            else if (m.head.kind == BF16)
                for (int j = 0; j < 2; j++) {
                    uint32_t bits = (uint32_t)((const uint16_t *)from)[j] << 16;
                    memcpy(to + 2 * i + j, &bits, 4);
                }
            else
                for (int j = 0; j < 2; j++) to[2 * i + j] = ((const int8_t *)from)[j] * m.head.scale[id];
        }
    });
}

// One head: normalise (Qwen3), rotate by position, multiply by `scale`; in place, fp32.
static void turn(const Model &m, float *x, const float *weight, int position, float scale) {
    int half = m.head_dim / 2;
    if (weight) {
        float inverse = inverse_rms(x, m.head_dim, m.eps);
        for (int i = 0; i < m.head_dim; i++) x[i] *= inverse * weight[i];
    }
    const float *cos = m.cos + (size_t)position * half, *sin = m.sin + (size_t)position * half;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = (a * cos[i] - b * sin[i]) * scale;
        x[i + half] = (b * cos[i] + a * sin[i]) * scale;
    }
}

// Queries rotated into `q`; keys and values of the step written to their pages.
template <class A> static void place(Engine &engine, const Layer &layer, const Step &step, const int *offsets) {
    const Model &m = engine.model;
    typedef typename A::element element;
    typedef typename A::Input X;
    int width = (m.heads + 2 * m.kv_heads) * m.head_dim;
    over_tokens(engine.pool, step.tokens, width, [&](int t) {
        int row = engine.token_row[t], position = step.starts[row] + t - offsets[row];
        float *x = engine.fused + (size_t)t * width;
        typename X::element *q = (typename X::element *)engine.q + (size_t)t * m.heads * m.head_dim;
        for (int head = 0; head < m.heads; head++, x += m.head_dim, q += m.head_dim) {
            turn(m, x, layer.q_norm, position, m.scale);
            for (int i = 0; i < m.head_dim; i += 16) X::put(q + i, load(x + i));
        }
        size_t page = (size_t)step.tables[row][position / PAGE] * m.kv_heads * PAGE * m.head_dim;
        int lane = position % PAGE;
        for (int head = 0; head < m.kv_heads; head++, x += m.head_dim) {
            turn(m, x, layer.k_norm, position, 1.0f);
            element *keys = (element *)layer.keys + page + (size_t)head * PAGE * m.head_dim;
            for (int i = 0; i < m.head_dim; i++)
                keys[(i / A::values * PAGE + lane) * A::values + i % A::values] = A::one(x[i]);
        }
        for (int head = 0; head < m.kv_heads; head++, x += m.head_dim) {
            element *values = (element *)layer.values + page + ((size_t)head * PAGE + lane) * m.head_dim;
            for (int i = 0; i < m.head_dim; i += 16) A::put(values + i, load(x + i));
        }
    });
}

template <class A> static void attention(Engine &engine, const Layer &layer, const Step &step, const int *offsets) {
    const Model &m = engine.model;
    int group = m.heads / m.kv_heads, items = 0;
    size_t width = (size_t)m.heads * m.head_dim * sizeof(typename A::Input::element);
    int *ends = (int *)alloca(sizeof(int) * step.rows);
    for (int row = 0; row < step.rows; row++)
        ends[row] = items += m.kv_heads * ((step.lengths[row] * group + QUERIES - 1) / QUERIES);
    engine.pool.each(items, [&](int thread, int item) {
        int row = 0;
        if (step.rows > 8) {  // binary search: the first row whose items end after this one
            int high = step.rows - 1;
            while (row < high) {
                int middle = (row + high) / 2;
                if (ends[middle] > item) high = middle; else row = middle + 1;
            }
        } else while (ends[row] <= item) row++;
        int local = item - (row ? ends[row - 1] : 0);
        int head = local % m.kv_heads, query = local / m.kv_heads * QUERIES;
        int count = step.lengths[row] * group - query < QUERIES ? step.lengths[row] * group - query : QUERIES;
        const uint32_t *q[QUERIES];
        uint8_t *out[QUERIES];
        int at[QUERIES];
        for (int i = 0; i < count; i++) {
            int token = (query + i) / group;
            size_t place = (offsets[row] + token) * width + (size_t)(head * group + (query + i) % group) * width / m.heads;
            q[i] = (const uint32_t *)(engine.q + place), out[i] = engine.mixed + place;
            at[i] = step.starts[row] + token;
        }
        Pages<A> pages = {layer.keys, layer.values, step.tables[row], m.kv_heads, head, m.head_dim};
        attend<A>(pages, q, at, count, (int)layer.window, out, engine.scores[thread], engine.score_stride);
    });
}

template <class A>
static void mlp(Engine &engine, const Layer &layer, int rows, const Piece *pieces, int count) {
    const Model &m = engine.model;
    typedef typename A::Input X;
    norm<A>(engine, engine.h, layer.mlp_norm, rows, engine.x);
    const uint32_t *x = (const uint32_t *)engine.x;
    if (layer.moe.experts) {
        add_experts<A>(engine.pool, layer.moe, engine.room, x, rows, m.hidden, engine.fused, engine.h);
        return;
    }
    int width = layer.gate_up.outputs;
    if (!count || !layer.lora_gate_up.a) {
        multiply<A>(engine.pool, layer.gate_up, x, rows, {nullptr, engine.wide, width, SWIGLU});
    } else {
        multiply<A>(engine.pool, layer.gate_up, x, rows, {engine.fused, nullptr, width, STORE});
        add_lora<A>(engine.pool, layer.lora_gate_up, x, pieces, count, engine.fused, width);
        over_tokens(engine.pool, rows, width, [&](int t) {
            const float *from = engine.fused + (size_t)t * width;
            for (int i = 0; i < width; i += 32)
                X::put((typename X::element *)engine.wide + (size_t)t * width / 2 + i / 2, silu(load(from + i)) * load(from + i + 16));
        });
    }
    const uint32_t *wide = (const uint32_t *)engine.wide;
    multiply<A>(engine.pool, layer.down, wide, rows, {engine.h, nullptr, m.hidden, ADD});
    add_lora<A>(engine.pool, layer.lora_down, wide, pieces, count, engine.h, m.hidden);
}

// Keeps only the tokens whose hidden state is wanted: after the last attention nobody looks at the others.
static void keep_taken(Engine &engine, const Step &step, size_t mixed_bytes) {
    size_t hidden = engine.model.hidden;
    for (int i = 0; i < step.takes; i++) {
        int from = step.take[i];
        if (from == i) continue;
        memcpy(engine.h + i * hidden, engine.h + from * hidden, hidden * 4);
        memcpy(engine.mixed + i * mixed_bytes, engine.mixed + from * mixed_bytes, mixed_bytes);
        engine.token_slot[i] = engine.token_slot[from];
    }
}

template <class A> static void forward(Engine &engine, const Step &step) {
    const Model &m = engine.model;
    int *offsets = (int *)alloca(sizeof(int) * step.rows);
    for (int row = 0, t = 0; row < step.rows; row++) {
        offsets[row] = t;
        for (int i = 0; i < step.lengths[row]; i++, t++) engine.token_row[t] = row, engine.token_slot[t] = step.slots[row];
    }
    int rows = step.tokens, count = pieces_of(engine.token_slot, rows, engine.pieces);
    size_t mixed_bytes = (size_t)m.heads * m.head_dim * sizeof(typename A::Input::element);
    const uint32_t *x = (const uint32_t *)engine.x, *mixed = (const uint32_t *)engine.mixed;
    embed<A>(engine, step);
    for (int i = 0; i < m.layers; i++) {
        const Layer &layer = m.layer[i];
        norm<A>(engine, engine.h, layer.attention_norm, rows, engine.x);
        multiply<A>(engine.pool, layer.qkv, x, rows, {engine.fused, nullptr, layer.qkv.outputs, STORE});
        add_lora<A>(engine.pool, layer.lora_qkv, x, engine.pieces, count, engine.fused, layer.qkv.outputs);
        place<A>(engine, layer, step, offsets);
        if (i == m.layers - 1 && !step.takes) return;
        attention<A>(engine, layer, step, offsets);
        if (i == m.layers - 1 && step.takes < rows) {
            keep_taken(engine, step, mixed_bytes);
            rows = step.takes, count = pieces_of(engine.token_slot, rows, engine.pieces);
        }
        multiply<A>(engine.pool, layer.o, mixed, rows, {engine.h, nullptr, m.hidden, ADD});
        add_lora<A>(engine.pool, layer.lora_o, mixed, engine.pieces, count, engine.h, m.hidden);
        mlp<A>(engine, layer, rows, engine.pieces, count);
    }
    norm<A>(engine, engine.h, m.norm, rows, engine.x, step.hidden);
    if (!step.logits) return;
    multiply<A>(engine.pool, m.head, x, rows, {step.logits, nullptr, m.head.outputs, STORE});
    add_lora<A>(engine.pool, m.lora_head, x, engine.pieces, count, step.logits, m.head.outputs);
}

template <class A> static void project(Engine &engine, const float *hidden, const int32_t *slots, int rows, float *logits) {
    const Model &m = engine.model;
    typedef typename A::Input X;
    for (size_t i = 0; i < (size_t)rows * m.hidden; i += 16) X::put((typename X::element *)engine.x + i, load(hidden + i));
    const uint32_t *x = (const uint32_t *)engine.x;
    int count = pieces_of(slots, rows, engine.pieces);
    multiply<A>(engine.pool, m.head, x, rows, {logits, nullptr, m.head.outputs, STORE});
    add_lora<A>(engine.pool, m.lora_head, x, engine.pieces, count, logits, m.head.outputs);
}

template <class T> static bool allot(T *&pointer, size_t count) {
    pointer = (T *)aligned(count * sizeof(T));
    return pointer;
}

#include "speculator.h"

extern "C" {

void whet_close(Engine *engine) {
    engine->pool.stop();
    void *owned[] = {engine->h, engine->fused, engine->x, engine->q, engine->mixed, engine->wide, engine->token_slot,
                     engine->token_row, engine->pieces, engine->room.x, engine->room.wide, engine->room.y,
                     engine->room.weight, engine->room.chosen, engine->room.place, engine->room.starts};
    for (void *memory : owned) free(memory);
    for (float *scores : engine->scores) free(scores);
    free(engine);
}

// The model's arrays must outlive the engine. Null when memory is short.
Engine *whet_open(const Model *model, int threads) {
    Engine *engine = (Engine *)calloc(1, sizeof(Engine));
    if (!engine) return nullptr;
    engine->pool = Pool();
    engine->model = *model;
    const Model &m = engine->model;
    size_t tokens = m.tokens, hidden = m.hidden, attention = (size_t)m.heads * m.head_dim, intermediate = m.intermediate;
    size_t qkv = attention + 2 * (size_t)m.kv_heads * m.head_dim;
    size_t fused = qkv > 2 * intermediate ? qkv : 2 * intermediate, narrow = hidden > attention ? hidden : attention;
    size_t pairs = tokens * m.per_token, experts = m.experts + 16;
    if (fused < experts) fused = experts;
    MoeRoom &room = engine->room;
    bool fine = !pairs || (allot(room.x, pairs * hidden * 4) && allot(room.wide, pairs * m.expert_intermediate * 4) &&
                           allot(room.y, pairs * hidden) && allot(room.weight, pairs) && allot(room.chosen, pairs) &&
                           allot(room.place, pairs) && allot(room.starts, experts));
    fine = fine && allot(engine->h, tokens * hidden) && allot(engine->fused, tokens * fused) &&
                allot(engine->x, tokens * narrow * 4) && allot(engine->q, tokens * attention * 4) &&
                allot(engine->mixed, tokens * attention * 4) && allot(engine->wide, tokens * intermediate * 4) &&
                allot(engine->token_slot, tokens) && allot(engine->token_row, tokens) && allot(engine->pieces, tokens);
    engine->score_stride = ((size_t)m.context + 2 * PAGE) / PAGE * PAGE;
    if (fine) engine->pool.start(threads < MOST_THREADS ? threads : MOST_THREADS);
    for (int i = 0; fine && i < engine->pool.threads; i++) fine = allot(engine->scores[i], QUERIES * engine->score_stride);
    if (fine) return engine;
    whet_close(engine);
    return nullptr;
}

int whet_threads(const Engine *engine) { return engine->pool.threads; }

void whet_forward(Engine *engine, const Step *step) {
    engine->pool.alone = step->tokens < engine->model.solo;
    if (engine->model.fp32) forward<F32>(*engine, *step);
    else forward<Bf16>(*engine, *step);
}

// Logits of hidden states as whet_forward gave them, at most `tokens` rows.
void whet_project(Engine *engine, const float *hidden, const int32_t *slots, int rows, float *logits) {
    engine->pool.alone = rows < engine->model.solo;
    if (engine->model.fp32) project<F32>(*engine, hidden, slots, rows, logits);
    else project<Bf16>(*engine, hidden, slots, rows, logits);
}

// Packs [outputs, inputs] elements of the model's kind into panels of sixteen; rows and columns are multiples of 16.
void whet_pack(const uint8_t *dense, uint8_t *packed, int outputs, int inputs, int element_bytes) {
    int unit = element_bytes == 1 ? 2 : 4, units = inputs * element_bytes / unit;
    for (int panel = 0; panel < outputs / 16; panel++)
        for (int lane = 0; lane < 16; lane++) {
            const uint8_t *from = dense + (size_t)(panel * 16 + lane) * inputs * element_bytes;
            uint8_t *to = packed + (size_t)panel * 16 * inputs * element_bytes + lane * unit;
            for (int k = 0; k < units; k++, from += unit, to += 16 * unit) memcpy(to, from, unit);
        }
}

// One token and the log of the model's own probability of it per row; rows lie `stride` floats apart. A row that stands
// behind a drafted token says which (`behind`, -1: none): if the row before it did not draw that, it is left out.
int whet_sample(const float *logits, int64_t stride, int rows, int size, const Draw *draws, const int64_t *behind,
                int64_t *tokens, float *logprobs) {
    float *scratch = (float *)aligned(4 * ((size_t)size + 16) * sizeof(float));
    if (!scratch) return 1;
    bool out = false;
    for (int row = 0; row < rows; row++) {
        out = row && behind[row] >= 0 && (out || tokens[row - 1] != behind[row]);
        if (out) tokens[row] = 0, logprobs[row] = 0;
        else sample_row(logits + row * stride, size, draws[row], scratch, tokens + row, logprobs + row);
    }
    free(scratch);
    return 0;
}

// What products in fp32, or with `halved` weights, are made with.
const char *whet_instructions(int halved) {
    if (TILES && halved) return "amx_bf16";
#if defined(__AVX512BF16__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "generic";
#endif
}
}

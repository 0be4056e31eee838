// Drafts of residual heads for rows that each name a slot: what engine/speculation/heads.py computes, all rows and all
// heads in one call. engine/native/drafting.py mirrors the structures.
//
// Most of a draft's time would be reading the pruned LM head. So its rows are multiplied in whole numbers first, and only
// those that come near the best again with the true weights. States are held in fp32, the heads' own products take them
// in the precision of the weights.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "products.h"
#include "sampler.h"

struct HeadSlot {
    const Matrix *weight;           // [heads], with their biases
    const uint8_t *condition;       // [tables][vocabulary + 1][hidden] elements, or null
    const uint8_t *head;            // [vocabulary][hidden] elements
    const int8_t *coarse;           // the same in seven bits: panels of 16 rows, [hidden / 4][16][4]
    const float *scale;             // [vocabulary] of the coarse rows, padded to a panel
    const int32_t *shift;           // [vocabulary], likewise: what 128 in every element of a state would add
    const int32_t *tokens, *places; // token ids of the rows; for every token its row, `vocabulary` where it has none
    const float *confidence;        // [heads][hidden]
    const float *confidence_last;   // [heads]: weight of the drafted token's log probability
    const float *confidence_bias;   // [heads]
    float error, length;            // of a coarse logit, per length and per grain of the state; see drafting.py
    int32_t heads, vocabulary, tables, recurrent;
    int32_t bf16;                   // what an element is, else fp32
};

struct DraftAsk {
    Draw draw;                      // of the first drafted token
    int32_t slot, token, most, unused;
};

struct DraftJob {
    const HeadSlot *slots;          // [last slot + 1]
    const DraftAsk *asks;           // [rows]
    const float *hidden;            // [rows, width]: the LM head's inputs
    int32_t *tokens, *counts;       // [rows, stride] and [rows]: what was drafted
    float *chances;                 // [rows, stride]
    float *state, *lifted, *logits; // room: [rows, width] twice, [rows, padded vocabulary]
    uint8_t *units, *whole;         // room: [rows, width] of four bytes and of one
    float *scratch;                 // room: for each thread 5 * (vocabulary + 32)
    float *survival, *shrink;       // room: [rows]
    int32_t *row, *place;           // room: [rows]
    int32_t rows, width, stride, last_slot, vocabulary;
    float floor;                    // a row stops when it is less likely than this to survive
};

// Tokens less likely than the best by more than this are not drafted; see heads.py.
static const float LOWEST = -11.0f;
// Sixteen logits further below the best than this weigh nothing beside it.
static const float NEGLIGIBLE = -18.0f;
// Logits this near the best are computed with the true weights, when they are few.
static const float NEAR = 4.0f;
static const int FEW = 64;

// --- seven-bit rows times eight-bit states ---------------------------------------------------------------------------

// Sums of sixteen rows. A state's elements have 128 added, since the instructions want one factor without a sign.
#if defined(__AVX512BW__)
struct Whole {
    __m512i lanes;
    // Eight elements of the rows at `w`, and of the state.
    inline __attribute__((always_inline)) void add(const int8_t *w, const uint32_t *x) {
        __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 64);
        __m512i a = _mm512_set1_epi32((int)x[0]), b = _mm512_set1_epi32((int)x[1]);
#if defined(__AVX512VNNI__)
        lanes = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(lanes, a, first), b, second);
#else
        __m512i pairs = _mm512_adds_epi16(_mm512_maddubs_epi16(a, first), _mm512_maddubs_epi16(b, second));
        lanes = _mm512_add_epi32(lanes, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
    }
    inline __attribute__((always_inline)) void scaled(float *to, const int32_t *shift, const float *scale, float by) const {
        __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(lanes, _mm512_loadu_si512(shift)));
        _mm512_storeu_ps(to, _mm512_mul_ps(whole, _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_set1_ps(by))));
    }
};
#elif defined(__AVX2__)
struct Whole {
    __m256i low, high;
    // Two sums of two products fit sixteen bits but for the most unlikely, which are cut off.
    static inline __attribute__((always_inline)) __m256i eight(const int8_t *w, __m256i a, __m256i b) {
        __m256i first = _mm256_maddubs_epi16(a, _mm256_load_si256((const __m256i *)w));
        __m256i second = _mm256_maddubs_epi16(b, _mm256_load_si256((const __m256i *)(w + 64)));
        return _mm256_madd_epi16(_mm256_adds_epi16(first, second), _mm256_set1_epi16(1));
    }
    // Eight elements of the rows at `w`, and of the state.
    inline __attribute__((always_inline)) void add(const int8_t *w, const uint32_t *x) {
        __m256i a = _mm256_set1_epi32((int)x[0]), b = _mm256_set1_epi32((int)x[1]);
        low = _mm256_add_epi32(low, eight(w, a, b)), high = _mm256_add_epi32(high, eight(w + 32, a, b));
    }
    static inline __attribute__((always_inline)) void half(float *to, __m256i sums, const int32_t *shift, const float *scale, __m256 by) {
        __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_loadu_si256((const __m256i *)shift)));
        _mm256_storeu_ps(to, _mm256_mul_ps(whole, _mm256_mul_ps(_mm256_loadu_ps(scale), by)));
    }
    inline __attribute__((always_inline)) void scaled(float *to, const int32_t *shift, const float *scale, float by) const {
        half(to, low, shift, scale, _mm256_set1_ps(by)), half(to + 8, high, shift + 8, scale + 8, _mm256_set1_ps(by));
    }
};
#else
struct Whole {
    int32_t lane[16];
    inline void add(const int8_t *w, const uint32_t *x) {
        for (int group = 0; group < 2; group++)
            for (int i = 0; i < 16; i++)
                for (int k = 0; k < 4; k++)
                    lane[i] += w[group * 64 + i * 4 + k] * (int32_t)((x[group] >> 8 * k) & 255);
    }
    inline void scaled(float *to, const int32_t *shift, const float *scale, float by) const {
        for (int i = 0; i < 16; i++) to[i] = (lane[i] - shift[i]) * (scale[i] * by);
    }
};
#endif

// MR rows over NP panels.
template <int MR, int NP>
static void coarse_tile(const HeadSlot &slot, const DraftJob &job, int row, int panel) {
    const int width = job.width, padded = (slot.vocabulary + 15) / 16 * 16;
    const int8_t *w = slot.coarse + (size_t)panel * width * 16;
    const uint8_t *x = job.whole + (size_t)row * width;
    Whole sums[MR][NP] = {};
    for (int k = 0; k < width; k += 8)
#pragma GCC unroll 8
        for (int p = 0; p < NP; p++)
#pragma GCC unroll 8
            for (int m = 0; m < MR; m++)
                sums[m][p].add(w + ((size_t)p * width + k) * 16, (const uint32_t *)(x + (size_t)m * width + k));
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int p = 0; p < NP; p++) {
            int column = (panel + p) * 16;
            float *to = job.logits + (size_t)(row + m) * padded + column;
            sums[m][p].scaled(to, slot.shift + column, slot.scale + column, job.shrink[row + m]);
        }
}

// As many rows at a time as leave registers for their sums.
template <int MR> static void coarse_rows(const HeadSlot &slot, const DraftJob &job, int rows, int panel, int left) {
    int row = 0;
    for (; row + MR <= rows; row += MR) left == 2 ? coarse_tile<MR, 2>(slot, job, row, panel) : coarse_tile<MR, 1>(slot, job, row, panel);
    for (; row < rows; row++) left == 2 ? coarse_tile<1, 2>(slot, job, row, panel) : coarse_tile<1, 1>(slot, job, row, panel);
}

static void coarse_panels(const HeadSlot &slot, const DraftJob &job, int rows, int panel, int left) {
    for (int width; left; panel += width, left -= width) {
        width = rows == 1 && left >= 3 ? 3 : left >= 2 ? 2 : 1;
        if (width == 3) coarse_tile<1, 3>(slot, job, 0, panel);
        else coarse_rows<3>(slot, job, rows, panel, width);
    }
}

static void whole_state(const DraftJob &job, int i) {
    const float *state = job.state + (size_t)i * job.width;
    uint8_t *to = job.whole + (size_t)i * job.width;
    v16f tops = splat(0.0f);
    for (int k = 0; k < job.width; k += 16) tops = larger(tops, larger(load(state + k), -load(state + k)));
    // A state that is not finite drafts what it likes; it must not become an undefined conversion.
    float top = largest(tops), times = top > 1e-30f && top < 3e38f ? 127.0f / top : 0.0f;
    for (int k = 0; k < job.width; k += 16) {
        int32_t wide[16];
        write(wide, convert<v16i>(times > 0 ? load(state + k) * times + 128.5f : splat(128.0f)));
        for (int j = 0; j < 16; j++) to[k + j] = (uint8_t)wide[j];
    }
    job.shrink[i] = times > 0 ? 1.0f / times : 0.0f;
}

template <class A> static float dot(const uint8_t *row, const float *state, int width) {
    const typename A::element *weights = (const typename A::element *)row;
    v16f first = splat(0.0f), second = splat(0.0f);
    int k = 0;
    for (; k + 32 <= width; k += 32) {
        first += A::get(weights + k) * load(state + k);
        second += A::get(weights + k + 16) * load(state + k + 16);
    }
    for (; k < width; k += 16) first += A::get(weights + k) * load(state + k);
    return sum(first + second);
}

// --- one row's token ------------------------------------------------------------------------------------------------

template <class A> struct Chooser {
    const HeadSlot &slot;
    const DraftJob &job;
    float *logits;
    const float *state;
    float error;  // how far two coarse logits may be from their true difference
    float top = 0;
    int padded;

    Chooser(const HeadSlot &of, const DraftJob &with, int i)
        : slot(of), job(with), state(with.state + (size_t)i * with.width), padded((of.vocabulary + 15) / 16 * 16) {
        logits = job.logits + (size_t)i * padded;
        v16f squares = splat(0.0f);
        for (int k = 0; k < job.width; k += 16) squares += load(state + k) * load(state + k);
        error = slot.error * sqrtf(sum(squares)) + slot.length * job.shrink[i];
    }
    float exact(int at) const {
        return dot<A>(slot.head + (size_t)at * job.width * sizeof(typename A::element), state, job.width);
    }
    float highest() const {
        v16f tops = load(logits);
        for (int i = 16; i < padded; i += 16) tops = larger(tops, load(logits + i));
        return largest(tops);
    }
    // Puts true logits in the place of those that matter most; returns the largest one's place.
    int refine(int32_t *near) {
        for (int i = slot.vocabulary; i < padded; i++) logits[i] = -INFINITY;
        top = highest();
        int count = within(NEAR > error ? NEAR : error, near, FEW);
        if (count > FEW) count = within(error, near, padded);
        for (int i = 0; i < count; i++) logits[near[i]] = exact(near[i]);
        int best = count ? near[0] : 0;
        for (int i = 1; i < count; i++)
            if (logits[near[i]] > logits[best]) best = near[i];
        top = logits[best];
        return best;
    }
    // Places of the logits that are `far` or less below the best; stops when there are more than `most`.
    int within(float far, int32_t *near, int most) const {
        int count = 0;
        for (int i = 0; i < padded && count <= most; i += 16) {
            unsigned open = bits_of(load(logits + i) >= top - far);
            for (; open && count <= most; open &= open - 1) near[count++] = i + __builtin_ctz(open);
        }
        return count;
    }
    double log_mass() const {
        v16f sums = splat(0.0f);
        for (int i = 0; i < padded; i += 16) {
            v16f below = load(logits + i) - top;
            if (bits_of(below >= NEGLIGIBLE)) sums += exp16(below);
        }
        return log(sum(sums));
    }
    static void weigh(float *scaled, float *odds, int count) {
        for (int i = 0; i < count; i++) scaled[i] = scaled[i] > 0 ? 0 : scaled[i];
        for (int i = 0; i < count; i += 16) store(odds + i, exp16(load(scaled + i)));
    }
    // The largest logit with the verifier's noise for the real token, of those the request's filters leave.
    int drawn(const Draw &draw, int best, float *scratch) const {
        const int room = slot.vocabulary + 32;
        float *scaled = scratch, *odds = scratch + room, *values = odds + room, *weights = values + room;
        int32_t *at = (int32_t *)(weights + room);
        const float temperature = draw.temperature > 1e-6f ? draw.temperature : 1e-6f;
        float floor = LOWEST;
        if (draw.min_p > 0 && logf(draw.min_p) > floor) floor = logf(draw.min_p);
        const float cut = top + floor * temperature * 1.0001f;
        int count = 0;
        for (int i = 0; i < padded; i += 16)
            for (unsigned open = bits_of(load(logits + i) >= cut); open; open &= open - 1, count++) {
                at[count] = i + __builtin_ctz(open);
                scaled[count] = (logits[at[count]] - top) / temperature;
            }
        for (int i = count; i < count + 16; i++) scaled[i] = -INFINITY;
        weigh(scaled, odds, count);
        const float filtered = narrow(scaled, odds, count, draw, floor, values, weights);
        if (filtered > LOWEST) {
            // Whom the filters leave should not depend on what whole numbers lost.
            const float doubt = error / temperature;
            int left = 0;
            for (int i = 0; i < count; i++) left += scaled[i] >= filtered - doubt;
            for (int i = 0; i < count; i++)
                if (scaled[i] >= filtered - doubt && (left <= FEW || scaled[i] <= filtered + doubt))
                    logits[at[i]] = exact(at[i]), scaled[i] = (logits[at[i]] - top) / temperature;
            weigh(scaled, odds, count);
            floor = narrow(scaled, odds, count, draw, floor, values, weights);
        }
        const uint64_t key = row_key(draw);
        const double doubt = error / temperature;
        double winner = -INFINITY, second = -INFINITY;
        float limit = INFINITY;
        int token = best, rival = -1;
        for (int i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)finalise(finalise(key + (uint64_t)slot.tokens[at[i]] * GOLDEN));
            if (scaled[i] < floor || (0xFFFFFFFFu - bits) * 0x1p-32f >= odds[i] * limit) continue;
            double perturbed = scaled[i] + gumbel(bits);
            if (perturbed > winner) {
                second = winner, rival = token, winner = perturbed, token = at[i];
                limit = (float)exp(doubt - winner) * 1.0001f;
            } else if (perturbed > second) {
                second = perturbed, rival = at[i];
            }
        }
        if (rival >= 0 && winner - second < doubt) {
            double ahead = (exact(token) - logits[token] - exact(rival) + logits[rival]) / temperature;
            if (winner - second + ahead < 0) token = rival;
        }
        return token;
    }
};

template <class A> static void choose(const HeadSlot &slot, const DraftJob &job, int i, int head, float *scratch) {
    Chooser<A> chooser(slot, job, i);
    const int row = job.row[i];
    int place = chooser.refine((int32_t *)scratch);
    const float log_mass = (float)chooser.log_mass();
    Draw draw = job.asks[row].draw;
    draw.position += head;
    float logit = chooser.top;
    if (draw.temperature > 0) place = chooser.drawn(draw, place, scratch), logit = chooser.exact(place);
    const float *confidence = slot.confidence + (size_t)head * job.width;
    float score = dot<F32>((const uint8_t *)confidence, chooser.state, job.width) + slot.confidence_bias[head] +
                  slot.confidence_last[head] * (logit - chooser.top - log_mass);
    float chance = 1.0f / (1.0f + expf(-score));
    if (!(chance >= 0)) chance = 0;
    job.tokens[(size_t)row * job.stride + head] = slot.tokens[place];
    job.chances[(size_t)row * job.stride + head] = chance;
    job.counts[row] = head + 1;
    job.place[i] = place, job.survival[i] *= chance;
}

// --- all rows of one slot -------------------------------------------------------------------------------------------

// The next head's states of the rows that are left.
template <class A> static void lift_states(Pool &pool, const HeadSlot &slot, const DraftJob &job, int rows, int head) {
    typedef typename A::element element;
    typedef typename A::Input X;
    const int width = job.width;
    for (int i = 0; i < rows; i++) {
        float *state = job.state + (size_t)i * width;
        if (!head || !slot.recurrent) memcpy(state, job.hidden + (size_t)job.row[i] * width, width * 4);
        for (int k = 0; k < width; k += 16) X::put((typename X::element *)job.units + (size_t)i * width + k, load(state + k));
    }
    multiply<A>(pool, slot.weight[head], (const uint32_t *)job.units, rows, {job.lifted, nullptr, width, STORE});
    for (int i = 0; i < rows; i++) {
        float *state = job.state + (size_t)i * width, *lifted = job.lifted + (size_t)i * width;
        size_t table = (size_t)(slot.tables > 1 ? head : 0) * (slot.vocabulary + 1) + job.place[i];
        const element *told = (const element *)slot.condition + table * width;
        for (int k = 0; k < width; k += 16) {
            v16f y = load(lifted + k);
            if (slot.condition) y += A::get(told + k);
            store(state + k, load(state + k) + silu(y));
        }
        whole_state(job, i);
    }
}

// Closes the gaps of rows that have what they want or are not worth going on with.
static int keep_open(const DraftJob &job, int rows, int head, int heads) {
    int kept = 0;
    for (int i = 0; i < rows; i++) {
        int most = job.asks[job.row[i]].most;
        if (head + 1 >= (most < heads ? most : heads) || job.survival[i] < job.floor) continue;
        if (kept < i) {
            memcpy(job.state + (size_t)kept * job.width, job.state + (size_t)i * job.width, (size_t)job.width * 4);
            job.row[kept] = job.row[i], job.place[kept] = job.place[i], job.survival[kept] = job.survival[i];
        }
        kept++;
    }
    return kept;
}

template <class A> static void draft_slot(Pool &pool, const HeadSlot &slot, const DraftJob &job, int rows) {
    const int panels = (slot.vocabulary + 15) / 16, room = 5 * (job.vocabulary + 32);
    for (int head = 0; rows; head++) {
        lift_states<A>(pool, slot, job, rows, head);
        const int width = pool.active() == 1 ? panels : 16;
        pool.each((panels + width - 1) / width, [&](int, int chunk) {
            int panel = chunk * width;
            coarse_panels(slot, job, rows, panel, panels - panel < width ? panels - panel : width);
        });
        pool.each(rows, [&](int thread, int i) { choose<A>(slot, job, i, head, job.scratch + (size_t)thread * room); });
        rows = keep_open(job, rows, head, slot.heads);
    }
}

static void draft(Pool &pool, const DraftJob &job) {
    for (int i = 0; i < job.rows; i++) job.counts[i] = 0;
    for (int at = 1; at <= job.last_slot; at++) {
        const HeadSlot &slot = job.slots[at];
        int rows = 0;
        for (int i = 0; i < job.rows && slot.heads; i++) {
            if (job.asks[i].slot != at || job.asks[i].most <= 0) continue;
            job.row[rows] = i, job.place[rows] = slot.places[job.asks[i].token], job.survival[rows++] = 1.0f;
        }
        if (slot.bf16) draft_slot<Bf16>(pool, slot, job, rows);
        else draft_slot<F32>(pool, slot, job, rows);
    }
}

// Up to `most` tokens behind each ask's token; rows of empty slots get none.
extern "C" void whet_draft(Engine *engine, const DraftJob *job) {
    engine->pool.alone = job->rows < engine->model.solo;
    draft(engine->pool, *job);
}

// Whether products with bf16 weights take fp32 as it is: then heads stored in bf16 lose nothing by staying so.
extern "C" int whet_bf16_is_exact() { return Bf16::Input::values == 1; }

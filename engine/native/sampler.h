// One token per row: what engine/layers/sampler.py does, with the same noise. A token can only win if its exponential
// variate is small enough, and that is at least one minus its uniform: almost all are dismissed without a logarithm.
#pragma once
#include "simd.h"

struct Draw {
    uint64_t seed;
    int64_t choice, position;
    float temperature, top_p, min_p;
    int32_t top_k;
};

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
static const float NOISE_RANGE = 26.2f;

template <class T> static inline T finalise(T x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
static uint64_t row_key(const Draw &draw) {
    uint64_t key = finalise(draw.seed + GOLDEN);
    key = finalise((key ^ (uint64_t)draw.choice) + GOLDEN);
    return finalise(key + (uint64_t)draw.position * GOLDEN + GOLDEN);
}
static double gumbel(uint32_t bits) { return -log(-log((bits + 0.5) * 0x1p-32)); }

// The largest value such that those at or above it weigh `target` or more; values and weights are reordered.
static float crossing(float *values, float *weights, int count, double target) {
    int from = 0, to = count;
    while (true) {
        float a = values[from], b = values[(from + to) / 2], c = values[to - 1];
        float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        double above = 0, equal = 0;
        int high = from, middle = from, low = to;  // [from, high) above, [high, middle) equal, [low, to) below
        while (middle < low) {
            float value = values[middle], weight = weights[middle];
            int other = value > pivot ? high : value < pivot ? low - 1 : middle;
            values[middle] = values[other], weights[middle] = weights[other];
            values[other] = value, weights[other] = weight;
            if (value > pivot) above += weight, high++, middle++;
            else if (value < pivot) low--;
            else equal += weight, middle++;
        }
        if (above >= target && high > from) to = high;
        else if (above + equal >= target || low == to) return pivot;
        else target -= above + equal, from = low;
    }
}

// Raises `floor` to what top-k and then top-p leave. A histogram finds the bin in which the line is crossed; only that
// bin's tokens are looked at one by one. `values` and `weights` are scratch of the vocabulary's size.
static float narrow(const float *scaled, const float *odds, int size, const Draw &draw, float floor, float *values,
                    float *weights) {
    const int bins = 512;
    const float fineness = (bins - 1) / NOISE_RANGE;
    for (int by_mass = 0; by_mass < 2; by_mass++) {
        if (by_mass ? draw.top_p >= 1 : draw.top_k <= 0 || draw.top_k >= size) continue;
        double mass[bins] = {}, total = 0, above = 0;
        for (int i = 0; i < size; i++)
            if (scaled[i] >= floor) mass[(int)(-scaled[i] * fineness)] += by_mass ? odds[i] : 1;
        for (double one : mass) total += one;
        double target = by_mass ? draw.top_p * total : draw.top_k;
        if (!by_mass && total <= target) continue;
        int bin = 0, count = 0;
        while (bin < bins - 1 && above + mass[bin] < target) above += mass[bin++];
        for (int i = 0; i < size; i++)
            if (scaled[i] >= floor && (int)(-scaled[i] * fineness) == bin)
                values[count] = scaled[i], weights[count++] = by_mass ? odds[i] : 1;
        if (count) floor = crossing(values, weights, count, target - above);
    }
    return floor;
}

static int noisy(const float *logits, int size, float top, int best, const Draw &draw, float *scratch) {
    float *scaled = scratch, *odds = scratch + size + 16, *values = odds + size + 16, *weights = values + size + 16;
    float temperature = draw.temperature > 1e-6f ? draw.temperature : 1e-6f;
    for (int i = 0; i < size; i++) scaled[i] = (logits[i] - top) / temperature;
    for (int i = size; i < size + 16; i++) scaled[i] = -INFINITY;
    for (int i = 0; i < size; i += 16) store(odds + i, exp16(load(scaled + i)));
    float floor = -NOISE_RANGE;
    if (draw.min_p > 0 && logf(draw.min_p) > floor) floor = logf(draw.min_p);
    floor = narrow(scaled, odds, size, draw, floor, values, weights);
    const uint64_t key = row_key(draw);
    double winner = gumbel((uint32_t)finalise(finalise(key + (uint64_t)best * GOLDEN)));
    float limit = (float)exp(-winner) * 1.0001f;
    static const uint64_t counted[] = {0, 1, 2, 3, 4, 5, 6, 7};
    const v8u lanes = read<v8u>(counted) * GOLDEN + key;
    uint32_t *bits = (uint32_t *)values;
    int token = best;
    for (int i = 0; i < size; i += 8)
        write(bits + i, convert<v8n>(finalise(finalise(lanes + (uint64_t)i * GOLDEN))));
    for (int i = 0; i < size; i += 16) {
        // Half of one minus the uniform, in 31 bits: nothing that could win is dismissed for its last bit.
        v16f least = convert<v16f>((v16i)(~read<v16u>(bits + i) >> 1)) * 0x1p-31f;
        unsigned open = bits_of(least < load(odds + i) * limit) & bits_of(load(scaled + i) >= floor);
        for (; open; open &= open - 1) {
            int at = i + __builtin_ctz(open);
            if (at == best) continue;
            double perturbed = scaled[at] + gumbel(bits[at]);
            if (perturbed > winner || (perturbed == winner && at < token)) {
                winner = perturbed, token = at;
                limit = (float)exp(-winner) * 1.0001f;
            }
        }
    }
    return token;
}

// `scratch` holds 4 * (size + 16) floats.
static void sample_row(const float *logits, int size, const Draw &draw, float *scratch, int64_t *token, float *logprob) {
    v16f tops = splat(-INFINITY);
    int whole = size / 16 * 16;
    for (int i = 0; i < whole; i += 16) tops = larger(tops, load(logits + i));
    float top = largest(tops);
    for (int i = whole; i < size; i++) top = logits[i] > top ? logits[i] : top;
    v16f sums = {};
    for (int i = 0; i < whole; i += 16) sums += exp16(load(logits + i) - top);
    double mass = sum(sums);
    for (int i = whole; i < size; i++) mass += expf(logits[i] - top);
    int best = 0;
    while (best < whole && !bits_of(load(logits + best) == top)) best += 16;
    while (best < size - 1 && logits[best] != top) best++;
    if (draw.temperature > 0 && isfinite(mass)) best = noisy(logits, size, top, best, draw, scratch);
    *token = best;
    *logprob = logits[best] - top - (float)log(mass);
}

// Functions of sixteen lanes, and what matrices are made of; instructions for bf16 products where the CPU has them.
#pragma once
#include <math.h>

#include "lanes.h"

// e^x with about 1e-7 relative error: x = n ln 2 + r, a polynomial in r, n added to the exponent.
LANES v16f exp16(v16f x) {
    x = select(x < -87.0f, splat(-87.0f), select(x > 88.0f, splat(88.0f), x));
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    v16f n = (x * 1.44269504088896341f + magic) - magic;
    v16f r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16f p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v16i exponent = (convert<v16i>(n) + 127) << 23;
    return p * (v16f)exponent;
}
LANES v16f silu(v16f x) { return x / (exp16(-x) + 1.0f); }

LANES v16h to_bf16(v16f x) {
#if defined(__AVX512BF16__)
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    v16h out;
    memcpy(&out, &y, 32);
    return out;
#else
    v16u u = (v16u)x;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return convert<v16h>(u);
#endif
}
LANES v16f from_bf16(const uint16_t *p) {
    return (v16f)(convert<v16u>(read<v16h>(p)) << 16);
}
static inline uint16_t round_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// What matrices, pages and activations are made of. A *unit* is 32 bits of one row: one fp32 value or two bf16 values.
// `weights` loads sixteen outputs' part of a unit and `mac` multiplies it with one unit of activations and accumulates.
// A CPU that multiplies pairs takes a unit in one part and activations in pairs; others take a pair in two parts, and
// activations, which `Input` names, in fp32: rounding them would save nothing.
struct F32 {
    static const int values = 1, bytes = 64, parts = 1;
    typedef float element;
    typedef F32 Input;
    LANES v16u weights(const uint8_t *p, int) { return read<v16u>(p); }
    LANES v16f mac(v16f acc, v16u w, uint32_t x) {
        float f;
        memcpy(&f, &x, 4);
        return acc + (v16f)w * f;
    }
    LANES void put(element *p, v16f x) { store(p, x); }
    LANES v16f get(const element *p) { return load(p); }
    LANES element one(float x) { return x; }
};

struct Bf16 {
    static const int values = 2, bytes = 64;
    typedef uint16_t element;
#if defined(__AVX512BF16__)
    static const int parts = 1;
    typedef Bf16 Input;
    LANES v16u weights(const uint8_t *p, int) { return read<v16u>(p); }
    LANES v16f mac(v16f acc, v16u w, uint32_t x) {
        return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
    }
#else
    static const int parts = 2;
    typedef F32 Input;
    LANES v16u weights(const uint8_t *p, int part) {
        v16u pair = read<v16u>(p);
        return part ? pair & 0xffff0000u : pair << 16;
    }
    LANES v16f mac(v16f acc, v16u w, uint32_t x) { return F32::mac(acc, w, x); }
#endif
    LANES void put(element *p, v16f x) { write(p, to_bf16(x)); }
    LANES v16f get(const element *p) { return from_bf16(p); }
    LANES element one(float x) { return round_bf16(x); }
};

// Eight-bit weights: every int8 value is a bf16 value, so only the scale is approximate.
struct Int8 {
    static const int values = 2, bytes = 32, parts = Bf16::parts;
    LANES v16u weights(const uint8_t *p, int part) {
#if defined(__AVX512BF16__)
        typedef int8_t v32c VECTOR(32);
        typedef int16_t v32s VECTOR(64);
        v16i pair = (v16i)__builtin_convertvector(read<v32c>(p), v32s);
        v16f low = convert<v16f>((pair << 16) >> 16), high = convert<v16f>(pair >> 16);
        return ((v16u)low >> 16) | (v16u)high;
#else
        v16i pair = convert<v16i>(read<v16s>(p));
        return (v16u)convert<v16f>(part ? pair >> 8 : (pair << 24) >> 24);
#endif
    }
    LANES v16f mac(v16f acc, v16u w, uint32_t x) { return Bf16::mac(acc, w, x); }
};

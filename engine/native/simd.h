// Sixteen lanes at a time, in the compiler's portable vector types; instructions for bf16 products where the CPU has them.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));

static inline v16f load(const float *p) {
    v16f x;
    memcpy(&x, p, 64);
    return x;
}
static inline void store(float *p, v16f x) { memcpy(p, &x, 64); }
static inline v16f splat(float x) { return x - (v16f){}; }

static inline float sum(v16f x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < 16; i++) total += x[i];
    return total;
#endif
}
static inline v16f larger(v16f a, v16f b) { return a > b ? a : b; }
static inline float largest(v16f x) {
    float best = x[0];
    for (int i = 1; i < 16; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// e^x with about 1e-7 relative error: x = n ln 2 + r, a polynomial in r, n added to the exponent.
static inline v16f exp16(v16f x) {
    x = x < -87.0f ? splat(-87.0f) : x > 88.0f ? splat(88.0f) : x;
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
    v16i exponent = (__builtin_convertvector(n, v16i) + 127) << 23;
    return p * (v16f)exponent;
}
static inline v16f silu(v16f x) { return x / (exp16(-x) + 1.0f); }

static inline v16h to_bf16(v16f x) {
#if defined(__AVX512BF16__)
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    v16h out;
    memcpy(&out, &y, 32);
    return out;
#else
    v16u u = (v16u)x;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(u, v16h);
#endif
}
static inline v16f from_bf16(const uint16_t *p) {
    v16h h;
    memcpy(&h, p, 32);
    return (v16f)(__builtin_convertvector(h, v16u) << 16);
}
static inline uint16_t round_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// What a matrix is made of. A *unit* is 32 bits of one row: one fp32 value or two bf16 values; activations are rows of
// units. `weights` loads the units of sixteen outputs; `mac` multiplies them with one broadcast unit and accumulates.
struct F32 {
    static const int values = 1, bytes = 64;
    typedef float element;
    static inline v16u weights(const uint8_t *p) {
        v16u w;
        memcpy(&w, p, 64);
        return w;
    }
    static inline v16f mac(v16f acc, v16u w, uint32_t x) {
        float f;
        memcpy(&f, &x, 4);
        return acc + (v16f)w * f;
    }
    static inline void put(element *p, v16f x) { store(p, x); }
    static inline v16f get(const element *p) { return load(p); }
    static inline element one(float x) { return x; }
};

struct Bf16 {
    static const int values = 2, bytes = 64;
    typedef uint16_t element;
    static inline v16u weights(const uint8_t *p) { return F32::weights(p); }
    static inline v16f mac(v16f acc, v16u w, uint32_t x) {
#if defined(__AVX512BF16__)
        return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
        uint32_t low = x << 16, high = x & 0xffff0000u;
        float a, b;
        memcpy(&a, &low, 4);
        memcpy(&b, &high, 4);
        return acc + (v16f)(w << 16) * a + (v16f)(w & 0xffff0000u) * b;
#endif
    }
    static inline void put(element *p, v16f x) {
        v16h h = to_bf16(x);
        memcpy(p, &h, 32);
    }
    static inline v16f get(const element *p) { return from_bf16(p); }
    static inline element one(float x) { return round_bf16(x); }
};

// Eight-bit weights times bf16 activations: every int8 value is a bf16 value, so only the scale is approximate.
struct Int8 {
    static const int values = 2, bytes = 32;
    static inline v16u weights(const uint8_t *p) {
        typedef int8_t v32c __attribute__((vector_size(32)));
        typedef int16_t v32s __attribute__((vector_size(64)));
        v32c c;
        memcpy(&c, p, 32);
        v16i pair = (v16i)__builtin_convertvector(c, v32s);
        v16f low = __builtin_convertvector((pair << 16) >> 16, v16f), high = __builtin_convertvector(pair >> 16, v16f);
        return ((v16u)low >> 16) | (v16u)high;
    }
    static inline v16f mac(v16f acc, v16u w, uint32_t x) { return Bf16::mac(acc, w, x); }
};

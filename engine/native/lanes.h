// Sixteen lanes at a time, in the compiler's portable vector types. Where the CPU's own vectors are narrower they are
// pairs of narrower ones, which live in registers: the compiler keeps a vector wider than a register in memory.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LANES static inline __attribute__((always_inline))
#define VECTOR(bytes) __attribute__((vector_size(bytes)))

#if defined(__AVX512F__)
typedef float v16f VECTOR(64);
typedef int32_t v16i VECTOR(64);
typedef uint32_t v16u VECTOR(64);
typedef uint16_t v16h VECTOR(32);
typedef int16_t v16s VECTOR(32);
typedef uint64_t v8u VECTOR(64);
typedef uint32_t v8n VECTOR(32);
// How many vectors of sums a product keeps at a time: what the registers hold beside its operands.
static const int SUMS = 24;
#else

template <class Half, class Lane> struct Pair {
    Half low, high;

    // As the compiler's own vectors: the same bits, read as lanes of another type.
    template <class H, class L> __attribute__((always_inline)) explicit operator Pair<H, L>() const {
        return {(H)low, (H)high};
    }
#define WITH(op, result, type, one, other)                                                                             \
    friend __attribute__((always_inline)) inline result operator op(Pair a, type b) {                                  \
        return {a.low op one, a.high op other};                                                                        \
    }
#define WITH_BOTH(op, result) WITH(op, result, Pair, b.low, b.high) WITH(op, result, Lane, b, b)
    WITH_BOTH(+, Pair)
    WITH_BOTH(-, Pair)
    WITH_BOTH(*, Pair)
    WITH_BOTH(/, Pair)
    WITH_BOTH(&, Pair)
    WITH_BOTH(|, Pair)
    WITH_BOTH(^, Pair)
    WITH(<<, Pair, int, (Lane)b, (Lane)b)
    WITH(>>, Pair, int, (Lane)b, (Lane)b)
#undef WITH_BOTH
#undef WITH
    __attribute__((always_inline)) Pair operator-() const { return {-low, -high}; }
    __attribute__((always_inline)) Pair operator~() const { return {~low, ~high}; }
    template <class T> __attribute__((always_inline)) Pair &operator+=(T b) { return *this = *this + b; }
    template <class T> __attribute__((always_inline)) Pair &operator*=(T b) { return *this = *this * b; }
};

#define COMPARE(op)                                                                                                    \
    template <class H, class L> LANES auto operator op(Pair<H, L> a, Pair<H, L> b)                                     \
        -> Pair<decltype(a.low op b.low), int32_t> {                                                                   \
        return {a.low op b.low, a.high op b.high};                                                                     \
    }                                                                                                                  \
    template <class H, class L> LANES auto operator op(Pair<H, L> a, L b) -> Pair<decltype(a.low op b), int32_t> {     \
        return {a.low op b, a.high op b};                                                                              \
    }
COMPARE(<)
COMPARE(>)
COMPARE(<=)
COMPARE(>=)
COMPARE(==)
#undef COMPARE

#if defined(__AVX2__)
#define SIXTEEN(name, lane, size)                                                                                      \
    typedef lane name##_half VECTOR(8 * size);                                                                         \
    typedef Pair<name##_half, lane> name;
typedef uint64_t v4u VECTOR(32);
typedef uint32_t v4n VECTOR(16);
typedef Pair<v4u, uint64_t> v8u;
typedef Pair<v4n, uint32_t> v8n;
static const int SUMS = 6;
#else
#define SIXTEEN(name, lane, size)                                                                                      \
    typedef lane name##_quarter VECTOR(4 * size);                                                                      \
    typedef Pair<Pair<name##_quarter, lane>, lane> name;
typedef uint64_t v2u VECTOR(16);
typedef uint32_t v2n VECTOR(8);
typedef Pair<Pair<v2u, uint64_t>, uint64_t> v8u;
typedef Pair<Pair<v2n, uint32_t>, uint32_t> v8n;
#if defined(__aarch64__)
static const int SUMS = 6;
#else
static const int SUMS = 3;
#endif
#endif
SIXTEEN(v16f, float, 4)
SIXTEEN(v16i, int32_t, 4)
SIXTEEN(v16u, uint32_t, 4)
SIXTEEN(v16h, uint16_t, 2)
SIXTEEN(v16s, int16_t, 2)
#undef SIXTEEN
#endif

// `x` in a register, where the compiler would rather compute it or load it again each time.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <class V> LANES void hold(V &x) { asm volatile("" : "+x"(x)); }
template <class H, class L> LANES void hold(Pair<H, L> &x) { hold(x.low), hold(x.high); }
#else
template <class V> LANES void hold(V &) {}
#endif

template <class V, class From> inline __attribute__((always_inline)) V converted(From x) {
    return __builtin_convertvector(x, V);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// Compilers take these conversions apart.
#define CONVERT(to, from)                                                                                              \
    template <> inline __attribute__((always_inline)) to converted<to, from>(from x)
CONVERT(v16i_half, v16s_half) { return (v16i_half)_mm256_cvtepi16_epi32((__m128i)x); }
CONVERT(v16u_half, v16h_half) { return (v16u_half)_mm256_cvtepu16_epi32((__m128i)x); }
CONVERT(v16h_half, v16u_half) {
    __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    return (v16h_half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
CONVERT(v4n, v4u) {
    __m256i even = _mm256_shuffle_epi32((__m256i)x, 0x88);
    return (v4n)_mm256_castsi256_si128(_mm256_permute4x64_epi64(even, 0x08));
}
#undef CONVERT
#endif

// A vector read from memory, written to it, filled with one value, converted lane by lane, chosen lane by lane.
template <class V> struct Of {
    LANES V read(const void *p) {
        V x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    LANES void write(void *p, V x) { memcpy(p, &x, sizeof x); }
    template <class L> LANES V splat(L x) { return x - V{}; }
    template <class From> LANES V convert(From x) { return converted<V>(x); }
    template <class Mask> LANES V select(Mask mask, V a, V b) { return mask ? a : b; }
};
#if !defined(__AVX512F__)
template <class H, class L> struct Of<Pair<H, L>> {
    typedef Pair<H, L> V;
    LANES V read(const void *p) { return {Of<H>::read(p), Of<H>::read((const char *)p + sizeof(H))}; }
    LANES void write(void *p, V x) {
        Of<H>::write(p, x.low);
        Of<H>::write((char *)p + sizeof(H), x.high);
    }
    LANES V splat(L x) {
        H half = Of<H>::splat(x);
        return {half, half};
    }
    template <class From> LANES V convert(From x) { return {Of<H>::convert(x.low), Of<H>::convert(x.high)}; }
    template <class Mask> LANES V select(Mask mask, V a, V b) {
        return {Of<H>::select(mask.low, a.low, b.low), Of<H>::select(mask.high, a.high, b.high)};
    }
};
#endif

template <class V> LANES V read(const void *p) { return Of<V>::read(p); }
template <class V> LANES void write(void *p, V x) { Of<V>::write(p, x); }
template <class V, class From> LANES V convert(From x) { return Of<V>::convert(x); }
template <class V, class Mask> LANES V select(Mask mask, V a, V b) { return Of<V>::select(mask, a, b); }

LANES v16f load(const float *p) { return read<v16f>(p); }
LANES void store(float *p, v16f x) { write(p, x); }
LANES v16f splat(float x) { return Of<v16f>::splat(x); }
LANES v16f larger(v16f a, v16f b) { return select(a > b, a, b); }

#if defined(__AVX512F__)
LANES float sum(v16f x) { return _mm512_reduce_add_ps((__m512)x); }
LANES float largest(v16f x) {
    float best = x[0];
    for (int i = 1; i < 16; i++) best = x[i] > best ? x[i] : best;
    return best;
}
// One bit for each lane of a comparison.
LANES unsigned bits_of(v16i mask) { return _mm512_cmplt_epi32_mask((__m512i)mask, _mm512_setzero_si512()); }
#else
template <class V> LANES float sum(V x) {
    float total = 0;
    for (unsigned i = 0; i < sizeof x / 4; i++) total += x[i];
    return total;
}
template <class V> LANES float largest(V x) {
    float best = x[0];
    for (unsigned i = 1; i < sizeof x / 4; i++) best = x[i] > best ? x[i] : best;
    return best;
}
template <class V> LANES unsigned bits_of(V mask) {
    unsigned bits = 0;
    for (unsigned i = 0; i < sizeof mask / 4; i++) bits |= (unsigned)(mask[i] < 0) << i;
    return bits;
}
#if defined(__AVX2__)
LANES float sum(v16f_half x) {
    typedef float v4f VECTOR(16);
    v4f half = (v4f)_mm256_castps256_ps128((__m256)x) + (v4f)_mm256_extractf128_ps((__m256)x, 1);
    return (half[0] + half[2]) + (half[1] + half[3]);
}
LANES unsigned bits_of(v16i_half mask) { return (unsigned)_mm256_movemask_ps((__m256)mask); }
#elif defined(__SSE2__)
LANES unsigned bits_of(v16i_quarter mask) { return (unsigned)_mm_movemask_ps((__m128)mask); }
#endif
template <class H> LANES float sum(Pair<H, float> x) { return sum(x.low + x.high); }
template <class H> LANES float largest(Pair<H, float> x) { return largest(select(x.low > x.high, x.low, x.high)); }
template <class H> LANES unsigned bits_of(Pair<H, int32_t> mask) {
    return bits_of(mask.low) | bits_of(mask.high) << sizeof(H) / 4;
}
#endif

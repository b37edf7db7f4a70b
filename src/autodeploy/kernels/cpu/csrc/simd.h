// Sixteen floats at a time, for any machine: loads from and stores to float32 and bfloat16, dot products, exp.
//
// The one thing a compiler would not find by itself, the AVX512-BF16 dot product, is spelled out below.

#pragma once

#include "vectors.h"

namespace autodeploy {

constexpr int LANES = 16;

using Floats = Vector<float, LANES>;
using Ints = Vector<int32_t, LANES>;
using Words = Vector<uint32_t, LANES>;

// A bfloat16 number: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

inline Floats splat(float x) { return x - Floats{}; }  // not 0 + x, which is an operation: it turns -0 into 0

inline Floats load(const float* from) { return load_vector<Floats>(from); }

inline Floats load(const bf16* from) {
    return bit_cast<Floats>(load_converted<Words>(reinterpret_cast<const uint16_t*>(from)) << 16);
}

inline void store(float* to, Floats x) { store_vector(to, x); }

// Rounds to nearest, ties to even; a NaN stays one, an infinity too.
inline Words upper_halves(Floats x) {
    const Words bits = bit_cast<Words>(x);
    return select(x == x, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, (bits >> 16) | 0x40);
}

inline void store(bf16* to, Floats x) {
    const Words halves = upper_halves(x);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i both = _mm256_packus_epi32(bit_cast<__m256i>(halves.low), bit_cast<__m256i>(halves.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(both, _MM_SHUFFLE(3, 1, 2, 0)));
#else
    store_converted(reinterpret_cast<uint16_t*>(to), halves);
#endif
}

// The first `count` lanes, for the end of a row; lanes beyond are zero, memory beyond is left alone.
template <class T>
inline Floats load(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
    return load(padded);
}

template <class T>
inline void store(T* to, Floats x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T padded[LANES];
    store(padded, x);
    std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

inline Floats round_to(Floats x, const float*) { return x; }

inline Floats round_to(Floats x, const bf16*) { return bit_cast<Floats>(upper_halves(x) << 16); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    to.bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
}

template <class V>
inline float sum(V x) {
    if constexpr (is_pair<V>::value) return sum(x.low + x.high);
#if defined(__AVX512F__)
    else return _mm512_reduce_add_ps(bit_cast<__m512>(x));
#elif defined(__AVX2__)
    else {
        __m128 four = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
        four += _mm_movehl_ps(four, four);
        return four[0] + four[1];
    }
#else
    else return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// to[0 .. 4] = the sums of four vectors.
template <class V>
inline void store_sums(V a, V b, V c, V d, float* to) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
        const auto halved = [](V x) {
            const __m256d upper = _mm512_extractf64x4_pd(bit_cast<__m512d>(x), 1);
            return _mm512_castps512_ps256(bit_cast<__m512>(x)) + bit_cast<__m256>(upper);
        };
        return store_sums(halved(a), halved(b), halved(c), halved(d), to);
    } else
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) {
        const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(to, _mm256_castps256_ps128(four) + _mm256_extractf128_ps(four, 1));
    } else
#endif
    {
        to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
    }
}

// The greatest of lanes that are no NaNs.
template <class V>
inline float greatest_lane(V x) {
    if constexpr (is_pair<V>::value) return greatest_lane(select(x.low > x.high, x.low, x.high));
#if defined(__AVX512F__)
    else return _mm512_reduce_max_ps(bit_cast<__m512>(x));
#elif defined(__AVX2__)
    else {
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return four[0] > four[1] ? four[0] : four[1];
    }
#else
    else {
        const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
        return even > odd ? even : odd;
    }
#endif
}

// A bit for each lane where a comparison held, the lowest one for the first lane.
template <class M>
inline uint32_t lanes_where(M mask) {
    if constexpr (is_pair<M>::value) return lanes_where(mask.low) | lanes_where(mask.high) << SIZE<M> / 2;
#if defined(__AVX512F__)
    else if constexpr (sizeof(M) == 64) {
        const __m256d upper = _mm512_extractf64x4_pd(bit_cast<__m512d>(mask), 1);
        return lanes_where(_mm512_castps512_ps256(bit_cast<__m512>(mask))) | lanes_where(bit_cast<__m256>(upper)) << 8;
    }
#endif
#if defined(__AVX2__)
    else if constexpr (sizeof(M) == 32) return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#endif
    else {
        uint32_t bits = 0;
        for (int i = 0; i < SIZE<M>; ++i) bits |= static_cast<uint32_t>(mask[i] != 0) << i;
        return bits;
    }
}

// Brings elements into the caches, from the first or from the second on: LOCALITY 3 or 2.
template <int LOCALITY, class T>
inline void prefetch(const T* from, int64_t count) {
    const char* byte = reinterpret_cast<const char*>(from);
    for (const char* end = byte + count * static_cast<int64_t>(sizeof(T)); byte < end; byte += 64)
        __builtin_prefetch(byte, 0, LOCALITY);
}

// e^r = 1 + r + ... for |r| <= ln 2 / 2, with x = r + n · ln 2 for a whole n, of which `shifted` is n + 1.5 · 2^23.
inline Floats exp_of_rest(Floats x, Floats& shifted) {
    const float shift = 12582912.0f;  // 1.5 · 2^23 rounds to an integer
    shifted = x * 1.44269504f + shift;
    const Floats n = shifted - shift;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

constexpr float LOWEST_EXPONENT = -87.336f;

// e^x to about 2 units in the last place: 2^n · e^r. Zero below the smallest normal result, infinity above the largest,
// NaN for NaN.
inline Floats exp(Floats x) {
    const float highest = 88.722f;
    Floats inside = select(x < LOWEST_EXPONENT, splat(LOWEST_EXPONENT), x), shifted;
    inside = select(inside > highest, splat(highest), inside);
    const Floats p = exp_of_rest(inside, shifted);
    // 2^n in two factors: n reaches 128, which has no float of its own.
    const Words integer = bit_cast<Words>(shifted) - bit_cast<Words>(splat(12582912.0f));
    const Words half = bit_cast<Words>(bit_cast<Ints>(integer) >> 1);
    const Floats result = p * bit_cast<Floats>((half + 127) << 23) * bit_cast<Floats>((integer - half + 127) << 23);
    const Floats bounded = select(x > highest, splat(__builtin_inff()), result);
    return select(x < LOWEST_EXPONENT, splat(0.0f), bounded);
}

// The same bits where no x is above 0, in less time.
inline Floats exp_below_one(Floats x) {
    Floats shifted;
    const Floats p = exp_of_rest(select(x < LOWEST_EXPONENT, splat(LOWEST_EXPONENT), x), shifted);
    const Floats result = p * bit_cast<Floats>((bit_cast<Words>(shifted) + 127) << 23);  // what is above is shifted out
    return select(x < LOWEST_EXPONENT, splat(0.0f), result);
}

// 2^x for x up to 0, to about 2 units in the last place, in less time still: zero below -126.5, NaN for NaN.
template <class V>
inline V exp2_below_one(V x) {
    const float shift = 12582912.0f + 127.0f;  // rounds to an integer, whose last bits are then those of an exponent
    x = select(x < -127.0f, V{} - 127.0f, x);
    const V shifted = x + shift, r = x - (shifted - shift);
    V p = r * 1.3264727313e-3f + 9.6715129912e-3f;
    p = p * r + 5.5507335812e-2f;
    p = p * r + 2.4022242427e-1f;
    p = p * r + 6.9314700365e-1f;
    p = p * r + 1.0f;
    return p * bit_cast<V>(bit_cast<Vector<uint32_t, SIZE<V>>>(shifted) << 23);
}

inline Floats tanh(Floats x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

// How rows of T are multiplied and summed: `Packed` holds `WIDTH` elements, `multiply_add` adds their products with
// others into 16 float32 partial sums. What many rows are multiplied with is converted to `Operand` before.
template <class T>
struct Product {
    static constexpr int WIDTH = LANES;
    using Packed = Floats;
    using Operand = float;
    template <class E>
    static Packed pack(const E* from) {
        return load(from);
    }
    template <class E>
    static Packed pack(const E* from, int64_t count) {
        return load(from, count);
    }
    static Floats multiply_add(Floats total, Packed a, Packed b) { return a * b + total; }
};

#if defined(__AVX512BF16__)
template <>
struct Product<bf16> {
    static constexpr int WIDTH = 2 * LANES;
    using Packed = __m512bh;
    using Operand = bf16;
    static Packed pack(const bf16* from) {
        Packed x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
    static Packed pack(const bf16* from, int64_t count) {
        bf16 padded[WIDTH] = {};
        std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(bf16));
        return pack(padded);
    }
    static Floats multiply_add(Floats total, Packed a, Packed b) {
        return bit_cast<Floats>(_mm512_dpbf16_ps(bit_cast<__m512>(total), a, b));
    }
};
#endif

// `length` elements as operands.
template <class T>
inline void to_operands(const T* from, int64_t length, float* to) {
    for (int64_t i = 0; i < length; i += LANES) store(to + i, load(from + i, length - i), length - i);
}

inline void to_operands(const bf16* from, int64_t length, bf16* to) {
    std::memcpy(to, from, static_cast<size_t>(length) * sizeof(bf16));
}

// products[m] = the dot product of `a` with row m of `b`, each `length` long, a multiple of the packed width unless
// HAS_TAIL. (With the tail out of sight, the compiler keeps the partial sums in registers.)
//
// One row of `a` at a time, so that a weight is read as one unbroken stream, which the hardware prefetches best; two
// sets of partial sums where registers allow, so that additions do not wait for each other.
template <class T, int M, bool HAS_TAIL, class X>
inline void dot_products(const T* a, const X* const* b, int64_t length, float products[M]) {
    using P = Product<T>;
    constexpr int SETS = M * static_cast<int>(sizeof(Floats)) / REGISTER_BYTES <= 4 ? 2 : 1;
    Floats sums[SETS][M] = {};
    const int64_t whole = length / P::WIDTH * P::WIDTH;
    int64_t i = 0;
    for (; i + SETS * P::WIDTH <= whole; i += SETS * P::WIDTH) {
        for (int set = 0; set < SETS; ++set) {
            const typename P::Packed packed = P::pack(a + i + set * P::WIDTH);
            for (int m = 0; m < M; ++m)
                sums[set][m] = P::multiply_add(sums[set][m], packed, P::pack(b[m] + i + set * P::WIDTH));
        }
    }
    if (SETS > 1 && i < whole) {
        const typename P::Packed last = P::pack(a + i);
        for (int m = 0; m < M; ++m) sums[0][m] = P::multiply_add(sums[0][m], last, P::pack(b[m] + i));
    }
    if constexpr (HAS_TAIL) {
        const typename P::Packed tail = P::pack(a + whole, length - whole);
        for (int m = 0; m < M; ++m)
            sums[SETS - 1][m] = P::multiply_add(sums[SETS - 1][m], tail, P::pack(b[m] + whole, length - whole));
    }
    for (int m = 0; m < M; ++m) products[m] = sum(SETS > 1 ? sums[0][m] + sums[1][m] : sums[0][m]);
}

// A loop over registers, unrolled before compilers decide where to keep an array of them: later, some choose memory.
#define EACH(INDEX, COUNT) _Pragma("GCC unroll 16") for (int INDEX = 0; INDEX < COUNT; ++INDEX)

// Keeps compilers from reading a register's content from memory again at each use.
template <class V>
inline void keep_in_register([[maybe_unused]] V& x) {
#if defined(__AVX2__) && !defined(AUTODEPLOY_EMULATED)
    asm("" : "+v"(x));
#endif
}

// As many products as fill a register: what they are added to, and elements as they are multiplied.
template <class T>
struct Register {
    static constexpr int WIDTH = REGISTER_BYTES / static_cast<int>(sizeof(float));
    using Sums = Vector<float, WIDTH>;
    using Packed = Sums;
    static Packed pack(const float* from) { return load_vector<Sums>(from); }
    static Packed pack(const bf16* from) {
        return bit_cast<Sums>(load_converted<Vector<uint32_t, WIDTH>>(reinterpret_cast<const uint16_t*>(from)) << 16);
    }
    static Sums multiply_add(Sums total, Packed a, Packed b) { return a * b + total; }
};

#if defined(__AVX512BF16__)
template <>
struct Register<bf16> : Product<bf16> {
    using Sums = Floats;
};
#endif

// products[o][m] = the dot product of row o of `a` with row m of `b`; rows are `length` apart. Sums stay in registers,
// of which W = 2 and M up to 6 need 15. A product has the same bits whatever W and M are. By itself, as compilers spill
// sums in larger functions.
template <class T, int W, int M, class X>
__attribute__((noinline)) void multiply_rows_of(const T* a, const X* b, int64_t length, float products[W][M]) {
    using R = Register<T>;
    typename R::Sums sums[W][M];
    EACH(w, W) EACH(m, M) sums[w][m] = typename R::Sums{};
    const int64_t whole = length / R::WIDTH * R::WIDTH;
    const auto add = [&](const T* from_a, int64_t stride_a, const X* from_b, int64_t stride_b) {
        typename R::Packed packed[W];
        EACH(w, W) packed[w] = R::pack(from_a + w * stride_a);
        EACH(m, M) {
            typename R::Packed x = R::pack(from_b + m * stride_b);
            keep_in_register(x);
            EACH(w, W) sums[w][m] = R::multiply_add(sums[w][m], packed[w], x);
        }
    };
    for (int64_t i = 0; i < whole; i += R::WIDTH) add(a + i, length, b + i, length);
    if (whole < length) {
        T padded_a[W][R::WIDTH] = {};
        X padded_b[M][R::WIDTH] = {};
        const size_t count = static_cast<size_t>(length - whole);
        for (int w = 0; w < W; ++w) std::memcpy(padded_a[w], a + w * length + whole, count * sizeof(T));
        for (int m = 0; m < M; ++m) std::memcpy(padded_b[m], b + m * length + whole, count * sizeof(X));
        add(padded_a[0], R::WIDTH, padded_b[0], R::WIDTH);
    }
    constexpr int COUNT = W * M, FOURS = COUNT / 4 * 4;
    const auto at = [&](int i) { return i < COUNT ? sums[i / M][i % M] : typename R::Sums{}; };
    EACH(i, FOURS / 4) store_sums(at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3), products[0] + 4 * i);
    if constexpr (FOURS < COUNT) {
        float last[4];
        store_sums(at(FOURS), at(FOURS + 1), at(FOURS + 2), at(FOURS + 3), last);
        std::memcpy(products[0] + FOURS, last, sizeof(float) * (COUNT - FOURS));
    }
}

template <class T, int M, class X>
inline void dot_products(const T* a, const X* const* b, int64_t length, float products[M]) {
    if (length % Product<T>::WIDTH == 0)
        dot_products<T, M, false>(a, b, length, products);
    else
        dot_products<T, M, true>(a, b, length, products);
}

}  // namespace autodeploy

// AVX-512 for processors that lack it: what the kernels use of it, in plain C++ with the instructions' exact results, so
// that what is compiled for AVX-512 can run anywhere. To be included before all else (`-include`), with EMULATE_BW,
// EMULATE_VNNI and EMULATE_BF16 defined for the extensions. Vectors of 64 bytes are the compiler's, which splits them.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#error "this processor's own AVX-512 has to be switched off: -mno-avx512f"
#endif

#define AUTODEPLOY_EMULATED 1  // no register has 64 bytes, so none can be named in assembly
#define __AVX512F__ 1
#undef __AMX_BF16__  // as on a processor that has no more than what is emulated

namespace emulated_avx512 {

template <class E>
struct Lanes {
    E at[64 / sizeof(E)];
    template <class V>
    explicit Lanes(const V& x) {
        static_assert(sizeof(V) == sizeof(at), "a vector of 64 bytes");
        std::memcpy(at, &x, sizeof(at));
    }
    Lanes() = default;
    template <class V>
    V as() const {
        static_assert(sizeof(V) == sizeof(at), "a vector of 64 bytes");
        V x;
        std::memcpy(&x, at, sizeof(x));
        return x;
    }
};

// Halves with halves, as the compilers' own sequences of instructions go.
template <class E, class V, class Combine>
inline E reduce(const V& x, Combine combine) {
    Lanes<E> lanes(x);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes.at[i] = combine(lanes.at[i], lanes.at[i + half]);
    return lanes.at[0];
}

inline float reduce_add_ps(__m512 x) {
    return reduce<float>(x, [](float a, float b) { return a + b; });
}

inline float reduce_max_ps(__m512 x) {
    return reduce<float>(x, [](float a, float b) { return a > b ? a : b; });
}

inline int32_t reduce_add_epi32(__m512i x) {
    return static_cast<int32_t>(reduce<uint32_t>(x, [](uint32_t a, uint32_t b) { return a + b; }));
}

inline int32_t reduce_max_epi32(__m512i x) {
    return reduce<int32_t>(x, [](int32_t a, int32_t b) { return a > b ? a : b; });
}

template <class E>
inline __m512i set1(E x) {
    Lanes<E> lanes;
    for (E& lane : lanes.at) lane = x;
    return lanes.template as<__m512i>();
}

inline __m512i set1_epi8(int8_t x) { return set1(x); }
inline __m512i set1_epi16(int16_t x) { return set1(x); }
inline __m512i set1_epi32(int32_t x) { return set1(x); }

// The nearest whole number, of two equally near the even one; for what no int32 is near to, the smallest.
inline __m512i cvtps_epi32(__m512 x) {
    const Lanes<float> from(x);
    Lanes<int32_t> to;
    for (int i = 0; i < 16; ++i) {
        const float whole = std::nearbyint(from.at[i]);
        to.at[i] = whole >= -0x1p31f && whole < 0x1p31f ? static_cast<int32_t>(whole) : INT32_MIN;
    }
    return to.as<__m512i>();
}

// float16 to float32, exactly; a signalling NaN becomes a quiet one.
inline __m512 cvtph_ps(__m256i x) {
    uint16_t halves[16];
    std::memcpy(halves, &x, sizeof(halves));
    Lanes<uint32_t> to;
    for (int i = 0; i < 16; ++i) {
        const uint32_t sign = (halves[i] & 0x8000u) << 16, exponent = halves[i] >> 10 & 31, fraction = halves[i] & 1023;
        if (exponent == 31) {
            to.at[i] = sign | 0x7f800000u | fraction << 13 | (fraction != 0 ? 0x400000u : 0);
        } else if (exponent != 0) {
            to.at[i] = sign | (exponent + 112) << 23 | fraction << 13;
        } else {
            const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
            std::memcpy(&to.at[i], &magnitude, sizeof(magnitude));
            to.at[i] |= sign;
        }
    }
    return to.as<__m512>();
}

inline __m512i cvtepu16_epi32(__m256i x) {
    uint16_t from[16];
    std::memcpy(from, &x, sizeof(from));
    Lanes<uint32_t> to;
    for (int i = 0; i < 16; ++i) to.at[i] = from[i];
    return to.as<__m512i>();
}

// The lower halves of lanes.
inline __m256i cvtepi32_epi16(__m512i x) {
    const Lanes<uint32_t> from(x);
    uint16_t to[16];
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from.at[i]);
    __m256i result;
    std::memcpy(&result, to, sizeof(result));
    return result;
}

inline __m256 castps512_ps256(__m512 x) {
    __m256 lower;
    std::memcpy(&lower, &x, sizeof(lower));
    return lower;
}

inline __m256d extractf64x4_pd(__m512d x, int upper) {
    __m256d half;
    std::memcpy(&half, reinterpret_cast<const char*>(&x) + 32 * (upper & 1), sizeof(half));
    return half;
}

template <class E>
inline __m512i add(__m512i a, __m512i b) {
    Lanes<E> sums(a);
    const Lanes<E> others(b);
    for (size_t i = 0; i < 64 / sizeof(E); ++i) sums.at[i] = static_cast<E>(sums.at[i] + others.at[i]);
    return sums.template as<__m512i>();
}

inline __m512i add_epi16(__m512i a, __m512i b) { return add<uint16_t>(a, b); }
inline __m512i add_epi32(__m512i a, __m512i b) { return add<uint32_t>(a, b); }

inline __m512i srli_epi16(__m512i x, unsigned count) {
    Lanes<uint16_t> lanes(x);
    for (uint16_t& lane : lanes.at) lane = static_cast<uint16_t>(count < 16 ? lane >> count : 0);
    return lanes.as<__m512i>();
}

// The products of neighbours, added in pairs.
inline __m512i madd_epi16(__m512i a, __m512i b) {
    const Lanes<int16_t> left(a), right(b);
    Lanes<uint32_t> to;
    for (int i = 0; i < 16; ++i)
        to.at[i] = static_cast<uint32_t>(left.at[2 * i] * right.at[2 * i]) +
                   static_cast<uint32_t>(left.at[2 * i + 1] * right.at[2 * i + 1]);
    return to.as<__m512i>();
}

// The same of unsigned bytes with signed ones; what 16 bits do not hold becomes the nearest that they do.
inline __m512i maddubs_epi16(__m512i a, __m512i b) {
    const Lanes<uint8_t> bytes(a);
    const Lanes<int8_t> numbers(b);
    Lanes<int16_t> to;
    for (int i = 0; i < 32; ++i) {
        const int sum = bytes.at[2 * i] * numbers.at[2 * i] + bytes.at[2 * i + 1] * numbers.at[2 * i + 1];
        to.at[i] = static_cast<int16_t>(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
    }
    return to.as<__m512i>();
}

// Of each lane, four unsigned bytes with four signed ones, and all products added, without saturation.
inline __m512i dpbusd_epi32(__m512i total, __m512i a, __m512i b) {
    Lanes<uint32_t> totals(total);
    const Lanes<uint8_t> bytes(a);
    const Lanes<int8_t> numbers(b);
    for (int i = 0; i < 64; ++i) totals.at[i / 4] += static_cast<uint32_t>(bytes.at[i] * numbers.at[i]);
    return totals.as<__m512i>();
}

// What is smaller than a normal number becomes zero, with its sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Of each lane, the products of two pairs of bfloat16 are added one after the other, the second first, each with one
// rounding.
inline __m512 dpbf16_ps(__m512 total, __m512bh a, __m512bh b) {
    Lanes<float> totals(total);
    const Lanes<uint16_t> left(a), right(b);
    const auto number = [](uint16_t bits) {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &word, sizeof(x));
        return flushed(x);
    };
    for (int i = 0; i < 16; ++i)
        for (int j = 2 * i + 1; j >= 2 * i; --j)
            totals.at[i] = flushed(std::fma(number(left.at[j]), number(right.at[j]), flushed(totals.at[i])));
    return totals.as<__m512>();
}

}  // namespace emulated_avx512

#define _mm512_reduce_add_ps emulated_avx512::reduce_add_ps
#define _mm512_reduce_max_ps emulated_avx512::reduce_max_ps
#define _mm512_reduce_add_epi32 emulated_avx512::reduce_add_epi32
#define _mm512_reduce_max_epi32 emulated_avx512::reduce_max_epi32
#define _mm512_set1_epi32 emulated_avx512::set1_epi32
#define _mm512_cvtps_epi32 emulated_avx512::cvtps_epi32
#define _mm512_cvtph_ps emulated_avx512::cvtph_ps
#define _mm512_cvtepu16_epi32 emulated_avx512::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated_avx512::cvtepi32_epi16
#define _mm512_castps512_ps256 emulated_avx512::castps512_ps256
#define _mm512_extractf64x4_pd emulated_avx512::extractf64x4_pd

#if defined(EMULATE_BW)
#define __AVX512BW__ 1
#define _mm512_set1_epi8 emulated_avx512::set1_epi8
#define _mm512_set1_epi16 emulated_avx512::set1_epi16
#define _mm512_add_epi16 emulated_avx512::add_epi16
#define _mm512_add_epi32 emulated_avx512::add_epi32
#define _mm512_srli_epi16 emulated_avx512::srli_epi16
#define _mm512_madd_epi16 emulated_avx512::madd_epi16
#define _mm512_maddubs_epi16 emulated_avx512::maddubs_epi16
#endif

#if defined(EMULATE_VNNI)
#define __AVX512VNNI__ 1
#define _mm512_dpbusd_epi32 emulated_avx512::dpbusd_epi32
#endif

#if defined(EMULATE_BF16)
#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps emulated_avx512::dpbf16_ps
#endif

// What a library was compiled for, in bits: 1 for AVX-512, 2 for its BW, 4 for its VNNI, 8 for its BF16.
extern "C" __attribute__((weak)) int emulated_avx512_features() {
    int features = 1;
#if defined(__AVX512BW__)
    features |= 2;
#endif
#if defined(__AVX512VNNI__)
    features |= 4;
#endif
#if defined(__AVX512BF16__)
    features |= 8;
#endif
    return features;
}

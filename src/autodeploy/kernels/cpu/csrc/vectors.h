// Vectors of a fixed size on any machine: the compiler's own where registers are that large, else pairs of half the size.
// (Left alone with a vector larger than a register, compilers split it too, but through memory.)

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace autodeploy {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class H>
struct Pair {
    H low, high;
    auto operator[](int i) const {
        constexpr int half = sizeof(H) / sizeof(low[0]);
        return i < half ? low[i] : high[i - half];
    }
};

template <class E, int BYTES, bool IS_NATIVE = BYTES <= REGISTER_BYTES>
struct VectorOf {
    typedef E Type __attribute__((vector_size(BYTES)));
};

template <class E, int BYTES>
struct VectorOf<E, BYTES, false> {
    using Type = Pair<typename VectorOf<E, BYTES / 2>::Type>;
};

// A vector of `N` elements.
template <class E, int N>
using Vector = typename VectorOf<E, N * static_cast<int>(sizeof(E))>::Type;

template <class V>
struct is_pair : std::false_type {};
template <class H>
struct is_pair<Pair<H>> : std::true_type {};

template <class V>
using Element = std::decay_t<decltype(std::declval<const V&>()[0])>;

template <class V>
constexpr int SIZE = sizeof(V) / sizeof(Element<V>);

#define AUTODEPLOY_BINARY(OP)                                                                                        \
    template <class H>                                                                                               \
    inline auto operator OP(Pair<H> a, Pair<H> b) {                                                                  \
        return Pair<decltype(a.low OP b.low)>{a.low OP b.low, a.high OP b.high};                                     \
    }                                                                                                                \
    template <class H>                                                                                               \
    inline auto operator OP(Pair<H> a, Element<H> b) {                                                               \
        return Pair<decltype(a.low OP b)>{a.low OP b, a.high OP b};                                                  \
    }                                                                                                                \
    template <class H>                                                                                               \
    inline auto operator OP(Element<H> a, Pair<H> b) {                                                               \
        return Pair<decltype(a OP b.low)>{a OP b.low, a OP b.high};                                                  \
    }
AUTODEPLOY_BINARY(+)
AUTODEPLOY_BINARY(-)
AUTODEPLOY_BINARY(*)
AUTODEPLOY_BINARY(/)
AUTODEPLOY_BINARY(&)
AUTODEPLOY_BINARY(|)
AUTODEPLOY_BINARY(^)
AUTODEPLOY_BINARY(<<)
AUTODEPLOY_BINARY(>>)
AUTODEPLOY_BINARY(<)
AUTODEPLOY_BINARY(>)
AUTODEPLOY_BINARY(==)
#undef AUTODEPLOY_BINARY

template <class H>
inline Pair<H> operator-(Pair<H> a) {
    return {-a.low, -a.high};
}

template <class H, class B>
inline Pair<H>& operator+=(Pair<H>& a, B b) {
    return a = a + b;
}

// Lane by lane, `a` where the comparison that gave `mask` held, else `b`.
template <class M, class V>
inline V select(M mask, V a, V b) {
    if constexpr (is_pair<V>::value)
        return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
    else
        return mask ? a : b;
}

// The same bits, of another type.
template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    if constexpr (is_pair<To>::value && is_pair<From>::value) {
        return {bit_cast<decltype(To::low)>(from.low), bit_cast<decltype(To::high)>(from.high)};
    } else {
        To to;
        std::memcpy(&to, &from, sizeof(to));
        return to;
    }
}

// The same numbers, of another type of the same size.
template <class To, class From>
inline To convert(From from) {
    if constexpr (is_pair<To>::value)
        return {convert<decltype(To::low)>(from.low), convert<decltype(To::high)>(from.high)};
    else
        return __builtin_convertvector(from, To);
}

// As many elements from memory as a vector has.
template <class V>
inline V load_vector(const Element<V>* from) {
    if constexpr (is_pair<V>::value) {
        return {load_vector<decltype(V::low)>(from), load_vector<decltype(V::high)>(from + SIZE<V> / 2)};
    } else {
        V x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
}

template <class V>
inline void store_vector(Element<V>* to, V x) {
    if constexpr (is_pair<V>::value) {
        store_vector(to, x.low);
        store_vector(to + SIZE<V> / 2, x.high);
    } else {
        std::memcpy(to, &x, sizeof(x));
    }
}

// The same with a change of type on the way: a register of the smaller type would be a part of one only.
template <class V, class E>
inline V load_converted(const E* from) {
    if constexpr (is_pair<V>::value)
        return {load_converted<decltype(V::low)>(from), load_converted<decltype(V::high)>(from + SIZE<V> / 2)};
    // Left alone, compilers convert halves.
#if defined(__AVX512F__)
    else if constexpr (std::is_same_v<E, uint16_t> && std::is_same_v<V, Vector<uint32_t, 16>>)
        return bit_cast<V>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    else if constexpr (std::is_same_v<E, uint16_t> && std::is_same_v<V, Vector<uint32_t, 8>>)
        return bit_cast<V>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
    else
        return convert<V>(load_vector<Vector<E, SIZE<V>>>(from));
}

template <class E, class V>
inline void store_converted(E* to, V x) {
    if constexpr (is_pair<V>::value) {
        store_converted(to, x.low);
        store_converted(to + SIZE<V> / 2, x.high);
#if defined(__AVX512F__)
    } else if constexpr (std::is_same_v<E, uint16_t> && std::is_same_v<V, Vector<uint32_t, 16>>) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bit_cast<__m512i>(x)));
#endif
    } else {
        store_vector(to, convert<Vector<E, SIZE<V>>>(x));
    }
}

}  // namespace autodeploy

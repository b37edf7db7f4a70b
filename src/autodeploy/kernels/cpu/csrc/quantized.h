// Products of whole numbers: activations rounded to int8 in blocks, weights of 8 or 4 bits in tiles of 16 outputs.
//
// A vector of weights holds four inputs of sixteen outputs; it is multiplied with the same four inputs of a row. Sums over a
// block are exact, so that a row gives the same bits in whatever company.

#pragma once

#include <cmath>
#include <utility>

#include "simd.h"

namespace autodeploy {

constexpr int64_t TILE = LANES;  // outputs that lie side by side
constexpr int64_t STEP = 32;     // inputs of a block, which share a scale
constexpr int64_t VECTOR = 64;   // bytes of a vector

// How far ahead weights of 4 bits are asked for: numbers, scales and offsets are streams of their own, each of which
// the hardware's prefetcher follows too late at that rate. One stream of 8 bits it follows better by itself.
constexpr int64_t AHEAD = 2048, SCALES_AHEAD = 256;

using Bytes = Vector<uint8_t, VECTOR>;

// A float16 number.
struct fp16 {
    uint16_t bits;
};

// As `load_halves` below.
inline float to_float(fp16 x) {
    const float magnitude = bit_cast<float>((x.bits & 0x7fffu) << 13) * 0x1p112f;
    return x.bits & 0x8000 ? -magnitude : magnitude;
}

template <class V>
inline V load_halves(const uint16_t* from) {
    if constexpr (is_pair<V>::value) {
        return {load_halves<decltype(V::low)>(from), load_halves<decltype(V::high)>(from + SIZE<V> / 2)};
    } else {
        // Exponent and fraction in the place of a float32's, whose exponent counts from 112 less. No infinities here.
        using W = Vector<uint32_t, SIZE<V>>;
        const W bits = load_converted<W>(from);
        const V magnitude = bit_cast<V>((bits & 0x7fff) << 13) * 0x1p112f;
        return bit_cast<V>(bit_cast<W>(magnitude) | ((bits & 0x8000) << 16));
    }
}

#if defined(__AVX512F__)
template <>
inline Floats load_halves<Floats>(const uint16_t* from) {
    return bit_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
#elif defined(__AVX2__) && defined(__F16C__)
template <>
inline Vector<float, 8> load_halves<Vector<float, 8>>(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

inline Floats load(const fp16* from) { return load_halves<Floats>(reinterpret_cast<const uint16_t*>(from)); }

#if defined(__AVX2__)
// One lane for all by an operation, halves with halves.
template <class Op>
inline int32_t reduce(__m256i x, Op op) {
    __m128i half = op(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = op(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = op(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(half);
}
#endif

// As bits of magnitudes, numbers are in order, infinities come after them and NaNs last.
inline int32_t greatest(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(bit_cast<__m512i>(x));
#elif defined(__AVX2__)
    const __m256i most = _mm256_max_epi32(bit_cast<__m256i>(x.low), bit_cast<__m256i>(x.high));
    return reduce(most, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
#else
    int32_t lanes[LANES], most = 0;
    store_vector(lanes, x);
    for (int i = 0; i < LANES; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
#endif
}

inline int32_t add(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(bit_cast<__m512i>(x));
#elif defined(__AVX2__)
    return reduce(bit_cast<__m256i>(x.low + x.high), [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
#else
    int32_t lanes[LANES], total = 0;
    store_vector(lanes, x);
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
#endif
}

#if defined(__AVX2__)
// The same numbers in 16 bits, where they fit.
inline __m256i to_words(Ints x) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_epi16(bit_cast<__m512i>(x));
#else
    const __m256i words = _mm256_packs_epi32(bit_cast<__m256i>(x.low), bit_cast<__m256i>(x.high));
    return _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
#endif
}
#endif

// Nearest whole numbers, ties to even. (Adding 1.5 · 2^23 would become one operation with the product before it.)
template <class V>
inline Vector<int32_t, SIZE<V>> round(V x) {
    using I = Vector<int32_t, SIZE<V>>;
    if constexpr (is_pair<V>::value) return {round(x.low), round(x.high)};
#if defined(__AVX512F__)
    else return bit_cast<I>(_mm512_cvtps_epi32(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
    else return bit_cast<I>(_mm256_cvtps_epi32(bit_cast<__m256>(x)));
#else
    else {
        I rounded;
        for (int i = 0; i < SIZE<V>; ++i) rounded[i] = static_cast<int32_t>(std::nearbyint(x[i]));
        return rounded;
    }
#endif
}

// How AVX2 multiplies, and AVX-512 without VNNI: weights of 8 bits as pairs of 16 bits; of 4 bits with sums of 16 bits,
// two for an output, of which one counts the first two inputs of each quad and the other the last two.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <int BITS>
constexpr bool IN_PAIRS = BITS == 8;
template <int BITS>
constexpr bool HAS_SHORT_SUMS = BITS == 4;
#else
template <int BITS>
constexpr bool IN_PAIRS = false;
template <int BITS>
constexpr bool HAS_SHORT_SUMS = false;
#endif

// Of lanes in quads the last two of each.
constexpr int32_t LAST_OF_QUADS[LANES] = {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1};


// A block of a row of activations: scale · numbers, and what every output's sum begins with.
template <int BITS>
struct Block {
    std::conditional_t<IN_PAIRS<BITS>, int16_t, int8_t> numbers[STEP];  // in pairs, a quad is in the order 0, 2, 1, 3
    float scale;
    int32_t start;  // - middle · sum of the numbers, so that weights count from their middle; or two such sums
    float sum;      // scale · sum of the numbers, for offsets

    void write(const Ints rounded[2]) {
#if defined(__AVX2__)
        const __m256i words[2] = {to_words(rounded[0]), to_words(rounded[1])};
        auto* to = reinterpret_cast<__m256i*>(numbers);
        if constexpr (IN_PAIRS<BITS>) {
            constexpr int PAIRS = _MM_SHUFFLE(3, 1, 2, 0);
            for (int i = 0; i < 2; ++i)
                _mm256_storeu_si256(to + i, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words[i], PAIRS), PAIRS));
        } else {
            const __m256i bytes = _mm256_packs_epi16(words[0], words[1]);
            _mm256_storeu_si256(to, _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(3, 1, 2, 0)));
        }
#else
        for (int i = 0; i < 2; ++i) store_converted(numbers + i * LANES, rounded[i]);
        if constexpr (IN_PAIRS<BITS>)
            for (int quad = 0; quad < STEP; quad += 4) std::swap(numbers[quad + 1], numbers[quad + 2]);
#endif
    }
};

// Rows of activations by panels of as many rows as are multiplied together, in a panel by blocks. Their sums are to stay
// in registers.
#if defined(__AVX512F__)
constexpr int64_t PANEL = 8;
#else
constexpr int64_t PANEL = 4;
#endif

struct RoundedRows {
    void* all;
    int64_t blocks;  // of STEP inputs in a row, the last filled up with zeros
    int64_t width;   // rows of a panel

    template <int BITS>
    Block<BITS>* at(int64_t row) const {
        return static_cast<Block<BITS>*>(all) + row / width * width * blocks + row % width;
    }

    template <int BITS, class T>
    void round_row(int64_t row, const T* x, int64_t num_inputs, int32_t middle) const {
        Block<BITS>* block = at<BITS>(row);
        for (int64_t first = 0; first < num_inputs; first += STEP, block += width) {
            const int64_t count = num_inputs - first;
            const Floats low = load(x + first, count);
            const Floats high = count > LANES ? load(x + first + LANES, count - LANES) : Floats{};
            const Ints magnitudes[2] = {bit_cast<Ints>(low) & 0x7fffffff, bit_cast<Ints>(high) & 0x7fffffff};
            const int32_t bits = greatest(select(magnitudes[0] > magnitudes[1], magnitudes[0], magnitudes[1]));
            const bool is_finite = bits < 0x7f800000;
            const float largest = bit_cast<float>(bits);
            const float inverse = largest < 1e-30f || !is_finite ? 0.0f : 1.0f / largest * 127.0f;
            const Ints rounded[2] = {is_finite ? round(low * inverse) : Ints{},
                                     is_finite ? round(high * inverse) : Ints{}};
            block->write(rounded);
            const Ints both = rounded[0] + rounded[1];
            const int32_t total = add(both);
            block->scale = is_finite ? largest / 127.0f : __builtin_nanf("");
            block->start = -middle * total;
            block->sum = block->scale * static_cast<float>(total);
            if constexpr (HAS_SHORT_SUMS<BITS>) {
                const int32_t last = add(both & load_vector<Ints>(LAST_OF_QUADS));
                const uint16_t starts[2] = {static_cast<uint16_t>(-middle * (total - last)),
                                            static_cast<uint16_t>(-middle * last)};
                std::memcpy(&block->start, starts, sizeof(block->start));
            }
        }
    }
};

// One tile of 16 outputs: its weights, and its scales and offsets (or null) by group of blocks.
struct Tile {
    const uint8_t* weight;
    const fp16 *scales, *offsets;
    int64_t num_groups, blocks_each;
};

// The whole-number products of a block, 16 outputs of M rows; `weight` is moved on.
#if defined(__AVX512VNNI__)
// Adds to each lane the products of its four bytes with the same four numbers.
inline void add_products(Ints& total, Bytes bytes, const int8_t* four) {
#if defined(AUTODEPLOY_EMULATED)  // in tests, on processors that lack it
    const __m512i numbers = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(four));
    total = bit_cast<Ints>(_mm512_dpbusd_epi32(bit_cast<__m512i>(total), bit_cast<__m512i>(bytes), numbers));
#else
    // Spelled out, as compilers neither fold the broadcast into it nor keep many totals in registers.
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(total)
        : "v"(bytes), "m"(*reinterpret_cast<const int32_t*>(four)));
#endif
}

template <int BITS, int M>
inline void block_products(const uint8_t*& weight, const Block<BITS>* block, Ints whole[M]) {
    // Few rows have registers for several sums that do not wait for each other. One of them may then count sixteenths,
    // so that the upper halves of bytes need no shift.
    constexpr int CHAINS = M == 8 ? 1 : M == 1 && BITS == 8 ? 4 : 2;
    constexpr bool SHIFT_AFTER = BITS == 4 && CHAINS == 2;
    Ints chains[M][CHAINS];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < CHAINS; ++c) chains[m][c] = Ints{} + (c == 0 ? block[m].start : 0);
    for (int quad = 0; quad < 8; quad += 8 / BITS, weight += VECTOR) {
        if constexpr (BITS == 4) __builtin_prefetch(weight + AHEAD);
        const Bytes bytes = load_vector<Bytes>(weight);
        const Bytes upper = SHIFT_AFTER ? bytes & 0xf0 : bit_cast<Bytes>(bit_cast<Words>(bytes) >> 4) & 15;
        const Bytes parts[2] = {BITS == 8 ? bytes : bytes & 15, upper};
        for (int part = 0; part < 8 / BITS; ++part)
            for (int m = 0; m < M; ++m)
                add_products(chains[m][(quad + part) % CHAINS], parts[part], block[m].numbers + 4 * (quad + part));
    }
    for (int m = 0; m < M; ++m) {
        whole[m] = chains[m][0];
        for (int c = 1; c < CHAINS; ++c) whole[m] += SHIFT_AFTER ? chains[m][c] >> 4 : chains[m][c];
    }
}
#elif defined(__AVX2__)
// A register of whole numbers, and the processor's operations on it by their common name.
#if defined(__AVX512BW__)
using Integers = __m512i;
#define AUTODEPLOY_OPERATION(NAME) _mm512_##NAME
#else
using Integers = __m256i;
#define AUTODEPLOY_OPERATION(NAME) _mm256_##NAME
#endif
constexpr int PARTS = VECTOR / sizeof(Integers);  // registers of a vector

inline Integers broadcast(const void* four_bytes) {
    int32_t bits;
    std::memcpy(&bits, four_bytes, sizeof(bits));
    return AUTODEPLOY_OPERATION(set1_epi32)(bits);
}

// Weights in their places of 8 or 16 bits: of two quads the first or the second, or of a quad two inputs or the others.
template <int BITS>
inline Integers weights_of(const uint8_t* from, bool second) {
    Integers bytes;
    std::memcpy(&bytes, from, sizeof(bytes));
    const Integers mask = BITS == 4 ? AUTODEPLOY_OPERATION(set1_epi8)(15) : AUTODEPLOY_OPERATION(set1_epi16)(255);
    if (BITS == 8) return second ? AUTODEPLOY_OPERATION(srli_epi16)(bytes, 8) : bytes & mask;
    return (second ? AUTODEPLOY_OPERATION(srli_epi16)(bytes, 4) : bytes) & mask;
}

// Of 4 bits, a block's products are summed in 16 bits, where they fit: 16 · 15 · 127. Of 8 bits they need 32.
template <int BITS>
inline Integers multiply_weights(Integers weights, Integers x) {
    return BITS == 4 ? AUTODEPLOY_OPERATION(maddubs_epi16)(weights, x) : AUTODEPLOY_OPERATION(madd_epi16)(weights, x);
}

template <int BITS>
inline Integers add_sums(Integers a, Integers b) {
    return BITS == 4 ? AUTODEPLOY_OPERATION(add_epi16)(a, b) : AUTODEPLOY_OPERATION(add_epi32)(a, b);
}

// Sums of 16 bits as one of 32 for each output.
inline Integers joined(Integers sums) {
    return AUTODEPLOY_OPERATION(madd_epi16)(sums, AUTODEPLOY_OPERATION(set1_epi16)(1));
}

// A block's sums for the parts of a tile, which begin with what the block says (STARTS) or with zero.
template <int BITS, int M, bool STARTS>
inline void sums_of_block(const uint8_t*& weight, const Block<BITS>* block, Integers sums[M][PARTS]) {
    if constexpr (STARTS)
        for (int m = 0; m < M; ++m)
            for (int part = 0; part < PARTS; ++part) sums[m][part] = broadcast(&block[m].start);
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; quad += 8 / BITS, weight += VECTOR) {
        if constexpr (BITS == 4) __builtin_prefetch(weight + AHEAD);
        for (int second = 0; second < 2; ++second) {
            Integers weights[PARTS];
            for (int part = 0; part < PARTS; ++part)
                weights[part] = weights_of<BITS>(weight + part * VECTOR / PARTS, second);
            for (int m = 0; m < M; ++m) {
                const Integers x = broadcast(block[m].numbers + 4 * quad + (BITS == 4 ? 4 : 2) * second);
                for (int part = 0; part < PARTS; ++part) {
                    const Integers products = multiply_weights<BITS>(weights[part], x);
                    const bool is_first = !STARTS && quad == 0 && second == 0;
                    sums[m][part] = is_first ? products : add_sums<BITS>(sums[m][part], products);
                }
                // In this order: with more at a time, sums would not stay in registers.
                if constexpr (PARTS == 1)
                    keep_in_register(sums[m][0]);
                else
                    asm("" : "+v"(sums[m][0]), "+v"(sums[m][1]));
            }
        }
    }
}

template <int BITS, int M>
inline void block_products(const uint8_t*& weight, const Block<BITS>* block, Ints whole[M]) {
    Integers sums[M][PARTS];
    sums_of_block<BITS, M, true>(weight, block, sums);
    const auto whole_sum = [](Integers x) { return BITS == 4 ? joined(x) : x; };
    for (int m = 0; m < M; ++m) {
        if constexpr (PARTS == 1) {
            whole[m] = bit_cast<Ints>(whole_sum(sums[m][0]));
        } else {
            using Half = Vector<int32_t, LANES / 2>;
            whole[m] = bit_cast<Ints>(
                Pair<Half>{bit_cast<Half>(whole_sum(sums[m][0])), bit_cast<Half>(whole_sum(sums[m][1]))});
        }
    }
}

#if !defined(__AVX512BW__)
inline __m256 load_half(const fp16* from) {
    return load_halves<Vector<float, 8>>(reinterpret_cast<const uint16_t*>(from));
}

// As `tile_products` below, for sums of 16 bits in few registers. Each block takes its scales by itself: then results, for
// which registers have no place beside the sums, are read and written once.
template <bool OFFSETS, int M>
inline void short_sums_of_tile(const Tile& tile, const Block<4>* block, int64_t width, Floats results[M]) {
    const uint8_t* weight = tile.weight;
    const fp16 *scales = tile.scales, *offsets = tile.offsets;
    alignas(32) float totals[M][2][LANES / 2] = {};
    for (int64_t group = 0; group < tile.num_groups; ++group, scales += TILE) {
        for (int64_t b = 0; b < tile.blocks_each; ++b, block += width) {
            __m256i sums[M][2];
            sums_of_block<4, M, !OFFSETS>(weight, block, sums);
            __builtin_prefetch(scales + SCALES_AHEAD);
            if constexpr (OFFSETS) __builtin_prefetch(offsets + SCALES_AHEAD);
            for (int half = 0; half < 2; ++half) {
                const __m256 scale = load_half(scales + half * TILE / 2);
                const __m256 offset = OFFSETS ? load_half(offsets + half * TILE / 2) : scale;
                for (int m = 0; m < M; ++m) {
                    const __m256 product = _mm256_cvtepi32_ps(joined(sums[m][half])) * _mm256_set1_ps(block[m].scale);
                    __m256 total = product * scale + _mm256_load_ps(totals[m][half]);
                    if constexpr (OFFSETS) total = offset * _mm256_set1_ps(block[m].sum) + total;
                    _mm256_store_ps(totals[m][half], total);
                }
            }
            asm("" ::: "memory");  // or compilers keep results in registers, and sums elsewhere
        }
        if constexpr (OFFSETS) offsets += TILE;
    }
    for (int m = 0; m < M; ++m) results[m] = load(totals[m][0]);
}
#endif
#undef AUTODEPLOY_OPERATION
#else
template <int BITS, int M>
inline void block_products(const uint8_t*& weight, const Block<BITS>* block, Ints whole[M]) {
    int32_t totals[M][LANES];
    for (int m = 0; m < M; ++m)
        for (int o = 0; o < LANES; ++o) totals[m][o] = block[m].start;
    for (int i = 0; i < STEP; ++i) {
        const uint8_t* bytes = weight + i / 4 * BITS / 8 * VECTOR + i % 4;
        const int shift = BITS == 4 && i / 4 % 2 == 1 ? 4 : 0;
        for (int m = 0; m < M; ++m)
            for (int o = 0; o < LANES; ++o)
                totals[m][o] += (bytes[4 * o] >> shift & ((1 << BITS) - 1)) * block[m].numbers[i];
    }
    for (int m = 0; m < M; ++m) whole[m] = load_vector<Ints>(totals[m]);
    weight += BITS * VECTOR;
}
#endif

// results[m] = the products of a tile with row m from `block`, for 16 outputs. By itself, so that its loops have all
// registers: in a larger function, compilers spill addresses that every load waits for.
template <int BITS, bool OFFSETS, int M>
__attribute__((noinline)) void tile_products(const Tile& tile, const Block<BITS>* block, int64_t width, Floats results[M]) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVX512BW__)
    if constexpr (BITS == 4) return short_sums_of_tile<OFFSETS, M>(tile, block, width, results);
#endif
    const uint8_t* weight = tile.weight;
    const fp16 *scales = tile.scales, *offsets = tile.offsets;
    const int64_t num_groups = tile.num_groups, blocks_each = tile.blocks_each;
    Floats totals[M] = {};
    for (int64_t group = 0; group < num_groups; ++group) {
        Floats products[M] = {}, sums[M] = {};
        for (int64_t b = 0; b < blocks_each; ++b, block += width) {
            Ints whole[M];
            block_products<BITS, M>(weight, block, whole);
            for (int m = 0; m < M; ++m) {
                products[m] += convert<Floats>(whole[m]) * block[m].scale;
                if constexpr (OFFSETS) sums[m] += block[m].sum;
            }
        }
        if constexpr (BITS == 4) __builtin_prefetch(scales + group * TILE + SCALES_AHEAD);
        const Floats scale = load(scales + group * TILE);
        for (int m = 0; m < M; ++m) totals[m] += products[m] * scale;
        if constexpr (OFFSETS) {
            if constexpr (BITS == 4) __builtin_prefetch(offsets + group * TILE + SCALES_AHEAD);
            const Floats offset = load(offsets + group * TILE);
            for (int m = 0; m < M; ++m) totals[m] += offset * sums[m];
        }
    }
    for (int m = 0; m < M; ++m) results[m] = totals[m];
}

}  // namespace autodeploy

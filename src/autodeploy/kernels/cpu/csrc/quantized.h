// Products of whole numbers: activations rounded to int8 in blocks, weights of 8 or 4 bits in tiles of 16 outputs.
//
// A vector of weights holds four inputs of sixteen outputs; it is multiplied with the same four inputs of a row. Sums over a
// block are exact, so that a row gives the same bits in whatever company.

#pragma once

#include <cmath>

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

// As bits of magnitudes, numbers are in order, infinities come after them and NaNs last.
inline int32_t greatest(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(bit_cast<__m512i>(x));
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
#else
    int32_t lanes[LANES], total = 0;
    store_vector(lanes, x);
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
#endif
}

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

// A block of a row of activations: scale · numbers, and what every output's sum begins with.
struct Block {
    int8_t numbers[STEP];
    float scale;
    int32_t start;  // - middle · sum of the numbers, so that weights count from their middle
    float sum;      // scale · sum of the numbers, for offsets
    int32_t total;  // sum of the numbers
};

// Rows of activations by panels of up to PANEL rows, in a panel by blocks: rows that are multiplied together lie together.
constexpr int64_t PANEL = 8;

struct RoundedRows {
    Block* all;
    int64_t blocks;  // of STEP inputs in a row, the last filled up with zeros
    int64_t width;   // rows of a panel

    Block* at(int64_t row) const { return all + row / width * width * blocks + row % width; }

    template <class T>
    void round_row(int64_t row, const T* x, int64_t num_inputs, int32_t middle) const {
        Block* block = at(row);
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
            for (int i = 0; i < 2; ++i) store_converted(block->numbers + i * LANES, rounded[i]);
            const int32_t total = add(rounded[0] + rounded[1]);
            block->scale = is_finite ? largest / 127.0f : __builtin_nanf("");
            block->start = -middle * total;
            block->sum = block->scale * static_cast<float>(total);
            block->total = total;
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
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// What blocks of many rows have besides numbers is loaded when it is used, not before, when sums need the registers.
template <int M>
inline void forget_memory() {
    if constexpr (M >= 4) asm("" ::: "memory");
}

// sum += weights · the four inputs at `inputs`, by pairs, in 16 bits. Spelled out, as compilers load all inputs of a block
// first, and then have no registers left for sums.
inline void add_products(__m256i& sum, __m256i weights, const int8_t* inputs) {
    __m256i products;
    asm("vpbroadcastd %2, %1\n\tvpmaddubsw %1, %3, %1\n\tvpaddw %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "m"(*reinterpret_cast<const int32_t*>(inputs)), "x"(weights));
}

// Eight outputs of M rows. A block's products with 4 bits are summed in 16 bits, where they fit: 16 · 15 · 127.
template <int M>
inline void half_products_4(const uint8_t* weight, const Block* block, __m256i totals[M]) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_si256();
    for (int quad = 0; quad < 8; quad += 2, weight += VECTOR) {
        __builtin_prefetch(weight + AHEAD);
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
        const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        for (int m = 0; m < M; ++m) {
            add_products(sums[m], low, block[m].numbers + 4 * quad);
            add_products(sums[m], high, block[m].numbers + 4 * quad + 4);
        }
    }
    forget_memory<M>();
    for (int m = 0; m < M; ++m)
        totals[m] = _mm256_add_epi32(_mm256_madd_epi16(sums[m], ones), _mm256_set1_epi32(block[m].start));
}

// The same for weights of 8 bits, of which two products fit in 16 once weights count from their middle. One factor must
// have no sign: the weights' signs go to the inputs.
inline void add_products(__m256i& sum, __m256i centred, __m256i magnitudes, __m256i ones, const int8_t* inputs) {
    __m256i products;
    asm("vpbroadcastd %2, %1\n\tvpsignb %3, %1, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\t"
        "vpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "m"(*reinterpret_cast<const int32_t*>(inputs)), "x"(centred), "x"(magnitudes), "x"(ones));
}

template <int M>
inline void half_products_8(const uint8_t* weight, const Block* block, __m256i totals[M]) {
    const __m256i middle = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
    __m256i sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm256_set1_epi32(block[m].start + 128 * block[m].total);
    for (int quad = 0; quad < 8; ++quad, weight += VECTOR) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
        const __m256i centred = _mm256_xor_si256(bytes, middle), magnitudes = _mm256_abs_epi8(centred);
        for (int m = 0; m < M; ++m)
            add_products(sums[m], centred, magnitudes, ones, block[m].numbers + 4 * quad);
    }
    for (int m = 0; m < M; ++m) totals[m] = sums[m];
}

// products[m] = or += the products of a block with row m, 16 outputs; `weight` is moved on.
template <int BITS, bool ADD, int M>
inline void block_products(const uint8_t*& weight, const Block* block, Floats products[M]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m256i totals[M];
        if constexpr (BITS == 4)
            half_products_4<M>(weight + half * VECTOR / 2, block, totals);
        else
            half_products_8<M>(weight + half * VECTOR / 2, block, totals);
        forget_memory<M>();
        for (int m = 0; m < M; ++m) {
            __m256& product = reinterpret_cast<__m256*>(products + m)[half];
            const __m256 scaled = _mm256_cvtepi32_ps(totals[m]) * _mm256_set1_ps(block[m].scale);
            product = ADD ? product + scaled : scaled;
        }
    }
    weight += BITS * VECTOR;
}
#else
#if defined(__AVX512VNNI__)
template <int BITS, int M>
inline void whole_products(const uint8_t*& weight, const Block* block, Ints whole[M]) {
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
                // Spelled out, as compilers neither fold the broadcast into it nor keep many totals in registers.
                asm("vpdpbusd %2%{1to16%}, %1, %0"
                    : "+v"(chains[m][(quad + part) % CHAINS])
                    : "v"(parts[part]), "m"(*reinterpret_cast<const int32_t*>(block[m].numbers + 4 * (quad + part))));
    }
    for (int m = 0; m < M; ++m) {
        whole[m] = chains[m][0];
        for (int c = 1; c < CHAINS; ++c) whole[m] += SHIFT_AFTER ? chains[m][c] >> 4 : chains[m][c];
    }
}
#else
template <int BITS, int M>
inline void whole_products(const uint8_t*& weight, const Block* block, Ints whole[M]) {
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

template <int BITS, bool ADD, int M>
inline void block_products(const uint8_t*& weight, const Block* block, Floats products[M]) {
    Ints whole[M];
    whole_products<BITS, M>(weight, block, whole);
    for (int m = 0; m < M; ++m) {
        const Floats scaled = convert<Floats>(whole[m]) * block[m].scale;
        products[m] = ADD ? products[m] + scaled : scaled;
    }
}
#endif

// results[m] = the products of a tile with row m from `block`, for 16 outputs. By itself, so that its loops have all
// registers: in a larger function, compilers spill addresses that every load waits for.
template <int BITS, bool OFFSETS, int M>
__attribute__((noinline)) void tile_products(const Tile& tile, const Block* block, int64_t width, Floats results[M]) {
    const uint8_t* weight = tile.weight;
    const fp16 *scales = tile.scales, *offsets = tile.offsets;
    const int64_t num_groups = tile.num_groups, blocks_each = tile.blocks_each;
    Floats totals[M] = {};
    for (int64_t group = 0; group < num_groups; ++group) {
        Floats products[M];
        float sums[M];
        block_products<BITS, false, M>(weight, block, products);
        for (int m = 0; m < M; ++m) sums[m] = block[m].sum;
        block += width;
        for (int64_t b = 1; b < blocks_each; ++b, block += width) {
            block_products<BITS, true, M>(weight, block, products);
            for (int m = 0; m < M; ++m) sums[m] += block[m].sum;
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

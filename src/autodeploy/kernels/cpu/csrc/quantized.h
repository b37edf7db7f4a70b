// Products of whole numbers: activations rounded to int8 in blocks, weights of 8 or 4 bits in tiles of 16 outputs.
//
// A vector of weights holds four inputs of sixteen outputs; it is multiplied with the same four inputs of a row. Sums over a
// block are exact, so that a row gives the same bits in whatever company.

#pragma once

#include <cmath>

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace autodeploy {

constexpr int64_t TILE = LANES;  // outputs that lie side by side
constexpr int64_t STEP = 32;     // inputs of a block, which share a scale
constexpr int64_t VECTOR = 64;   // bytes of a vector

// How far ahead weights of 4 bits are asked for: numbers, scales and offsets are streams of their own, each of which
// the hardware's prefetcher follows too late at that rate. One stream of 8 bits it follows better by itself.
constexpr int64_t AHEAD = 2048, SCALES_AHEAD = 256;

typedef uint8_t Bytes __attribute__((vector_size(VECTOR)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

// A float16 number.
struct fp16 {
    uint16_t bits;
};

inline Floats load(const fp16* from) {
    Halves x;
    std::memcpy(&x, from, sizeof(x));
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(x)));
#else
    // Exponent and fraction in the place of a float32's, whose exponent counts from 112 less. No infinities here.
    const Words bits = __builtin_convertvector(x, Words);
    const Floats magnitude = bit_cast<Floats>((bits & 0x7fff) << 13) * 0x1p112f;
    return bit_cast<Floats>(bit_cast<Words>(magnitude) | ((bits & 0x8000) << 16));
#endif
}

inline Bytes load_bytes(const uint8_t* from) {
    Bytes x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

// As bits of magnitudes, numbers are in order, infinities come after them and NaNs last.
inline uint32_t greatest(Words x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epu32(bit_cast<__m512i>(x));
#else
    uint32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

inline int32_t add(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32(bit_cast<__m512i>(x));
#else
    int32_t total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
#endif
}

// Nearest whole numbers, ties to even.
inline Ints round(Floats x) {
#if defined(__AVX512F__)
    return bit_cast<Ints>(_mm512_cvtps_epi32(bit_cast<__m512>(x)));
#else
    float lanes[LANES];
    int32_t rounded[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; ++i) rounded[i] = static_cast<int32_t>(std::nearbyint(lanes[i]));
    Ints result;
    std::memcpy(&result, rounded, sizeof(result));
    return result;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Eight sums of products of four. Products of two would exceed 16 bits, so the weights go in as two halves of 4 bits.
inline __m256i multiply_add_half(__m256i total, __m256i weights, __m256i four) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    const __m256i low = _mm256_and_si256(weights, mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(weights, 4), mask);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(low, four), ones));
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(high, four), sixteens));
}
#endif

// total[o] + the products of output o's four weights with `four` inputs.
inline Ints multiply_add(Ints total, Bytes weights, const int8_t* four) {
#if defined(__AVX512VNNI__)
    // Spelled out, as compilers neither fold the broadcast into it nor keep many totals in registers.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(weights), "m"(*reinterpret_cast<const int32_t*>(four)));
    return total;
#elif defined(__AVX2__)
    int32_t inputs;
    std::memcpy(&inputs, four, sizeof(inputs));
    __m256i halves[2], bytes[2];
    std::memcpy(halves, &total, sizeof(halves));
    std::memcpy(bytes, &weights, sizeof(bytes));
    for (int i = 0; i < 2; ++i) halves[i] = multiply_add_half(halves[i], bytes[i], _mm256_set1_epi32(inputs));
    std::memcpy(&total, halves, sizeof(total));
    return total;
#else
    for (int o = 0; o < LANES; ++o)
        for (int i = 0; i < 4; ++i) total[o] += static_cast<int32_t>(weights[4 * o + i]) * four[i];
    return total;
#endif
}

// A block of a row of activations: scale · numbers, and what every output's sum begins with.
struct Block {
    int8_t numbers[STEP];
    float scale;
    int32_t start;  // - middle · sum of the numbers, so that weights count from their middle
    float sum;      // scale · sum of the numbers, for offsets
    int32_t unused;
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
            const Words magnitudes[2] = {bit_cast<Words>(low) & 0x7fffffff, bit_cast<Words>(high) & 0x7fffffff};
            const uint32_t bits = greatest(magnitudes[0] > magnitudes[1] ? magnitudes[0] : magnitudes[1]);
            const bool is_finite = bits < 0x7f800000;
            const float largest = bit_cast<float>(bits);
            const float inverse = largest < 1e-30f || !is_finite ? 0.0f : 1.0f / largest * 127.0f;
            const Ints rounded[2] = {is_finite ? round(low * inverse) : Ints{},
                                     is_finite ? round(high * inverse) : Ints{}};
            for (int i = 0; i < 2; ++i) {
                const SignedBytes bytes = __builtin_convertvector(rounded[i], SignedBytes);
                std::memcpy(block->numbers + i * LANES, &bytes, sizeof(bytes));
            }
            const int32_t total = add(rounded[0] + rounded[1]);
            block->scale = is_finite ? largest / 127.0f : __builtin_nanf("");
            block->start = -middle * total;
            block->sum = block->scale * static_cast<float>(total);
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
template <int BITS, int M>
inline void block_products(const uint8_t*& weight, const Block* block, Ints whole[M]) {
    // Few rows have registers for several sums that do not wait for each other. One of them may then count sixteenths,
    // so that the upper halves of bytes need no shift.
    constexpr int CHAINS = M == 8 ? 1 : M == 1 && BITS == 8 ? 4 : 2;
    constexpr bool SHIFT_AFTER = BITS == 4 && CHAINS == 2;
    Ints chains[M][CHAINS];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < CHAINS; ++c) chains[m][c] = Ints{} + (c == 0 ? block[m].start : 0);
    for (int quad = 0; quad < 8; quad += 8 / BITS, weight += VECTOR) {
        if constexpr (BITS == 4) __builtin_prefetch(weight + AHEAD);
        const Bytes bytes = load_bytes(weight);
        const Bytes upper = SHIFT_AFTER ? bytes & 0xf0 : bit_cast<Bytes>(bit_cast<Words>(bytes) >> 4) & 15;
        const Bytes parts[2] = {BITS == 8 ? bytes : bytes & 15, upper};
        for (int part = 0; part < 8 / BITS; ++part)
            for (int m = 0; m < M; ++m) {
                Ints& chain = chains[m][(quad + part) % CHAINS];
                chain = multiply_add(chain, parts[part], block[m].numbers + 4 * (quad + part));
            }
    }
    for (int m = 0; m < M; ++m) {
        whole[m] = chains[m][0];
        for (int c = 1; c < CHAINS; ++c) whole[m] += SHIFT_AFTER ? chains[m][c] >> 4 : chains[m][c];
    }
}

// results[m] = the products of a tile with row m from `block`, for 16 outputs. By itself, so that its loops have all
// registers: in a larger function, compilers spill addresses that every load waits for.
template <int BITS, bool OFFSETS, int M>
__attribute__((noinline)) void tile_products(const Tile& tile, const Block* block, int64_t width, Floats results[M]) {
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
                products[m] += __builtin_convertvector(whole[m], Floats) * block[m].scale;
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
